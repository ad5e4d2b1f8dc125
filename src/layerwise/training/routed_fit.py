"""Routed layers without a step of training: what can be had by least squares from the base's own states.

Of a frozen model it is known what each layer's attention gives at each position. So the convolution that comes closest,
and a correction of low rank, are least squares; and what they still miss is the cost that a router should predict.

*Cost.* An error d in a layer's output changes what the model says by about 1/2 d' F d nats, where F = E[g g'] and g is
the gradient of the log probability of a token drawn from the model itself (the Fisher information, one matrix a layer,
over positions). So errors of all layers are in one unit, least squares weighs directions by what they are worth, and
one threshold serves all routers: attention goes where it buys most.

*Twice.* The second time positions below the median cost count alone, nearly: the others will attend.

*The router* learns the logarithm of the expected cost from [x ; convolution] by the gamma deviance, on stored states
layer by layer, some seconds each. Its bias is then set so that the wanted share of all positions attends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.model.routed_layers import RoutedLayers, RoutedSelfAttention

_FISHER = 12  # texts whose gradients are taken
_EQUATIONS = 2500  # positions of the least squares of the taps: they have few unknowns
_RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # one is chosen on every eighth text
_DEAR = 0.05  # weight of a position that will attend
_STEPS, _BATCH, _RATE = 256, 1024, 2e-3  # of a router


@dataclass
class States:
    """What one layer saw and gave, a tensor a text: `inputs` (length, hidden size), `values` (kv heads, length, head
    size), `attended` (length, heads times head size, before the output projection), and of some texts `gradients`
    (length, hidden size) of the log probability with respect to the layer's attention output."""

    inputs: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    attended: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


