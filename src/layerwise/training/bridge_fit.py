"""Bridges fitted by least squares, without a step of training: see `model.bridges`.

From what enters a layer a ridge regression foretells what is missing to the state that the same text has after the
layer when every layer runs. Where it is known which layers a plan leaves out (`fit_bridges`), the texts walk that plan,
layer after layer, so a bridge also mends what those before it got wrong; where plans are still to be found
(`fit_every_bridge`), each bridge is fitted to its layer alone.

The map is then cut to its rank by the directions in which its own outputs differ most (reduced-rank regression), and
split into two factors whose rows and columns are equally long, because an optimizer such as Adam takes equal steps on
both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.data.examples import length_sorted_batches
from layerwise.model.bridges import Bridge
from layerwise.model.modes import evaluating
from layerwise.model.packing import padded
from layerwise.model.runtime import Runtime
from layerwise.plan import Part, Plan, Visit
from layerwise.policies.prompts import normalised

if TYPE_CHECKING:
    from layerwise.model.causal_lm import LayerwiseForCausalLM

Visits = tuple[Visit, ...]  # what a plan makes of one layer: nothing, one visit, or attention and a bridge
TOKENS_AT_ONCE = 2048
RIDGE = 0.02  # a token, where what a bridge sees has a mean square of 1
FIRST = 20.0  # what the first token of a text weighs: there is one, unlike all others, and all others look at it


@torch.no_grad()
def fit_bridges(model: LayerwiseForCausalLM, texts: Sequence[Sequence[int]], *plans: Plan) -> None:
    """Fit the bridges that the plans name to these texts (token ids). No bridge may be in two of them.

    A bridge does for its layer and for those right before it that the plan leaves out. What a plan repeats, the states
    with every layer have been through twice as well.
    """
    alike: dict[tuple[int, ...], list[list[Visits]]] = {}
    for plan in plans:
        walk = _beside_every_layer(plan)
        alike.setdefault(tuple(layer for layer, _ in walk), []).append([visits for _, visits in walk])
    with evaluating(model):
        for layers, those in alike.items():
            _fit_along(model, texts, layers, those)


def _beside_every_layer(plan: Plan) -> list[tuple[int, Visits]]:
    """The layers of the full plan, and of the repeats of this one, each with what the plan visits there."""
    walk: list[tuple[int, Visits]] = []
    last = -1
    for visit in plan:
        if walk and visit.part is Part.BRIDGE and walk[-1][1] == (Visit(visit.layer, Part.ATTENTION),):
            walk[-1] = (visit.layer, (*walk[-1][1], visit))  # the bridge stands in for the MLP alone
            continue
        walk += [(layer, ()) for layer in range(last + 1, visit.layer)]
        walk.append((visit.layer, (visit,)))
        last = visit.layer
    return walk


def _fit_along(
    model: LayerwiseForCausalLM,
    texts: Sequence[Sequence[int]],
    layers: Sequence[int],
    plans: Sequence[Sequence[Visits]],
) -> None:
    """Fit the bridges of plans beside the same layers: `plans[p][at]` are what plan p visits at `layers[at]`."""
    runtime = Runtime(model.runtime.backbone)
    batches = list(_batches(model, texts))

    def after(visit: Visit, states: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(states, batches, strict=True)
        return [runtime.forward(one, [Plan((visit,))] * len(counts), counts) for one, (_, counts) in pairs]

    whole = [embedded for embedded, _ in batches]  # states with every layer
    walks = [whole for _ in plans]  # states by each plan: the same until it leaves something out
    for at, layer in enumerate(layers):
        before, whole = whole, after(Visit(layer), whole)
        for number, plan in enumerate(plans):
            if walks[number] is before and plan[at] == (Visit(layer),):
                walks[number] = whole
                continue
            for visit in plan[at]:
                if visit.part is Part.BRIDGE:
                    moments = Moments()
                    for entering, wanted, (_, counts) in zip(walks[number], whole, batches, strict=True):
                        moments.add(*_rows(entering, wanted, counts))
                    _set(model.bridges[visit], moments)
                walks[number] = after(visit, walks[number])


@torch.no_grad()
def fit_every_bridge(model: LayerwiseForCausalLM, texts: Sequence[Sequence[int]]) -> None:
    """Fit all bridges of set 0 to these texts (token ids), which walk the full plan."""
    runtime, full, bridges = Runtime(model.runtime.backbone), Plan.full(model.depth), model.bridges
    found = {visit.layer: Moments() for visit in bridges.visits if not visit.set}
    with evaluating(model):
        for hidden, counts in _batches(model, texts):
            for layer in range(model.depth):
                entering, hidden = hidden, runtime.forward(hidden, [full[layer : layer + 1]] * len(counts), counts)
                if layer in found:
                    found[layer].add(*_rows(entering, hidden, counts))
    for layer, moments in found.items():
        _set(bridges[layer], moments)


def _batches(model: LayerwiseForCausalLM, texts: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, list[int]]]:
    """Embeddings (rows, width, d) of texts of similar length, and how many tokens each row has."""
    for group in length_sorted_batches([len(text) for text in texts], TOKENS_AT_ONCE):
        ids, counts = padded([texts[at] for at in group])
        yield model.embed(ids.to(model.device)), counts


def _rows(entering: Tensor, wanted: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token what a bridge sees, what it should add, and what the token weighs."""
    columns = torch.arange(entering.shape[1], device=entering.device)
    inside = columns < torch.tensor(counts, device=entering.device)[:, None]
    weight = torch.ones(inside.shape, device=entering.device)
    weight[:, 0] = FIRST
    return normalised(entering)[inside], (wanted.float() - entering.float())[inside], weight[inside]


