"""Routed attention from the command line to its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import routed_attention_runs as tool
from test_recall import config
from tiny import one_line
from typer.testing import CliRunner

from layerwise.cli.bench import app as bench
from layerwise.cli.train import app as train_app
from layerwise.report.attention_figures import recall_figure, routed_speed_figure, routing_figure
from layerwise.training.curriculum import RoutedAttentionConfig
from layerwise.training.routed_attention import train

SMALL = [
    "--steps",
    "2",
    "--layers",
    "2",
    "--hidden-size",
    "16",
    "--heads",
    "2",
    "--kernel-size",
    "4",
    "--eval-rows",
    "8",
]
SMALL += ["--test-rows", "8", "--start-length", "8", "--tokens-per-batch", "64", "--eval-every", "1"]


def last_json(app: Any, words: list[str]) -> dict[str, Any]:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_train_from_the_command_line_and_again_by_its_own_command(tmp_path: Path) -> None:
    words = ["routed-attention", "--task", "mqar", "--distance", "40", "--pairs", "2", *SMALL, "--json"]
    result = last_json(train_app, [*words, "--out", str(tmp_path / "one")])
    assert result["task"] == "mqar" and result["steps"] == 2 and "history" not in result
    again = result["command"].replace(str(tmp_path / "one"), str(tmp_path / "two")).split()[2:]
    second = last_json(train_app, [*again, "--json"])
    assert second["accuracy"] == result["accuracy"] and second["usage"] == result["usage"]


def test_bench_from_the_command_line(tmp_path: Path) -> None:
    words = ["routed-attention", "--lengths", "16,24", "--usages", "0.5", "--rounds", "1", "--hidden-size", "16"]
    words += ["--heads", "2", "--no-memory", "--out", str(tmp_path / "speed.json"), "--json"]
    points = last_json(bench, words)["points"]
    assert {(point["length"], point["phase"]) for point in points} == {
        (length, phase) for length in (16, 24) for phase in ("forward", "decode")
    }
    assert all(point.keys() >= {"usage", "ideal", "measured", "realised"} for point in points)
    routed_speed_figure(points, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 5000
    wrong = CliRunner().invoke(bench, ["routed-attention", "--lengths", "many"])
    assert isinstance(wrong.exception, ValueError) and "lengths" in str(wrong.exception)


def test_runs_are_kept_in_order_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in tool.planned():  # every run is a configuration that fits
        RoutedAttentionConfig(out=str(tmp_path / "none"), **run.options()).rules()
    monkeypatch.setattr(tool, "RESULT", tmp_path / "runs.json")
    for seed in (1, 0):
        changes = {"task": "mqar", "distance": 256, "pairs": 8, "seed": seed, "steps": 2}
        tool.add(train(config(tmp_path / str(seed), **changes)))
    runs = tool.kept()
    assert [run["seed"] for run in runs] == [0, 1] and runs[0]["pairs"] == 8 and "config" not in runs[0]
    recall_figure(runs, tmp_path / "recall.png")
    routing_figure(runs[0]["example"], runs[0]["pairs"], tmp_path / "routing.png")
    for name in ("recall", "routing"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    one_line(lambda: recall_figure([], tmp_path / "none.png"), "curriculum")
    one_line(lambda: routed_speed_figure([], tmp_path / "none.png"), "bench routed-attention")
