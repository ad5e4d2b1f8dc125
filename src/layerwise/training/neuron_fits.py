"""Which neurons of MLPs some inputs can do without, measured on their answers: see `model.thin`.

What an answer loses without neuron j is foretold by the first order of its loss L,

    worth_j = sum over tokens of  (a_j dL/da_j)^2         a_j = act(gate_j . x) * (up_j . x)

which is what leaving it out at that token would change, squared (Molchanov et al., arXiv 1906.10771). The least worth
are left out first, over all layers alike, because a neuron costs the same in each; a part at a time, and then all that
are left are measured anew, on other examples: what one neuron says another may say too.

Kept neurons come in eighths of a layer's, so that there are no more than seven sizes of thin MLPs, for each of which a
kernel has to be compiled.

What is left is mended by least squares (`mend_neurons`): texts walk the whole layers, and beside it those with thin
MLPs, and from what the kept neurons say a ridge regression foretells what the second walk lacks of the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.data.examples import IGNORED, Tokens, collate, length_sorted_batches
from layerwise.model.modes import evaluating
from layerwise.model.runtime import Runtime
from layerwise.model.thin import ThinMlps, gated
from layerwise.plan import Part, Plan, Visit
from layerwise.training.bridge_fit import Moments
from layerwise.training.gate_fits import row_losses

if TYPE_CHECKING:
    from layerwise.model.causal_lm import LayerwiseForCausalLM

TOKENS_AT_ONCE = 1024
ROUNDS = 4
OF_PROMPTS = 0.3  # what a token of a prompt weighs beside one of an answer, where thin MLPs are mended
SIZES = 8  # a thin MLP keeps a multiple of a layer's neurons divided by this


def neuron_worths(model: LayerwiseForCausalLM, examples: Sequence[Tokens]) -> Tensor:
    """The worth of every neuron to these answers, (layers, neurons) float64, summed over examples.

    Layers that have a thin MLP run with it; the worth of what it leaves out is 0.

    Raises:
        UnsupportedModelError: the MLPs are not gated ones.
    """
    backbone = model.runtime.backbone
    plan = _with_thin(model)
    maps = [backbone.module(visit).mlp.down_proj for visit in plan]
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


def _with_thin(model: LayerwiseForCausalLM) -> Plan:
    """Every layer, with its thin MLP if it has one."""
    thin = model.runtime.backbone.thin
    return Plan(tuple(Visit(layer, Part.THIN if layer in thin else Part.BOTH) for layer in range(model.depth)))


def choose_neurons(
    model: LayerwiseForCausalLM, examples: Sequence[Tokens], share: float, rounds: int = ROUNDS, rank: int = 0
) -> None:
    """Give the model thin MLPs that leave out a share of all its neurons, those of least worth to these answers.

    Args:
        rounds: in which they are left out, a part in each.
        rank: of what mends them, if anything is to; it adds nothing yet.
    """
    neurons = gated(model.runtime.backbone.layers[0].mlp)[2].in_features
    for done in range(rounds):
        worths = neuron_worths(model, examples[done::rounds])
        for layer, kept in _kept(model).items():
            gone = torch.ones(neurons, dtype=torch.bool)
            gone[kept] = False
            worths[layer, gone] = -1.0  # stays out
        count = round(share * model.depth * neurons * (done + 1) / rounds)
        last = done == rounds - 1
        thin = least_worth(worths, count, SIZES if last else None)
        model.thin_by(ThinMlps(model.runtime.backbone, thin, rank if last else 0))


@torch.no_grad()
def mend_neurons(model: LayerwiseForCausalLM, examples: Sequence[Tokens], plan: Plan) -> None:
    """Fit what mends the thin MLPs of a plan to the texts of these examples, layer after layer."""
    runtime, thin = Runtime(model.runtime.backbone), model.thin
    groups = length_sorted_batches([len(one.input_ids) for one in examples], TOKENS_AT_ONCE)
    batches = [collate([examples[at] for at in group], 0) for group in groups]
    counts = [[len(examples[at].input_ids) for at in group] for group in groups]

    def after(visit: Visit, states: Sequence[Tensor]) -> list[Tensor]:
        return [runtime.forward(one, [Plan((visit,))] * len(n), n) for one, n in zip(states, counts, strict=True)]

    with evaluating(model):
        whole = [model.embed(batch["input_ids"].to(model.device)) for batch in batches]  # states with every layer whole
        walk = whole
        last = -1
        for visit in plan:
            if visit.layer != last:
                before, whole = whole, after(Visit(visit.layer), whole)
            last = visit.layer
            if visit.part is not Part.THIN:
                walk = whole if walk is before and visit.part is Part.BOTH else after(visit, walk)
                continue
            mend, moments = thin.mends[str(visit.layer)], Moments()
            mend.out.weight.zero_()
            mend.out.bias.zero_()
            with _inputs([thin[visit.layer].down_proj]) as seen:
                unmended = after(visit, walk)
            for activations, reached, wanted, batch in zip(seen, unmended, whole, batches, strict=True):
                inside = batch["attention_mask"].bool()
                weights = torch.where(batch["labels"] == IGNORED, OF_PROMPTS, 1.0)[inside]
                lacks = wanted.float() - reached.float()
                moments.add(activations[inside].float(), lacks[inside], weights)
            into, out, bias = moments.low_rank(mend.into.out_features)
            mend.into.weight.copy_(into)
            mend.out.weight.copy_(out)
            mend.out.bias.copy_(bias)
            walk = after(visit, walk)


def _kept(model: LayerwiseForCausalLM) -> Mapping[int, Tensor]:
    return {} if model.thin is None else model.thin.kept
