"""Fitting the small routers of `policies.router` to features that were computed before.

The backbone is frozen and the paths are given, so what a router reads does not change while it learns: features are
computed once (`training.features`), and the 25 epochs of the paper run over small tensors.

*Per layer*: focal loss on the classes of the labelled path, weighted by class (arXiv 2510.12773, section 3.3). Almost
every label says execute, so the weights matter; with beta = 0.999, as published, they saturate at a thousand labels.

*Menu*: cross entropy of the plan that the question's task gets, see `training.menu`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import cos, pi

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, log_softmax

from layerwise.policies.router import CLASSES, Routers
from layerwise.training.recipes import RouterRecipe

SMALLEST = 1e-3  # standard deviation below which an input counts as constant


def class_weights(classes: Tensor, beta: float) -> Tensor:
    """Weights of skip, execute and repeat for labels of any shape: (1 - beta) / (1 - beta^n), scaled to mean 1.

    With beta = 1 they are 1/n, its limit. A class without a label gets 0 and does not count in the mean.
    """
    counts = torch.bincount(classes.flatten(), minlength=CLASSES).double()
    effective = counts if beta == 1 else (1 - beta**counts) / (1 - beta)
    weights = torch.where(counts > 0, 1 / effective.clamp(min=1e-12), 0.0)
    return (weights * (counts > 0).sum() / weights.sum()).float()


def focal_loss(logits: Tensor, classes: Tensor, weights: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean of - w_c (1 - p_c)^gamma log p_c, c the label: logits (..., classes), labels (...)."""
    log_p = log_softmax(logits, -1).gather(-1, classes[..., None]).squeeze(-1)
    return -(weights[classes] * (1 - log_p.exp()) ** gamma * log_p).mean()


def macro_f1(found: Tensor, expected: Tensor) -> float:
    """Mean over the classes that occur in `expected` of the harmonic mean of precision and recall; any one shape."""
    scores = []
    for one in expected.unique():
        hits = ((found == one) & (expected == one)).sum()
        scores.append(2 * hits / ((found == one).sum() + (expected == one).sum()))
    return torch.stack(scores).mean().item()


def fit_layers(
    means: Tensor, share: Tensor, classes: Tensor, held_out: Tensor, recipe: RouterRecipe, notify: Callable[[str], None]
) -> Routers:
    """One router a layer.

    Args:
        means: (questions, layers, windows, d), what entered each layer on the labelled path.
        share: (questions, windows), see `policies.router.windows`.
        classes: (questions, layers), the labels.
        held_out: (questions,) booleans; those do not train, the epoch with the least loss on them is kept.
    """
    layers, d = means.shape[1], means.shape[3]
    weights = class_weights(classes[~held_out], recipe.beta)
    centre, scale = _moments(means[~held_out], share[~held_out])
    routers = Routers.random(layers, d, CLASSES, recipe.units, recipe.seed)

    def loss(those: Routers, rows: Tensor) -> Tensor:
        logits = layer_logits(those, (means[rows].float() - centre) / scale, share[rows])
        return focal_loss(logits, classes[rows], weights, recipe.gamma)

    return _folded(_fit(routers, loss, held_out, recipe, notify), centre.squeeze(1), scale.squeeze(1))


def layer_logits(routers: Routers, means: Tensor, share: Tensor) -> Tensor:
    """The logits of all layers at once, (rows, layers, classes); arguments as in `fit_layers`."""
    rows, layers, count, d = means.shape
    inputs = means.transpose(0, 1).reshape(layers, rows * count, d)
    inner = gelu(torch.baddbmm(routers.inner_bias[:, None], inputs, routers.inner_weight.transpose(1, 2)))
    logits = torch.baddbmm(routers.outer_bias[:, None], inner, routers.outer_weight.transpose(1, 2))
    logits = logits.view(layers, rows, count, -1).transpose(0, 1)
    return (logits * share[:, None, :, None]).sum(2)


