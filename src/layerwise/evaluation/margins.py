"""How good plans are for many questions; what is known is kept in files that a stopped run goes on from."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.data import complete_lines
from layerwise.data.short_answers import Question
from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.model.fingerprint import digest_of, fingerprint
from layerwise.plan import Plan
from layerwise.search.evaluator import PathEvaluator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAID_EVERY = 10.0  # seconds between lines of progress


@dataclass
class Kept:
    """Files in `folder` with what earlier runs found out, and how many of this run's answers came from them.

    They are named after the model's weights, its bridges and what was asked, not after the code that answered: with
    `fresh` nothing is taken from them, and what is found out takes the place of what they held.
    """

    folder: Path
    fresh: bool = False
    reused: int = 0


def plan_margins(
    model: LayerwiseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    plans: Sequence[Sequence[Plan]],
    kept: Kept,
    notify: Callable[[str], None] = lambda line: None,
) -> list[list[float]]:
    """The margin of the right answer, in nats, positive if it is given, of each question along its plans.

    Answers that are generated must be what the model writes; see `PathEvaluator`.

    Args:
        plans: of each question, any number.
        kept: what is known is in a file, a line for each question and the plans that were new to it.
        notify: gets a line of progress every few seconds.
    """
    file = _file(kept.folder, "margins", model, [])
    known: dict[str, dict[str, float]] = defaultdict(dict)
    for key, found in complete_lines(file):  # later lines are newer
        known[key] |= {} if kept.fresh else found
    keys = [short_digest([one.task, one.prompt, one.answer, one.choices]) for one in questions]
    pairs = list(zip(keys, plans, strict=True))
    new = [[plan for plan in dict.fromkeys(own) if str(plan) not in known[key]] for key, own in pairs]
    kept.reused += sum(len(set(own)) - len(those) for (_, own), those in zip(pairs, new, strict=True))
    left = [at for at, those in enumerate(new) if those]
    with file.open("a", encoding="utf-8") as out:
        for at in _announced(left, "questions scored", notify):
            margins = PathEvaluator(model, tokenizer, questions[at], written=True).margins(new[at])
            found = dict(zip(map(str, new[at]), margins, strict=True))
            known[keys[at]] |= found
            out.write(json.dumps([keys[at], found]) + "\n")
            out.flush()
    return [[known[key][str(plan)] for plan in own] for key, own in pairs]


def kept_lines(
    kept: Kept,
    name: str,
    model: LayerwiseForCausalLM,
    asked: Sequence[Any],
    compute: Callable[[int], list[Any]],
    doing: str,
    notify: Callable[[str], None],
) -> list[list[Any]]:
    """The answers `compute(i)` for each of `asked`, a line of JSON each in a file named after the model and `asked`.

    A run that was stopped goes on after its last complete line.
    """
    file = _file(kept.folder, name, model, asked)
    known = [] if kept.fresh else complete_lines(file)
    kept.reused += sum(map(len, known))
    with file.open("w" if kept.fresh else "a", encoding="utf-8") as out:
        for number in _announced(range(len(known), len(asked)), doing, notify):
            known.append(compute(number))
            out.write(json.dumps(known[-1]) + "\n")
            out.flush()
    return known


def _file(folder: Path, name: str, model: LayerwiseForCausalLM, about: Any) -> Path:
    """The file in `folder` for what depends on the model and on `about`."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone = model.runtime.backbone
    kept_of = [fingerprint(backbone.model, adapted=True), str(backbone.dtype), about]
    kept_of += [digest_of(backbone.bridges)] if backbone.bridges else []
    return folder / f"{name}-{short_digest(kept_of)}.jsonl"


def short_digest(value: Any) -> str:
    """A name for what JSON can write."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _announced(numbers: Sequence[int], doing: str, notify: Callable[[str], None]) -> Iterator[int]:
    """`numbers`, with a line of progress every few seconds and after the last."""
    began = said = time.perf_counter()
    for done, number in enumerate(numbers, 1):
        yield number
        now = time.perf_counter()
        if now - said > SAID_EVERY or done == len(numbers):
            left = (now - began) / done * (len(numbers) - done)
            notify(f"{done} of {len(numbers)} {doing} ({left / 60:.0f} min left)")
            said = now
