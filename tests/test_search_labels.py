"""Labels: records, files that are continued, menus; the command, in one process and in several."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_eval import word_tokenizer, words
from tiny import one_line
from typer.testing import CliRunner

from layerwise import Plan, attach
from layerwise.cli import app
from layerwise.data.short_answers import Question
from layerwise.search import labels, run
from layerwise.search.fanout import label_all
from layerwise.search.labels import kind, menu, read_labels, summary
from layerwise.search.reference import plain_margin
from layerwise.search.searcher import Searcher, SearchOptions

OPTIONS = SearchOptions(simulations=10, seed=3)


def question(number: int) -> Question:
    chance = random.Random(number)
    choices = tuple(f" {words(chance, count)}" for count in (1, 2, 1))
    prompts = [words(chance, 6) for _ in range(3)]
    return Question("lcm", f"q{number}", prompts[0], choices[number % 3], choices, tuple(prompts[1:]))


QUESTIONS = [question(number) for number in range(5)]


@pytest.fixture
def folder(base: Path) -> Path:
    word_tokenizer().save_pretrained(base)
    return base


def search(folder: Path, out: Path, asked: list[Question] = QUESTIONS, **chosen: Any) -> list[labels.Record]:
    chosen = {"calibration": 0, "dtype": "float32", "options": OPTIONS, **chosen}
    return run.search(str(folder), asked, chosen.pop("options"), out, **chosen)


# -- records -----------------------------------------------------------------------------------------------------


def test_a_record_says_what_the_paths_score() -> None:
    base = tiny.model("llama")
    record = Searcher(attach(base), word_tokenizer(), OPTIONS)(QUESTIONS[1])
    assert record["evaluations"] == 11 == len(record["paths"]) + 1 and record["id"] == "q1"
    assert record["base"]["plan"] == "0-5" and record["base"]["layers"] == 6
    for path in (record["base"], *record["paths"]):
        plan = Plan.parse(path["plan"], tiny.LAYERS)
        assert path["score"] == pytest.approx(plain_margin(base, word_tokenizer(), QUESTIONS[1], plan), abs=2e-4)
        assert path["right"] == (path["score"] > 0) and path["layers"] == plan.depth
    order = [(path["robust"], path["right"]) for path in record["paths"]]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_robust_paths_win_on_every_variant_and_no_other_does_of_those_tested(margin: float) -> None:
    base, tokenizer = tiny.model("llama"), word_tokenizer()
    options = replace(OPTIONS, simulations=30, retest=99, margin=margin)
    counts = {True: 0, False: 0}
    for asked in QUESTIONS:
        record = Searcher(attach(base), tokenizer, options)(asked)
        for path in (record["base"], *record["paths"]):
            prompts = [asked.prompt, *asked.variants]
            plan = Plan.parse(path["plan"])
            won = all(
                plain_margin(base, tokenizer, replace(asked, prompt=one), plan) > margin + 1e-4 for one in prompts
            )
            assert path["robust"] == won
            counts[won] += path["right"]
    assert min(counts.values()) > 0, counts


def test_only_the_best_right_paths_are_tested_again() -> None:
    model = attach(tiny.model("llama"))
    records = [Searcher(model, word_tokenizer(), replace(OPTIONS, simulations=30, retest=2))(one) for one in QUESTIONS]
    assert all(sum(path["robust"] for path in record["paths"]) <= 2 for record in records)


# -- files -------------------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_goes_on_and_ends_the_same(folder: Path, tmp_path: Path) -> None:
    whole = search(folder, tmp_path / "whole.jsonl", calibration=0)
    search(folder, tmp_path / "cut.jsonl", QUESTIONS[:3])
    text = (tmp_path / "cut.jsonl").read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(text[:-20])  # in the middle of the third question
    assert [one["id"] for one in read_labels(tmp_path / "cut.jsonl")[1]] == ["q0", "q1"]
    shown: list[tuple[int, int]] = []
    found = search(folder, tmp_path / "cut.jsonl", progress=lambda done, of: shown.append((done, of)))
    assert found == whole and shown == [(2, 5), (3, 5), (4, 5), (5, 5)]
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert search(folder, tmp_path / "cut.jsonl") == whole  # nothing is left to do


def test_other_options_or_another_model_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    search(folder, tmp_path / "l.jsonl", QUESTIONS[:1])
    with pytest.raises(ValueError, match=r"made with options.simulations 10, not 11: use the same"):
        search(folder, tmp_path / "l.jsonl", options=replace(OPTIONS, simulations=11))
    with pytest.raises(ValueError, match="made with dtype"):
        search(folder, tmp_path / "l.jsonl", dtype="bfloat16")
    tiny.model("llama", seed=1).save_pretrained(tmp_path / "other")
    word_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="made with fingerprint"):
        search(tmp_path / "other", tmp_path / "l.jsonl")
    (tmp_path / "text.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="no file of labels"):
        search(folder, tmp_path / "text.jsonl")
    with pytest.raises(ValueError, match="there is no file"):
        read_labels(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ([1], "no file of labels"),
        ({"options": [1]}, "no file of labels"),
        ({"calibration": 0}, "made with"),
        ({"calibration": 0, "options": {"prior": None}}, "made with"),
    ],
)
def test_a_first_line_that_says_something_else_is_told_in_one_line(
    folder: Path, tmp_path: Path, about: Any, says: str
) -> None:
    file = tmp_path / "l.jsonl"
    file.write_text(json.dumps({"about": about}) + "\n")
    one_line(lambda: search(folder, file), str(file), says)


def test_a_prompt_may_hold_any_separator(tmp_path: Path) -> None:
    written = {**record(0, True), "prompt": "a\u2028b\u2029c\x85d\x0be\r\nf"}
    labels.LabelFile(tmp_path / "l.jsonl", {}).add(written)
    assert read_labels(tmp_path / "l.jsonl")[1] == [written]
    assert labels.LabelFile(tmp_path / "l.jsonl", {}).done == {"q0"}


def test_a_continued_file_keeps_its_prior(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "questions", lambda task, split: QUESTIONS[1:])
    first = search(folder, tmp_path / "l.jsonl", QUESTIONS[:2], calibration=2)
    weights = read_labels(tmp_path / "l.jsonl")[0]["options"]["prior"]
    assert len(weights) == 6 + 5 + 6 and max(weights.values()) == 1.0
    monkeypatch.setattr(run, "training_prior", None)
    assert search(folder, tmp_path / "l.jsonl", calibration=2)[:2] == first


# -- fan-out -----------------------------------------------------------------------------------------------------


def by_id(path: Path) -> dict[str, Any]:
    return {record["id"]: record for record in read_labels(path)[1]}


def test_processes_find_what_one_process_finds(folder: Path, tmp_path: Path) -> None:
    whole = search(folder, tmp_path / "one.jsonl")
    assert search(folder, tmp_path / "two.jsonl", workers=2) == whole
    assert by_id(tmp_path / "two.jsonl") == by_id(tmp_path / "one.jsonl")


class _Dies:
    def __call__(self, workers: int) -> Any:
        os._exit(1)


@pytest.mark.parametrize("backend", ["local", "ray"])
def test_a_worker_that_dies_is_told_in_one_line(backend: str) -> None:
    if backend == "ray":
        pytest.importorskip("ray")
    asked = Question("sums", "1", "1 + 1 =", " 2\n", (" 2\n", " 3\n"))
    one_line(lambda: list(label_all([asked], _Dies(), 2, backend)), "a worker process died")


def test_a_ray_cluster_finds_what_one_process_finds(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    whole = search(folder, tmp_path / "one.jsonl")
    assert search(folder, tmp_path / "two.jsonl", workers=2, backend="ray") == whole


def test_without_ray_the_message_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="pip install"):
        search(folder, tmp_path / "l.jsonl", backend="ray")


# -- what labels say ---------------------------------------------------------------------------------------------


def record(number: int, base: bool, **paths: str) -> labels.Record:
    """Paths by name (`skip` 4 layers, `full` 6, `repeat` 7): right, robust or wrong."""
    plans = {"skip": ("0-3", 4), "full": ("0-5", 6), "repeat": ("0*2 1-5", 7)}

    def line(name: str, how: str) -> dict[str, Any]:
        plan, layers = plans[name]
        return {"plan": plan, "layers": layers, "score": 0, "right": how != "wrong", "robust": how == "robust"}

    found = sorted((line(*pair) for pair in paths.items()), key=lambda path: -path["robust"])
    return {"id": f"q{number}", "task": "lcm", "base": line("full", "robust" if base else "wrong"), "paths": found}


RECORDS = [
    record(0, True, skip="robust", repeat="wrong"),
    record(1, True, skip="right"),
    record(2, False, skip="robust", repeat="robust"),
    record(3, False, repeat="robust"),
    record(4, False, repeat="right"),
    record(5, False, skip="wrong"),
]


def test_classes_are_counted() -> None:
    assert [kind(one) for one in RECORDS] == ["right", "right", "improved", "improved", "unconfirmed", "hopeless"]
    found = summary(RECORDS)
    assert found["tasks"]["lcm"] == found["all"]
    assert found["all"]["classes"] == {"right": 2, "improved": 2, "unconfirmed": 1, "hopeless": 1}
    assert found["all"]["shorter"] == 1 and found["all"]["layers"] == pytest.approx((4 + 6 + 4 + 6 + 6 + 6) / 6)
    assert found["all"]["base"] == 2 / 6 and found["all"]["oracle"] == 5 / 6 and found["all"]["robust_oracle"] == 4 / 6


def test_a_menu_covers_greedily() -> None:
    assert [(one["plan"], one["covers"], one["alone"]) for one in menu(RECORDS, 9)] == [
        ("0-3", 2, 2),  # as many as the full plan and the repeat, with fewer layers
        ("0-5", 1, 2),
        ("0*2 1-5", 1, 2),
    ]
    assert [one["plan"] for one in menu(RECORDS, 1, robust=False)] == ["0-3"]
    assert menu(RECORDS, 1, robust=False)[0]["alone"] == 3
    assert menu([], 3) == []


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def word_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions of random words in the place of every task's."""
    monkeypatch.setattr(run, "questions", lambda task, split: QUESTIONS[:4])


