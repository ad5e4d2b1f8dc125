"""Routed attention against full attention, in the same layer: does the saved work come back as time?

One `RoutedAttention` layer with random weights. Full attention is that layer with `mixing = "attention"`: the same
projections around torch's fused `scaled_dot_product_attention`, no router and no convolution. In decoding it runs both
with torch's own projections and with the operators that the routed layer uses for them, and the faster of the two
counts; what full attention takes if its single queries are scored by our operator too is noted beside it
(`full_own_seconds`). The routed layer runs everything it needs: router, convolution, gather, scatter; only *who*
attends is given, so that a usage can be set. Routed positions are spread at random over the text. Contenders take turns
(see `timing`).

    ideal     cost of full attention / cost of the routed layer, as counted: multiplications for a forward pass, bytes
              of weights and cache read for a decoding step. It includes router, convolution and projections.
    bound     the same if router and convolution were free, so that usage alone decides
    measured  time of full attention / time of the routed layer
    realised  measured / ideal

A decoding point times a run of tokens, of which the share `usage` attends; keys and values of those in between are made
when the next one attends. Every round has a copy of the layer in other memory. The kernels ("dense", "gathered",
"chunked") are timed side by side, on forward passes of texts that are not too long.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from statistics import median
from typing import Any

import torch
from torch import Tensor

from layerwise.benchmarks.environment import environment
from layerwise.benchmarks.memory import peak, reset_peak, resident
from layerwise.benchmarks.timing import rounds as take_turns
from layerwise.model.recall_model import RoutedLayerCache
from layerwise.model.routed_attention import Kernel, RoutedAttention

KERNELS: tuple[Kernel, ...] = ("dense", "gathered", "chunked")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DECODED = 320  # tokens of a decoding run: one attends at 0.3%
_KERNELS_UP_TO = 4096  # longest text on which kernels are compared: dense scores of long ones take seconds
_LONG, _LONG_ROUNDS = 8192, 5  # texts from which so many rounds, at most, will do
_WARM = 2.0  # seconds of work before anything is timed: of a process just begun the first tenths of a second are slow
_FEWEST_MACS = 2e9  # a timed call is repeated, up to 8 times, to do about this much work


def bench_routed_attention(
    lengths: Sequence[int],
    usages: Sequence[float],
    rounds: int = 5,
    hidden_size: int = 512,
    heads: int = 8,
    router_width: int = 32,
    dtype: str = "float32",
    kernels: bool = True,
    memory: bool = True,
    decoded: int = _DECODED,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the comparison; returns `points` (see the module's text; times are seconds, medians over `rounds`).

    Args:
        lengths, usages: what is measured, every pair of them, forward and decode.
        hidden_size, heads, router_width: sizes of the layer. The router is narrow: of the published width it would
            cost as much as half of all projections.
        dtype: "float32" or "bfloat16", of both contenders.
        rounds: medians are of so many, of fewer for long texts.
        kernels: also time each kernel, in `kernels` of every forward point but those of long texts.
        memory: also measure peak memory of a forward pass at the longest length, each usage in its own process.
        decoded: tokens of a decoding run.

    Raises:
        ValueError: nothing to measure, a usage that is no share, or a layer of no size.
    """
    if not lengths or not usages or rounds < 1 or decoded < 1:
        raise ValueError("lengths and usages need one entry at least, rounds and decoded must be 1 or more")
    if min(lengths) < 2 or not all(0 <= usage <= 1 for usage in usages):
        raise ValueError("lengths must be 2 or more, and usages between 0 and 1")
    if hidden_size < 1 or heads < 1:
        raise ValueError("hidden-size and heads must be 1 or more")
    if dtype not in DTYPES:
        raise ValueError(f"no dtype '{dtype}': choose {', '.join(DTYPES)}")
    layer = make_layer(hidden_size, heads, router_width, dtype)
    layer.prepare(notify)
    hidden, warm_until = torch.randn(1, min(lengths), hidden_size, dtype=DTYPES[dtype]), time.perf_counter() + _WARM
    while time.perf_counter() < warm_until:
        _mix(layer, hidden, None, None)
    points = []
    for length in lengths:
        turns = rounds if length < _LONG else min(rounds, _LONG_ROUNDS)
        for measure in (_forward_points, _decode_points):
            found = measure(layer, length, usages, turns, kernels and length <= _KERNELS_UP_TO, decoded)
            points += [point | {"rounds": turns} for point in found]
            for point in found:
                notify(
                    f"{point['phase']}, length {length}, usage {point['usage']:.1%}: {point['measured']:.2f}x full "
                    f"attention, {point['realised']:.0%} of the ideal {point['ideal']:.2f}x"
                )
    result: dict[str, Any] = {
        "layer": {"hidden_size": hidden_size, "heads": heads, "router_width": router_width, "dtype": dtype},
        "kernel_size": layer.kernel_size,
        "operators": layer.prepared,
        "rounds": rounds,
        "points": points,
        "environment": environment(),
    }
    if memory:
        notify("measuring memory, each usage in a process of its own")
        sizes = (hidden_size, heads, router_width, dtype)
        result["memory"] = [_memory_apart(max(lengths), usage, *sizes) for usage in (None, *usages)]
    return result


