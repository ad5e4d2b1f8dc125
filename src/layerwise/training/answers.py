"""A model's own greedy answers to prompts: what a draft that leaves the model untouched is taught with.

A draft is right when it says what the model will say, not what a reference says. So the frozen recipe is taught on the
model's own text (as in Kangaroo, arXiv 2404.18911, and EAGLE, arXiv 2401.15077), written here in batches: prompts of
similar length together, a row leaves its batch when it has ended. Each finished batch is appended to the file, so a run
that was stopped, even in the middle of a line, goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerwise.data import Example, complete_lines, prompt_ids
from layerwise.decoding.text import end_tokens
from layerwise.model.cache import Cache
from layerwise.model.fingerprint import fingerprint
from layerwise.model.packing import last_of, padded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerwise.model.causal_lm import LayerwiseForCausalLM


@torch.no_grad()
def greedy_answers(
    model: LayerwiseForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Sequence[int]
) -> list[list[int]]:
    """The greedy continuation of each prompt, up to and with the first token of `ends`, by the model's own plan."""
    runtime, (plan, *_) = model.runtime, model.row_plans(1)
    tokens, counts = padded(prompts)
    live, answers = list(range(len(prompts))), [[] for _ in prompts]
    cache = Cache(len(prompts), max(counts) + max_new_tokens)
    hidden = runtime.forward(model.embed(tokens), [plan] * len(live), counts, cache)
    hidden = last_of(hidden, counts)
    while True:
        chosen = runtime.logits(hidden, [plan] * len(live))[:, -1].argmax(-1).tolist()
        for row, token in zip(live, chosen, strict=True):
            answers[row].append(token)
        going = [at for at, token in enumerate(chosen) if token not in ends]
        if not going or len(answers[live[0]]) == max_new_tokens:
            return answers
        if len(going) < len(live):
            cache.select(going)
            live = [live[at] for at in going]
        step = model.embed(torch.tensor([[chosen[at]] for at in going]))
        hidden = runtime.forward(step, [plan] * len(live), None, cache)


def write_answers(
    model: LayerwiseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    out: Path,
    max_new_tokens: int = 160,
    rows: int = 32,
) -> Iterator[int]:
    """Append (prompt, answer) token ids as JSON lines to `out`; yields how many prompts are done.

    Prompts that the file holds already are passed over. What wrote the answers is kept beside it, in a file whose name
    ends in .json.

    Raises:
        ValueError: `out` holds answers of another model, to other prompts, or with other options; names them.
    """
    prompts = [prompt_ids(one, tokenizer) for one in examples]
    about = {
        "set of prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
        "model": fingerprint(model.runtime.backbone.model, adapted=True),
        "policy": model.policy.to_dict(),
        "precision": str(model.runtime.backbone.dtype),
        "max-new-tokens": max_new_tokens,
    }
    done = _done(out, prompts, about)
    pending = sorted((p for p in enumerate(prompts) if p[0] not in done), key=lambda p: len(p[1]))
    if not pending:
        return
    model.runtime.engine.prepare(model.row_plans(1), few=True)
    finished = len(done)
    with out.open("a", encoding="utf-8") as file:
        for at in range(0, len(pending), rows):
            batch = pending[at : at + rows]
            answers = greedy_answers(model, [ids for _, ids in batch], max_new_tokens, end_tokens(model))
            for (number, ids), answer in zip(batch, answers, strict=True):
                file.write(
                    json.dumps({"id": number, "kind": examples[number].kind, "prompt": ids, "answer": answer}) + "\n"
                )
            file.flush()
            finished += len(batch)
            yield finished


def _done(out: Path, prompts: list[list[int]], about: dict[str, Any]) -> set[int]:
    """The places of the prompts that `out` answers, if `about` wrote it; else see `write_answers`."""
    answers, beside, text = complete_lines(out), out.with_suffix(".json"), json.dumps(about)
    about = saved = json.loads(text)
    if answers and beside.is_file():
        saved = json.loads(beside.read_text(encoding="utf-8"))
    elif any(prompts[one["id"] : one["id"] + 1] != [one["prompt"]] for one in answers):
        saved = {**about, "set of prompts": None}  # written by an earlier version, which kept nothing beside them
    other = [name for name, value in about.items() if saved.get(name) != value]
    if other:
        raise ValueError(
            f"'{out}' was written with another {' and another '.join(other)}: use the same, or give another folder"
        )
    beside.write_text(text + "\n", encoding="utf-8")
    return {one["id"] for one in answers}