def fit(
    model: LayerwiseForCausalLM,
    routed: RoutedLayers,
    texts: Tensor,
    usage: float,
    seed: int = 0,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[int, float]:
    """Fit taps, corrections and routers to `texts` (texts, length), so that `usage` of their positions attend.

    Returns each layer's mean cost of attending nowhere, in nats a token.
    """
    generator = torch.Generator().manual_seed(seed)
    states = collect(model, routed, texts, generator)
    notify(f"fitting {len(states)} layers to {texts.numel():,} tokens")
    costs, logits = {}, []
    for number, layer in zip(routed.numbers, routed, strict=True):
        costs[number], said = fit_layer(layer, states.pop(number), generator)
        logits.append(said)
        notify(f"layer {number}: {costs[number]:.4f} nats a token if nobody attends")
    routed.level(torch.stack(logits), usage)
    settle(model, routed, texts[:_FISHER], usage)
    return costs


@torch.no_grad()
def settle(model: LayerwiseForCausalLM, routed: RoutedLayers, texts: Tensor, usage: float, times: int = 2) -> None:
    """Set the routers' biases so that `usage` of all positions of `texts` attend, layers above seeing what those below
    now give."""
    was = routed.training
    routed.eval()
    for _ in range(times):
        said = []
        for row in texts:
            model(row[None], logits_to_keep=1)
            said.append(routed.routing().logits)
        routed.level(torch.stack(said), usage)
    routed.train(was)


# -- the base's states -------------------------------------------------------------------------------------------


def collect(
    model: LayerwiseForCausalLM, routed: RoutedLayers, texts: Tensor, generator: torch.Generator
) -> dict[int, States]:
    """Run the base on `texts` (texts, length) and keep what its converted layers did."""
    states = {number: States() for number in routed.numbers}
    hooks = []
    for number, layer in zip(routed.numbers, routed, strict=True):
        attention, mine = layer.attention, states[number]
        hooks += [
            attention.v_proj.register_forward_hook(partial(_keep_values, mine, layer.head_dim)),
            attention.o_proj.register_forward_hook(partial(_keep_output, mine)),
        ]
    try:
        with routed.mixing("attention"):
            for count, row in enumerate(texts):
                with torch.set_grad_enabled(count < _FISHER):
                    logits = model(row[None], logits_to_keep=0 if count < _FISHER else 1).logits[0]
                if count < _FISHER:
                    chances = logits.detach().float().softmax(-1)
                    drawn = torch.multinomial(chances.cpu(), 1, generator=generator)[:, 0].to(logits.device)
                    F.cross_entropy(logits.float(), drawn, reduction="sum").backward()
    finally:
        for hook in hooks:
            hook.remove()
    return states


def _keep_values(states: States, head_dim: int, _module: object, given: tuple[Tensor], output: Tensor) -> None:
    states.inputs.append(given[0].detach()[0])
    states.values.append(output.detach()[0].unflatten(-1, (-1, head_dim)).transpose(0, 1))


def _keep_output(states: States, _module: object, given: tuple[Tensor], output: Tensor) -> None:
    states.attended.append(given[0].detach()[0])
    if torch.is_grad_enabled():
        if not output.requires_grad:  # nothing below is trained
            output.requires_grad_()
        output.register_hook(lambda gradient: states.gradients.append(gradient[0]))


# -- one layer ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def fit_layer(layer: RoutedSelfAttention, states: States, generator: torch.Generator) -> tuple[float, Tensor]:
    """Fit `layer`; returns its mean cost without attention, and its router's logits (texts, length)."""
    value = metric(states, layer.attention.o_proj.weight.float())
    weights = torch.ones(len(states.values), len(states.inputs[0]))
    for _ in range(2):
        fit_taps(layer, states, value, weights)
        convolved = _convolved(layer, states)
        missing = torch.stack([a.float() for a in states.attended]) - convolved
        features = torch.cat((torch.stack([x.float() for x in states.inputs]), convolved), -1)
        if layer.correction is not None:
            fit_correction(layer.correction, features[:, 1:], missing[:, 1:], value, weights[:, 1:])
            missing = missing - layer.correction(features)
        costs = (missing @ value.T).square().sum(-1) / 2
        costs[:, 0] = 0  # the first position is exact
        weights = torch.where(costs <= costs[:, 1:].median(), 1.0, _DEAR)
    with torch.enable_grad():
        fit_router(layer.router, features[:, 1:].flatten(0, 1), costs[:, 1:].flatten(), generator)
    return costs.mean().item(), layer.router(features)[..., 0]


def metric(states: States, output: Tensor) -> Tensor:
    """R (hidden size, inner) such that |R d|^2 / 2 is the cost in nats of an error d before the projection `output`."""
    gradients = torch.cat([one[1:] for one in states.gradients]).float()
    fisher = gradients.T @ gradients / len(gradients)
    sizes, axes = torch.linalg.eigh(fisher)
    return (axes * sizes.clamp(min=1e-6 * sizes.max()).sqrt()).T @ output


def fit_taps(layer: RoutedSelfAttention, states: States, value: Tensor, weights: Tensor) -> None:
    """Taps and sink of all heads together, by least squares in the metric `value`; `weights` (texts, length)."""
    heads, taps = layer.taps.shape
    unknown = heads * (taps + 1)
    square, right = torch.zeros(unknown, unknown), torch.zeros(unknown)
    by_head = value.view(-1, heads, layer.head_dim)
    step = max(1, weights[:, 1:].numel() // _EQUATIONS)
    for number, (values, attended, weight) in enumerate(zip(states.values, states.attended, weights, strict=True)):
        part = slice(1 + number % step, None, step)
        root = weight[part].sqrt()[:, None]
        lagged = torch.einsum("nhjd,khd->nkhj", _lagged(values, heads, taps)[part], by_head).flatten(2)
        lagged = (lagged * root[..., None]).flatten(0, 1)
        square += lagged.T @ lagged
        right += lagged.T @ (attended[part].float() @ value.T * root).flatten()
    ridge = 1e-3 * square.diagonal().mean() * torch.eye(unknown)
    found = torch.linalg.solve(square + ridge, right).view(heads, taps + 1)
    layer.taps.copy_(found[:, :-1])
    layer.sink.copy_(found[:, -1])


def _lagged(values: Tensor, heads: int, taps: int) -> Tensor:
    """The values each head has at distances 0 to taps - 1, then the first: (length, heads, taps + 1, head size)."""
    values = values.float().repeat_interleave(heads // len(values), dim=0).transpose(0, 1)
    windows = F.pad(values, (0, 0, 0, 0, taps - 1, 0)).unfold(0, taps, 1).flip(-1).transpose(2, 3)
    return torch.cat((windows, values[:1, :, None].expand(len(values), -1, -1, -1)), dim=2)


def _convolved(layer: RoutedSelfAttention, states: States) -> Tensor:
    return torch.stack([layer._filtered(one.float()[None], 0, one.shape[1])[0] for one in states.values])


def fit_correction(
    correction: torch.nn.Sequential, features: Tensor, missing: Tensor, value: Tensor, weights: Tensor
) -> None:
    """The map of low rank from `features` to what is `missing`, by ridge regression, cut off in the metric `value`.

    All are (texts, length, ...). The ridge is the best on every eighth text.
    """
    held = torch.arange(len(features)) % 8 == 7
    mean, deviation = features.mean((0, 1)), features.std((0, 1)) + 1e-6
    scaled = (features - mean) / deviation
    target = missing @ value.T
    sums = []
    for part in (~held, held):
        x, y, w = (one[part].flatten(0, 1) for one in (scaled, target, weights[..., None]))
        total = w.sum()
        middle = (w * y).sum(0) / total
        sums.append((x.T @ (w * x) / total, x.T @ (w * (y - middle)) / total, middle))
    (square, right, _), (held_square, held_right, _) = sums
    found = {}
    for ridge in _RIDGES:
        map_ = torch.linalg.solve(square + ridge * torch.eye(len(square)), right)
        # The error on the texts held out, without what does not depend on the map.
        found[ridge] = map_, ((map_ * (held_square @ map_)).sum() - 2 * (map_ * held_right).sum()).item()
    map_ = min(found.values(), key=lambda one: one[1])[0]
    if not held.any():
        map_ = found[1.0][0]
    # The directions of the predictions that matter most.
    _, axes = torch.linalg.eigh(map_.T @ square @ map_)
    rank = correction[0].out_features
    axes = axes[:, -rank:]
    reduce = (map_ @ axes).T / deviation
    correction[0].weight.copy_(reduce)
    back = torch.linalg.pinv(value.double())
    correction[1].weight.copy_(back @ axes.double())
    correction[1].bias.copy_((back @ sums[0][2].double()).float() - correction[1].weight @ (reduce @ mean))
    balance(correction)


def balance(correction: torch.nn.Sequential) -> None:
    """Make the two factors of `correction` alike in size, for each direction: Adam's steps are, whatever the size."""
    first, second = correction[0].weight, correction[1].weight
    ratio = (second.square().mean(0) / first.square().mean(1)).sqrt().sqrt()
    first *= ratio[:, None]
    second /= ratio


def fit_router(router: torch.nn.Sequential, features: Tensor, costs: Tensor, generator: torch.Generator) -> None:
    """Teach `router` the logarithm of the expected cost: features (positions, numbers), costs (positions,).

    The loss is the gamma deviance, z + cost exp(-z): like least squares on relative errors, right in the mean.
    """
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    usual = costs.mean()
    relative = (costs / usual).clamp(max=50.0)
    torch.nn.init.normal_(router[0].weight, std=features.shape[1] ** -0.5, generator=generator)
    torch.nn.init.zeros_(router[0].bias)
    torch.nn.init.normal_(router[-1].weight, std=0.1, generator=generator)
    torch.nn.init.zeros_(router[-1].bias)
    scaled = (features - mean) / deviation
    learns = router[0].weight.requires_grad
    router.requires_grad_(True)
    optimizer = torch.optim.AdamW(router.parameters(), lr=_RATE, weight_decay=0.05)
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 - step / _STEPS)
        rows = torch.randint(len(scaled), (_BATCH,), generator=generator)
        said = router(scaled[rows])[:, 0]
        optimizer.zero_grad()
        (said + relative[rows] * (-said).exp()).mean().backward()
        optimizer.step()
    router.requires_grad_(learns)
    with torch.no_grad():  # the scaling becomes part of the first map
        router[0].weight /= deviation
        router[0].bias -= router[0].weight @ mean
        router[-1].bias += usual.log()
