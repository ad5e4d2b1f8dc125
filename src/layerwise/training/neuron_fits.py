"""Which neurons of MLPs some inputs can do without, measured on their answers: see `model.thin`.

What an answer loses without neuron j is foretold by the first order of its loss L,

    worth_j = sum over tokens of  (a_j dL/da_j)^2         a_j = act(gate_j . x) * (up_j . x)

which is what leaving it out at that token would change, squared (Molchanov et al., arXiv 1906.10771). The least worth
are left out first, over all layers alike, because a neuron costs the same in each; a part at a time, and then all that
are left are measured anew, on other examples: what one neuron says another may say too.

Kept neurons come in quarters of a layer's, so that there are no more than three sizes of thin MLPs, for each of which a
kernel has to be compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.data.examples import Tokens, collate, length_sorted_batches
from layerwise.model.modes import evaluating
from layerwise.model.runtime import Runtime
from layerwise.model.thin import ThinMlps, gated
from layerwise.plan import Part, Plan, Visit
from layerwise.training.gate_fits import row_losses

if TYPE_CHECKING:
    from layerwise.model.causal_lm import LayerwiseForCausalLM

TOKENS_AT_ONCE = 1024
ROUNDS = 4
SIZES = 4  # a thin MLP keeps a multiple of a layer's neurons divided by this


def neuron_worths(model: LayerwiseForCausalLM, examples: Sequence[Tokens]) -> Tensor:
    """The worth of every neuron to these answers, (layers, neurons) float64, summed over examples.

    Layers that have a thin MLP run with it; the worth of what it leaves out is 0.

    Raises:
        UnsupportedModelError: the MLPs are not gated ones.
    """
    backbone = model.runtime.backbone
    plan = Plan(tuple(Visit(n, Part.THIN if n in backbone.thin else Part.BOTH) for n in range(model.depth)))
    maps = [gated(backbone.module(visit).mlp)[2] for visit in plan]
    kept = {} if model.thin is None else model.thin.kept
    worths = torch.zeros(model.depth, max(gated(layer.mlp)[2].in_features for layer in backbone.layers)).double()
    with evaluating(model), _inputs(maps) as seen:
        for group in length_sorted_batches([len(one.input_ids) for one in examples], TOKENS_AT_ONCE):
            batch, counts = collate([examples[at] for at in group], 0), [len(examples[at].input_ids) for at in group]
            with torch.enable_grad():
                hidden = model.embed(batch["input_ids"].to(model.device)).detach().requires_grad_()
                deep = Runtime(backbone).forward(hidden, [plan] * len(group), counts)
                losses, _ = row_losses(backbone, deep, batch["labels"].to(model.device), counts)
                gradients = torch.autograd.grad(losses.sum(), seen)
            for layer, (activation, gradient) in enumerate(zip(seen, gradients, strict=True)):
                changes = (activation.detach().float() * gradient.float()).square().sum((0, 1)).double().cpu()
                worths[layer, kept.get(layer, slice(len(changes)))] += changes
            seen.clear()
    return worths


@contextmanager
def _inputs(maps: Sequence[torch.nn.Module]) -> Iterator[list[Tensor]]:
    """A list that gets what enters these maps in the passes within; the caller empties it."""
    seen: list[Tensor] = []
    hooks = [one.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0])) for one in maps]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def least_worth(worths: Tensor, count: int, sizes: int | None = None) -> dict[int, Tensor]:
    """Leave out about `count` neurons of least worth, over all layers; what the layers that lose some keep.

    Args:
        worths: (layers, neurons).
        sizes: leave out whole parts of a layer's neurons, of so many alike; but for the part of most worth, since a
            layer keeps some.
    """
    neurons = worths.shape[1]
    size = 1 if sizes is None else -(-neurons // sizes)
    ordered, order = worths.sort(dim=1)
    parts = [part.sum(1) for part in ordered.split(size, dim=1)][:-1]
    table = torch.stack(parts, 1)  # (layers, parts), ascending in each
    picked = table.flatten().argsort()[: round(count / size)]
    left_out = torch.bincount(picked // table.shape[1], minlength=len(worths)) * size
    return {layer: order[layer, less:] for layer, less in enumerate(left_out.tolist()) if less}


def choose_neurons(model: LayerwiseForCausalLM, examples: Sequence[Tokens], share: float) -> None:
    """Give the model thin MLPs that leave out a share of all its neurons, those of least worth to these answers."""
    neurons = gated(model.runtime.backbone.layers[0].mlp)[2].in_features
    for done in range(ROUNDS):
        worths = neuron_worths(model, examples[done::ROUNDS])
        for layer, kept in _kept(model).items():
            gone = torch.ones(neurons, dtype=torch.bool)
            gone[kept] = False
            worths[layer, gone] = -1.0  # stays out
        count = round(share * model.depth * neurons * (done + 1) / ROUNDS)
        last = done == ROUNDS - 1
        thin = least_worth(worths, count, SIZES if last else None)
        model.thin_by(ThinMlps(model.runtime.backbone, thin))


def _kept(model: LayerwiseForCausalLM) -> Mapping[int, Tensor]:
    return {} if model.thin is None else model.thin.kept
