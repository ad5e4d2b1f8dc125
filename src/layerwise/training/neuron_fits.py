"""Which neurons of MLPs some inputs can do without, and how the others speak for them: see `model.thin`.

Leaving neurons out of an MLP, and changing the map down of those that stay to make up for them, is pruning by the
optimal brain surgeon (Hassibi and Stork 1993), here of whole columns (as in arXiv 2302.04089). With activations a of
all neurons, the map down W, and the gradients g of the answers' loss at what the MLP adds,

    H = sum over tokens of  w a a^T          G = sum over tokens of  g g^T

(the loss is taken for a quadratic with curvature G x H, arXiv 1503.05671; w is 1 for tokens that predict a labelled one
and less for those of prompts), neurons S are left out at the cost

    tr(G W_S C_S^-1 W_S^T)          C = H^-1, C_S its rows and columns S

if W changes by -W_S C_S^-1 C_S: (S, all). The cheapest are left out first, a few at a time, down to an eighth of the
layer's. That gives each layer a curve, what it costs to leave out so much; and of all layers the cheapest steps are
taken, since a neuron saves the same in each. The change of W is cut to a low rank, by G and H as well.

Kept neurons come in eighths of a layer's, so that there are no more than seven sizes of thin MLPs, for each of which a
kernel has to be compiled.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isnan
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.data.examples import IGNORED, Tokens, collate, length_sorted_batches
from layerwise.model.modes import evaluating
from layerwise.model.runtime import Runtime
from layerwise.model.thin import ThinMlps, gated
from layerwise.plan import Plan
from layerwise.training.gate_fits import row_losses

if TYPE_CHECKING:
    from layerwise.model.causal_lm import LayerwiseForCausalLM

TOKENS_AT_ONCE = 1024
SIZES = 8  # a thin MLP keeps a multiple of a layer's neurons divided by this
AT_ONCE = 32  # neurons left out before costs are counted anew
OF_PROMPTS = 0.2  # what a token of a prompt weighs beside one that predicts a label
RIDGE = 0.005  # of the activations' mean square
FLOOR = 0.02  # of the mean over all directions of outputs: none matters less, as far as ranks are cut


@dataclass
class Moments:
    """Of one layer, summed over tokens: what its neurons say, with a 1 for the bias, and what its outputs matter.

    Attributes:
        says: (neurons + 1, neurons + 1), H above.
        matters: (hidden size, hidden size), G above.
    """

    says: Tensor
    matters: Tensor


def moments(model: LayerwiseForCausalLM, examples: Sequence[Tokens]) -> list[Moments]:
    """The moments of every layer, all of which run, over these examples.

    Raises:
        UnsupportedModelError: the MLPs are not gated ones.
    """
    backbone = model.runtime.backbone
    maps = [gated(layer.mlp)[2] for layer in backbone.layers]
    plan = Plan.full(model.depth)
    found = [Moments(torch.zeros(one.in_features + 1, one.in_features + 1), torch.zeros(())) for one in maps]
    with evaluating(model), _calls(maps) as calls:
        for group in length_sorted_batches([len(one.input_ids) for one in examples], TOKENS_AT_ONCE):
            batch, counts = collate([examples[at] for at in group], 0), [len(examples[at].input_ids) for at in group]
            with torch.enable_grad():
                hidden = model.embed(batch["input_ids"].to(model.device)).detach().requires_grad_()
                deep = Runtime(backbone).forward(hidden, [plan] * len(group), counts)
                losses, _ = row_losses(backbone, deep, batch["labels"].to(model.device), counts)
                gradients = torch.autograd.grad(losses.sum(), [output for _, output in calls])
            inside = batch["attention_mask"].bool()
            predicts = batch["labels"].roll(-1, 1) != IGNORED  # never of the last column, whose next is the first
            weights = torch.where(predicts, 1.0, OF_PROMPTS)[inside]
            for layer, ((activations, _), gradient) in enumerate(zip(calls, gradients, strict=True)):
                rows = activations.detach()[inside].float().cpu()
                rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
                felt = gradient[inside].float().cpu()
                found[layer].says += (rows * weights[:, None]).T @ rows
                found[layer].matters = found[layer].matters + felt.T @ felt
            calls.clear()
    return found


@contextmanager
def _calls(maps: Sequence[torch.nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list that gets input and output of these maps in the passes within; the caller empties it."""
    calls: list[tuple[Tensor, Tensor]] = []
    hooks = [one.register_forward_hook(lambda _, given, output: calls.append((given[0], output))) for one in maps]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Thinned:
    """A map down with some of its neurons left out.

    Attributes:
        cost: as above, of leaving them out.
        kept: (neurons,) those that stay, ascending.
        weight, bias: (hidden size, kept neurons) and (hidden size,), changed to make up for the others.
    """

    cost: float
    kept: Tensor
    weight: Tensor
    bias: Tensor


