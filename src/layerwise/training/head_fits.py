"""The thin head that some inputs bear: see `model.thin_head`.

With states h of answers, after the final norm and about to be the head's input, and W the head, the preview keeps the
directions in which W h differs most over these answers: with C the covariance of h,

    maximise  tr(P C P^T W^T W)  over projections P of a rank

which is the principal components of C^1/2, weighed by W^T W (the activation-aware form of truncating W's singular
values, as in arXiv 2312.05821).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.data.examples import Tokens, collate, length_sorted_batches
from layerwise.model.modes import evaluating
from layerwise.model.runtime import Runtime
from layerwise.model.thin_head import ThinHead
from layerwise.plan import Plan
from layerwise.training.exit_loss import labelled

if TYPE_CHECKING:
    from layerwise.model.causal_lm import LayerwiseForCausalLM

TOKENS_AT_ONCE = 2048
RIDGE = 1e-4  # of the states' mean variance: no direction is without any


@torch.no_grad()
def fit_thin_head(
    model: LayerwiseForCausalLM, examples: Sequence[Tokens], plan: Plan, rank: int, candidates: int
) -> None:
    """Give the model a thin head for answers such as these, which walk `plan`.

    Raises:
        ValueError: the rank is not below the hidden size, or there are more candidates than tokens.
    """
    backbone = model.runtime.backbone
    hidden = backbone.shape.hidden
    if not 0 < rank < hidden:
        raise ValueError(f"a thin head has a rank from 1 to {hidden - 1}, not {rank}")
    states = answer_states(model, examples, plan).double()
    center = states.mean(0)
    covariance = (states - center).T @ (states - center) / len(states)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(hidden, dtype=states.dtype)
    root = torch.linalg.cholesky(covariance)
    head = backbone.head.weight.detach().cpu().float()
    _, directions = torch.linalg.eigh(root.T @ (head.T @ head).double() @ root)  # ascending
    best = directions[:, -rank:].flip(-1)
    down = torch.linalg.solve_triangular(root, best.T, upper=False, left=False)
    model.thin_head_by(ThinHead(backbone, center, down, root @ best, candidates))


@torch.no_grad()
def answer_states(model: LayerwiseForCausalLM, examples: Sequence[Tokens], plan: Plan) -> Tensor:
    """(tokens, hidden size) float32 on the CPU: of all answers what enters the head, after the final norm."""
    backbone, found = model.runtime.backbone, []
    with evaluating(model):
        for group in length_sorted_batches([len(one.input_ids) for one in examples], TOKENS_AT_ONCE):
            batch, counts = collate([examples[at] for at in group], 0), [len(examples[at].input_ids) for at in group]
            hidden = model.embed(batch["input_ids"].to(model.device))
            deep = Runtime(backbone).forward(hidden, [plan] * len(group), counts)
            at, _ = labelled(batch["labels"].to(model.device), counts)
            found.append(backbone.norm(deep.flatten(0, 1)[at]).float().cpu())
    return torch.cat(found)
