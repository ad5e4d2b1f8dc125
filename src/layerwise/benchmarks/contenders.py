"""Decoding one prompt with layerwise or with another library, by the same weights and the same clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from layerwise.benchmarks.timing import Stopwatch
from layerwise.trace import Trace

HF_EXITS = (4, 8, 16)
ECONOMIZE_CYCLES = (4, 8)  # tokens that its lookup drafts at once


class Run:
    """One greedy call: its tokens, the time from the first to the last, and of the whole call."""

    def __init__(self, tokens: list[int], watch: Stopwatch, trace: Trace | None) -> None:
        self.tokens = tokens
        self.decoding = watch.times[-1] - watch.times[1]
        self.whole = watch.total
        self.trace = trace


Call = Callable[[torch.Tensor, int], Run]  # of a prompt and the most new tokens


def timed(model: Any, ids: torch.Tensor, new_tokens: int, draft: str | None = None, **options: Any) -> Run:
    """Answer a prompt (1, width) greedily by the model's `generate`; with `draft`, a model of layerwise."""
    watch = Stopwatch()
    trace = Trace() if draft is not None else None
    if draft is not None:
        options |= {"draft": draft, "trace": trace}
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, streamer=watch, **options
    )
    return Run(out[0, ids.shape[1] :].tolist(), watch, trace)


def other_libraries(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> dict[str, tuple[Call, int | None]]:
    """How other libraries decode with the same weights, and the setting at which each is fastest on one prompt."""

    def early(exit: int) -> Call:
        return lambda ids, most: timed(model, ids, most, assistant_early_exit=exit)

    exits = [exit for exit in HF_EXITS if exit < model.config.num_hidden_layers]
    choices: dict[str, dict[int | None, Call]] = {
        "transformers": {None: lambda ids, most: timed(model, ids, most)},
        "transformers early exit": {exit: early(exit) for exit in exits},
        "economize": _economize(model),
    }
    best: dict[str, tuple[Call, int | None]] = {}
    for name, calls in choices.items():
        settings = list(calls)
        if len(settings) > 1:
            settings.sort(key=lambda at, calls=calls: calls[at](ids, new_tokens).decoding)
        if settings:
            best[name] = calls[settings[0]], settings[0]
    return best


def _economize(model: PreTrainedModel) -> dict[int | None, Call]:
    """Its prompt lookup, by tokens a cycle: it needs neither training nor another model. Nothing if not installed."""
    try:
        import economize
        from economize.techniques.lookup import LookupConfig
    except ImportError:
        return {}

    def lookup(cycle: int) -> Call:
        wrapped = economize.apply(model, LookupConfig(), decoding=economize.DecodeConfig(cycle_length=cycle))
        return lambda ids, most: timed(wrapped, ids, most)

    return {cycle: lookup(cycle) for cycle in ECONOMIZE_CYCLES}
