"""How long a pass takes by the number of its tokens, timed before the first answer.

Whether a sixth drafted token pays depends on what it costs to verify, which on one machine is nothing and on the next a
fifth of a step. An answer has a few dozen rounds: a tuner that has to find out on the way spends them on it.
"""

from __future__ import annotations

from time import perf_counter

import torch

from layerwise.model.cache import Cache
from layerwise.model.runtime import Runtime
from layerwise.plan import Plan

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16)  # kernels work in tiles of a few tokens; in between, times are interpolated
BEFORE = 32  # tokens that are in the cache
REPEATS = 3  # of which the shortest counts: whatever disturbs a pass makes it longer
BESIDES = 6  # layers that the LM head, and what a pass takes besides, are worth
BUDGET = 0.6  # seconds; a model too slow for that is left with fewer measurements, or none


@torch.no_grad()
def pass_times(runtime: Runtime, rows: int) -> dict[int, float]:
    """Seconds of a pass of the whole model over so many tokens a row, head included, for some numbers of tokens."""
    backbone = runtime.backbone
    plans, cache = [Plan.full(backbone.depth)] * rows, Cache(rows, BEFORE + max(WIDTHS))
    times: dict[int, float] = {}

    def run(width: int) -> float:
        began = perf_counter()
        tokens = torch.zeros(rows, width, dtype=torch.long, device=backbone.device)
        hidden = runtime.forward(backbone.embedding(tokens), plans, cache=cache)
        int(runtime.engine.logits(hidden)[0, -1].argmax())  # waits for a device that runs ahead
        return perf_counter() - began

    until = perf_counter() + BUDGET
    run(BEFORE)
    for _ in range(REPEATS):
        for width in WIDTHS:
            if perf_counter() > until:
                return times
            times[width] = min(run(width), times.get(width, torch.inf))
            cache.rollback(BEFORE)
    return times
