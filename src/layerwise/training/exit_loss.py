"""Cross entropy at many exits without keeping their logits.

One position has a logit for each of some 50,000 tokens, and LayerSkip asks for several exits at each position:
written plainly, a batch of 4,000 positions and 5 exits keeps 4 GB of logits until the backward pass. Here the head runs
over a chunk of positions at a time, and its gradient is taken at once, while the chunk's logits exist; what is kept is
the gradient with respect to the hidden states, a hundredth of the size. It costs no extra matrix product: this is the
same work in another order, as in "fused linear cross entropy" kernels, but for any norm and head made of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from layerwise.data.examples import IGNORED

LOGITS_AT_ONCE = 2**25  # 128 MB of float32


def exit_losses(
    logits: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    hidden: Tensor,
    targets: Tensor,
    weights: Sequence[float],
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Cross entropy summed over positions, for each exit.

    Args:
        logits: final norm and head, (positions, hidden size) to (positions, vocabulary).
        parameters: what `logits` is made of and is trained.
        hidden: (exits, positions, hidden size), before the final norm.
        targets: (positions,) token ids.
        weights: one an exit.
        chunk: positions at a time.

    Returns:
        The weighted sum over exits (differentiable, once), and the plain sum of each exit (exits,), without gradient.
    """
    total, sums = _ExitLosses.apply(logits, targets, tuple(weights), chunk, hidden, *parameters)
    return total, sums


def labelled(labels: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where a next token is to be predicted, and which.

    Args:
        labels: (rows, width) packed to the left.
        counts: tokens of each row.

    Returns:
        Indices into the flattened (rows * width) positions, and the token ids that follow them.
    """
    nexts = torch.full_like(labels, IGNORED)
    nexts[:, :-1] = labels[:, 1:]
    column = torch.arange(labels.shape[1], device=labels.device)
    last = torch.tensor(counts, device=labels.device)[:, None] - 1
    nexts = nexts.masked_fill(column >= last, IGNORED).flatten()
    at = (nexts != IGNORED).nonzero()[:, 0]
    return at, nexts[at]


class _ExitLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Callable[[Tensor], Tensor],
        targets: Tensor,
        weights: tuple[float, ...],
        chunk: int,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        wanted = ctx.needs_input_grad[4] or bool(trained)
        of_hidden = torch.zeros_like(hidden) if wanted else None
        of_trained = [torch.zeros_like(parameter) for parameter in trained]
        sums = torch.zeros(len(weights), device=hidden.device)
        for number, weight in enumerate(weights):
            for start in range(0, len(targets), chunk):
                part = slice(start, start + chunk)
                with torch.set_grad_enabled(wanted):
                    piece = hidden[number, part].detach().requires_grad_(wanted)
                    loss = cross_entropy(logits(piece).float(), targets[part], reduction="sum")
                sums[number] += loss.detach()
                if wanted:
                    first, *rest = torch.autograd.grad(loss, [piece, *trained], allow_unused=True)
                    of_hidden[number, part] = first * weight
                    for gathered, gradient in zip(of_trained, rest, strict=True):
                        if gradient is not None:
                            gathered.add_(gradient, alpha=weight)
        ctx.gradients = (of_hidden, of_trained, [parameter.requires_grad for parameter in parameters])
        ctx.mark_non_differentiable(sums)
        return (sums * torch.tensor(weights, device=sums.device)).sum(), sums

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_trained, asked = ctx.gradients
        ctx.gradients = None  # the memory is needed now, and the graph is walked once
        rest = iter(of_trained)
        of_parameters = [next(rest).mul_(upstream[0]) if one else None for one in asked]
        return (None, None, None, None, of_hidden.mul_(upstream[0]), *of_parameters)
