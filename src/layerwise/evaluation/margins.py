"""How good plans are for many questions; what is known is kept in files that a stopped run goes on from."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.data.short_answers import Question
from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.model.fingerprint import fingerprint
from layerwise.plan import Plan
from layerwise.search.evaluator import PathEvaluator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAID_EVERY = 10.0  # seconds between lines of progress


def plan_margins(
    model: LayerwiseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    plans: Sequence[Sequence[Plan]],
    folder: Path,
    notify: Callable[[str], None] = lambda line: None,
) -> list[list[float]]:
    """The margin of the right choice, in nats (positive if it is the likeliest), of each question along its plans.

    Args:
        plans: of each question, any number.
        folder: keeps what is known, a line a question; the file's name is made of all that margins depend on.
        notify: gets a line of progress every few seconds.
    """
    asked = [
        [one.task, one.id, one.prompt, one.answer, one.choices, [str(plan) for plan in own]]
        for one, own in zip(questions, plans, strict=True)
    ]

    def compute(number: int) -> list[float]:
        return PathEvaluator(model, tokenizer, questions[number]).margins(plans[number])

    return kept_lines(folder, "margins", model, asked, compute, "questions scored", notify)


def kept_lines(
    folder: Path,
    name: str,
    model: LayerwiseForCausalLM,
    asked: Sequence[Any],
    compute: Callable[[int], Any],
    doing: str,
    notify: Callable[[str], None],
) -> list[Any]:
    """`compute(i)` for each of `asked`, a line of JSON each in a file whose name is made of the model and of `asked`.

    A run that was stopped goes on after its last complete line.
    """
    about = json.dumps([fingerprint(model.runtime.backbone.model), str(model.runtime.backbone.dtype), asked])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{hashlib.sha256(about.encode()).hexdigest()[:12]}.jsonl"
    known = _complete_lines(file)
    first = len(known)
    began = said = time.perf_counter()
    with file.open("a", encoding="utf-8") as out:
        for number in range(first, len(asked)):
            known.append(compute(number))
            out.write(json.dumps(known[-1]) + "\n")
            out.flush()
            done, now = number + 1, time.perf_counter()
            if now - said > SAID_EVERY or done == len(asked):
                left = (now - began) / (done - first) * (len(asked) - done)
                notify(f"{done} of {len(asked)} {doing} ({left / 60:.0f} min left)")
                said = now
    return known


def _complete_lines(file: Path) -> list[Any]:
    """What a stopped run wrote; the last line is cut off the file if it was not finished."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]
