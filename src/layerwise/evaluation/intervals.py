"""How sure a measured mean or share is: 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DRAWS = 2000  # of the bootstrap
NINETY_FIVE = 1.959964  # standard deviations that hold 95% of a normal distribution


def wilson(right: int, n: int, z: float = NINETY_FIVE) -> tuple[float, float]:
    """Wilson's interval of a share: unlike the normal one it stays within 0 and 1 and is no point at either end.

    Raises:
        ValueError: there are no trials, or more successes than trials.
    """
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"an interval needs 0 <= right <= n and n > 0, not {right} of {n}")
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(differences: Sequence[float] | np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """Means of DRAWS samples of `differences`, drawn with replacement."""
    values = np.asarray(differences)
    return values[chance.integers(len(values), size=(DRAWS, len(values)))].mean(1)


def ends(draws: np.ndarray) -> list[float]:
    """Where the middle 95% of `draws` begin and end."""
    return [float(end) for end in np.quantile(draws, (0.025, 0.975))]


def interval(differences: Sequence[float], seed: int = 0) -> list[float]:
    """95% interval of the mean, by bootstrap."""
    return ends(bootstrap(differences, np.random.default_rng(seed)))
