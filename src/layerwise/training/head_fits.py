"""The thin head that some inputs bear: see `model.thin_head`.

With states h of texts, after the final norm and about to be the head's input, and W the head, the preview keeps the
directions in which W h differs most over these texts: with C the covariance of h,

    maximise  tr(P C P^T W^T W)  over projections P of a rank

which is the principal components of C^1/2, weighed by W^T W (the activation-aware form of truncating W's singular
values, as in arXiv 2312.05821).

Prompts count as much as answers. They have ten times as many tokens, and what answers copy stands there: fitted to
answers alone, the preview leaves out a word that no answer had, which costs a whole answer's worth of nats at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.data.examples import Tokens, collate, length_sorted_batches
from layerwise.model.modes import evaluating
from layerwise.model.runtime import Runtime
from layerwise.model.thin_head import ThinHead
from layerwise.plan import Plan

if TYPE_CHECKING:
    from layerwise.model.causal_lm import LayerwiseForCausalLM

TOKENS_AT_ONCE = 2048
RIDGE = 1e-4  # of the states' mean variance: no direction is without any


@torch.no_grad()
def fit_thin_head(
    model: LayerwiseForCausalLM, examples: Sequence[Tokens], plan: Plan, rank: int, candidates: int
) -> None:
    """Give the model a thin head for texts such as these, which walk `plan`.

    Raises:
        ValueError: the rank is not below the hidden size, or there are more candidates than tokens.
    """
    backbone = model.runtime.backbone
    hidden = backbone.shape.hidden
    if not 0 < rank < hidden:
        raise ValueError(f"a thin head has a rank from 1 to {hidden - 1}, not {rank}")
    seen, total, squares = 0, torch.zeros(hidden).double(), torch.zeros(hidden, hidden).double()
    for states in final_states(model, examples, plan):
        seen, total = seen + len(states), total + states.double().sum(0)
        squares += states.double().T @ states.double()
    center = total / seen
    covariance = squares / seen - torch.outer(center, center)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(hidden).double()
    root = torch.linalg.cholesky(covariance)
    head = backbone.head.weight.detach().cpu().float()
    _, directions = torch.linalg.eigh(root.T @ (head.T @ head).double() @ root)  # ascending
    best = directions[:, -rank:].flip(-1)
    down = torch.linalg.solve_triangular(root, best.T, upper=False, left=False)
    model.thin_head_by(ThinHead(backbone, center, down, root @ best, candidates))


@torch.no_grad()
def final_states(model: LayerwiseForCausalLM, examples: Sequence[Tokens], plan: Plan) -> Iterator[Tensor]:
    """What enters the head, after the final norm, of all tokens: some examples at a time, (tokens, hidden size) float32
    on the CPU."""
    backbone = model.runtime.backbone
    for group in length_sorted_batches([len(one.input_ids) for one in examples], TOKENS_AT_ONCE):
        batch, counts = collate([examples[at] for at in group], 0), [len(examples[at].input_ids) for at in group]
        with evaluating(model):
            hidden = model.embed(batch["input_ids"].to(model.device))
            deep = Runtime(backbone).forward(hidden, [plan] * len(group), counts)
        yield backbone.norm(deep)[batch["attention_mask"].bool()].float().cpu()
