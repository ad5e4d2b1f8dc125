"""Who attends: the router of routed attention, one decision for each position."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.model.filters import moving_average


class Routing(NamedTuple):
    """What the router said: `gate` (rows, width) in {0, 1}, 1 attends, with the straight-through gradient in training;
    `logits` (rows, width), positive where attention is preferred. Padding has gate 0."""

    gate: Tensor
    logits: Tensor


class Router(nn.Module):
    """Linear, GELU, linear on [x ; moving average of x], per position: one logit, positive to attend.

    One logit is the published two's difference. The moving average (decay 0.9, zero before the text) is linear and so
    commutes with the first map; it is taken after it, on `width` numbers instead of the hidden size.
    """

    def __init__(self, hidden_size: int, width: int, decay: float = 0.9, initial_usage: float = 0.5) -> None:
        super().__init__()
        self.inputs = nn.Linear(hidden_size, 2 * width)  # for x and for the average, in one product
        self.out = nn.Linear(width, 1)
        self.decay, self.initial_usage = decay, initial_usage
        self.start()

    def start(self) -> None:
        """Set the bias to `initial_usage`."""
        with torch.no_grad():
            self.out.bias.fill_(math.log(self.initial_usage / (1 - self.initial_usage)))

    def forward(self, hidden: Tensor, mask: Tensor | None, average: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits (rows, width) and the moving average after the last position (rows, router width)."""
        # Functions, not modules: for one token the calls of three modules take as long as what they compute.
        now, past = F.linear(hidden, self.inputs.weight, self.inputs.bias).chunk(2, dim=-1)
        if mask is not None:
            past = past * mask[..., None]
        past = moving_average(past, self.decay, average)
        # Not the exact GELU: on a CPU that goes through oneDNN, a high price for the few numbers of one token.
        inner = F.gelu(now + past, approximate="tanh")
        return F.linear(inner, self.out.weight, self.out.bias)[..., 0], past[:, -1]


def gumbel_sigmoid(logits: Tensor, tau: float = 1.0) -> Tensor:
    """1 with the probability sigmoid(logit), else 0; the gradient is that of the relaxed sample at temperature `tau`.

    The hard Gumbel softmax (arXiv 1611.01144) of two logits, of which only the difference matters: two Gumbel
    variables differ by a logistic one.
    """
    uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((logits + torch.logit(uniform)) / tau)
    return (soft > 0.5).to(soft.dtype) - soft.detach() + soft
