"""Whether a plan's answer to a question is right.

Options are compared by their log-likelihoods; numbers have to be written: the model generates, greedily, and
`Question.accepts` reads what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from layerwise.data.short_answers import Question
from layerwise.evaluation.margins import Kept, kept_lines, plan_margins
from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 32  # answers written at once


def verdicts(
    model: LayerwiseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    plans: Sequence[Sequence[Plan]],
    kept: Kept,
    notify: Callable[[str], None] = lambda line: None,
) -> list[dict[Plan, bool]]:
    """For each question, which of its plans answer rightly. Arguments as in `plan_margins`; files are kept likewise."""
    unique = [tuple(dict.fromkeys(own)) for own in plans]
    found: list[dict[Plan, bool]] = [{} for _ in questions]
    compared = [at for at, one in enumerate(questions) if not one.generated]
    own = [unique[at] for at in compared]
    margins = plan_margins(model, tokenizer, [questions[at] for at in compared], own, kept, notify)
    for at, those in zip(compared, margins, strict=True):
        found[at] = {plan: margin > 0 for plan, margin in zip(unique[at], those, strict=True)}
    # Rows of one plan share every call, rows of one length need no padding.
    asked = [(at, plan) for at, one in enumerate(questions) if one.generated for plan in unique[at]]
    asked.sort(key=lambda pair: (str(pair[1]), len(questions[pair[0]].prompt)))
    batches = [asked[at : at + ROWS] for at in range(0, len(asked), ROWS)]
    about = [[[questions[at].prompt, questions[at].choices, str(plan)] for at, plan in batch] for batch in batches]

    def compute(number: int) -> list[bool]:
        batch = batches[number]
        return written(model, tokenizer, [questions[at] for at, _ in batch], [plan for _, plan in batch])

    lines = kept_lines(kept, "written", model, about, compute, "batches of answers written", notify)
    for batch, right in zip(batches, lines, strict=True):
        for (at, plan), one in zip(batch, right, strict=True):
            found[at][plan] = one
    return found


def written(
    model: LayerwiseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    plans: Sequence[Plan],
) -> list[bool]:
    """Whether the greedy answer to each question, along its plan, is accepted."""
    prompts = [cast(Any, tokenizer(one.prompt))["input_ids"] for one in questions]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    choices = [choice for one in questions for choice in one.choices]
    longest = max(map(len, cast(Any, tokenizer(choices, add_special_tokens=False))["input_ids"]))
    made = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        plans=list(plans),
        max_new_tokens=longest + 1,
        do_sample=False,
        draft="off",
    )
    texts = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
    return [one.accepts(text) for one, text in zip(questions, texts, strict=True)]
