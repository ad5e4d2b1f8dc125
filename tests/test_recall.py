"""The recall tasks, the curriculum, and trainings of a few steps."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import one_line

from layerwise.data.examples import IGNORED
from layerwise.data.recall import RecallTask
from layerwise.model.recall_model import RecallModel
from layerwise.training import routed_attention
from layerwise.training.curriculum import Curriculum, RoutedAttentionConfig, Rules, stage_lengths
from layerwise.training.routed_attention import RecallRun, build, evaluate, penalty, train

TASKS = [RecallTask("recall", 20), RecallTask("mqar", 60, pairs=6), RecallTask("mqar", 256, pairs=8, queries=3)]


def pairs_of(task: RecallTask, split: str, seed: int = 0) -> set[tuple[int, int]]:
    ids = task.batch(200, seed, split=split).input_ids
    count = 1 if task.task == "recall" else task.pairs
    return {(row[2 * n], row[2 * n + 1]) for row in ids.tolist() for n in range(count)}


# -- tasks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_answers_are_right(task: RecallTask) -> None:
    batch = task.batch(50, seed=1)
    assert batch.input_ids.shape == batch.targets.shape == (50, task.length)
    count = 1 if task.task == "recall" else task.pairs
    for ids, targets in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
        answers = {ids[2 * number]: ids[2 * number + 1] for number in range(count)}
        assert len(answers) == count
        questions = [at for at in range(2 * count, task.length) if ids[at] in answers]
        assert questions == [at for at, target in enumerate(targets) if target != IGNORED]
        assert len(questions) == task.asks == len({ids[at] for at in questions})
        assert all(targets[at] == answers[ids[at]] for at in questions)
        noise = [ids[at] for at in range(2 * count, task.length) if at not in questions]
        are_values = [task.keys <= token < task.keys + task.values for token in noise]
        # The original has one value; in mqar everything in between is one.
        assert not any(are_values) if task.task == "recall" else all(are_values)
    if task.task == "recall":
        assert batch.asked.nonzero()[:, 1].unique().tolist() == [task.length - 1]
        assert torch.equal(batch.input_ids[:, 0], batch.input_ids[:, -1])


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_tests_hold_pairs_that_training_never_sees(task: RecallTask) -> None:
    trained = pairs_of(task, "train") | pairs_of(task, "train", 5) | pairs_of(task, "validation")
    assert not trained & (pairs_of(task, "test") | pairs_of(task, "test", 5))


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_sequences_come_from_the_seed(task: RecallTask) -> None:
    first = task.batch(8, 3, 7)
    again = task.batch(8, 3, 7)
    assert torch.equal(first.input_ids, again.input_ids) and torch.equal(first.targets, again.targets)
    for other in (task.batch(8, 4, 7), task.batch(8, 3, 8), task.batch(8, 3, 7, "validation")):
        assert not torch.equal(first.input_ids, other.input_ids)


def test_least_usage() -> None:
    assert RecallTask("recall", 512).least_usage(4) == 1 / 2048
    assert RecallTask("mqar", 256, pairs=8).least_usage(4) == 8 / 1024


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    one_line(lambda: RecallTask("recall", 2), "distance")
    one_line(lambda: RecallTask("mqar", 20, pairs=8), "fit")
    one_line(lambda: RecallTask("mqar", 200, pairs=8, queries=9), "queries")
    one_line(lambda: config(tmp_path, mode="both"), "both", "joint")
    one_line(lambda: config(tmp_path, steps=0), "steps")
    one_line(lambda: config(tmp_path, floor=0.995), "floor")


# -- curriculum ----------------------------------------------------------------------------------------------------


def test_stage_lengths() -> None:
    assert stage_lengths(32, 128) == [32, 64, 128]
    assert stage_lengths(100, 512) == [100, 200, 400, 512]
    assert stage_lengths(512, 128) == [128]


def test_the_penalty_waits_until_the_task_is_solved_and_doubles_while_it_is() -> None:
    state = Curriculum(Rules((32, 64), most=0.5, rises=2), 3)
    state.update(0.5, [1, 1, 1])
    assert state.phase == "learn" and not any(state.weights)
    state.update(0.99, [1, 1, 1])
    assert state.phase == "spare" and state.weights == [0.125] * 3
    state.update(1.0, [1, 1, 1])
    assert state.weights == [0.25] * 3
    state.update(0.95, [1, 1, 1])  # holds
    assert state.weights == [0.25] * 3
    state.update(0.6, [1, 1, 1])  # backs off
    assert state.weights == [0.125] * 3 and state.backed_off == 1
    for _ in range(2):
        state.update(1.0, [0, 0, 0])
    assert state.weights == [0.5] * 3 and state.length == 32
    state.update(1.0, [0, 0, 0])
    assert state.length == 64 and not state.done and state.weights == [0.125] * 3  # eased, then doubled again
    for _ in range(3):
        state.update(1.0, [0, 0, 0])
    assert state.done


def test_lengths_may_grow_first() -> None:
    state = Curriculum(Rules((32, 64), spare_from=1), 1)
    state.update(1.0, [1])
    assert state.length == 64 and not any(state.weights)
    state.update(1.0, [1])
    assert state.phase == "spare" and any(state.weights)


def test_a_usage_target_ends_the_rise() -> None:
    state = Curriculum(Rules((32,), target=1.25), 4)
    state.update(1.0, [0.5, 0.0, 0.0, 0.0])
    state.update(1.0, [0.03, 0.02, 0.0, 0.0])  # 1.6 slots
    assert state.weights == [0.125] * 4 and not state.done
    state.update(1.0, [0.03, 0.0, 0.0, 0.0])
    assert state.done


def test_pressure_that_has_done_its_work_may_be_eased() -> None:
    for eases, expected in ((True, 0.0625), (False, 0.125)):
        state = Curriculum(Rules((32,), target=1.25, eases=eases), 1)
        state.update(1.0, [0.5])
        state.update(1.0, [0.5])
        state.update(0.95, [0.5])  # too many attend: held
        assert state.weights == [0.125]
        state.update(0.95, [0.03])
        assert state.weights == [expected]


def test_routes_are_fixed_until_the_task_is_learnt() -> None:
    state = Curriculum(Rules((32, 64), spare_from=1), 1, fixed=True)
    phases = []
    for _ in range(3):
        phases.append((state.stage, state.phase))
        state.update(1.0, [1.0])
    assert phases == [(0, "fixed"), (1, "fixed"), (1, "learn")] and state.phase == "spare"


def test_stages_of_the_tasks(tmp_path: Path) -> None:
    sizes = {"layers": 2, "kernel_size": 5, "start_length": 16}
    recall = config(tmp_path, distance=62, **sizes).rules()
    assert recall.lengths == (16, 32, 64) and recall.spare_from == 0 and recall.target == 1.25
    mqar = config(tmp_path, task="mqar", distance=64, pairs=4, **sizes).rules()
    assert mqar.lengths == (16, 32, 64) and mqar.spare_from == 1  # four pairs fill half of 16 tokens
    assert config(tmp_path, distance=62, order="lengthen-first", **sizes).rules().spare_from == 2
    assert config(tmp_path, distance=62, mode="joint", **sizes).rules().lengths == (64,)
    # Convolutions of 40 taps in two layers reach 78 back: no stage is shorter.
    assert config(tmp_path, distance=510, layers=2, kernel_size=40).rules().lengths[0] == 81


# -- training ------------------------------------------------------------------------------------------------------


def config(out: Path, **changes: Any) -> RoutedAttentionConfig:
    given: dict[str, Any] = {"distance": 14, "steps": 4, "tokens_per_batch": 64, "start_length": 8, "eval_every": 1}
    given |= {"eval_rows": 8, "test_rows": 8, "save_every": 1, "layers": 2, "hidden_size": 16, "heads": 2}
    return RoutedAttentionConfig(**{**given, "kernel_size": 4, "out": str(out), **changes})


def measured(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in ("seconds", "config", "command")}


@pytest.mark.parametrize("mode", ["curriculum", "joint", "attention", "convolution"])
@pytest.mark.parametrize("task", ["recall", "mqar"])
def test_two_steps_of_every_mode(tmp_path: Path, mode: str, task: str) -> None:
    said: list[str] = []
    result = train(config(tmp_path, mode=mode, task=task, steps=2, pairs=2), said.append)
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["steps"] == 2 and len(result["history"]) == 2 and "accuracy" in said[-1]
    assert f"--mode {mode}" in result["command"] and f"--task {task}" in result["command"]
    if mode in ("attention", "convolution"):
        assert result["usage"] == float(mode == "attention")
    else:
        assert 0 <= result["usage"] <= 1 and len(result["usage_per_layer"]) == 2
    length = 16 if task == "recall" else 14
    again = RecallModel.from_pretrained(tmp_path)
    seen = evaluate(again, RecallTask(task, length, 2), 8, 0, "test")
    assert seen["accuracy"] == result["accuracy"] and seen["usage"] == result["usage"]


def test_ctrl_c_and_resume_equal_uninterrupted_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    easy = {"solved": 0.01, "floor": 0.01, "rises": 2, "save_every": 100}
    whole = train(config(tmp_path / "whole", **easy))
    broken = config(tmp_path / "broken", **easy)
    usual = routed_attention.CurriculumRun.step

    def interrupted(run: Any) -> None:
        if run.number == 1:
            signal.raise_signal(signal.SIGINT)
        usual(run)

    with monkeypatch.context() as patch:
        patch.setattr(routed_attention.CurriculumRun, "step", interrupted)
        said: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            train(broken, said.append)
        assert "stopped at step 2" in said[-1] and "--resume" in said[-1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    one_line(lambda: train(broken), "already holds", "--resume")
    one_line(lambda: train(replace(broken, seed=9), resume=True), "seed")
    one_line(lambda: train(config(tmp_path / "none"), resume=True), "no checkpoint")
    assert measured(train(broken, resume=True)) == measured(whole)
    assert measured(train(broken, resume=True)) == measured(whole)  # nothing is left to do


def test_a_checkpoint_holds_the_random_state_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, gpu, state = RecallRun(config(tmp_path), print), torch.device("cuda", 1), torch.arange(3, dtype=torch.uint8)
    run.begin(resume=False)
    restored: list[Any] = []
    monkeypatch.setattr(routed_attention.CurriculumRun, "_device", gpu)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state if device == gpu else None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *given: restored.append(given))
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda file, map_location, weights_only: load(file, weights_only=weights_only))
    run._save()
    run.begin(resume=True)
    ((found, device),) = restored
    assert torch.equal(found, state) and device == gpu


def test_the_penalty_on_logits_moves_a_router_that_is_sure(tmp_path: Path) -> None:
    """The gradient of the sampled gate dies where the router is sure; that of the logits' penalty does not."""
    model = build(config(tmp_path)).train()
    for layer in model.layers:
        layer.mix.router.out.bias.data = torch.tensor([30.0])
    ids = RecallTask("recall", 16).batch(4, 0).input_ids
    pulls = {}
    for on in ("logits", "gate"):
        model.zero_grad()
        output = model(ids)
        penalty(output.route_logits, output.gates, torch.ones(2), on).backward()
        pulls[on] = model.layers[0].mix.router.out.bias.grad.abs().sum().item()
    assert pulls["logits"] > 0.4 and pulls["gate"] < 1e-3