def _set(bridge: Bridge, moments: Moments) -> None:
    down, up, bias = moments.low_rank(bridge.down.out_features)
    bridge.down.weight.copy_(down)
    bridge.up.weight.copy_(up)
    bridge.up.bias.copy_(bias)


class Moments:
    """What a weighted ridge regression has to know of its rows: they are added bit by bit, and forgotten."""

    def __init__(self) -> None:
        self.weight = torch.zeros((), dtype=torch.float64)
        self.inputs, self.outputs = self.weight, self.weight  # weighted sums
        self.squares, self.products = self.weight, self.weight  # of inputs with inputs and with outputs

    def add(self, inputs: Tensor, outputs: Tensor, weights: Tensor) -> None:
        """Add rows: inputs (n, in), outputs (n, out) and their weights (n,); sums are kept on the CPU, in float64."""
        inputs, outputs, weights = (one.cpu() for one in (inputs, outputs, weights))
        weighed = (inputs * weights[:, None]).double()
        self.weight = self.weight + weights.double().sum()
        self.inputs = self.inputs + weighed.sum(0)
        self.outputs = self.outputs + weights.double() @ outputs.double()
        self.squares = self.squares + weighed.T @ inputs.double()
        self.products = self.products + weighed.T @ outputs.double()

    def low_rank(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The ridge regression, of a rank: up @ down @ input + bias.

        Returns:
            down (rank, in), up (out, rank) and bias (out,), in float32.
        """
        of_inputs, of_outputs = self.inputs / self.weight, self.outputs / self.weight
        square = self.squares - self.weight * torch.outer(of_inputs, of_inputs)
        product = self.products - self.weight * torch.outer(of_inputs, of_outputs)
        ridge = RIDGE * self.weight * torch.eye(len(square), dtype=square.dtype, device=square.device)
        whole = torch.linalg.solve(square + ridge, product)  # (in, out)
        _, directions = torch.linalg.eigh(whole.T @ square @ whole)  # ascending
        up = directions[:, -rank:].flip(-1)
        down = (whole @ up).T
        bias = of_outputs - up @ (down @ of_inputs)
        scale = down.norm(dim=1).clamp(min=1e-12).sqrt()
        return (down / scale[:, None]).float(), (up * scale).float(), bias.float()
