"""The suite `paths`: verdicts as a slow reference gives them, controls, intervals, the command, the figure."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_eval import layerwise_eval
from test_hub import with_lora
from test_router import FULL, LAYERS, MENU, menu, per_layer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from layerwise import Plan, attach, from_pretrained
from layerwise.data.short_answers import Question
from layerwise.evaluation import path_time, paths, verdicts
from layerwise.evaluation.margins import Kept, plan_margins
from layerwise.evaluation.verdicts import written
from layerwise.hub import save_adapter
from layerwise.model import causal_lm
from layerwise.model.bridges import Bridges
from layerwise.policies.router import MenuPolicy, classes_of
from layerwise.report.route_figures import path_figure
from layerwise.search.evaluator import PathEvaluator

INSIDE, OUTSIDE = ("names", "sums"), ("others",)


def number_tokenizer() -> PreTrainedTokenizerFast:
    """Word `w7` is token 7 below 50; from there on the number `57` is token 57."""
    vocabulary = {"<pad>": 0, "</s>": 1} | {f"w{n}" if n < 50 else str(n): n for n in range(2, tiny.VOCABULARY)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def asked(task: str, count: int) -> list[Question]:
    """Questions of the tiny model; "sums" are to be written, and half of them are such that it writes the answer."""
    chance, base, tokenizer, made = random.Random(task), tiny.model("llama"), number_tokenizer(), []
    while len(made) < count:
        prompt = " ".join(f"w{chance.randrange(2, 50)}" for _ in range(2 + len(made) % 7))
        numbers = chance.sample(range(50, tiny.VOCABULARY), 3)
        if task == "sums":
            with torch.no_grad():
                said = base(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].argmax().item()
            if said < 50:
                continue
            numbers[0] = said if len(made) % 2 else numbers[0]
            choices = tuple(f" {number}\n" for number in dict.fromkeys(numbers))
        else:
            choices = tuple(f" {number}" for number in numbers)
        made.append(Question(task, f"{task}-{len(made)}", prompt, choices[0], choices))
    return made


@pytest.fixture
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "IN_DOMAIN", INSIDE)
    monkeypatch.setattr(paths, "OUT_OF_DOMAIN", OUTSIDE)
    monkeypatch.setattr(paths, "questions", lambda task, split: asked(task, 12) if split == "test" else [])
    monkeypatch.setattr(path_time, "PROMPTS", 2)
    monkeypatch.setattr(path_time, "NEW_TOKENS", 4)


# -- verdicts ------------------------------------------------------------------------------------------------


def test_verdicts_are_those_of_plain_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "ROWS", 5)
    model, tokenizer = attach(tiny.model("llama")), number_tokenizer()
    those = asked("names", 6) + asked("sums", 8)
    plans = [[MENU[number % 4], FULL, FULL] for number in range(len(those))]
    lines: list[str] = []
    found = verdicts.verdicts(model, tokenizer, those, plans, Kept(tmp_path), lines.append)
    said = []
    for one, own, right in zip(those, plans, found, strict=True):
        assert set(right) == set(own)
        for plan in own:
            if one.generated:
                with torch.no_grad():
                    logits = model(torch.tensor([tokenizer(one.prompt)["input_ids"]]), plans=[plan]).logits[0, -1]
                expected = tokenizer.decode(logits.argmax()) == one.answer.strip()
                said.append(expected)
            else:
                expected = PathEvaluator(model, tokenizer, one).margins([plan])[0] > 0
            assert right[plan] == expected
    assert 0 < sum(said) < len(said)
    monkeypatch.setattr(verdicts, "written", lambda *_: pytest.fail("asked again"))
    again = Kept(tmp_path)
    assert verdicts.verdicts(model, tokenizer, those, plans, again) == found
    assert again.reused == sum(map(len, found))
    assert any("questions scored" in line for line in lines) and any("answers written" in line for line in lines)


def test_a_written_answers_margin_says_whether_it_is_written() -> None:
    """By the logits of plain passes; answers of two tokens, one of which is at times only the second likeliest."""
    model, tokenizer = attach(tiny.model("llama")), number_tokenizer()
    signs = []
    for number, one in enumerate(asked("sums", 9)):
        plan, ids = [FULL, *MENU][number % 4], tokenizer(one.prompt)["input_ids"]
        margins, said = [], []
        for place in (int(number % 3 == 1), int(number % 3 == 2)):
            with torch.no_grad():
                logits = model(torch.tensor([ids + said]), plans=[plan]).logits[0, -1]
            said.append(int(logits[2:].topk(2).indices[place]) + 2)  # no special token
            own, logits[said[-1]] = logits[said[-1]].item(), float("-inf")
            margins.append(own - logits.max().item())
        answer = f" {tokenizer.decode(said)}\n"
        question = Question("sums", str(number), one.prompt, answer, (answer, " 50\n"))
        found = PathEvaluator(model, tokenizer, question, written=True).margins([plan])[0]
        assert found == pytest.approx(min(margins), abs=2e-4)
        signs.append(found > 0)
    assert not any(signs[1::3] + signs[2::3]) and sum(signs) > 1


def test_margins_are_kept_by_question_and_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, those = attach(tiny.model("llama")), number_tokenizer(), asked("names", 3)
    first = plan_margins(model, tokenizer, those, [[FULL], [FULL, MENU[1]], []], Kept(tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text() + '["half a li')  # a run was killed
    new: list[list[Plan]] = []
    real = PathEvaluator.margins
    monkeypatch.setattr(PathEvaluator, "margins", lambda self, plans: new.append(list(plans)) or real(self, plans))
    kept, asked_again = Kept(tmp_path), [[MENU[1]], [MENU[1], FULL], [MENU[1], FULL]]
    found = plan_margins(model, tokenizer, those[::-1], asked_again, kept)
    assert new == [[MENU[1]], [MENU[1]]] and kept.reused == 3
    assert found[1] == first[1][::-1] and found[2][1] == first[0][0]
    adapted, kept = attach(with_lora(tiny.model("llama"))), Kept(tmp_path)
    assert plan_margins(adapted, tokenizer, those, [[FULL]] * 3, kept) != [[row[0]] for row in found]
    assert kept.reused == 0  # the base has answered, the LoRA on it has not


def test_fresh_verdicts_take_the_place_of_those_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, those = attach(tiny.model("llama")), number_tokenizer(), asked("names", 3) + asked("sums", 3)
    plans = [[FULL]] * 6
    true = verdicts.verdicts(model, tokenizer, those, plans, Kept(tmp_path))
    with monkeypatch.context() as patched:  # a version with a mistake
        patched.setattr(verdicts, "written", lambda _, __, those, ___: [not true[3][FULL]] * len(those))
        patched.setattr(PathEvaluator, "margins", lambda self, plans: [9.0 if not true[0][FULL] else -9.0] * len(plans))
        wrong = verdicts.verdicts(model, tokenizer, those, plans, Kept(tmp_path, fresh=True))
    assert wrong[0] != true[0] and wrong[3] != true[3]
    assert verdicts.verdicts(model, tokenizer, those, plans, Kept(tmp_path)) == wrong
    for file in tmp_path.iterdir():
        file.write_text(file.read_text() + '["half a li')  # a run was killed
    fresh = Kept(tmp_path, fresh=True)
    assert verdicts.verdicts(model, tokenizer, those, plans, fresh) == true and fresh.reused == 0
    assert verdicts.verdicts(model, tokenizer, those, plans, Kept(tmp_path)) == true


def test_a_batch_of_answers_is_each_answer(tmp_path: Path) -> None:
    model, tokenizer, those = attach(tiny.model("llama")), number_tokenizer(), asked("sums", 8)
    plans = [MENU[number % 4] for number in range(8)]
    alone = [written(model, tokenizer, [one], [plan])[0] for one, plan in zip(those, plans, strict=True)]
    assert written(model, tokenizer, those, plans) == alone


# -- controls ------------------------------------------------------------------------------------------------


def test_random_plans_run_as_many_layers() -> None:
    chance = random.Random(0)
    for text in ("0-5", "0*2 1-5", "0-2 4-5", "0-1 3*2 5"):
        plan = Plan.parse(text)
        drawn = {paths.random_plan(plan, LAYERS, chance) for _ in range(40)}
        classes = Counter(classes_of(plan, LAYERS)[1:])
        assert all(Counter(classes_of(one, LAYERS)[1:]) == classes and one.visits[0].layer == 0 for one in drawn)
        assert len(drawn) > 3 or classes[1] == LAYERS - 1


# -- the suite -----------------------------------------------------------------------------------------------


def labels_file(folder: Path) -> Path:
    """What a search of the test questions would have written."""
    model, tokenizer, lines = attach(tiny.model("llama")), number_tokenizer(), [{"about": {}}]
    for one in asked("names", 12):
        scores = PathEvaluator(model, tokenizer, one).margins([FULL, *MENU])
        row = {"task": one.task, "id": one.id, "prompt": one.prompt, "answer": one.answer, "choices": one.choices}
        base = {"plan": str(FULL), "score": scores[0], "right": scores[0] > 0, "robust": False, "layers": 6.0}
        row |= {"base": base, "evaluations": 4, "seed": 0}
        row["paths"] = [
            {"plan": str(plan), "score": score, "right": score > 0, "robust": score > 0.05, "layers": plan.depth}
            for plan, score in zip(MENU, scores[1:], strict=True)
        ]
        lines.append(row | {"algorithm": "mcts"})
    file = folder / "labels.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


@pytest.fixture(params=["per-layer", "menu", "menu with bridges"])
def adapter(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> Path:
    """A saved adapter with a record of its training."""
    number_tokenizer().save_pretrained(base)
    model = from_pretrained(base, engine="eager")
    form, _, bridges = request.param.partition(" with ")
    model.policy = {"per-layer": per_layer, "menu": menu}[form]()
    if bridges:
        model.cross_by(Bridges(model.runtime.backbone, range(1, LAYERS), 2))
        model.policy = replace(model.policy, menu=tuple(plan.crossed(range(1, LAYERS)) for plan in model.policy.menu))
    save_adapter(model, tmp_path / "adapter")
    static = {"3": "0-2", "5": "0-3 5", "12": "0-5"}
    held_out = {"macro_f1": 0.4, "macro_f1_always_execute": 0.3}
    (tmp_path / "adapter" / "training.json").write_text(json.dumps({"static": static, "held_out": held_out}))
    return tmp_path / "adapter"


def test_the_suite_says_what_routing_gains(adapter: Path, few_questions: None, tmp_path: Path) -> None:
    model, tokenizer = from_pretrained(adapter=adapter, engine="eager"), number_tokenizer()
    lines: list[str] = []
    given: dict[str, Any] = {"limit": 10, "rounds": 2, "folder": tmp_path / "kept"}
    result = paths.path_suite(model, tokenizer, adapter, **given, notify=lines.append)
    assert json.loads(json.dumps(result)) == result
    assert tuple(result["in_domain"]) == INSIDE and tuple(result["out_of_domain"]) == OUTSIDE
    base, routed = 0.0, 0.0
    depths: list[tuple[int, float]] = []
    for task in INSIDE:
        table = result["in_domain"][task]
        those = asked(task, 12)[:10]
        assert table["n"] == 10 and table["interval"][0] <= table["routed"] - table["base"] <= table["interval"][1]
        prompts = [tokenizer(one.prompt)["input_ids"] for one in those]
        plans = [paths.decided_plans(model, model.policy, [ids])[0] for ids in prompts]
        depths += [(len(ids), plan.depth) for ids, plan in zip(prompts, plans, strict=True)]
        right = verdicts.verdicts(model, tokenizer, those, [[FULL, plan] for plan in plans], Kept(tmp_path / "other"))
        assert table["base"] == pytest.approx(sum(one[FULL] for one in right) / 10)
        assert table["routed"] == pytest.approx(sum(one[plan] for one, plan in zip(right, plans, strict=True)) / 10)
        base, routed = base + table["base"] / 2, routed + table["routed"] / 2
    assert result["accuracy_gain"] == pytest.approx(100 * (routed - base))
    run = sum(count * depth for count, depth in depths) / sum(count for count, _ in depths) / LAYERS
    assert result["layers_saved"] == pytest.approx(1 - run)
    controls = result["controls"]
    everything = controls["always_execute"]
    if bridges := model.runtime.backbone.bridged:
        routed_plans = [Plan.parse(text) for text in result["routes"]["plans"]]
        made = paths._Controls({}, 0, bridges).plans(routed_plans, LAYERS)
        assert any(plan.depth < LAYERS for plan in made["random"])
        assert all({visit.layer for visit in plan} == set(range(LAYERS)) for plan in made["random"])

    assert set(controls) == {"always_execute", "static", "random", "shuffled"}
    assert everything["accuracy"] == pytest.approx(base) and everything["layers_saved"] == 0
    assert everything["routed_ahead"] == pytest.approx(result["accuracy_gain"])
    assert controls["static"]["plan"] == "0-3 5" and controls["static"]["layers_saved"] == pytest.approx(1 / 6)
    if isinstance(model.policy, MenuPolicy):
        assert result["oracle"]["menu"]["accuracy"] >= max(routed, base)
    assert result["oracle"]["search"] is None and result["macro_f1"]["routed"] == 0.4
    assert result["time"]["prompts"] == 2 and result["commit"] == result["environment"]["commit"]
    again = paths.path_suite(model, tokenizer, adapter, **given)
    assert (result["answers_kept"], again["answers_kept"]) == (0, result["answers"])
    assert {name: again[name] for name in ("in_domain", "controls", "routes")} == {
        name: result[name] for name in ("in_domain", "controls", "routes")
    }
    path_figure(result, tmp_path / "paths.png")
    assert (tmp_path / "paths.png").stat().st_size > 5_000


def test_labels_of_test_questions_give_the_searchs_oracle(adapter: Path, few_questions: None, tmp_path: Path) -> None:
    model, tokenizer = from_pretrained(adapter=adapter, engine="eager"), number_tokenizer()
    file = labels_file(tmp_path)
    result = paths.path_suite(model, tokenizer, adapter, labels=file, rounds=1, folder=tmp_path)
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    best = sum(row["base"]["right"] or any(path["right"] for path in row["paths"]) for row in rows) / 12
    search = result["oracle"]["search"]
    assert search["n"] == 12 and search["accuracy"] == pytest.approx(best) and best > search["base"]
    assert search["base"] == pytest.approx(result["in_domain"]["names"]["base"])
    assert "test split" in result["macro_f1"]["questions"] and 0 < result["macro_f1"]["always_execute"] < 1


def test_the_command_writes_prints_and_draws(
    adapter: Path, few_questions: None, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(causal_lm, "compiler_available", lambda: False)  # compiling takes longer than all the rest
    out, figure = tmp_path / "drllm.json", tmp_path / "paths.png"
    options = ["--suite", "paths", "--limit", "3", "--dtype", "float32", "--out", str(out), "--figure", str(figure)]
    done = layerwise_eval(str(adapter), *options, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result and figure.stat().st_size > 5_000
    fields = {"in_domain", "out_of_domain", "accuracy_gain", "out_of_domain_gain", "layers_saved", "time_realised"}
    assert fields | {"controls", "oracle", "macro_f1", "command", "commit", "environment"} <= set(result)
    assert result["adapter"] == "adapter" and "shuffled" in done.stdout and "points ahead" in done.stdout


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--suite", "paths"], "give the folder"),
        (["somewhere", "--suite", "paths", "--limit", "0"], "limit must be 1"),
        (["somewhere", "--suite", "paths", "--labels", "no-such-file"], "layerwise search"),
        (["somewhere", "--limit", "3"], "--limit belongs to --suite paths"),
        (["somewhere", "--fresh"], "--fresh belongs to --suite paths"),
        (["somewhere", "--suite", "paths", "--samples", "3"], "--suite exits and --suite tools-vs-planning"),
        (["somewhere", "--suite", "tools-vs-planning", "--dtype", "float32"], "--dtype belongs"),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(given: list[str], says: str) -> None:
    error = layerwise_eval(*given).exception
    assert isinstance(error, ValueError) and says in str(error) and "\n" not in str(error)


def test_an_adapter_that_does_not_route_is_refused(few_questions: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train drllm"):
        paths.path_suite(attach(tiny.model("llama")), number_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="to draw"):
        path_figure({}, tmp_path / "x.png")
