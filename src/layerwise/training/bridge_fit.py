"""Bridges fitted by least squares, before any step of training: see `model.bridges`.

Layer after layer, on texts that walk the plan with bridges: from what enters the layer there, a ridge regression
foretells what is missing to the state that the same text has after the layer when every layer runs. So a bridge also
mends what those before it got wrong. The map is then cut to its rank by the directions in which its own outputs differ
most (reduced-rank regression), and split into two factors whose rows and columns are equally long, because an optimizer
such as Adam takes equal steps on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.data.examples import Tokens, collate, length_sorted_batches
from layerwise.model.bridges import Bridge
from layerwise.model.modes import evaluating
from layerwise.model.runtime import Runtime
from layerwise.plan import Part, Plan
from layerwise.policies.prompts import normalised

if TYPE_CHECKING:
    from layerwise.model.causal_lm import LayerwiseForCausalLM

TOKENS_AT_ONCE = 2048
RIDGE = 0.02  # a token, where what a bridge sees has a mean square of 1
FIRST = 20.0  # what the first token of a text weighs: there is one, unlike all others, and all others look at it


@torch.no_grad()
def fit_bridges(model: LayerwiseForCausalLM, examples: Sequence[Tokens], plan: Plan) -> None:
    """Fit the bridges that `plan` names, which is else the full plan, to these examples, prompts and answers."""
    runtime, full = Runtime(model.runtime.backbone), Plan.full(model.depth)
    with evaluating(model):
        walks = []  # (states by the plan, states with every layer, tokens of each row)
        for group in length_sorted_batches([len(one.input_ids) for one in examples], TOKENS_AT_ONCE):
            ids = collate([examples[at] for at in group], 0)["input_ids"].to(model.device)
            counts = [len(examples[at].input_ids) for at in group]
            embedded = model.embed(ids)
            walks.append([embedded, embedded, counts])
        for visit in plan:
            for walk in walks:
                walk[1] = runtime.forward(walk[1], [full[visit.layer : visit.layer + 1]] * len(walk[2]), walk[2])
            if visit.part is Part.BRIDGE:
                _fit(model.bridges[visit.layer], walks)
            for walk in walks:
                walk[0] = runtime.forward(walk[0], [Plan((visit,))] * len(walk[2]), walk[2])


def _fit(bridge: Bridge, walks: Sequence[Sequence[Any]]) -> None:
    seen, missing, weights = [], [], []
    for entering, wanted, counts in walks:
        width, device = entering.shape[1], entering.device
        inside = torch.arange(width, device=device) < torch.tensor(counts, device=device)[:, None]
        weight = torch.ones(inside.shape, device=device)
        weight[:, 0] = FIRST
        seen.append(normalised(entering)[inside])
        missing.append((wanted.float() - entering.float())[inside])
        weights.append(weight[inside])
    down, up, bias = low_rank(torch.cat(seen), torch.cat(missing), torch.cat(weights), bridge.down.out_features)
    bridge.down.weight.copy_(down)
    bridge.up.weight.copy_(up)
    bridge.up.bias.copy_(bias)


def low_rank(inputs: Tensor, outputs: Tensor, weights: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted ridge regression of outputs (n, out) on inputs (n, in), of a rank: up @ down @ input + bias.

    Args:
        weights: (n,) of the rows.

    Returns:
        down (rank, in), up (out, rank) and bias (out,), in float32.
    """
    inputs, outputs, weights = inputs.double(), outputs.double(), weights.double()[:, None]
    of_inputs, of_outputs = ((weights * one).sum(0) / weights.sum() for one in (inputs, outputs))
    centred, aimed = inputs - of_inputs, outputs - of_outputs
    square = centred.T @ (weights * centred)
    ridge = RIDGE * weights.sum() * torch.eye(len(square), dtype=square.dtype, device=square.device)
    whole = torch.linalg.solve(square + ridge, centred.T @ (weights * aimed))  # (in, out)
    _, directions = torch.linalg.eigh(whole.T @ square @ whole)  # ascending
    up = directions[:, -rank:].flip(-1)
    down = (whole @ up).T
    bias = of_outputs - up @ (down @ of_inputs)
    scale = down.norm(dim=1).clamp(min=1e-12).sqrt()
    return (down / scale[:, None]).float(), (up * scale).float(), bias.float()
