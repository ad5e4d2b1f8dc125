"""A frame: what the layers of one forward pass need to know besides the hidden states.

Rows of a batch differ in length, in how many tokens they bring, and in plan. A frame holds those facts once per
pass and derives from them, each at most once: rotary embeddings, attention masks and the places in the cache.
Inside the runtime rows are packed to the left: row r brings counts[r] tokens, which continue its lengths[r]
cached ones; the columns beyond counts[r] are padding, neither stored nor attended to.

The tokens of a row may be a tree, several continuations at once: then each stands at the depth it would have in its
continuation, and sees what is cached and its own ancestors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layerwise.model.backbone import Backbone
from layerwise.model.cache import Cache
from layerwise.plan import Slot

Rows = tuple[int, ...] | None  # a subset of the batch; None is every row
_UNKNOWN = object()  # None is a mask


@dataclass
class Frame:
    """One forward pass over `width` columns; `counts[r]` of them are tokens of row r.

    Without a cache the pass starts at position 0 and stores nothing. `parents[r]`, if given, names the column that each
    token of row r follows, an earlier one; -1 for what is cached.
    """

    backbone: Backbone
    counts: Sequence[int]
    width: int
    device: torch.device
    dtype: torch.dtype
    cache: Cache | None = None
    parents: Sequence[Sequence[int]] | None = None
    _memo: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.starts = list(self.cache.lengths) if self.cache else [0] * len(self.counts)
        ends = [start + count for start, count in zip(self.starts, self.counts, strict=True) if count]
        self.stop = max(ends, default=0)
        self.aligned = len(set(self.starts)) == 1 and set(self.counts) == {self.width}
        if self.cache:
            # Kernels write the columns of padding as well, beyond the tokens of a row.
            self.cache.reserve(max(self.starts) + self.width)

    def members(self, rows: Rows) -> Sequence[int]:
        return range(len(self.counts)) if rows is None else rows

    def index(self, rows: tuple[int, ...]) -> Tensor:
        """`rows` as an index tensor."""
        return self._once(("index", rows), lambda: torch.tensor(rows, device=self.device))

    def positions(self, rows: Rows) -> Tensor:
        """Position of every column: (1, width) if all rows agree, else (rows, width)."""

        def make() -> Tensor:
            starts = self.starts_of(rows)
            if self.parents is not None:
                return self._ancestors(rows).sum(-1) - 1 + torch.tensor(starts, device=self.device)[:, None]
            columns = torch.arange(self.width, device=self.device)[None]
            if len(set(starts)) == 1:
                return columns + starts[0]
            return columns + torch.tensor(starts, device=self.device)[:, None]

        return self._once(("positions", rows), make)

    def rotary(self, layer: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """Cosines and sines for the layer's kind of rotary embedding, each (1 or rows, width, head size)."""
        kind = self.backbone.kinds[layer]
        return self._once(
            ("rotary", kind.rotary, rows),
            # Padding columns have positions too, beyond the last token's.
            lambda: self.backbone.rotary(kind.rotary, self.positions(rows), max(self.starts) + self.width, self.dtype),
        )

    def mask(self, layer: int, slot: Slot | None, rows: Rows) -> Tensor | None:
        """Additive mask (rows, 1, width, keys), or None where the attention kernel needs none."""
        window = self.backbone.kinds[layer].window
        seen = None
        if self.cache and slot:
            seen = self.cache.holes(slot, self.members(rows), self.starts_of(rows), self.device)
        if seen is None:
            return self._once(("mask", window, rows), lambda: self._mask(window, rows, None))
        return self._mask(window, rows, seen)

    def starts_of(self, rows: Rows) -> list[int]:
        return [self.starts[row] for row in self.members(rows)]

    def _mask(self, window: int | None, rows: Rows, seen: Tensor | None) -> Tensor | None:
        keys = self.stop if self.cache else self.width
        if seen is None and self.parents is None and (window is None or keys <= window):
            fresh = not any(self.starts)
            # scaled_dot_product_attention knows the causal square and the single last query without a mask. A
            # fresh batch needs no more: padding stands to the right of every token that counts.
            square = self.backbone.sdpa and fresh and keys == self.width
            if square or (self.width == 1 and self.aligned):
                return None
        return self._additive(window, rows, seen)

    def _additive(self, window: int | None, rows: Rows, seen: Tensor | None) -> Tensor:
        keys = self.stop if self.cache else self.width
        position = self.positions(rows)[:, :, None]
        index = torch.arange(keys, device=self.device)
        holds = index  # the position of what stands there
        allowed = index <= position
        if self.parents is not None:
            allowed, holds = self._branches(rows, index)
        if window is not None:
            allowed = allowed & (holds > position - window)
        if seen is not None:
            members = seen if rows is None else seen[self.index(rows)]
            new = (index >= position[:, :1]) & (index < position[:, :1] + self.width)
            allowed = allowed & (members[:, None, :keys] | new)
        floor = torch.finfo(self.dtype).min
        return torch.where(allowed, 0.0, floor).to(self.dtype)[:, None]

    def _ancestors(self, rows: Rows) -> Tensor:
        """(rows, width, width) booleans: which columns each column descends from, itself among them."""

        def make() -> Tensor:
            assert self.parents is not None
            members = self.members(rows)
            found = [[[at == column for at in range(self.width)] for column in range(self.width)] for _ in members]
            for lines, row in zip(found, members, strict=True):
                for column, parent in enumerate(self.parents[row]):
                    if parent >= 0:
                        lines[column] = [own or above for own, above in zip(lines[column], lines[parent], strict=True)]
            return torch.tensor(found, device=self.device)

        return self._once(("ancestors", rows), make)

    def _branches(self, rows: Rows, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which keys at `index` each column of a tree may see, (rows, width, keys), and the position of what they
        hold, (rows, 1, keys)."""
        ancestors, starts = self._ancestors(rows), torch.tensor(self.starts_of(rows), device=self.device)[:, None]
        column = index - starts
        inside = column.clamp(0, self.width - 1)
        seen = ancestors.gather(2, inside[:, None].expand(-1, self.width, -1)) & (column < self.width)[:, None]
        holds = torch.where(column < 0, index, self.positions(rows).gather(1, inside))
        return (column < 0)[:, None] | seen, holds[:, None]

    def few(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a kernel for a few tokens of every row needs, all memory of its own: the index in the cache of each
        column (rows, width), the additive float32 mask (rows, 1, width, keys), cosines and sines (rows, width, head
        size)."""
        kind = self.backbone.kinds[layer]

        def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            rows = len(self.counts)
            columns = (
                torch.arange(self.width, device=self.device) + torch.tensor(self.starts, device=self.device)[:, None]
            )
            mask = self._additive(kind.window, None, None).float().expand(rows, -1, -1, -1).contiguous()
            cosine, sine = (table.expand(rows, -1, -1).contiguous() for table in self.rotary(layer, None))
            return columns, mask, cosine, sine

        return self._once(("few", kind), make)

    def places(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where tokens go: (row in the cache, index in the cache, row in this call, column), one entry a token."""

        def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            quads = [
                (row, self.starts[row] + column, call_row, column)
                for call_row, row in enumerate(self.members(rows))
                for column in range(self.counts[row])
            ]
            return tuple(torch.tensor(quads, device=self.device).T)

        return self._once(("places", rows), make)

    def view(self, slot: Slot | None, rows: Rows) -> SlotView | None:
        """What a decoder layer gets as its `past_key_values`: the slot of this visit."""
        return SlotView(self, slot, rows) if self.cache and slot else None

    def _once(self, key: Any, make: Any) -> Any:
        found = self._memo.get(key, _UNKNOWN)
        if found is _UNKNOWN:
            found = self._memo[key] = make()
        return found


@dataclass(slots=True)
class SlotView:
    """One slot of a cache, with the one method that Hugging Face attention calls, `update`."""

    frame: Frame
    slot: Slot
    rows: Rows

    def update(self, keys: Tensor, values: Tensor, layer_idx: int = 0, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store (rows, heads, width, size) keys and values; return all that the rows have, old and new.

        `layer_idx` is ignored: the visit decides the slot, not the layer.
        """
        frame, cache = self.frame, self.frame.cache
        store = cache.store(self.slot, keys)
        if frame.aligned and self.rows is None:
            start = frame.starts[0]
            store.keys[:, :, start : frame.stop] = keys
            store.values[:, :, start : frame.stop] = values
        else:
            row, index, call_row, column = frame.places(self.rows)
            store.keys.transpose(1, 2)[row, index] = keys.transpose(1, 2)[call_row, column]
            store.values.transpose(1, 2)[row, index] = values.transpose(1, 2)[call_row, column]
        members = frame.members(self.rows)
        cache.mark(self.slot, members, frame.starts_of(self.rows), [frame.counts[row] for row in members])
        if self.rows is None:
            return store.keys[:, :, : frame.stop], store.values[:, :, : frame.stop]
        index = frame.index(self.rows)
        return store.keys[index, :, : frame.stop], store.values[index, :, : frame.stop]

    def held(self) -> Tensor | None:
        """Which of the places that `update` returns hold a token, (rows, places) booleans; None if there are no holes
        before the end of any row."""
        seen = self.frame.cache.slots[self.slot].seen
        if seen is None:
            return None
        return (seen if self.rows is None else seen[self.frame.index(self.rows)])[:, : self.frame.stop]