def test_the_command_writes_labels_and_says_what_they_hold(folder: Path, tmp_path: Path, word_task: None) -> None:
    out = tmp_path / "labels.jsonl"
    words = ["--model", str(folder), "--out", str(out), "--tasks", "lcm,lcm", "--limit", "2", "--dtype", "float32"]
    words = ["search", *words, "--simulations", "6", "--calibration", "1", "--json"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.strip().splitlines()[-1])
    about, records = read_labels(out)
    assert len(records) == 2 and found["summary"]["all"]["n"] == 2 and about["options"]["simulations"] == 6
    assert "lcm: 2 questions" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "x.jsonl", "--tasks", "sums,nothing"], "no task 'nothing'"),
        (["--out", "no/such/x.jsonl"], "'no/such' does not exist"),
        (["--out", "x.jsonl", "--simulations", "0"], "simulations must be at least 1"),
        (["--out", "x.jsonl", "--algorithm", "best"], "choose mcts, random, greedy"),
        (["--out", "x.jsonl", "--seed", "-1"], "seed must be at least 0"),
        (["--out", "x.jsonl", "--workers", "0"], "workers must be at least 1"),
        (["--out", "x.jsonl", "--backend", "cloud"], "choose local or ray"),
        (["--out", "x.jsonl", "--price", "-1"], "price must not be negative"),
        (["--out", "x.jsonl", "--tasks", "piqa"], "out of domain"),
        (["--out", "x.jsonl", "--split", "dev"], "no split 'dev'"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        CliRunner().invoke(app, ["search", *words], catch_exceptions=False)


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2() -> None:
    words = [sys.executable, "-m", "layerwise", "search", "--out", "x.jsonl", "--tasks", "nothing"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "nothing" in done.stderr
