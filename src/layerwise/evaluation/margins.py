"""How good plans are for many questions, in a file that a stopped run goes on from."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    about = json.dumps([fingerprint(model.runtime.backbone.model), str(model.runtime.backbone.dtype), asked])
    file = folder / f"margins-{hashlib.sha256(about.encode()).hexdigest()[:12]}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    known = _complete_lines(file)
    first = len(known)
    began = said = time.perf_counter()
    with file.open("a", encoding="utf-8") as out:
        for done, (question, own) in enumerate(zip(questions[first:], plans[first:], strict=True), first + 1):
            known.append(PathEvaluator(model, tokenizer, question).margins(own))
            out.write(json.dumps(known[-1]) + "\n")
            out.flush()
            now = time.perf_counter()
            if now - said > SAID_EVERY or done == len(questions):
                left = (now - began) / (done - first) * (len(questions) - done)
                notify(f"plans scored for {done} of {len(questions)} questions ({left / 60:.0f} min left)")
                said = now
    return known


def _complete_lines(file: Path) -> list[list[float]]:
    """What a stopped run wrote; the last line is cut off the file if it was not finished."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]
