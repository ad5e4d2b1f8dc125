"""How much of the time that skipped layers promise is really saved.

Whole `generate` calls on the same prompts, with all layers and with the policy deciding, take turns; medians of each
prompt are added up. What could be saved at best follows from the cost of the plans: the prompt is bound by operations,
decoding by the bytes read, and the LM head is in both.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import torch

from layerwise.benchmarks.environment import environment
from layerwise.benchmarks.timing import Stopwatch, rounds
from layerwise.cost import ideal_speedup, prefill_cost
from layerwise.data.short_answers import Question
from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = 48
NEW_TOKENS = 24


@dataclass(frozen=True)
class _Times:
    """Seconds of one prompt: reading it, and decoding what follows the first token."""

    prompt: float
    decoding: float


def timing(
    model: LayerwiseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    plans: Sequence[Plan],
    count: int,
    seed: int,
    notify: Callable[[str], None],
) -> dict[str, Any]:
    """Measure PROMPTS of the questions, whose plans were decided before, in `count` rounds.

    Returns:
        `realised`, the time saved as a share of what could be saved at best, None if no timed plan saves a layer; and
        the seconds it is made of. If `load`, the load average before, is above `cpus`, others took part of the time.
    """
    load = os.getloadavg()[0]
    picked = random.Random(seed).sample(range(len(asked)), min(PROMPTS, len(asked)))
    full, shape = Plan.full(model.depth), model.runtime.backbone.shape
    sums = {name: [0.0, 0.0] for name in ("full", "routed", "ideal")}
    saved = 1 - sum(plans[at].depth for at in picked) / len(picked) / full.depth
    model.prepare()
    for number, at in enumerate(picked):
        ids = torch.tensor([cast(Any, tokenizer(asked[at].prompt))["input_ids"]], device=model.device)
        contenders = {"full": lambda ids=ids: _timed(model, ids, full), "routed": lambda ids=ids: _timed(model, ids)}
        for run in contenders.values():
            run()
        taken: dict[str, list[_Times]] = {name: [] for name in contenders}
        for _, name, times in rounds(contenders, count):
            taken[name].append(times)
        medians = {
            name: (median(one.prompt for one in those), median(one.decoding for one in those))
            for name, those in taken.items()
        }
        width = ids.shape[1]
        operations = prefill_cost(shape, plans[at], width).flops / prefill_cost(shape, full, width).flops
        bytes_read = 1 / ideal_speedup(shape, plans[at], width + NEW_TOKENS // 2)
        medians["ideal"] = (medians["full"][0] * operations, medians["full"][1] * bytes_read)
        for name, pair in medians.items():
            sums[name] = [total + seconds for total, seconds in zip(sums[name], pair, strict=True)]
        notify(f"timed {number + 1} of {len(picked)} prompts")
    return {
        "realised": _realised(sums, slice(None)),
        "realised_prompt": _realised(sums, slice(0, 1)),
        "realised_decoding": _realised(sums, slice(1, 2)),
        "layers_saved": saved,
        "time_saved": 1 - sum(sums["routed"]) / sum(sums["full"]),
        "seconds": {name: dict(zip(("prompt", "decoding"), pair, strict=True)) for name, pair in sums.items()},
        "prompts": len(picked),
        "new_tokens": NEW_TOKENS,
        "rounds": count,
        "engine": model.runtime.engine.name,
        "load": load,
        "environment": environment(),
        "cpus": os.cpu_count(),
    }


def _realised(sums: dict[str, list[float]], part: slice) -> float | None:
    """Time saved, as a share of what could be; None if nothing could be."""
    full, routed, ideal = (sum(sums[name][part]) for name in ("full", "routed", "ideal"))
    return (full - routed) / (full - ideal) if ideal < full else None


def _timed(model: LayerwiseForCausalLM, ids: torch.Tensor, plan: Plan | None = None) -> _Times:
    """One greedy call; with `plan`, instead of what the policy decides."""
    watch = Stopwatch()
    options: dict[str, Any] = {} if plan is None else {"plans": [plan]}
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        eos_token_id=model.config.vocab_size,  # no token: what is timed is a step, however early the answer ends
        do_sample=False,
        draft="off",
        streamer=watch,
        **options,
    )
    return _Times(watch.times[1] - watch.began, watch.times[-1] - watch.times[1])
