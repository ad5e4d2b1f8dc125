"""Training of Dr.LLM's routers: losses against slow ones, features against a real pass, the command line."""

from __future__ import annotations

import json
import random
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_eval import word_tokenizer, words
from test_router import FULL, HIDDEN, LAYERS, MENU
from tiny import one_line
from typer.testing import CliRunner

from layerwise import Plan, attach, from_pretrained
from layerwise.cli.train import app
from layerwise.policies.router import WINDOWS, MenuPolicy, PerLayerPolicy, Routers, classes_of, plan_of, windows
from layerwise.search.evaluator import PathEvaluator
from layerwise.training import drllm, features
from layerwise.training.features import decided_plans, kept_features, menu_reads, path_windows
from layerwise.training.recipes import DrLLMConfig, RouterRecipe
from layerwise.training.routers import (
    choose,
    class_weights,
    fit_layers,
    fit_menu,
    focal_loss,
    layer_logits,
    macro_f1,
    schedule_of,
)

TRIED = [*MENU, Plan.parse("0-3 5"), Plan.parse("0 2-5"), Plan.parse("3-4*2"), Plan.parse("1-5")]


def silent(line: str) -> None:
    pass


# -- losses --------------------------------------------------------------------------------------------------


def test_focal_loss_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    logits, classes = torch.randn(5, 4, 3), torch.randint(0, 3, (5, 4))
    weights = torch.tensor([3.0, 0.5, 1.7])
    expected = 0.0
    for row in range(5):
        for layer in range(4):
            c = int(classes[row, layer])
            p = float(logits[row, layer].exp()[c] / logits[row, layer].exp().sum())
            expected -= float(weights[c]) * (1 - p) ** 2 * torch.log(torch.tensor(p)).item() / 20
    assert focal_loss(logits, classes, weights).item() == pytest.approx(expected, rel=1e-5)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), classes.flatten())
    torch.testing.assert_close(focal_loss(logits, classes, torch.ones(3), gamma=0.0), plain)


def test_class_weights_have_mean_one_and_do_not_saturate() -> None:
    classes = torch.tensor([0] * 400 + [1] * 95_000 + [2] * 100)
    for beta in (0.999, 0.9999, 1.0):
        weights = class_weights(classes, beta)
        assert weights.mean().item() == pytest.approx(1) and weights[2] > weights[0] > weights[1]
        effective = [n if beta == 1 else (1 - beta**n) / (1 - beta) for n in (400, 95_000, 100)]
        assert (weights[2] / weights[1]).item() == pytest.approx(effective[1] / effective[2], rel=1e-4)
    assert class_weights(torch.tensor([1, 1, 0]), 1.0).tolist() == pytest.approx([4 / 3, 2 / 3, 0])


def test_macro_f1_counts_every_class_alike() -> None:
    expected = torch.tensor([1, 1, 1, 1, 1, 1, 0, 2])
    assert macro_f1(expected, expected) == 1
    always = macro_f1(torch.ones_like(expected), expected)
    assert always == pytest.approx((2 * 6 / (8 + 6)) / 3)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [schedule_of(step, 100, 500) for step in range(100)]
    assert rates[9] == 1 == max(rates) and rates[0] == 0.1 and rates[-1] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert schedule_of(0, 2, 500) == 1


def test_the_best_option_saves_enough() -> None:
    options = [(0.9, 0.0), (0.7, 0.2), (0.8, 0.1), (0.8, 0.15)]
    assert [choose(options, saved) for saved in (0, 0.05, 0.12, 0.18, 0.5)] == [0, 3, 3, 1, 1]


# -- features ------------------------------------------------------------------------------------------------


def prompts_of(count: int = 6) -> list[list[int]]:
    chance = random.Random(5)
    return [[chance.randrange(3, tiny.VOCABULARY) for _ in range(3 + 4 * (at % 4))] for at in range(count)]


