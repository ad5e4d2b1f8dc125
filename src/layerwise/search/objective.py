"""What a search maximises, and the book it keeps.

A path is worth the probability-like `sigmoid(margin)` of the right answer, minus a price for its layers. The margin is
dense: it tells a path that nearly turned right from one that is lost, where 0/1 tells nothing until it happens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from layerwise.plan import Plan

Margins = Callable[[Sequence[Plan]], Sequence[float]]  # of a batch of plans, in nats


def value(margin: float, plan: Plan, layers: int, price: float) -> float:
    """What a path is worth: at most 1, minus `price` times its length in multiples of the model's `layers`."""
    probability = 1 / (1 + math.exp(-margin)) if margin > -700 else 0.0
    return probability - price * plan.depth / layers


@dataclass
class Book:
    """Every plan evaluated, with its margin, in order; no plan twice, and at most `budget` besides the full one.

    Algorithms only meet margins through a book, so that their evaluations can be compared at equal numbers.
    """

    layers: int
    measure: Margins
    budget: int
    price: float
    margins: dict[Plan, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.full = Plan.full(self.layers)
        self.values([self.full])

    @property
    def left(self) -> int:
        """How many more plans may be evaluated."""
        return self.budget + 1 - len(self.margins)

    def values(self, plans: Sequence[Plan]) -> list[float]:
        """What each plan is worth; those not known yet are evaluated together."""
        new = [plan for plan in dict.fromkeys(plans) if plan not in self.margins]
        assert len(new) <= self.left, "an algorithm must ask for no more than is left"
        if new:
            self.margins.update(zip(new, self.measure(new), strict=True))
        return [value(self.margins[plan], plan, self.layers, self.price) for plan in plans]
