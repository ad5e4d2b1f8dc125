"""What policies that read a prompt share."""

from __future__ import annotations

import torch
from torch import Tensor


def normalised(states: Tensor) -> Tensor:
    """States (..., d) divided by their root mean square, float32."""
    states = states.float()
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)


def no_prompt() -> ValueError:
    """What to raise where plans are asked for without a prompt to decide from."""
    return ValueError("the routers decide while they read a prompt: give plans, or set model.plan, to do without them")
