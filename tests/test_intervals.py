"""Intervals of means and shares."""

from __future__ import annotations

import numpy as np
import pytest

from layerwise.evaluation import intervals


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (75, 150, 0.4209, 0.5791)],
)
def test_wilson_interval(right: int, n: int, low: float, high: float) -> None:
    assert intervals.wilson(right, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_needs_trials() -> None:
    for right, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="needs"):
            intervals.wilson(right, n)


def test_the_bootstrap_is_the_interval_of_a_mean() -> None:
    differences = np.array([1.0] * 30 + [-1.0] * 10 + [0.0] * 160)
    deviation = differences.std() / 200**0.5
    expected = (0.1 - 1.96 * deviation, 0.1 + 1.96 * deviation)
    assert intervals.interval(differences.tolist()) == pytest.approx(expected, abs=0.01)