def fit_menu(
    read: Tensor, wanted: Tensor, held_out: Tensor, recipe: RouterRecipe, notify: Callable[[str], None]
) -> Routers:
    """The router of a menu, from what it reads (questions, 2 d) and the numbers of the wanted plans (questions,)."""
    inputs = read[:, None, None]
    centre, scale = _moments(inputs[~held_out], torch.ones(len(inputs), 1)[~held_out])
    routers = Routers.random(1, read.shape[1], int(wanted.max()) + 1, recipe.units, recipe.seed)
    # Nothing is known at first: all plans begin alike, and not by what random weights say.
    routers = replace(routers, outer_weight=torch.zeros_like(routers.outer_weight))
    standard = ((inputs - centre) / scale)[:, 0, 0]

    def loss(those: Routers, rows: Tensor) -> Tensor:
        return cross_entropy(those.logits(0, standard[rows]), wanted[rows])

    return _folded(_fit(routers, loss, held_out, recipe, notify), centre.squeeze(1), scale.squeeze(1))


def _fit(
    routers: Routers,
    loss: Callable[[Routers, Tensor], Tensor],
    held_out: Tensor,
    recipe: RouterRecipe,
    notify: Callable[[str], None],
) -> Routers:
    """AdamW with a cosine schedule; the routers of the epoch whose loss on held-out questions is least."""
    chance = torch.Generator().manual_seed(recipe.seed)
    train, judged = (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)
    routers = Routers(*(one.clone().requires_grad_() for one in routers.tensors().values()))
    parameters = list(routers.tensors().values())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    each = -(-len(train) // recipe.batch)
    steps = each * recipe.epochs
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_of(step, steps, recipe.warmup))
    best, least = routers, float("inf")
    for epoch in range(recipe.epochs):
        total = 0.0
        for rows in train[torch.randperm(len(train), generator=chance)].split(recipe.batch):
            optimizer.zero_grad()
            value = loss(routers, rows)
            value.backward()
            optimizer.step()
            rate.step()
            total += value.item() * len(rows)
        with torch.no_grad():
            found = sum(loss(routers, rows).item() * len(rows) for rows in judged.split(64)) / len(judged)
        if found < least:
            best, least = Routers(*(one.detach().clone() for one in parameters)), found
        notify(f"epoch {epoch + 1}/{recipe.epochs}: loss {total / len(train):.4f}, held out {found:.4f}")
    return best


def schedule_of(step: int, steps: int, warmup: int) -> float:
    """The learning rate's share of its maximum: a linear rise, at most a tenth of the steps, then half a cosine."""
    rise = min(warmup, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + cos(pi * (step - rise) / max(1, steps - rise)))


def _moments(means: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each input of each layer over questions and windows, each (layers, 1, d)."""
    weight = (share / share.sum()).float()
    total = torch.zeros(means.shape[1], means.shape[3], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part, own in zip(
        means.split(64), weight.split(64), strict=True
    ):  # the features are large, and in half precision
        values = part.double()
        total += torch.einsum("nlwd,nw->ld", values, own.double())
        squares += torch.einsum("nlwd,nw->ld", values.square(), own.double())
    scale = (squares - total.square()).clamp(min=SMALLEST**2).sqrt()
    return total.float()[:, None], scale.float()[:, None]


def _folded(routers: Routers, centre: Tensor, scale: Tensor) -> Routers:
    """Routers of raw inputs that say what `routers` say of (inputs - centre) / scale, each (routers, d)."""
    weight = routers.inner_weight / scale[:, None]
    return replace(routers, inner_weight=weight, inner_bias=routers.inner_bias - (weight @ centre[..., None])[..., 0])


# -- what is chosen on held-out questions ------------------------------------------------------------------------


def choose(options: Sequence[tuple[float, float]], saved: float) -> int:
    """The number of the option (reward, share of layers saved) with the highest reward among those that save `saved`.

    If none does, the one that saves most; among equals, the one that saves more, then the first.
    """
    enough = [at for at, option in enumerate(options) if option[1] >= saved]
    if not enough:
        return max(range(len(options)), key=lambda at: (options[at][1], options[at][0], -at))
    return max(enough, key=lambda at: (*options[at], -at))
