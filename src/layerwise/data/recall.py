"""Recall tasks: a key stood beside a value long ago, and is seen again; which value was it?

*recall*, the original task of routed attention (M. Bee, Zenodo 10.5281/zenodo.18518956): key, value, noise, and the
same key last; the distance is the length - 2. Keys, values and noise are different tokens, and a sequence holds ONE
value. So "find the token that is a value" solves it, and no key need be matched: it tests reach, not recall. It is kept
for comparison; how the 256 tokens were divided is not published, and is a choice made here.

*mqar*, multi-query associative recall (Zoology, arXiv 2312.04927): several pairs first, later some of the keys again at
random places, and at each the value must be named. Everything in between is a *value* token drawn at random, so values
are everywhere and only the one beside the same key is right.

Training and test sequences share no (key, value) pair: a fixed fifth of all combinations occurs in tests only. Tokens
themselves are shared, since a token that was never trained has no meaning. Sequences come from a seed, none is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from layerwise.data.examples import IGNORED

Task = Literal["recall", "mqar"]
Split = Literal["train", "validation", "test"]
VOCABULARY = 256
_TEST_SHARE = 0.2
_SPLITS = {"train": 0, "validation": 1, "test": 2}


@dataclass(frozen=True)
class RecallBatch:
    """`input_ids` (rows, length); `targets` (rows, length), int64: the token to name after reading each position,
    IGNORED where nothing is asked. Targets are not shifted: `targets[:, t]` belongs to the logits at t."""

    input_ids: Tensor
    targets: Tensor

    @property
    def asked(self) -> Tensor:
        """(rows, length) True where a value must be named."""
        return self.targets != IGNORED


@dataclass(frozen=True)
class RecallTask:
    """A task at one length.

    Args:
        task: "recall" or "mqar".
        length: tokens of a sequence; of recall, distance + 2.
        pairs: mqar: how many keys stand in front, each with its value.
        queries: mqar: how many are asked for, each once; all unless given.

    Raises:
        ValueError: they do not fit into the length, or there are not enough keys.
    """

    task: Task
    length: int
    pairs: int = 8
    queries: int | None = None

    def __post_init__(self) -> None:
        if self.task not in Task.__args__:
            raise ValueError(f"no task '{self.task}': choose {', '.join(Task.__args__)}")
        if self.task == "recall" and self.length < 3:
            raise ValueError(f"{self.length} tokens are too few for key, value and key: give a distance of 1 or more")
        if self.task == "mqar":
            if not 1 <= self.asks <= self.pairs <= self.keys:
                raise ValueError(f"queries must be 1 to pairs, and pairs at most {self.keys}")
            if self.length < 2 * self.pairs + self.asks:
                raise ValueError(f"{self.pairs} pairs and {self.asks} queries do not fit into {self.length} tokens")

    @property
    def keys(self) -> int:
        """Tokens 0 to keys - 1 are keys; values follow, and for recall the noise."""
        return 64 if self.task == "recall" else 128

    @property
    def values(self) -> int:
        """How many tokens are values: chance is one in so many."""
        return 64 if self.task == "recall" else 128

    @property
    def asks(self) -> int:
        """Questions of a sequence."""
        return 1 if self.task == "recall" else self.pairs if self.queries is None else self.queries

    def least_usage(self, layers: int) -> float:
        """The share of position-layer slots that must attend: one a question, in one layer."""
        return self.asks / (self.length * layers)

    def batch(self, rows: int, seed: int, step: int = 0, split: Split = "train") -> RecallBatch:
        """`rows` sequences; the same arguments give the same ones on every machine, and others give others."""
        source = torch.Generator().manual_seed((seed * 3 + _SPLITS[split]) * 2**31 + step)
        return self._single(rows, source, split) if self.task == "recall" else self._many(rows, source, split)

    def _pair(self, keys: Tensor, source: torch.Generator, split: Split) -> Tensor:
        """A value of the right split for each key."""
        allowed = _is_test(self.keys, self.values)[keys.flatten()] == (split == "test")
        picked = torch.multinomial(allowed.float(), 1, generator=source)
        return picked.view_as(keys) + self.keys

    def _single(self, rows: int, source: torch.Generator, split: Split) -> RecallBatch:
        keys = torch.randint(self.keys, (rows, 1), generator=source)
        values = self._pair(keys, source, split)
        noise = torch.randint(self.keys + self.values, VOCABULARY, (rows, self.length - 3), generator=source)
        targets = torch.full((rows, self.length), IGNORED)
        targets[:, -1:] = values
        return RecallBatch(torch.cat((keys, values, noise, keys), dim=1), targets)

    def _many(self, rows: int, source: torch.Generator, split: Split) -> RecallBatch:
        keys = torch.rand(rows, self.keys, generator=source).argsort(dim=1)[:, : self.pairs]
        values = self._pair(keys, source, split)
        front = torch.stack((keys, values), dim=2).flatten(1)
        room = self.length - front.shape[1]
        rest = torch.randint(self.keys, VOCABULARY, (rows, room), generator=source)
        places = torch.rand(rows, room, generator=source).argsort(dim=1)[:, : self.asks]
        which = torch.rand(rows, self.pairs, generator=source).argsort(dim=1)[:, : self.asks]
        rest = rest.scatter(1, places, keys.gather(1, which))
        targets = torch.full((rows, self.length), IGNORED)
        targets.scatter_(1, places + front.shape[1], values.gather(1, which))
        return RecallBatch(torch.cat((front, rest), dim=1), targets)


@cache
def _is_test(keys: int, values: int) -> Tensor:
    """(keys, values) True for the combinations that only tests use."""
    return torch.rand(keys, values, generator=torch.Generator().manual_seed(20260201)) < _TEST_SHARE
