"""Which edits are worth trying first, measured once before the search.

Most layers can be skipped at some price, a few never. Every single edit is tried on a few questions, and its weight is
the exponential of its mean change in value, in units of `tree.TEMPERATURE`: edits that help on average are drawn more
often, hopeless ones hardly ever, none never.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from layerwise.plan import Plan
from layerwise.search.objective import Margins, value
from layerwise.search.tree import TEMPERATURE, edits

LEAST_WEIGHT = 1e-3


def measured_prior(
    layers: int,
    measures: Iterable[Margins],
    count: int,
    price: float,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Weights of all single edits, by their text, the largest 1.

    Args:
        measures: one for each of `count` questions, giving the margins of plans in nats.
        notify: gets a line after each question.
    """
    full = Plan.full(layers)
    every = edits(full, layers)
    plans = [full, *(edit.apply(full) for edit in every)]
    gains = [0.0] * len(every)
    for number, measure in enumerate(measures, 1):
        values = [value(one, plan, layers, price) for one, plan in zip(measure(plans), plans, strict=True)]
        gains = [gain + (one - values[0]) / count for gain, one in zip(gains, values[1:], strict=True)]
        notify(f"{number} of {count} questions for the prior")
    best = max(gains)
    weights = [max(LEAST_WEIGHT, math.exp((gain - best) / TEMPERATURE)) for gain in gains]
    return {str(edit): round(weight, 4) for edit, weight in zip(every, weights, strict=True)}
