"""Whole trainings of LayerRoute: stopped and resumed, to their ends, from the command line, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_layerroute import FULL, IDS, LAYERS, MASK, decided
from test_training_runs import StopAt, files  # noqa: F401 (a fixture)
from tiny import one_line
from typer.testing import CliRunner

from layerwise import attach, from_pretrained
from layerwise.cli.train import app
from layerwise.training import layerroute
from layerwise.training.layerroute import LayerRoute, LayerRouteConfig, LayerRouteRecipe, train


def config(files: Path, out: Path, **changes: Any) -> LayerRouteConfig:  # noqa: F811
    given: dict[str, Any] = {"rank": 2, "steps": 5, "tokens_per_batch": 60, "gradient_accumulation": 2}
    given |= {"log_every": 1, "save_every": 2, "precision": "float32", "learning_rate": 1e-2, "warmup": 1}
    given |= {"data": str(files / "data.jsonl"), "model": str(files / "base"), "out": str(out), **changes}
    return LayerRouteConfig(**given)


def logged(out: Path) -> Iterator[dict[str, float]]:
    for entry in json.loads((out / "training.json").read_text(encoding="utf-8"))["log"]:
        if "loss" in entry:
            yield {name: value for name, value in entry.items() if name not in ("epoch", "step")}


@pytest.mark.parametrize(
    ("fits", "bridge_rank", "leave"),
    [(0, 0, "nothing"), (2, 0, "nothing"), (2, 2, "nothing"), (2, 2, "attention"), (2, 0, "neurons")],
)
def test_ctrl_c_and_resume_equal_uninterrupted_training(
    fits: int,
    bridge_rank: int,
    leave: str,
    files: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {"bridge_rank": bridge_rank, "leave": leave}
    if fits:
        given |= {"fits": 2, "hold": 0.2, "hold_full": 0.5}
        given |= {"neurons": 0.4} if leave == "neurons" else {"start_closed": "2-3", "keep": "0-1 4-5"}
    whole = config(files, tmp_path / "whole", router_learning_rate=0.05, **given)
    train(whole)
    expected = list(logged(tmp_path / "whole"))
    assert len(expected) == 5 and len({entry.get("price") for entry in expected}) == (1 if fits else 5)
    broken = replace(whole, out=str(tmp_path / "broken"))
    usual = layerroute.LayerRouteTrainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(
            layerroute.LayerRouteTrainer,
            "__init__",
            lambda self, *args, **options: usual(self, *args, callbacks=[StopAt(2)], **options),
        )
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    train(broken, resume=True)
    for found, entry in zip(logged(tmp_path / "broken"), expected, strict=True):
        assert found == pytest.approx(entry, rel=1e-5)
    ours, theirs = (from_pretrained(tmp_path / name, engine="eager") for name in ("whole", "broken"))
    assert torch.equal(ours.policy.weight, theirs.policy.weight) and ours.policy.weight.any()
    assert ours.policy.weight.dtype == torch.bfloat16
    assert decided(ours, IDS, attention_mask=MASK) == decided(theirs, IDS, attention_mask=MASK)
    if bridge_rank:
        assert ours.bridges.names == ["2", "3"] and ours.policy.bridged == (2, 3)
        for mine, its in zip(ours.bridges.parameters(), theirs.bridges.parameters(), strict=True):
            assert torch.equal(mine, its) and mine.any()
    if leave == "neurons":
        assert ours.policy.keep == theirs.policy.keep != tuple(range(LAYERS))
        assert str(ours.thin.kept) == str(theirs.thin.kept)


@pytest.mark.parametrize(("hold", "hold_full", "first"), [(0.6, 0.5, 0), (0.6, 1.0, 3), (1.0, 0.5, 0), (1.0, 1.0, 5)])
def test_bridges_are_fitted_before_rows_cross_them(
    hold: float,
    hold_full: float,
    first: int,
    files: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[int] = []
    trainers: list[layerroute.LayerRouteTrainer] = []
    usual = layerroute.LayerRouteTrainer.__init__
    monkeypatch.setattr(
        layerroute.LayerRouteTrainer,
        "__init__",
        lambda self, *args, **options: trainers.append(self) or usual(self, *args, **options),
    )
    monkeypatch.setattr(
        layerroute.LayerRoute, "fit_bridges", lambda self, examples: steps.append(trainers[0].state.global_step)
    )
    given: dict[str, Any] = {"fits": 1, "hold": hold, "hold_full": hold_full, "start_closed": "2-3", "keep": "0-1 4-5"}
    train(config(files, tmp_path / "out", bridge_rank=2, **given))
    assert steps == [first]
    run = [entry["layers_run"] for entry in logged(tmp_path / "out")]
    assert (run[:3] == [LAYERS] * 3) is (hold_full == 1.0)


def test_what_is_fitted_at_the_end_leaves_the_full_depth_alone(files: Path, tmp_path: Path) -> None:  # noqa: F811
    given: dict[str, Any] = {"fits": 1, "hold": 1.0, "hold_full": 1.0, "start_closed": "2-3", "keep": "0-1 4-5"}
    alike = {"lora_dropout": 0.0}  # which draws by chance
    routed = from_pretrained(train(config(files, tmp_path / "routed", bridge_rank=2, **given, **alike)), engine="eager")
    plain = from_pretrained(train(config(files, tmp_path / "plain", objective="none", **alike)), engine="eager")
    assert torch.equal(routed(IDS, plans=[FULL] * len(IDS)).logits, plain(IDS).logits)
    assert routed.policy.weight.any() and all(bridge.any() for bridge in routed.bridges.parameters())


def test_the_budget_moves_the_rate_to_its_target(files: Path, tmp_path: Path) -> None:  # noqa: F811
    chosen = config(
        files, tmp_path / "out", objective="budget", target=0.5, dual_rate=1.0, steps=30, router_learning_rate=0.05,
        save_every=100, learning_rate_schedule="constant_with_warmup", start_bias=0.5, keep="0",
    )  # fmt: skip
    train(chosen)
    run = [entry["layers_run"] / LAYERS for entry in logged(tmp_path / "out")]
    assert run[0] == 1 and abs(sum(run[-10:]) / 10 - 0.5) < 0.15
    model = from_pretrained(tmp_path / "out", engine="eager")
    assert all(plan.visits[0].layer == 0 for plan in decided(model, IDS[:, :4]))


@pytest.mark.parametrize("objective", ["paper", "budget", "quality", "none"])
def test_two_steps_from_the_command_line(objective: str, files: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "adapter"
    given = ["layerroute", str(files / "data.jsonl"), "--out", str(out), "--model", str(files / "base"), "--steps", "2"]
    given += ["--objective", objective, "--seed", "3", "--rank", "2", "--tokens-per-batch", "60", "--json"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    model = from_pretrained(adapter=out, engine="eager")
    assert (model.plan is None) == (objective != "none")
    adapted = {name for name, _ in model.base.named_parameters() if "lora" in name}
    assert len(adapted) == 2 * 4 * LAYERS
    assert model.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape[0] == 1


@pytest.mark.parametrize(
    ("flags", "owner"),
    [
        (
            ["--fits", "2", "--penalty", "1", "--keep", "0"],
            "--fits 0",
        ),  # the default, but somebody expects it to matter
        (["--fits", "2", "--router-learning-rate", "0.1", "--keep", "0"], "--fits 0"),
        (["--objective", "none", "--start-bias", "2"], "--objective paper and --objective budget"),
        (["--objective", "budget", "--penalty", "2"], "--objective paper and --objective quality"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    flags: list[str],
    owner: str,
    files: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    given = ["layerroute", str(files / "data.jsonl"), "--out", str(tmp_path / "out"), *flags]
    error = f"{flags[2]} belongs to {owner}"
    one_line(lambda: CliRunner().invoke(app, given, catch_exceptions=False), error)


@pytest.mark.parametrize(
    ("change", "mention"),
    [
        ({"objective": "best"}, "objective"),
        ({"target": 0.0}, "target"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"penalty": -1.0}, "penalty"),
        ({"keep": "x"}, "'x'"),
        ({"bridge_rank": -1}, "bridge-rank"),
        ({"bridge_rank": 2}, "give fits too"),
        ({"leave": "attention"}, "give fits too"),
        ({"hold": 1.0}, "hold is 1: lower it"),
        ({"hold": 1.1}, "hold must be 0 to 1"),
        ({"leave": "half"}, "no leave 'half'"),
        ({"rank": 0}, "rank"),
        ({"lora_dropout": 1.0}, "lora-dropout"),
        ({"router_learning_rate": 0.0}, "router-learning-rate"),
        ({"fits": -1}, "fits"),
        ({"fits": 1, "objective": "paper"}, "fits"),
        ({"fits": 1}, "keep"),
    ],
)
def test_recipes_refuse_nonsense(change: dict[str, Any], mention: str) -> None:
    call: Callable[[], Any] = lambda: LayerRouteRecipe(**change)  # noqa: E731
    one_line(call, mention)


@pytest.mark.parametrize(
    ("recipe", "steps", "mention"),
    [
        ({"hold": 0.1, "start_closed": "0-5"}, 20, "start-closed"),
        ({"fits": 1, "candidates": 6}, 20, "candidates"),
        ({"hold": 0.9}, 2, "hold"),
        ({"hold": 0.5, "settle": 0.6}, 3, "hold"),
    ],
)
def test_recipes_that_do_not_fit_the_model_or_the_steps_are_refused(
    recipe: dict[str, Any], steps: int, mention: str
) -> None:
    one_line(lambda: LayerRoute(attach(tiny.model("llama")), LayerRouteRecipe(**recipe), steps), mention)
