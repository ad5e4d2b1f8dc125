"""Causal filters over positions: short convolutions and moving averages, without a loop over the text."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 64  # positions of one block of a moving average
_TILE = 32  # positions of one block of a convolution: its products are (tile + taps) / taps times what is needed


def causal_filter(values: Tensor, taps: Tensor) -> Tensor:
    """y[t] = sum_j taps[head, j] values[t - j], each head's channels by its own taps.

    Args:
        values: (rows, taps - 1 + width, channels), the first taps - 1 are the past.
        taps: (heads, taps), the newest first.

    Returns:
        (rows, width, channels). Long texts go in blocks, as products with a banded matrix.
    """
    heads, count = taps.shape
    rows, total, channels = values.shape
    width = total - count + 1
    taps = taps.to(values.dtype)
    if width < _TILE // 2:
        windows = values.unfold(1, count, 1).unflatten(2, (heads, -1))  # rows, width, heads, channels, taps
        return (windows * taps.flip(-1)[:, None]).sum(-1).flatten(2)
    blocks, span = -(-width // _TILE), _TILE + count - 1
    values = F.pad(values, (0, 0, 0, blocks * _TILE - width))
    # Row i of the band holds the taps, oldest first, from column i on.
    band = F.pad(taps.flip(-1)[:, None].expand(-1, _TILE, -1), (0, _TILE)).flatten(1)
    band = band[:, : _TILE * span].view(heads, _TILE, span)
    # Head by head, so that the products read the values where they are: of one row nothing is copied.
    windows = values.unfold(1, span, _TILE).unflatten(2, (heads, -1)).transpose(3, 4).unbind(2)
    mixed = [
        torch.bmm(one.expand(rows * blocks, -1, -1), seen.flatten(0, 1))
        for one, seen in zip(band, windows, strict=True)
    ]
    return torch.cat(mixed, dim=-1).view(rows, blocks * _TILE, channels)[:, :width]


def moving_average(values: Tensor, decay: float, before: Tensor | None = None) -> Tensor:
    """m[t] = decay m[t - 1] + (1 - decay) values[t] for values (rows, width, channels); `before` is m[-1], or zero."""
    rows, width, channels = values.shape
    if width == 1:
        return (1 - decay) * values if before is None else torch.lerp(before[:, None], values, 1 - decay)
    size = min(width, _BLOCK)
    blocks = -(-width // size)
    inside, ahead, fade = _decays(decay, size, blocks, values.dtype, values.device)
    local = torch.matmul(inside, F.pad(values, (0, 0, 0, blocks * size - width)).unflatten(1, (blocks, size)))
    carry = torch.matmul(ahead, local[:, :, -1])
    if before is not None:
        order = torch.arange(blocks, device=values.device)
        carry = carry + (decay**size) ** order.to(values.dtype)[:, None] * before[:, None]
    return (local + fade * carry[:, :, None]).view(rows, blocks * size, channels)[:, :width]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # those of inference could not be used in training
@torch.no_grad()
def _decays(
    decay: float, size: int, blocks: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights within a block (size, size); from the end of each block to the ones after it, to which it hands on what
    fades by decay^size a block, (blocks, blocks); and of what a block is handed at each of its positions (size, 1)."""
    steps, order = torch.arange(size, device=device), torch.arange(blocks, device=device)
    inside = _powers(decay, steps[:, None] - steps).to(dtype) * (1 - decay)
    ahead = _powers(decay**size, order[:, None] - order - 1).to(dtype)
    return inside, ahead, decay ** (steps + 1).to(dtype)[:, None]


def _powers(base: float, exponents: Tensor) -> Tensor:
    """base^exponent, and 0 where the exponent is negative."""
    return torch.where(exponents >= 0, base ** exponents.clamp(min=0).float(), 0.0)