def make_layer(hidden_size: int, heads: int, router_width: int, dtype: str) -> RoutedAttention:
    """The layer that is measured, ready for inference."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = RoutedAttention(hidden_size, heads, router_width=router_width)
    return layer.to(DTYPES[dtype]).eval().requires_grad_(False)


def spread(length: int, usage: float) -> Tensor:
    """A gate (1, length): round(usage * length) positions at random, one at least unless `usage` is 0."""
    count = max(int(usage > 0), round(usage * length))
    order = torch.rand(length, generator=torch.Generator().manual_seed(length)).argsort()
    return (order < count)[None]


# -- what it should cost ---------------------------------------------------------------------------------------------


def forward_cost(layer: RoutedAttention, gate: Tensor, parts: bool = True) -> float:
    """Multiplications of one row's forward pass; `gate` (1, length).

    With `parts=False` router and convolution are left out. Of n positions of which k attend: keys and values for all,
    queries and outputs for k, and each of the k is scored against the positions up to its own.
    """
    size, inner = layer.hidden_size, layer.heads * layer.head_dim
    length, at = gate.shape[1], gate[0].nonzero()[:, 0]
    work = 2 * inner * size * len(at) + 2 * inner * float((at + 1).sum())
    work += 2 * layer.kv_heads * layer.head_dim * size * (int(at[-1]) + 1 if len(at) else 0)
    if parts:
        work += length * size * layer.router.inputs.out_features
        if len(at) < length:
            work += length * size * layer.kernel_size + (2 * length - len(at)) * size * size
    return work


def decode_bytes(layer: RoutedAttention, gate: Tensor, before: int, width: int, parts: bool = True) -> float:
    """Bytes read to decode a run of tokens after `before` others; `gate` (1, tokens) and `width` bytes a number.

    A token that attends reads the weights of attention and the cache up to itself. Every token reads the router, and
    one that does not attend also the convolution and its window.
    """
    size, inner, kv = layer.hidden_size, layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    at = gate[0].nonzero()[:, 0]
    numbers = len(at) * (2 * inner + 2 * kv) * size + 2 * kv * float((at + before + 1).sum())
    if parts:
        numbers += gate.shape[1] * size * layer.router.inputs.out_features
        numbers += (gate.shape[1] - len(at)) * (2 * size * size + layer.kernel_size * size)
    return numbers * width


# -- what it does cost -----------------------------------------------------------------------------------------------


def _forward_points(
    layer: RoutedAttention, length: int, usages: Sequence[float], rounds: int, kernels: bool, decoded: int
) -> list[dict[str, Any]]:
    hidden = torch.randn(1, length, layer.hidden_size, dtype=layer.q_proj.weight.dtype)
    everybody = torch.ones(1, length, dtype=torch.bool)
    full_cost = forward_cost(layer, everybody, parts=False)
    repeats = min(8, max(1, round(_FEWEST_MACS / full_cost)))

    def run(gate: Tensor | None, kernel: Kernel = "auto") -> Callable[[], float]:
        return lambda: _timed(lambda: _mix(layer, hidden, None, gate, kernel), repeats)

    contenders = {("full", "auto"): run(None)}
    gates = {usage: spread(length, usage) for usage in usages}
    for usage, gate in gates.items():
        for kernel in ("auto", *(KERNELS if kernels else ())):
            contenders[usage, kernel] = run(gate, kernel)
    times = _median_times(contenders, rounds)
    points = []
    for usage, gate in gates.items():
        ideal = full_cost / forward_cost(layer, gate)
        bound = full_cost / max(1.0, forward_cost(layer, gate, parts=False))
        point = _point(length, usage, gate, "forward", ideal, bound, times["full", "auto"], times[usage, "auto"])
        if kernels:
            point["kernels"] = {kernel: times[usage, kernel] for kernel in KERNELS}
        points.append(point)
    return points


def _decode_points(
    layer: RoutedAttention, length: int, usages: Sequence[float], rounds: int, kernels: bool, decoded: int
) -> list[dict[str, Any]]:
    gates = {usage: spread(decoded, usage) for usage in usages}
    times: dict[Any, list[float]] = {name: [] for name in ("full", "prepared", "own", *usages)}
    laid_out = []  # all of them, so that none gets the memory of another
    for number in range(rounds):
        # Whether a layer of a few megabytes stays in a processor's cache depends by a fifth on the pages it got.
        contenders = _decoders(deepcopy(layer), length, gates, decoded)
        laid_out.append(contenders)
        for call in contenders.values():
            call()  # warm up
        for _, name, seconds in take_turns(contenders, 1, first=number):
            times[name].append(seconds)
    middle = {name: median(values) for name, values in times.items()}
    usual = min(middle["full"], middle["prepared"])
    width = layer.q_proj.weight.element_size()
    full = decode_bytes(layer, torch.ones(1, decoded), length, width, parts=False)
    points = []
    for usage, gate in gates.items():
        ideal = full / decode_bytes(layer, gate, length, width)
        bound = full / max(1.0, decode_bytes(layer, gate, length, width, parts=False))
        point = _point(length, usage, gate, "decode", ideal, bound, usual, middle[usage])
        points.append(point | {"full_own_seconds": middle["own"]})
    return points


def _decoders(
    layer: RoutedAttention, length: int, gates: Mapping[float, Tensor], decoded: int
) -> dict[Any, Callable[[], float]]:
    """Of full attention without operators, with them for projections, with them alone, and of each usage: seconds a
    token of decoding a run."""
    prompt = torch.randn(1, length, layer.hidden_size, dtype=layer.q_proj.weight.dtype)
    tokens = torch.randn(1, decoded, layer.hidden_size, dtype=prompt.dtype)
    caches, able = {}, layer.prepared
    for mixing in ("attention", "routed"):
        layer.mixing, caches[mixing] = mixing, RoutedLayerCache()
        with torch.inference_mode():
            # The last of the prompt attends, so both begin with all keys made, as after a question.
            layer(prompt, cache=caches[mixing], gate=torch.arange(length)[None] == length - 1)

    def run(gate: Tensor | None, prepared: bool = True, fused: bool = False) -> Callable[[], float]:
        cache = caches["attention" if gate is None else "routed"]
        steps = [tokens[:, at : at + 1] for at in range(decoded)]
        asks = [None if gate is None else gate[:, at : at + 1].to(prompt.dtype) for at in range(decoded)]

        @torch.inference_mode()
        def decode() -> None:
            layer.mixing, layer.kernel = "attention" if gate is None else "routed", "auto"
            layer.prepared, layer.fused = able and prepared, fused
            for token, ask in zip(steps, asks, strict=True):
                layer(token, cache=cache, gate=ask)

        def timed() -> float:
            state = cache.snapshot()
            try:
                return _timed(decode) / decoded
            finally:
                cache.restore(state)
                layer.prepared, layer.fused = able, False

        return timed

    full = {"full": run(None, prepared=False), "prepared": run(None, fused=True), "own": run(None)}
    return full | {usage: run(gate) for usage, gate in gates.items()}


def _point(
    length: int, asked: float, gate: Tensor, phase: str, ideal: float, bound: float, full: float, routed: float
) -> dict[str, Any]:
    return {
        "length": length,
        "usage": gate.float().mean().item(),
        "asked_usage": asked,  # before rounding to whole tokens
        "phase": phase,
        "ideal": ideal,
        "bound": bound,
        "measured": full / routed,
        "realised": full / routed / ideal,
        "seconds": routed,
        "full_seconds": full,
    }


@torch.inference_mode()
def _mix(
    layer: RoutedAttention,
    hidden: Tensor,
    cache: RoutedLayerCache | None,
    gate: Tensor | None,
    kernel: Kernel = "auto",
) -> Tensor:
    """One call: full attention if there is no gate."""
    layer.mixing, layer.kernel = "attention" if gate is None else "routed", kernel
    return layer(hidden, cache=cache, gate=gate)[0]


def _timed(call: Callable[[], Any], repeats: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def _median_times(contenders: dict[Any, Callable[[], float]], count: int) -> dict[Any, float]:
    times: dict[Any, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()  # warm up
    for _, name, seconds in take_turns(contenders, count):
        times[name].append(seconds)
    return {name: median(values) for name, values in times.items()}


# -- memory ----------------------------------------------------------------------------------------------------------


def _memory_apart(
    length: int, usage: float | None, hidden_size: int, heads: int, router_width: int, dtype: str
) -> dict[str, Any]:
    words = [sys.executable, "-m", "layerwise.benchmarks.routed_attention", *map(str, (length, hidden_size, heads))]
    words += [str(router_width), dtype, *(["--usage", str(usage)] if usage is not None else [])]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the memory measurement failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_memory(
    length: int, usage: float | None, hidden_size: int, heads: int, router_width: int, dtype: str
) -> dict[str, Any]:
    """MiB that one forward pass adds at its peak, in this process; `usage` None is full attention."""
    layer = make_layer(hidden_size, heads, router_width, dtype)
    _mix(layer, torch.zeros(1, 64, hidden_size, dtype=DTYPES[dtype]), None, spread(64, 0.5))  # libraries are loaded
    hidden = torch.randn(1, length, hidden_size, dtype=DTYPES[dtype])
    before = resident()
    reset_peak()
    _mix(layer, hidden, None, None if usage is None else spread(length, usage))
    return {"length": length, "usage": usage, "full": usage is None, "peak_mib": (peak() - before) / 2**20}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for number in ("length", "hidden_size", "heads", "router_width"):
        parser.add_argument(number, type=int)
    parser.add_argument("dtype")
    parser.add_argument("--usage", type=float)
    print(json.dumps(measure_memory(**vars(parser.parse_args()))))
