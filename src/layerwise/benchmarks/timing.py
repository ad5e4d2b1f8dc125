"""Timing two or more things fairly.

A machine's speed drifts by tens of percent within minutes, so a time on its own says little and the ratio of two
times taken apart says less. Here every contender runs once in each round, in an order that rotates, and medians over
rounds are compared. The memory bandwidth that a roofline needs is measured in the same rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median
from typing import Any

import torch


def rounds(contenders: dict[Any, Callable[[], Any]], count: int, first: int = 0) -> Iterator[tuple[int, Any, Any]]:
    """Run every contender once in each of `count` rounds, the first numbered `first`; yields (round, name, result)."""
    names = list(contenders)
    for number in range(first, first + count):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            yield number, name, contenders[name]()


class Bandwidth:
    """Measures how fast memory can be read: bytes per second, best of a few sweeps over a large buffer."""

    def __init__(self, mebibytes: int = 512) -> None:
        # Far larger than any cache, and touched once so that its pages exist.
        self.buffer = torch.ones(mebibytes * 2**20 // 4)

    def __call__(self, sweeps: int = 3) -> float:
        best = float("inf")
        for _ in range(sweeps):
            began = time.perf_counter()
            self.buffer.sum()
            best = min(best, time.perf_counter() - began)
        return self.buffer.nbytes / best


class Stopwatch:
    """A streamer that takes the time of every token of one `generate` call."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.began = time.perf_counter()

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        return None

    @property
    def total(self) -> float:
        """Seconds from the call to the last token."""
        return self.times[-1] - self.began

    @property
    def step(self) -> float:
        """Median seconds of a decoding step; the prompt and the first token are left out."""
        ends = self.times[1:]  # the first entry is the prompt's
        return median(later - earlier for earlier, later in pairwise(ends))