def eliminated(weight: Tensor, of: Moments, sizes: int = SIZES) -> Iterator[Thinned]:
    """The map down (hidden size, neurons) with one, two, ... of `sizes` parts of its neurons left out, all but one.
    Each takes its time, when it is asked for."""
    neurons = weight.shape[1]
    part = -(-neurons // sizes)
    says, matters = of.says.double(), of.matters.double()
    ridge = torch.full((neurons + 1,), RIDGE * says.diagonal()[:-1].mean().item(), dtype=says.dtype)
    ridge[-1] = 0  # of the bias
    inverse = torch.linalg.inv(says + ridge.diag())
    changed = torch.cat([weight.double().cpu(), weight.new_zeros(len(weight), 1).double().cpu()], 1)
    felt = matters @ changed
    alive = torch.ones(neurons + 1, dtype=torch.bool)
    cost = 0.0
    for boundary in range(part, neurons, part):
        while (gone := int((~alive).sum())) < boundary:
            left = alive[:-1].nonzero()[:, 0]
            price = (changed[:, left] * felt[:, left]).sum(0) / inverse[left, left]
            those = left[price.argsort()[: min(AT_ONCE, boundary - gone)]]
            own = torch.linalg.inv(inverse[those][:, those])
            cost += (felt[:, those] * (changed[:, those] @ own)).sum().item()
            moved = own @ inverse[those]
            changed = changed - changed[:, those] @ moved
            felt = felt - felt[:, those] @ moved
            inverse = inverse - inverse[:, those] @ moved
            alive[those] = False
        kept = alive[:-1].nonzero()[:, 0]
        yield Thinned(cost, kept, changed[:, kept].float(), changed[:, -1].float())


def cheapest(ways: Iterable[Iterable[Thinned]], steps: int) -> list[Thinned | None]:
    """How far to go in each layer: so many steps in all, of all layers the cheapest, in each layer in order.

    Args:
        ways: of each layer what is left after its first step, its second, and so on. No more are asked for than it
            takes to know which are the cheapest.
    """
    best: list[tuple[float, int, Thinned]] = []  # price, layer
    layer = -1
    for layer, way in enumerate(ways):
        price = before = 0.0
        for one in way:
            rise, before = one.cost - before, one.cost
            # A step that costs less than the one before it does not come sooner; one that costs no number comes last.
            price = max(price, inf if isnan(rise) else rise)
            if len(best) == steps and (not steps or price >= best[-1][0]):
                break
            insort(best, (price, layer, one), key=itemgetter(0))
            del best[steps:]
    taken: list[Thinned | None] = [None] * (layer + 1)
    for _, layer, one in best:
        taken[layer] = one
    return taken


@torch.no_grad()
def thin_mlps(
    model: LayerwiseForCausalLM, found: Sequence[Moments], share: float, rank: int = 0, keep: Collection[int] = ()
) -> ThinMlps:
    """Thin MLPs that leave out a share of all the model's neurons, those that cost least by these moments.

    Args:
        found: of every layer, over the answers in question; see `moments`.
        rank: of what mends them; 0 for nothing.
        keep: layers that keep all their neurons.

    Raises:
        ValueError: the other layers have not so many to leave out, each of which keeps a part.
    """
    maps = [gated(layer.mlp)[2] for layer in model.runtime.backbone.layers]
    free, wanted = [layer for layer in range(model.depth) if layer not in keep], round(share * len(maps) * SIZES)
    if wanted > len(free) * (SIZES - 1):
        raise ValueError(
            f"{len(free)} layers cannot leave out {share:.0%} of all neurons: lower neurons, or keep fewer"
        )
    ways = (eliminated(maps[layer].weight.detach().float(), found[layer]) for layer in free)
    chosen = {layer: one for layer, one in zip(free, cheapest(ways, wanted), strict=True) if one is not None}
    thin = ThinMlps(model.runtime.backbone, {layer: one.kept for layer, one in chosen.items()}, rank)
    for layer, one in chosen.items() if rank else ():
        mend, says = thin.mends[str(layer)], found[layer].says
        stay = torch.cat([one.kept, torch.tensor([len(says) - 1])])
        change = one.weight - maps[layer].weight.detach().float().cpu()[:, one.kept]
        into, out = low_rank(change, Moments(says[stay][:, stay], found[layer].matters), rank)
        mean = says[one.kept, -1] / says[-1, -1]
        mend.into.weight.copy_(into)
        mend.out.weight.copy_(out)
        mend.out.bias.copy_(one.bias + (change - out @ into) @ mean)
    return thin


def low_rank(change: Tensor, of: Moments, rank: int) -> tuple[Tensor, Tensor]:
    """Factors into (rank, neurons) and out (hidden size, rank) of a change (hidden size, neurons) of a map.

    They keep the directions in which what it adds differs most where that matters: by the covariance of its inputs, and
    by G in the space of its outputs. Rows and columns are equally long.

    Args:
        of: of the same neurons.
    """
    change, says = change.double(), of.says.double()
    varies = says[:-1, :-1] - torch.outer(says[:-1, -1], says[-1, :-1]) / says[-1, -1]
    matters = of.matters.double()
    root = torch.linalg.cholesky(matters + FLOOR * matters.diagonal().mean() * torch.eye(len(matters)))
    felt = root.T @ change
    _, directions = torch.linalg.eigh(felt @ varies @ felt.T)  # ascending
    best = directions[:, -rank:].flip(-1)
    into, out = best.T @ felt, torch.linalg.solve_triangular(root.T, best, upper=True)
    scale = (into.norm(dim=1) / out.norm(dim=0)).clamp(min=1e-12).sqrt()
    return (into / scale[:, None]).float(), (out * scale).float()
