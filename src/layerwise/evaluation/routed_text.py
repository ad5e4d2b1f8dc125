"""What routed layers of a pretrained model are worth, on held-out text: perplexity against usage, controls, time.

Controls answer whether it matters *who* attends. They use the same layers, convolutions and usage:

    random  the same share of each layer's positions, drawn by chance
    static  whole layers: those attend that cost most without attention, the others nowhere (as the convolutions were
            made for some positions and not for all, this control is at a disadvantage)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.benchmarks.timing import Stopwatch, rounds
from layerwise.evaluation.intervals import bootstrap, ends
from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.model.routed_layers import RoutedLayers

CURVE = (0.1, 0.25, 0.75)  # usages beside the one that was aimed at


def report(
    model: LayerwiseForCausalLM,
    routed: RoutedLayers,
    texts: Tensor,
    level: Callable[[float], None],
    costs: dict[str, float] | None,
    seed: int,
) -> dict[str, Any]:
    """Measure `routed`, the routed layers of `model`, on `texts` (texts, length).

    Args:
        level: sets the routers' thresholds for a usage.
        costs: of each layer by its number, what it loses without attention; without them there is no static control.
        seed: of what is drawn.

    Returns:
        base_perplexity, convolution_perplexity (attention nowhere); perplexity, its ratio to the base's and the 95%
        interval of that over texts (paired bootstrap), usage and usage_per_layer of the model as it is; `controls` and
        `curve`, each of perplexity, ratio and usage; `generate`, see `generate_times`.
    """
    with routed.mixing("attention"):
        base = np.array(loss_on(model, texts))
    with routed.mixing("convolution"):
        without = mean(loss_on(model, texts))

    def measured() -> tuple[np.ndarray, dict[str, Any], list[float]]:
        used: list[Tensor] = []
        losses = np.array(loss_on(model, texts, lambda: used.append(usages(routed))))
        of_layers = torch.stack(used).mean(0).tolist()
        ratio = math.exp(losses.mean() - base.mean())
        point = {"usage": mean(of_layers), "perplexity": math.exp(losses.mean()), "ratio": ratio}
        return losses, point, of_layers

    losses, point, of_layers = measured()
    draws = bootstrap(losses - base, np.random.default_rng(seed))
    found: dict[str, Any] = {
        "texts": len(texts),
        "base_perplexity": math.exp(base.mean()),
        "convolution_perplexity": math.exp(without),
        **point,
        "interval": [math.exp(end) for end in ends(draws)],
        "usage_per_layer": of_layers,
        "controls": _controls(routed, of_layers, costs, seed, lambda: measured()[1]),
        "curve": [],
    }
    biases = [layer.router[-1].bias.detach().clone() for layer in routed]
    for usage in CURVE:
        level(usage)
        found["curve"].append(measured()[1])
    with torch.no_grad():
        for layer, bias in zip(routed, biases, strict=True):
            layer.router[-1].bias.copy_(bias)
    found["curve"] = sorted([*found["curve"], point], key=lambda one: one["usage"])
    return found


@torch.no_grad()
def loss_on(model: LayerwiseForCausalLM, texts: Tensor, after: Callable[[], None] = lambda: None) -> list[float]:
    """Mean cross entropy of each of `texts` (texts, length); `after` is called after each."""
    losses = []
    for row in texts:
        logits = model(row[None]).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, row[1:].to(logits.device)).item())
        after()
    return losses


def usages(routed: RoutedLayers) -> Tensor:
    """The share of each layer's positions that attended in the last pass; 0 or 1 of a layer that is not routed."""
    shares = [
        torch.tensor(float(layer.mixing == "attention"))
        if layer.mixing != "routed" or layer.routing is None
        else layer.routing.gate.float().mean().cpu()
        for layer in routed
    ]
    return torch.stack(shares)


def _controls(
    routed: RoutedLayers,
    of_layers: Sequence[float],
    costs: dict[str, float] | None,
    seed: int,
    measured: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    found = {}
    generator = torch.Generator().manual_seed(seed)
    deciders = [layer.decide for layer in routed]
    for layer, usage in zip(routed, of_layers, strict=True):
        layer.decide = partial(_by_chance, usage, generator)
    try:
        found["random"] = measured()
    finally:
        for layer, decide in zip(routed, deciders, strict=True):
            layer.decide = decide
    if costs is not None:
        dear = sorted(routed.numbers, key=lambda number: -costs[str(number)])
        attend = dear[: math.ceil(sum(of_layers))]  # rounded in the control's favour
        before = [layer.mixing for layer in routed]
        for number, layer in zip(routed.numbers, routed, strict=True):
            layer.mixing = "attention" if number in attend else "convolution"
        try:
            found["static"] = {**measured(), "layers": sorted(attend)}
        finally:
            for layer, mixing in zip(routed, before, strict=True):
                layer.mixing = mixing
    return found


def _by_chance(usage: float, generator: torch.Generator, logits: Tensor) -> Tensor:
    return torch.rand(logits.shape, generator=generator).to(logits.device) < usage


def generate_times(
    model: LayerwiseForCausalLM, routed: RoutedLayers, prompt: Tensor, new_tokens: int = 32, count: int = 3
) -> dict[str, Any]:
    """Median seconds of `generate` (greedy) after `prompt` (1, length), and of its decoding step: with attention where
    it is routed ("routed"), everywhere by these same modules ("attention"), and of the model as it was ("base"); the
    engine, and the usage of the prompt's pass."""
    options = {"max_new_tokens": new_tokens, "eos_token_id": -1, "do_sample": False, "pad_token_id": 0}
    backbone = model.runtime.backbone

    def timed(who: str) -> tuple[float, float]:
        watch, converted = Stopwatch(), backbone.attention
        backbone.attention = {} if who == "base" else converted
        try:
            with routed.mixing("routed" if who == "routed" else "attention"):
                model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=watch, **options)
        finally:
            backbone.attention = converted
        return watch.total, watch.step

    seen: dict[str, list[tuple[float, float]]] = {"routed": [], "attention": [], "base": []}
    for _, who, taken in rounds({who: partial(timed, who) for who in seen}, count):
        seen[who].append(taken)
    found: dict[str, Any] = {"prompt_tokens": prompt.shape[1], "new_tokens": new_tokens}
    found["engine"] = model.runtime.engine.name
    for who, taken in seen.items():
        found[f"{who}_seconds"], found[f"{who}_step_seconds"] = np.median(np.array(taken), axis=0).tolist()
    with torch.no_grad():
        model(prompt, logits_to_keep=1)
    return {**found, "usage": usages(routed).mean().item()}
