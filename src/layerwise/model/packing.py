"""Between the user's layout of a batch and the runtime's.

Users pad on either side and say so with an attention mask; the runtime wants each row's tokens packed to the left.
Token number t of a row has position t in both, which is what `generate` of transformers does too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, slots=True)
class Packing:
    """How many tokens each row has, and, unless all are in place already, the column each one comes from."""

    counts: list[int]
    order: Tensor | None  # (rows, width): column of the user's layout, tokens first

    @classmethod
    def of(cls, rows: int, width: int, attention_mask: Tensor | None) -> Packing:
        """Read a mask (rows, width), or (rows, cached + width) whose last `width` columns count.

        Raises:
            ValueError: the mask is not of that shape, or a row has no token.
        """
        if attention_mask is None:
            return cls([width] * rows, None)
        if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < width:
            raise ValueError(
                f"attention_mask must be (rows, columns) = ({rows}, {width}) of zeros and ones, "
                f"not {tuple(attention_mask.shape)}"
            )
        mask = attention_mask[:, attention_mask.shape[1] - width :].bool()
        counts = mask.sum(1).tolist()
        if 0 in counts:
            raise ValueError(f"row {counts.index(0)} of the batch has no token: its attention_mask is all zeros")
        in_place = bool((mask[:, :-1] >= mask[:, 1:]).all())
        return cls(counts, None if in_place else torch.argsort(mask.logical_not().int(), dim=1, stable=True))

    def pack(self, columns: Tensor) -> Tensor:
        """User layout to runtime layout: (rows, width) or (rows, width, values)."""
        if self.order is None:
            return columns
        return columns.gather(1, _spread(self.order, columns))

    def unpack(self, columns: Tensor) -> Tensor:
        """Runtime layout to user layout: (rows, width, values); padding columns are undefined."""
        if self.order is None:
            return columns
        return torch.zeros_like(columns).scatter(1, _spread(self.order, columns), columns)


def last_of(packed: Tensor, counts: Sequence[int]) -> Tensor:
    """The last token's state of each row of a packed (rows, width, values): (rows, 1, values)."""
    if len(set(counts)) == 1:
        return packed[:, counts[0] - 1 : counts[0]]
    index = torch.tensor(counts, device=packed.device) - 1
    return packed[torch.arange(len(index), device=packed.device), index][:, None]


def lengths_of_prompts(
    packing: Packing, labels: Tensor | None, given: Sequence[int] | Tensor | None = None
) -> list[int]:
    """How many tokens of each row are its prompt: as `given`, else what precedes the first label, else all.

    The label of a row's first token is never predicted, so a prompt has at least one token.

    Args:
        labels: (rows, width) in the user's layout, -100 where no loss is wanted.

    Raises:
        ValueError: a given length is not between 1 and the tokens of its row.
    """
    counts = packing.counts
    if given is not None:
        lengths = [int(length) for length in given]
        if len(lengths) != len(counts) or any(not 0 < n <= most for n, most in zip(lengths, counts, strict=True)):
            raise ValueError(f"prompt_lengths must be 1 or more tokens of each row, at most {counts}, not {lengths}")
        return lengths
    if labels is None:
        return list(counts)
    columns = torch.arange(labels.shape[1], device=labels.device)
    answered = (packing.pack(labels) != -100) & (columns < torch.tensor(counts, device=labels.device)[:, None])
    first = torch.where(answered, columns, labels.shape[1]).amin(1).tolist()
    return [max(1, min(at, count)) for at, count in zip(first, counts, strict=True)]


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """Token ids (prompts, longest), packed to the left and filled up with 0, and how many each prompt has."""
    return pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True), list(map(len, prompts))


def check_positions(position_ids: Tensor, packing: Packing) -> None:
    """Refuse positions (rows or 1, width) that do not count each row's tokens in order.

    A shift of a whole row is fine: with rotary embeddings it changes nothing, and padding causes it.
    """
    given = packing.pack(position_ids.expand(len(packing.counts), -1))
    for row, count in enumerate(packing.counts):
        steps = torch.arange(count, device=given.device)
        if not torch.equal(given[row, :count] - given[row, 0], steps):
            raise ValueError("position_ids must count each row's tokens in order; packed sequences do not fit")


def _spread(order: Tensor, like: Tensor) -> Tensor:
    order = order.to(like.device)  # a mask may be on another device than the model
    return order if like.dim() == 2 else order[:, :, None].expand(-1, -1, like.shape[2])