def test_a_weight_presses_its_own_layer(tmp_path: Path) -> None:
    model = build(config(tmp_path)).train()
    ids = RecallTask("recall", 16).batch(4, 0).input_ids
    output = model(ids)
    penalty(output.route_logits, output.gates, torch.tensor([0.0, 1.0]), "logits").backward()
    first, second = (layer.mix.router.out.bias.grad.abs().sum() for layer in model.layers)
    assert first < 0.05 * second  # what reaches the first comes through what the second one reads


def test_fixed_routes_ask_no_router_and_are_let_go_when_they_solve_the_task(tmp_path: Path) -> None:
    run = routed_attention.RecallRun(config(tmp_path, task="mqar", pairs=2, solved=0.01, floor=0.01), lambda line: None)
    run.begin(resume=False)
    run.step()
    assert run.history[0]["phase"] == "fixed" and run.history[0]["usage_per_layer"] == [0.0, 1.0]
    assert all(layer.mix.router.out.weight.grad is None for layer in run.model.layers)
    before = run.rate()
    run.curriculum.fixed = False
    assert run.rate() == pytest.approx(before / 3)
    run.step()
    assert run.history[1]["phase"] == "learn" and 0 < run.history[1]["usage"] < 1
    assert all(layer.mix.router.out.weight.grad is not None for layer in run.model.layers)
    usage = run.history[1]["usage_per_layer"]
    assert usage[0] < 0.3 and usage[1] > 0.7  # routers begin near the fixed routes