def test_features_are_what_a_routed_pass_reads(tmp_path: Path) -> None:
    model, prompts = attach(tiny.model("llama")), prompts_of()
    routers = Routers.random(LAYERS, HIDDEN, 3, units=8, seed=3)
    routers.outer_weight.mul_(4)
    model.policy = PerLayerPolicy(routers)
    plans = decided_plans(model, model.policy, prompts)
    assert len(set(plans)) > 2
    classes = [classes_of(plan, LAYERS) for plan in plans]
    means, share = path_windows(model, prompts, classes)  # type: ignore[arg-type]
    assert means.shape == (6, LAYERS, WINDOWS, HIDDEN)
    assert layer_logits(routers, means, share).argmax(-1).tolist() == [list(one) for one in classes if one]
    for number in (0, 3):
        hidden = model.embed(torch.tensor([prompts[number]]))
        for layer, times in enumerate(classes[number]):
            entering, own = windows(hidden, [len(prompts[number])])
            torch.testing.assert_close(means[number, layer], entering[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(share[number], own[0])
            for _ in range(times):
                hidden = model.runtime.forward(hidden, [Plan.of([layer])])
    menu = MenuPolicy(MENU, Routers.random(1, 2 * HIDDEN, len(MENU), units=8))
    menu.routers.outer_weight.mul_(6)
    read = menu_reads(model, prompts, MENU[0][: menu.shared])
    assert list(menu.pick(read)) == decided_plans(model, menu, prompts) and len(set(menu.pick(read))) > 1


def test_features_are_kept_and_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "SHARD", 4)
    model, prompts, calls = attach(tiny.model("llama")), prompts_of(10), []

    def compute(those: list[Any], paths: list[Any]) -> dict[str, Any]:
        calls.extend(those)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return {"read": menu_reads(model, those, FULL[:2])}

    stop = 7
    with pytest.raises(KeyboardInterrupt):
        kept_features(tmp_path, model, prompts, ["0-1"] * 10, compute, silent)
    stop, before = 99, len(calls)
    read = kept_features(tmp_path, model, prompts, ["0-1"] * 10, compute, silent)["read"]
    assert len(calls) - before == 6  # the first four were in a complete file
    torch.testing.assert_close(read.float(), menu_reads(model, prompts, FULL[:2]), rtol=2e-3, atol=2e-3)
    kept_features(tmp_path, model, prompts, ["0-1"] * 10, compute, silent)
    assert len(calls) - before == 6
    kept_features(tmp_path, model, prompts[:4], ["0-1"] * 4, compute, silent)
    assert len(calls) - before == 10  # other prompts, other features


# -- fitting -------------------------------------------------------------------------------------------------

RECIPE = RouterRecipe(units=16, epochs=40, warmup=5, learning_rate=1e-2, weight_decay=0.0)


def test_layers_learn_what_can_be_read() -> None:
    """A label that is in the features is learnt, with inputs far from zero mean and unit size."""
    torch.manual_seed(1)
    kind = torch.randint(0, 3, (120,))
    means = 3 + 0.01 * torch.randn(120, 4, WINDOWS, 6)
    means[torch.arange(120), :, :, kind] += 0.05
    share = torch.full((120, WINDOWS), 1 / WINDOWS)
    classes = torch.stack([kind, torch.ones_like(kind), 2 - kind, kind], 1)
    held_out = torch.arange(120) < 30
    routers = fit_layers(means.half(), share, classes, held_out, RECIPE, silent)
    found = torch.stack([(routers.logits(at, means[:, at]) * share[..., None]).sum(1) for at in range(4)], 1)
    torch.testing.assert_close(found, layer_logits(routers, means, share), rtol=1e-3, atol=1e-3)
    assert (found.argmax(-1) == classes)[held_out].float().mean() > 0.95


def test_a_menu_learns_who_needs_which_plan() -> None:
    torch.manual_seed(2)
    kind = torch.randint(0, 3, (200,))
    read = 0.3 * torch.randn(200, 8) + 5
    read[torch.arange(200), 2 * kind] += 1.5
    held_out = torch.arange(200) < 50
    picked = fit_menu(read, kind, held_out, RECIPE, silent).logits(0, read).argmax(-1)
    assert (picked == kind)[held_out].float().mean() > 0.9


# -- whole trainings -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, a tiny model and its tokenizer, and `labels.jsonl`, scored as they are."""
    folder = tmp_path_factory.mktemp("drllm")
    base = tiny.model("llama")
    base.save_pretrained(folder / "base")
    tokenizer, model, chance = word_tokenizer(), attach(base), random.Random(7)
    tokenizer.save_pretrained(folder / "base")
    lines: list[dict[str, Any]] = [{"about": {}}]
    for number in range(60):
        choices = [" " + words(chance, 1 + number % 2) for _ in range(3)]
        row = {"task": ("sums", "names")[number % 2], "id": str(number), "prompt": words(chance, 4 + number % 9)}
        row |= {"answer": choices[0], "choices": choices, "evaluations": 7, "seed": 0, "algorithm": "mcts"}
        question = drllm.Question(row["task"], row["id"], row["prompt"], choices[0], tuple(choices))
        scores = PathEvaluator(model, tokenizer, question).margins([FULL, *TRIED])
        row["base"] = {"plan": str(FULL), "score": scores[0], "right": scores[0] > 0, "robust": False, "layers": 6.0}
        row["paths"] = [
            {"plan": str(plan), "score": score, "right": score > 0, "robust": score > 0.01, "layers": plan.depth}
            for plan, score in zip(TRIED, scores[1:], strict=True)
        ]
        lines.append(row)
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def config(given: Path, out: Path, **changes: Any) -> DrLLMConfig:
    options: dict[str, Any] = {"units": 8, "epochs": 3, "precision": "float32", "held_out": 0.3, "saved": 0.05}
    options |= {"questions": 0, "screen": 8}
    options |= {"labels": str(given / "labels.jsonl"), "model": str(given / "base"), "out": str(out), **changes}
    return DrLLMConfig(**options)


@pytest.mark.parametrize("form", ["per-layer", "menu", "menu with bridges"])
def test_a_training_is_saved_with_what_it_chose(form: str, given: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    form, _, bridges = form.partition(" with ")
    options = {"bridge_rank": 4, "precision": "bfloat16"} if bridges else {}
    chosen = config(given, tmp_path / "out", form=form, **options)
    drllm.train(chosen, lines.append)
    model = from_pretrained(adapter=tmp_path / "out", engine="eager")
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert model.plan is None and model.policy.threshold == record["threshold"]
    assert record["held_out"]["n"] + record["labels"]["execute"] > 20 and str(given) not in json.dumps(record["static"])
    assert "no test" in record["held_out"]["note"]
    if form == "menu":
        assert 2 <= len(model.policy.menu) <= 4 and model.policy.menu[0] == FULL
        assert all(plan.visits[0].layer == 0 for plan in model.policy.menu)
    if bridges:  # a layer is left out by crossing it, in the menu and in what it has to beat
        every = [*model.policy.menu, *(Plan.parse(text) for text in record["static"].values())]
        shared = [plan for plan in every if all(visit.set == 0 for visit in plan)]
        assert all({visit.layer for visit in plan} == set(range(LAYERS)) for plan in shared)
        assert model.runtime.backbone.bridged == tuple(range(1, LAYERS))
        served = {visit.set for plan in every for visit in plan if visit.set}
        assert {visit.set for visit in model.bridges.visits} == {0} | served == set(range(len(served) + 1))
        tried = [text for those in record["finalists"].values() for text, _, _ in those]
        assert any("b" in text and Plan.parse(text).crossed_by(0) != Plan.parse(text) for text in tried)
        short = next(plan for plan in model.policy.menu if plan.depth < LAYERS)
        ids, many = torch.tensor([[5, 6, 7], [8, 9, 10]]), {"max_new_tokens": 4, "do_sample": False}
        exact = from_pretrained(adapter=tmp_path / "out", engine="eager", dtype="float32")
        mixed, both = exact.generate(ids, plans=[FULL, short], **many), exact.generate(ids, plans=[FULL] * 2, **many)
        for row, plan in enumerate((FULL, short)):
            assert torch.equal(mixed[row], exact.generate(ids[row : row + 1], plans=[plan], **many)[0])
        assert torch.equal(exact.generate(ids, draft="policy", **many), both)
    # again: everything that takes long is there already
    again: list[str] = []
    drllm.train(chosen, again.append)
    assert any("features of" in line for line in lines) and any("questions scored" in line for line in lines)
    assert not any("features of" in line or "questions scored" in line for line in again)
    theirs = from_pretrained(adapter=tmp_path / "out", engine="eager").policy
    assert theirs.to_dict() == model.policy.to_dict()


def test_held_out_is_a_share_of_the_questions_in_whatever_order_they_come() -> None:
    prompts = sorted((f"question {number}" for number in range(2000)), key=lambda one: sha256(one.encode()).hexdigest())
    asked = [drllm.Question("sums", prompt, prompt, " 1", (" 1", " 2")) for prompt in prompts]
    for part in (asked, asked[:400], asked[-400:]):
        share = sum(drllm.is_held_out(one, 0.2) for one in part) / len(part)
        assert share == pytest.approx(0.2, abs=0.06)


def test_the_path_to_imitate_is_the_shortest_robust_one_that_is_right(given: Path) -> None:
    label = drllm.read_labels(given / "labels.jsonl")[1][0]

    def tried(text: str, score: float = 1.0, right: bool = True, robust: bool = True) -> dict[str, Any]:
        return {"plan": text, "score": score, "right": right, "robust": robust}

    def found(*paths: Any, base_right: bool = True) -> str | None:
        changed = label | {"paths": paths, "base": label["base"] | {"right": base_right}}
        classes = drllm.path_to_imitate(changed, LAYERS)
        return None if classes is None else str(plan_of(classes))

    assert found(tried("0-4"), tried("0-2 5"), tried("0 5", robust=False), tried("1 5", right=False)) == "0-2 5"
    assert found(tried("0-4", 1.0), tried("1-5", 2.0)) == "1-5"
    assert found(tried("0*2 1-5")) == "0-5" and found(tried("0*2 1-5"), base_right=False) == "0*2 1-5"
    assert found(tried("3-4*2"), base_right=False) is None and found(base_right=False) is None


@pytest.mark.parametrize("form", ["per-layer", "menu"])
def test_two_steps_from_the_command_line(form: str, given: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    options = ["drllm", "--labels", str(given / "labels.jsonl"), "--out", str(out), "--model", str(given / "base")]
    options += ["--form", form, "--units", "4", "--epochs", "1", "--batch", "30", "--held-out", "0.3", "--json"]
    options += ["--questions", "0"] if form == "menu" else []
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["adapter"] == str(out)
    model = from_pretrained(adapter=out, engine="eager")
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, draft="policy").shape[0] == 1


@pytest.mark.parametrize(
    ("form", "flag", "owner"), [("menu", "--gamma", "--form per-layer"), ("per-layer", "--screen", "--form menu")]
)
def test_options_of_the_other_form_are_refused(form: str, flag: str, owner: str, given: Path, tmp_path: Path) -> None:
    options = ["drllm", "--labels", str(given / "labels.jsonl"), "--out", str(tmp_path), "--form", form, flag, "2"]
    one_line(lambda: CliRunner().invoke(app, options, catch_exceptions=False), f"{flag} belongs to {owner}")


def test_mistakes_are_one_line(given: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"form": "tree", "units": 0, "epochs": 0, "beta": 1.5, "saved": 1.0, "held_out": 0.0}
    changes |= {
        "gamma": -1.0,
        "screen": 0,
        "threshold": 1.5,
        "questions": -1,
        "precision": "int8",
        "labels": "no-such-file",
        "seed": -1,
        "bridge_rank": -1,
    }
    for name, value in changes.items():
        one_line(lambda name=name, value=value: config(given, tmp_path, **{name: value}), str(value))
    one_line(lambda: config(given, tmp_path, form="per-layer", bridge_rank=2), "leave out bridge-rank")
    empty = tmp_path / "labels.jsonl"
    lines = (given / "labels.jsonl").read_text().splitlines()
    empty.write_text("\n".join(lines[:2]) + "\n")
    one_line(lambda: drllm.train(config(given, tmp_path / "out", labels=str(empty))), "search more questions")
    empty.write_text("\n".join([json.dumps({"about": {"fingerprint": "1", "model": "other"}}), *lines[1:]]) + "\n")
    one_line(lambda: drllm.train(config(given, tmp_path / "out", labels=str(empty))), "other weights (other)")
    empty.write_text("nonsense\n")
    one_line(lambda: drllm.train(config(given, tmp_path / "out", labels=str(empty))), "no file of labels")
