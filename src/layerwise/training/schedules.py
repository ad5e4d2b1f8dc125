"""The schedules of LayerSkip (arXiv 2404.16710): which layers to drop, which exits to train, and how much each counts.

Two numbers are decided anew at every step t of T, for every layer l of L (both counted from 0):

    drop rate     p(l,t) = S(t) * D(l) * p_max              D(l) = exp(l ln2 / (L-1)) - 1, from 0 to 1 over the layers
    exit weight   w(l,t) = C(l,t) e(l) / sum_i C(i,t) e(i)  e(l) grows with the square of the depth

S says how dropout changes over training, C in {0, 1} which exits take part. Training all exits at every step costs a
head each and hurts the last layer, so a *curriculum* switches on a few: `rotational` every R-th, moving on by one each
step, or `gradual` from the last layer downwards. The last layer always takes part.

Everything here is arithmetic on plain numbers; `layerskip` applies it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

from layerwise.training.recipes import Dropout


def drop_rates(layers: int, p_max: float, step: int, steps: int, form: Dropout = "constant") -> tuple[float, ...]:
    """Probability p(l,t) with which a row skips each layer (arXiv 2404.16710, section 4.1.1).

    Args:
        layers: how many layers the model has.
        p_max: the rate of the last layer where S is 1; in [0, 1).
        step: t, from 0 to `steps` - 1.
        steps: T, the length of the training.
        form: S(t). "constant" is 1 (fine-tuning, continual pretraining); "growing" is exp(t ln2 / (T-1)) - 1
            (pretraining from scratch); "decaying" runs that backwards, from 1 to 0 (after arXiv 2609.05275: the full
            model is trained undisturbed at the end). A training of one step is at its beginning.

    Raises:
        ValueError: an argument is out of range.
    """
    _check(layers, step, steps)
    if not 0 <= p_max < 1:
        raise ValueError(f"p_max must be at least 0 and below 1, not {p_max}")
    if form not in get_args(Dropout):
        raise ValueError(f"no dropout schedule '{form}': choose {', '.join(get_args(Dropout))}")
    over_time = 1.0
    if form != "constant":
        over_time = _doubling(step if form == "growing" else steps - 1 - step, steps)
        if steps == 1:
            over_time = 0.0 if form == "growing" else 1.0
    return tuple(over_time * _doubling(layer, layers) * p_max for layer in range(layers))


def exit_weights(layers: int, e_scale: float, enabled: Sequence[bool]) -> tuple[float, ...]:
    """Weight w(l,t) of the loss at the exit after each layer (arXiv 2404.16710, section 4.1.2).

    e(l) = e_scale * sum_{i=0..l} i, and e(L-1) = (L-1) + e_scale * sum_{i=0..L-2} i. The sums run over all layers,
    enabled or not; what is normalised to 1 is the enabled ones.

    Args:
        layers: how many layers the model has.
        e_scale: how much the early exits count beside the last layer; 0 trains the last layer alone.
        enabled: C(l,t), one a layer.

    Raises:
        ValueError: an argument is out of range, or the last layer is not enabled.
    """
    _check(layers)
    if e_scale < 0:
        raise ValueError(f"e_scale must be 0 or more, not {e_scale}")
    if len(enabled) != layers or not enabled[-1]:
        raise ValueError(f"enabled must hold one entry for each of {layers} layers, and the last must be on")
    raw = [e_scale * layer * (layer + 1) / 2 for layer in range(layers)]
    raw[-1] = (layers - 1) + e_scale * (layers - 2) * (layers - 1) / 2
    kept = [value if on else 0.0 for value, on in zip(raw, enabled, strict=True)]
    if layers == 1:
        kept = [1.0]  # e(0) is 0, but the only exit is the last layer
    total = sum(kept)
    return tuple(value / total for value in kept)


def rotational(layers: int, every: int, step: int) -> tuple[bool, ...]:
    """C(l,t) of the rotational curriculum: every `every`-th layer, moving on by one each step; the last always."""
    _check(layers)
    if every < 1:
        raise ValueError(f"the rotation must be over 1 layer or more, not {every}")
    return tuple(layer % every == step % every or layer == layers - 1 for layer in range(layers))


def gradual(layers: int, step: int, steps: int) -> tuple[bool, ...]:
    """C(l,t) of the gradual curriculum: from the last layer down, one more every T/2L steps, all after half of them."""
    _check(layers, step, steps)
    on = 1 + 2 * layers * step // steps
    return tuple(layer >= layers - on for layer in range(layers))


def _doubling(position: int, length: int) -> float:
    """exp(position ln2 / (length-1)) - 1: from 0 at the first position to 1 at the last."""
    return math.exp(position * math.log(2) / (length - 1)) - 1 if length > 1 else 0.0


def _check(layers: int, step: int = 0, steps: int = 1) -> None:
    if layers < 1:
        raise ValueError(f"a model has at least one layer, not {layers}")
    if not 0 <= step < steps:
        raise ValueError(f"step {step} does not lie in a training of {steps} steps: they count from 0")
