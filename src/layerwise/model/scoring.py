"""Scores of queries against keys, and rotary positions: what routed layers need of attention itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_COMMON = 512  # keys that all queries scored at once see, from which they are scored apart, without a mask


def score(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scores, softmax and weighted sum: (rows, queries, heads times head size).

    Args:
        queries: (rows, heads, queries, head size).
        keys, values: (rows, kv heads, keys, head size).
        seen: True (or, of floats, 0) where a query sees a key, to be spread to (rows, heads, queries, keys); None if
            nothing hides any.
        causal: query i sees the keys up to i.
        scale: of the scores; head size ** -1/2 unless given.
    """
    causal, grouped = causal and queries.shape[2] > 1, queries.shape[1] != keys.shape[1]
    mixed = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=seen, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return mixed.transpose(1, 2).flatten(2)


def score_sorted(queries: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """`score` of queries at the positions `at` (queries,), in order, each of which sees the keys up to its own."""
    if len(at) == 1:
        return score(queries, keys, values)
    # Keys that all of them see need no mask, which costs more than it hides; one is left to the rest.
    common = int(at[0])
    ungrouped = queries.shape[1] == keys.shape[1] and keys.is_cpu and not torch.is_grad_enabled()
    split = ungrouped and common >= _COMMON
    seen = torch.arange(common if split else 0, keys.shape[2], device=keys.device) <= at[:, None]
    if not split:
        return score(queries, keys, values, seen)
    bias = keys.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    early, early_sum = flash(queries, keys[:, :, :common], values[:, :, :common])
    late, late_sum = flash(queries, keys[:, :, common:], values[:, :, common:], attn_mask=bias)
    share = torch.sigmoid(early_sum - late_sum)[..., None].to(early.dtype)
    mixed = share * early + (1 - share) * late
    return mixed.transpose(1, 2).flatten(2)


def rotate(states: Tensor, places: Tensor, theta: float) -> Tensor:
    """Rotary positions (RoFormer, arXiv 2104.09864) of states (rows, heads, width, size) at `places` (rows, width)."""
    half = states.shape[-1] // 2
    angles = places[..., None] * theta ** (-torch.arange(half, device=states.device).float() / half)
    angles = torch.cat((angles, angles), dim=-1)
    return rotated(states, angles.cos().to(states.dtype), angles.sin().to(states.dtype))


def rotated(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions in the rotate-half form; `cosine` and `sine` (1 or rows, width, size)."""
    first, second = states.chunk(2, dim=-1)
    return states * cosine[:, None] + torch.cat((-second, first), dim=-1) * sine[:, None]
