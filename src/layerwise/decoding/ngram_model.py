"""A back-off n-gram model of answers that a model gave: what it is likely to say next, for the price of a look-up.

A small model opens, formats and closes its answers in few ways. A table of what it said to some thousand prompts names
its next token more than a third of the time, which makes a draft (REST, arXiv 2311.08252, searches the texts instead).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from layerwise.tensor_files import read_tensors

FILE = "ngrams.safetensors"
GUESSES = 2  # tokens that are kept of what follows an n-gram: a tree of drafts asks for more than the likeliest
ALIKE = 0.25  # an n-gram is left out if a shorter one names the same token, and is as sure to within this
_FACTOR = 0x9E3779B97F4A7C15  # odd, of no pattern: of the keys, hashes modulo 2^64
_BITS = 2**64 - 1


class NGramModel:
    """The likeliest tokens after each n-gram; the longest known suffix of a text decides.

    How sure it is of a token is count / (count of the n-gram + 1), which is about how often it is right (stupid
    back-off, aclanthology D07-1090: no probability mass is kept for what was not seen).

    Attributes:
        keys: (n-grams,) int64, hashes. Two n-grams with one hash would make a bad draft and do no harm.
        tokens: (n-grams, guesses) int32, what follows, the likeliest first.
        sure: (n-grams, guesses) float16; 0 where fewer tokens follow.
        order: tokens of the longest n-grams.
    """

    def __init__(self, keys: Tensor, tokens: Tensor, sure: Tensor, order: int) -> None:
        self.keys, self.tokens, self.sure, self.order = keys, tokens, sure, order

    @classmethod
    def fit(cls, answers: Iterable[tuple[Sequence[int], Sequence[int]]], order: int = 6) -> NGramModel:
        """Count the answers, given as (token ids of the prompt, of the answer); the prompt's end is context only.

        Raises:
            ValueError: there is no token to count.
        """
        texts, inside = [], []  # -1 between texts, so that no n-gram crosses from one to the next
        for prompt, answer in answers:
            start = list(prompt[-order:])
            texts += [-1, *start, *answer]
            inside += [False] * (1 + len(start)) + [True] * len(answer)
        text, places = np.array(texts, dtype=np.int64), np.nonzero(np.array(inside, dtype=bool))[0]
        kept: list[tuple[np.ndarray, ...]] = []
        shorter: tuple[np.ndarray, ...] | None = None
        hashes = np.zeros(len(places), dtype=np.uint64)
        for length in range(1, order + 1):
            before = text[places - length]
            places, hashes, before = places[before >= 0], hashes[before >= 0], before[before >= 0]
            if not len(places):
                break
            longer = hashes * np.uint64(_FACTOR) + before.astype(np.uint64) + np.uint64(1)
            keys, tokens, sure, first = _likeliest(longer, text[places])
            fresh = np.ones(len(keys), dtype=bool)
            if shorter is not None:
                at = np.searchsorted(shorter[0], hashes[first])  # every suffix of what was counted was counted
                known, trust = shorter[1][at], shorter[2][at]
                fresh = (tokens[:, 0] != known[:, 0]) | (np.abs(sure - trust)[:, 0] > ALIKE)
                tokens, sure = np.where(fresh[:, None], tokens, known), np.where(fresh[:, None], sure, trust)
            kept.append((keys[fresh], tokens[fresh], sure[fresh]))
            shorter, hashes = (keys, tokens, sure), longer
        if not kept:
            raise ValueError("there are no answers to count n-grams of")
        keys, tokens, sure = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        return cls(
            torch.from_numpy(keys.view(np.int64)),
            torch.from_numpy(tokens.astype(np.int32)),
            torch.from_numpy(sure.astype(np.float16)),
            order,
        )

    def __len__(self) -> int:
        return len(self.keys)

    def prepare(self) -> None:
        """Make the table that look-ups use, a fraction of a second that should be in no round's time."""
        _ = self._table

    @cached_property
    def _table(self) -> dict[int, list[tuple[int, float]]]:
        pairs = zip(self.tokens.tolist(), self.sure.tolist(), strict=True)
        guesses = ([(token, sure) for token, sure in zip(*pair, strict=True) if sure] for pair in pairs)
        return dict(zip(self.keys.tolist(), guesses, strict=True))

    def after(self, text: Sequence[int]) -> tuple[int, float] | None:
        """The token to follow `text` and how sure it is, None if nothing is known; the last `order` tokens count."""
        known = self.known(text)
        return known[0][0] if known else None

    def known(self, text: Sequence[int]) -> list[list[tuple[int, float]]]:
        """What each known suffix of `text` has to say, the longest first: tokens as of `after`, the likeliest first."""
        found, key = [], 0
        for token in reversed(text[-self.order :]):
            key = (key * _FACTOR + token + 1) & _BITS
            named = self._table.get(key - 2**64 if key >> 63 else key)
            if named is not None:
                found.append(named)
        return found[::-1]

    def save(self, folder: str | Path) -> None:
        from safetensors.torch import save_file

        tensors = {"keys": self.keys, "tokens": self.tokens, "sure": self.sure}
        save_file(tensors, str(Path(folder) / FILE), metadata={"format": "pt", "order": str(self.order)})

    @classmethod
    def load(cls, folder: str | Path, vocabulary: int) -> NGramModel:
        """Read what `save` wrote, for a model that knows `vocabulary` tokens.

        Raises:
            ValueError: the file is missing, damaged or made for another vocabulary.
        """

        def made(about: dict[str, str], tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, int]:
            return tensors["keys"], tensors["tokens"], tensors["sure"], int(about["order"])

        path = Path(folder) / FILE
        keys, tokens, sure, order = read_tensors(path, "the n-grams", made)
        whole = 0 < len(keys) == len(tokens) == len(sure)
        if tokens.ndim == 1:  # as they were counted first: one token an n-gram
            tokens, sure = tokens[:, None], sure[:, None]
        if not whole or not 0 <= tokens.min() <= tokens.max() < vocabulary:
            raise ValueError(f"the n-grams '{path}' do not belong to this model: count them again")
        return cls(keys, tokens, sure, order)


def _likeliest(keys: np.ndarray, following: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each key, ascending: its likeliest tokens (keys, GUESSES), count / (all + 1) of each, 0 where there are fewer,
    and the first index at which the key is found."""
    order = np.lexsort((following, keys))
    keys, following = keys[order], following[order]
    new_key = np.r_[True, keys[1:] != keys[:-1]]
    new_pair = new_key | np.r_[True, following[1:] != following[:-1]]
    pairs = np.nonzero(new_pair)[0]
    counts = np.diff(np.r_[pairs, len(keys)])
    starts = np.nonzero(new_key[pairs])[0]  # of each key, among the pairs
    totals = np.add.reduceat(counts, starts)
    of_key = np.cumsum(new_key[pairs]) - 1
    best = np.lexsort((following[pairs], -counts, of_key))  # by key still; the smallest token of equals first
    rank = np.arange(len(pairs)) - starts[of_key]
    tokens, sure = np.zeros((len(starts), GUESSES), dtype=following.dtype), np.zeros((len(starts), GUESSES))
    for guess in range(GUESSES):
        at = best[rank == guess]
        tokens[of_key[at], guess], sure[of_key[at], guess] = following[pairs[at]], counts[at] / (totals[of_key[at]] + 1)
    first = np.nonzero(new_key)[0]
    return keys[first], tokens, sure, order[first]
