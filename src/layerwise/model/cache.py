"""The KV cache: one slot per visit, one length per row.

A plan may visit a layer twice, skip it for some rows, or change between tokens, so "the cache of layer 7" says
too little. Keys and values live in *slots*, keyed (layer, nth visit). All slots of a cache share the rows of the
batch, the capacity and the per-row lengths; a row's token number t stands at index t of every slot, padding is
never stored.

**The hole rule.** A token whose plan left a layer out has no key there. When a later token of the same row
visits that layer, it attends to the tokens that did visit it and to none other: holes are not filled in, and
not guessed. A cached pass therefore equals an uncached one in which every token walks its own plan. Whoever
wants the keys filled in runs the tokens again (`rollback`, then a pass with the new plan).

Rollback shortens rows; what stood beyond is overwritten by the next tokens and never attended to, sliding windows
included, because windows are masks here and not ring buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from layerwise.plan import Plan, Slot

ALIGNMENT = 64  # capacities are rounded up to this many tokens


@dataclass(slots=True)
class SlotStore:
    """Keys and values of one slot, each (rows, key heads, capacity, head size).

    `ends[r]` is one past the last token that row r stored. `seen` is None while every token before `ends` is
    there, else a boolean (rows, capacity) that tells holes from keys.
    """

    keys: Tensor
    values: Tensor
    ends: list[int]
    seen: Tensor | None = None


@dataclass
class Cache:
    """The KV cache of a batch of `rows` rows, for up to `capacity` tokens each; grows when it must."""

    rows: int
    capacity: int
    lengths: list[int] = field(default_factory=list)
    slots: dict[Slot, SlotStore] = field(default_factory=dict)
    plans: list[Plan] | None = None  # that a routing policy decided for these rows at their first token

    def __post_init__(self) -> None:
        self.capacity = _aligned(self.capacity)
        self.lengths = self.lengths or [0] * self.rows

    def check_rows(self, rows: int) -> None:
        """ValueError unless the cache is that of a batch of `rows` rows."""
        if rows != self.rows:
            raise ValueError(f"the cache has {self.rows} rows, the prompt {rows}: continue the same batch")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest row, in tokens; not read from any layer, for a plan may skip every one of them."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(s.keys.nbytes + s.values.nbytes for s in self.slots.values())

    def store(self, slot: Slot, like: Tensor) -> SlotStore:
        """The store of `slot`, made on first use with the heads, dtype and device of `like` (., heads, ., size)."""
        if slot not in self.slots:
            size = (self.rows, like.shape[1], self.capacity, like.shape[3])
            # Zeros, not empty: masked scores must be finite. The system hands out zero pages lazily, so memory
            # is resident only where tokens were stored.
            self.slots[slot] = SlotStore(like.new_zeros(size), like.new_zeros(size), [0] * self.rows)
        return self.slots[slot]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens per row; grows by half at least, so that appending stays cheap."""
        if tokens <= self.capacity:
            return
        self.capacity = _aligned(max(tokens, self.capacity * 3 // 2))
        for store in self.slots.values():
            store.keys, store.values = (_widened(t, 2, self.capacity) for t in (store.keys, store.values))
            if store.seen is not None:
                store.seen = _widened(store.seen, 1, self.capacity)

    def holes(self, slot: Slot, rows: Sequence[int], starts: Sequence[int], device: torch.device) -> Tensor | None:
        """Which tokens `slot` holds, (all rows, capacity) booleans; None if `rows` lack none before `starts`."""
        store = self.slots.get(slot)
        if store is None:
            return torch.zeros(self.rows, self.capacity, dtype=torch.bool, device=device) if any(starts) else None
        if store.seen is None and any(store.ends[row] != start for row, start in zip(rows, starts, strict=True)):
            index = torch.arange(self.capacity, device=store.keys.device)
            store.seen = index[None] < torch.tensor(store.ends, device=index.device)[:, None]
        return store.seen

    def mark(self, slot: Slot, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        """Note that row rows[i] stored counts[i] tokens from starts[i] on in `slot`."""
        store = self.slots[slot]
        self.holes(slot, rows, starts, store.keys.device)
        for row, start, count in zip(rows, starts, counts, strict=True):
            if store.seen is not None:
                store.seen[row, start : start + count] = True
            store.ends[row] = start + count

    def advance(self, counts: Sequence[int]) -> None:
        """Lengthen each row by the tokens of a finished pass."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def rollback(self, lengths: Sequence[int] | int) -> None:
        """Forget all tokens of row r from lengths[r] on (one number: of every row).

        Raises:
            ValueError: a length is negative or greater than what is stored.
        """
        lengths = [lengths] * self.rows if isinstance(lengths, int) else list(lengths)
        if len(lengths) != self.rows or any(
            not 0 <= new <= old for new, old in zip(lengths, self.lengths, strict=True)
        ):
            raise ValueError(f"cannot roll rows of lengths {self.lengths} back to {lengths}")
        self.lengths = lengths
        for store in self.slots.values():
            store.ends = [min(end, length) for end, length in zip(store.ends, lengths, strict=True)]
            if store.seen is not None:
                for row, length in enumerate(lengths):
                    store.seen[row, length:] = False
                held = store.seen.sum(1).tolist()
                if all(bool(store.seen[row, :count].all()) for row, count in enumerate(held)):
                    # No hole is left, so nothing tells this slot from one that never had any.
                    store.ends, store.seen = held, None

    def retain(self, counts: Sequence[int], kept: Sequence[Sequence[int]]) -> None:
        """Of the last counts[r] tokens of row r, which came in one pass, keep those numbered kept[r] (ascending).

        They close ranks, and all others are forgotten: one branch of a tree becomes text.
        """
        starts = [length - count for length, count in zip(self.lengths, counts, strict=True)]
        moves = [
            (row, start + old, start + new)
            for row, (start, numbers) in enumerate(zip(starts, kept, strict=True))
            for new, old in enumerate(numbers)
            if new != old
        ]
        for store in self.slots.values() if moves else ():
            row, source, place = torch.tensor(moves, device=store.keys.device).T
            store.keys[row, :, place] = store.keys[row, :, source]
            store.values[row, :, place] = store.values[row, :, source]
        self.rollback([start + len(numbers) for start, numbers in zip(starts, kept, strict=True)])

    def select(self, rows: Sequence[int]) -> None:
        """Keep the rows named, in that order; a row may be named twice (a beam, a draft tree)."""
        self.lengths = [self.lengths[row] for row in rows]
        self.rows = len(rows)
        self.plans = None if self.plans is None else [self.plans[row] for row in rows]
        for store in self.slots.values():
            index = torch.tensor(rows, dtype=torch.long, device=store.keys.device)
            store.keys, store.values = store.keys[index], store.values[index]
            store.ends = [store.ends[row] for row in rows]
            store.seen = None if store.seen is None else store.seen[index]

    def part(self, rows: Sequence[int]) -> Cache:
        """A cache of its own with the rows named."""
        slots = {slot: replace(store) for slot, store in self.slots.items()}
        made = Cache(self.rows, self.capacity, list(self.lengths), slots, self.plans)
        made.select(rows)
        return made

    def join(self, others: Sequence[Cache], order: Sequence[int]) -> None:
        """Take in the rows of `others` behind one's own; then put them all into `order`, as `select` does."""
        caches = [self, *others]
        capacity = max(cache.capacity for cache in caches)
        for slot in dict.fromkeys(slot for cache in caches for slot in cache.slots):
            like = next(cache.slots[slot].keys for cache in caches if slot in cache.slots)
            stores = [cache.store(slot, like) for cache in caches]
            keys, values = (
                torch.cat([_widened(getattr(store, name), 2, capacity) for store in stores])
                for name in ("keys", "values")
            )
            ends, seen = [end for store in stores for end in store.ends], None
            if any(store.seen is not None for store in stores):
                index = torch.arange(capacity, device=keys.device)
                shown = [index < torch.tensor(store.ends, device=index.device)[:, None] for store in stores]
                kept = [None if store.seen is None else _widened(store.seen, 1, capacity) for store in stores]
                seen = torch.cat([one if one is not None else all_ for one, all_ in zip(kept, shown, strict=True)])
            self.slots[slot] = SlotStore(keys, values, ends, seen)
        self.capacity, self.lengths = capacity, [length for cache in caches for length in cache.lengths]
        if self.plans is not None:
            self.plans = [plan for cache in caches for plan in cache.plans]
        self.rows = len(self.lengths)
        self.select(order)


def _aligned(tokens: int) -> int:
    return -(-max(tokens, 1) // ALIGNMENT) * ALIGNMENT


def _widened(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    wide = tensor.new_zeros(shape)
    wide.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return wide
