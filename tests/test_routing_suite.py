"""The suite tools-vs-planning: skips, cross entropies and controls against slow computations; right answers."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_eval import word_tokenizer, words
from test_layerroute import LAYERS, Calls, gates
from torch.nn.functional import cross_entropy

from layerwise import Plan, attach
from layerwise.cost import decode_cost, layers_run
from layerwise.data import Example, bfcl, load, routing, split_of, tokenize
from layerwise.evaluation import routing as suite
from layerwise.evaluation.routed_answers import Asked, called, deciding_seconds, result, right
from layerwise.policies.gates import GatedPolicy
from layerwise.report.route_figures import layer_use_figure


def asked(count: int) -> list[Asked]:
    chance, tokenizer, found = random.Random(1), word_tokenizer(), []
    for number in range(count):
        side = ("tools", "planning", "irrelevance")[number % 3]
        example = Example.of(words(chance, 3 + number), words(chance, 2 + number % 4), side, str(number))
        tokens = tokenize(example, tokenizer)
        assert tokens is not None
        found.append(Asked(example, tokens, side))
    return found


@pytest.fixture
def model() -> Any:
    made = attach(tiny.model("llama")).eval()
    made.policy = gates(keep=(0,))
    return made


@torch.no_grad()
def test_losses_and_plans_are_those_of_rows_alone(model: Any) -> None:
    those = asked(7)
    losses, plans = suite.answer_losses(model, those, 0)
    assert len(set(plans)) > 1
    for one, loss, plan in zip(those, losses, plans, strict=True):
        ids, labels = torch.tensor([one.tokens.input_ids]), torch.tensor([one.tokens.labels])
        logits = model(ids, labels=labels).logits[0, :-1]
        assert loss == pytest.approx(cross_entropy(logits, labels[0, 1:]).item(), abs=1e-4)
        given, same = suite.answer_losses(model, [one], 0, [plan])
        assert given == pytest.approx([loss], abs=1e-4) and same == [plan]


@torch.no_grad()
def test_what_is_known_is_not_measured_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    those, measured = asked(6), []
    losses = suite.Losses(model, those, 0)
    routed, plans = losses.decided()
    measure = suite.answer_losses
    monkeypatch.setattr(suite, "answer_losses", lambda *given: measured.extend(given[1]) or measure(*given))
    full = Plan.full(6)
    found = losses.by([plans[4], full, plans[2]], [4, 1, 2])
    assert [found[0], found[2]] == [routed[4], routed[2]]
    assert found[1] == pytest.approx(measure(model, [those[1]], 0, [full])[0][0], abs=1e-4)
    assert measured == ([those[1]] if plans[1] != full else [])
    losses.by([full] * 6)
    assert len(measured) == sum(plan != full for plan in plans)


def test_controls_by_routes_of_others_are_means_over_exchanges(model: Any) -> None:
    those = [one for one in asked(9) if one.side != "irrelevance"]
    losses = suite.Losses(model, those, 0)
    routed, plans = losses.decided()
    found = suite.controls(losses, routed, plans, seed=2)["shuffled"]
    draws = suite.control_plans(plans, model.policy, model.runtime.backbone.shape, seed=2)["shuffled"]
    each = [sum(suite.answer_losses(model, those, 0, other)[0]) - sum(routed) for other in draws]
    assert len(each) == suite.SHUFFLES and len(set(plans)) > 1
    assert found["ce_above_routed"] == pytest.approx(sum(each) / len(each) / len(those), abs=1e-5)
    assert found["interval"][0] <= found["ce_above_routed"] <= found["interval"][1]


def test_flops_count_every_token_and_the_head(model: Any) -> None:
    one = asked(1)[0]
    plan = Plan.parse("0-2")
    prompt, answer = one.tokens.prompt_length, len(one.tokens.input_ids) - one.tokens.prompt_length
    expected = sum(decode_cost(model.runtime.backbone.shape, plan, prompt + at).flops for at in range(answer))
    assert suite.decode_flops(model, one, plan) == expected > answer * 2 * 32 * model.config.vocab_size


def test_controls_skip_as_many_layers(model: Any) -> None:
    full, shape = Plan.full(6), model.runtime.backbone.shape
    plans = [full.skip(2), full.skip(2, 3), full, full.skip(3, 4), full.skip(2, 3, 4)]
    policy = GatedPolicy(torch.zeros(6, 2), torch.zeros(6), keep=(0, 5))
    drawn = suite.control_plans(plans, policy, shape, seed=3)
    found = {name: draws[0] for name, draws in drawn.items()}
    skipped = {name: sum(6 - len(plan) for plan in those) for name, those in found.items()}
    assert skipped == {"static": 8, "random": 8, "shuffled": 8}
    assert all(sorted(map(str, those)) == sorted(map(str, plans)) for those in drawn["shuffled"])
    assert len(set(map(tuple, drawn["shuffled"]))) > 1  # not the same exchange every time
    assert set(found["static"]) <= {full.skip(2), full.skip(2, 3), full.skip(3), full.skip(2, 3)}
    assert sorted(len(plan) for plan in found["random"]) == [4, 4, 4, 5, 5]  # whatever the routes skip of a prompt
    ran = {layer for plan in found["random"] for layer in plan.counts(6)[:1]}
    assert ran == {1}  # layer 0 is kept
    crossed = replace(shape, layers=tuple(replace(one, bridge_weights=((0, 64),)) for one in shape.layers))
    bridged = suite.control_plans(plans, replace(policy, bridged=(1, 2, 3, 4)), crossed, seed=3)
    for name in ("static", "random"):
        assert [plan.depth for plan in bridged[name][0]] == [plan.depth for plan in found[name]]
        assert all(len(plan) == 6 for plan in bridged[name][0])


def test_controls_leave_out_as_many_weights_where_layers_differ(model: Any) -> None:
    shape, policy = (
        model.runtime.backbone.shape,
        GatedPolicy(torch.zeros(6, 2), torch.zeros(6), (0, 5), thin=(1, 2, 3, 4)),
    )
    kept = (0, 3000, 4000, 1000, 2000, 0)  # of 4,608 weights
    shape = replace(
        shape, layers=tuple(replace(one, thin_weights=n) for one, n in zip(shape.layers, kept, strict=True))
    )
    plans = [policy.plan(those) for those in ([1, 2, 3, 4], [1, 2, 3], [3, 4], [1, 2, 3, 4], [])] * 12
    run = sum(layers_run(shape, plan) for plan in plans)
    for name, draws in suite.control_plans(plans, policy, shape, seed=1).items():
        assert sum(layers_run(shape, plan) for plan in draws[-1]) == pytest.approx(run, abs=0.5), name
    assert suite.layer_use(asked(4), plans[:4], shape)["layer_use"]["tools"][0] == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<tool_call>[{"arguments": {"x": 1}, "name": "f"}]</tool_call>', True),
        ('<tool_call>[{"name": "f", "arguments": {"x": "1"}}]</tool_call>', False),
        ("I call f.", False),
        ("<tool_call>[{</tool_call>", False),
    ],
)
def test_a_right_call_says_the_same(text: str, expected: bool) -> None:
    answer = '<tool_call>[{"name": "f", "arguments": {"x": 1}}]</tool_call>'
    assert right(Example.of("q", answer, "simple_python", "k"), text) is expected


def test_a_right_result_is_the_number() -> None:
    problem = Example.of("q", "so 3 * 4\n#### 1,200", "gsm8k+functions", "k")
    assert right(problem, "a\n#### 1200") and not right(problem, "a\n#### 12") and not right(problem, "1200")
    assert result("no mark") is None and called("none") is None


def test_no_more_is_tokenized_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    those, seen = [one.example for one in asked(90)], []
    monkeypatch.setattr(suite, "load", lambda name, split: those)
    monkeypatch.setattr(suite, "tokenize", lambda *given: seen.append(given) or tokenize(*given))
    assert len(suite.held_out(word_tokenizer(), 6, 1000, 0)) == len(seen) == 6 + 6 + 2 + 2


def test_the_suite_says_what_it_measured(model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    those = asked(12)
    monkeypatch.setattr(suite, "held_out", lambda *_: those)
    monkeypatch.setattr(suite, "base_name", lambda *_: None)
    monkeypatch.setattr(suite, "load_tokenizer", lambda name: word_tokenizer())
    plain = attach(tiny.model("llama")).eval()
    monkeypatch.setattr(suite, "from_pretrained", lambda *_, adapter, **__: model if adapter == "routed" else plain)
    found = suite.routing_suite("routed", reference="other")
    assert json.loads(json.dumps(found)) == found
    assert found["differential"] == pytest.approx(found["tool_skip"] - found["planning_skip"])
    tools = found["kinds"]["tools"]
    assert found["tool_ppl_ratio"] == pytest.approx(tools["ppl"]["routed"] / tools["ppl"]["base"])
    assert tools["ppl"]["full_depth"] == pytest.approx(tools["ppl"]["base"])
    assert sum(tools["n"] for tools in found["kinds"].values()) == 12
    assert set(found["controls"]) == {"static", "random", "shuffled"} and len(found["layer_use"]["tools"]) == LAYERS
    layer_use_figure(found, tmp_path / "heat.png")
    assert (tmp_path / "heat.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="has no gates"):
        suite.routing_suite("plain")


# -- the data it is measured on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_functions_beside_a_plan_are_of_its_split(split: str) -> None:
    places: dict[str, set[str]] = {}
    for row in bfcl.rows():
        places.setdefault(bfcl.system_message(row), set()).add(split_of(row.key))
    examples = load("planning", split)
    beside = [one for one in examples if one.kind.endswith(routing.BESIDE)]
    assert 0.4 < len(beside) / len(examples) < 0.6
    assert all(split in places[one.messages[0]["content"]] for one in beside)
    assert all(len(one.messages) == 2 for one in examples if one not in beside)


def test_the_mix_has_every_kind_in_its_share() -> None:
    sides = [routing.side(one.kind) for one in load("routing", "test")]
    rounds = sides.count("questions")
    assert [sides.count(name) for name in routing.SHARES] == [rounds * share for share in routing.SHARES.values()]
    assert len(set(sides[:20])) > 2  # mixed, not one kind after another


def test_questions_about_functions_are_answered_by_their_schema() -> None:
    for one in load("questions", "test"):
        system, answer = one.messages[0]["content"], one.answer
        if answer.startswith("It must be given"):
            names = answer.removeprefix("It must be given ").removesuffix(".").split(", ")
            assert all(f'"{name}"' in system for name in names)


def test_deciding_asks_every_gate_and_runs_no_layer(model: Any) -> None:
    calls = Calls(model)
    asked = []
    scores = model.policy.scores
    object.__setattr__(model.policy, "scores", lambda layer, *given: asked.append(layer) or scores(layer, *given))
    with torch.no_grad():
        assert deciding_seconds(model, torch.tensor([[5, 6, 7]])) > 0
    assert asked == [layer for layer in range(model.depth) if layer not in model.policy.keep]
    assert not sum(calls.rows.values())
