"""What `bench speculative` writes, and the table made from it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tables import speculative_table
from typer.testing import CliRunner

from layerwise import attach
from layerwise.benchmarks import contenders, speculative
from layerwise.benchmarks.speculative import _compared, static_drafts
from layerwise.cli import app
from layerwise.cli.bench import _keep, _kept, _print_speculative
from layerwise.trace import Source, Trace


def ran(tokens: list[int], seconds: float, drafted: int = 0, accepted: int = 0) -> Any:
    trace = Trace()
    trace.drafted, trace.accepted = drafted, accepted
    trace.drafts["head"] = 2
    for _ in tokens:
        trace.made(0, Source.DRAFTED)
    return SimpleNamespace(tokens=tokens, decoding=seconds, whole=seconds + 1.0, trace=trace)


def test_ratios_are_of_total_times_of_medians() -> None:
    runs = {
        "plain": [[ran([1, 2, 3], 4.0), ran([1, 2, 3], 6.0), ran([1, 2, 3], 50.0)], [ran([7, 8], 2.0)] * 3],
        "auto": [[ran([1, 2, 3], 2.0, 4, 3)] * 3, [ran([7, 8], 2.0, 4, 1)] * 3],
        "transformers": [[ran([1, 2, 3], 12.0)], [ran([7, 8], 8.0)]],
        "transformers early exit": [[ran([1, 2, 3], 30.0)], [ran([7, 8], 10.0)]],
        "economize": [[ran([1, 2, 3], 8.0)], [ran([7, 8], 4.0)]],
    }
    found = _compared(runs, "auto")
    assert found["speedup"] == pytest.approx(8 / 4)
    assert found["speedup_whole_call"] == pytest.approx(10 / 6)
    assert found["speedup_vs_hf"] == pytest.approx(20 / 4)
    assert found["speedup_vs_hf_early_exit"] == pytest.approx(40 / 4)
    assert found["speedup_vs_economize"] == pytest.approx(12 / 4)
    assert found["acceptance"] == pytest.approx(4 / 8)
    assert found["tokens_per_second"] == pytest.approx(3 / 4)
    assert found["identical"] and found["identical_to_hf"]


def test_answers_of_one_token_have_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="ended after its first token"):
        _compared({"plain": [[ran([1], 1.0)]], "auto": [[ran([1], 1.0)]]}, "auto")


def test_a_result_without_early_exit_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """transformers has none to measure in a model of four layers."""
    runs = {name: [[ran([1, 2, 3], 4.0)]] for name in ("plain", "auto", "transformers")}
    told = {"task": "code", "draft": "auto", "batch": {"rows": 8, "speedup": 1.0}, "settings": {"transformers": None}}
    _print_speculative(told | _compared(runs, "auto"))
    assert "1.0x transformers" in capsys.readouterr().out


def test_a_batch_has_eight_prompts_of_its_own_and_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []

    def generate(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.append(ids)
        return ids

    ours: Any = SimpleNamespace(generate=generate, prepare=lambda *_, **__: None, read_draft=lambda _: None)
    ours.exit_head, ours.ngrams, ours.exits = None, None, ()
    ours.runtime = SimpleNamespace(backbone=SimpleNamespace(model=tiny.model("llama")), engine=SimpleNamespace(name=""))
    for name, given in {
        "load_tokenizer": lambda _: None,
        "from_pretrained": lambda *_, **__: ours,
        "held_out": lambda task, tokenizer, count: [torch.tensor([[number]]) for number in range(count)],
        "timed": lambda *_: ran([1, 2], 1.0),
    }.items():
        monkeypatch.setattr(speculative, name, given)
    result = speculative.bench_speculative("code", "base", prompts=3, count=2, peers=False)
    assert result["prompts"] == 3 and all(sorted(ids[:, 0].tolist()) == list(range(8)) for ids in asked)
    assert len(asked) == 2 + 2 * 2 * 2  # a prompt alone and with its answer: once to warm up, then two by two rounds


def test_one_different_token_in_any_round_is_seen() -> None:
    runs = {
        "plain": [[ran([1, 2, 3], 1.0), ran([1, 2, 3], 1.0)]],
        "auto": [[ran([1, 2, 3], 1.0), ran([1, 2, 4], 1.0)]],
    }
    assert not _compared(runs, "auto")["identical"]


def test_other_libraries_decode_the_same_weights_each_at_its_fastest_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    base, ids = tiny.model("llama"), torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    plain = attach(base).generate(ids, max_new_tokens=6, do_sample=False)[0, 8:].tolist()
    taken = iter((9.0, 3.0, 8.0, 2.0))  # one setting of early exit after the other, then of economize
    monkeypatch.setattr(contenders, "timed", lambda *_, **__: SimpleNamespace(decoding=next(taken)))
    monkeypatch.setattr(contenders, "HF_EXITS", (2, 4, 99))
    found = contenders.other_libraries(base, ids, 6)
    assert {name: setting for name, (_, setting) in found.items()} == {
        "transformers": None, "transformers early exit": 4, "economize": 8
    }  # fmt: skip
    monkeypatch.undo()
    for name, (call, _) in found.items():
        assert call(ids, 6).tokens == plain, name


def test_a_sweep_holds_only_what_the_model_can_draft() -> None:
    bare = static_drafts(SimpleNamespace(exit_head=None, ngrams=None, exits=()))
    assert bare and not any("head" in one or "corpus" in one for one in bare)
    full = static_drafts(SimpleNamespace(exit_head=object(), ngrams=object(), exits=(4, 8)))
    assert {"head,4", "corpus,4", "exit:4,2", "exit:8,4"} <= set(full)


def result(task: str, speedup: float, adapter: str | None = None) -> dict[str, Any]:
    return {
        "task": task,
        "adapter": adapter,
        "model": "base",
        "speedup": speedup,
        "tokens_per_second": 100.0,
        "acceptance": 0.5,
        "tokens_per_pass": 2.0,
        "speedup_whole_call": 1.2,
        "speedup_vs_hf": 4.0,
        "speedup_vs_hf_early_exit": 9.0,
        "batch": {"speedup": 1.1, "identical": True},
        "identical": task != "chat",
        "prompts": 8,
        "new_tokens": 96,
        "rounds": 3,
        "environment": {"cpu": "CPU", "threads": 2, "torch": "2", "transformers": "5", "commit": "abc"},
    }


def test_results_of_tasks_and_weights_gather_in_one_file(tmp_path: Path) -> None:
    file = tmp_path / "speculative.json"
    for one in (result("tools", 1.5), result("code", 2.0), result("tools", 1.7), result("tools", 2.5, "mine")):
        _keep(file, one)
    runs = json.loads(file.read_text())["runs"]
    assert [(run["label"], [(t["task"], t["speedup"]) for t in run["tasks"]]) for run in runs] == [
        ("base", [("code", 2.0), ("tools", 1.7)]),
        ("mine", [("tools", 2.5)]),
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--draft", "ngram"], "holds code with draft auto: give another file"),
        (["--new-tokens", "32"], "holds code with new-tokens 64: give another file"),
        (["--draft", "tree,5", "--sweep", "--out", "another.json"], "a sweep compares auto"),
    ],
)
def test_a_result_of_other_options_is_not_replaced(words: list[str], says: str, tmp_path: Path) -> None:
    kept = {"task": "code", "draft": "auto", "new_tokens": 64}
    out = tmp_path / "kept.json"
    out.write_text(json.dumps({"runs": [{"label": "folder", "tasks": [kept]}]}), encoding="utf-8")
    given = ["bench", "speculative", "--task", "code", "--adapter", "no/such/folder", "--new-tokens", "64"]
    with pytest.raises(ValueError, match=says):
        CliRunner().invoke(app, [*given, "--out", str(out), *words], catch_exceptions=False)


@pytest.mark.parametrize("text", ["[1, 2]", '{"runs": [{"name": "x"}]}'])
def test_a_file_of_something_else_is_not_overwritten(text: str, tmp_path: Path) -> None:
    file = tmp_path / "notes.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="give another file"):
        _kept(file)  # before anything is measured
    with pytest.raises(ValueError, match="give another file"):
        _keep(file, result("tools", 1.5))
    assert file.read_text() == text


def test_the_table_says_how_many_rows_are_identical() -> None:
    runs = [{"label": "mine", "tasks": [result("tools", 1.5), result("chat", 1.25)]}]
    text = speculative_table({"runs": runs})
    assert "| tools | mine | **1.50x** | 1.20x | 100 | 50% | 2.00 | 4.0x | 9.0x |" in text
    assert "identical to plain decoding's in 1 of 2 rows" in text and "fixed draft" not in text
    runs[0]["tasks"][0] |= {"auto_vs_best_static": 0.9, "hopeless": 0.97}
    text = speculative_table({"runs": runs})
    assert "0.90 times as fast as the best fixed draft" in text and "1 rows were swept" in text
