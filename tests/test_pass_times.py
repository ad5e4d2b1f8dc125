"""Passes are timed before the first answer: every width, once a model, and not for longer than the budget."""

from __future__ import annotations

import pytest
import tiny

from layerwise import attach
from layerwise.decoding import pass_times as timing
from layerwise.decoding.drafts import Draft


class Clock:
    """Every look at it is a second later."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize("rows", [1, 3])
def test_every_width_is_timed_once_a_model(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, clock = attach(tiny.model("llama"), engine="eager"), Clock()
    monkeypatch.setattr(timing, "perf_counter", clock)
    monkeypatch.setattr(timing, "BUDGET", 1e6)
    assert model.pass_times(rows) == dict.fromkeys(timing.WIDTHS, 1.0)
    spent = clock.now
    for temperature in (0.0, 1.5):
        tuner = model.tuner(Draft("auto"), rows, temperature)
        assert [tuner.round_seconds(width) for width in range(1, 17)] == [1.0] * 16
        assert tuner is model.tuner(Draft("auto"), rows, temperature)
        half = model.tuner(Draft("auto"), rows, temperature, depth=3)  # of 6 layers, and as many for all else
        assert half is not tuner and half.round_seconds(4) == 0.75
    assert clock.now == spent


def test_a_slow_model_is_not_timed_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clock = attach(tiny.model("llama"), engine="eager"), Clock()
    monkeypatch.setattr(timing, "perf_counter", clock)
    monkeypatch.setattr(timing, "BUDGET", 8.0)
    assert list(model.pass_times(1)) == [1, 2]  # a look before each pass and two in it
    assert model.tuner(Draft("auto"), 1).choose({"tree": 0.0}, 15, hopes={"tree": [0.9]})[0] == "tree"
