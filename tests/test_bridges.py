"""Bridges: the laws hold for plans with them, policies take them, training fits and saves them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_cost import counted, embedded
from test_layerroute_training import answered, gradients, module
from tiny import ARCHITECTURES, LAYERS, one_line, random_plan

from layerwise import Plan, attach, from_pretrained
from layerwise.cost import pass_cost
from layerwise.evaluation.margins import _file
from layerwise.model.bridges import Bridge, Bridges
from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.model.compiled import compiler_available
from layerwise.model.runtime import Runtime
from layerwise.plan import Part, Visit
from layerwise.policies.gates import GatedPolicy, summary
from layerwise.report.html import _cell
from layerwise.training import layerroute
from layerwise.training.bridge_fit import Moments, _rows, fit_bridges, fit_every_bridge
from layerwise.training.gate_fits import choose_basis

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def bridged(
    name: str = "llama", layers: tuple[int | Visit, ...] = (1, 2, 4, Visit(2, Part.BRIDGE, 3)), **options: Any
) -> LayerwiseForCausalLM:
    """A tiny model with random bridges."""
    model = attach(tiny.model(name), **options)
    model.cross_by(Bridges(model.runtime.backbone, layers, {0: 3, 3: 2}))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        for parameter in model.bridges.parameters():
            parameter.normal_(std=0.3)
    return model


def with_bridges(rng: random.Random) -> Plan:
    """A random plan some of whose visits are bridges."""
    visits = [
        Visit(visit.layer, Part.BRIDGE) if visit.layer in (1, 2, 4) and rng.random() < 0.6 else visit
        for visit in random_plan(rng)
    ]
    return Plan((*visits, Visit(3), Visit(2, Part.BRIDGE, 3), Visit(2, Part.BRIDGE)))


def by_hand(bridge: Bridge, states: torch.Tensor) -> torch.Tensor:
    scaled = states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return states + scaled @ bridge.down.weight.T @ bridge.up.weight.T + bridge.up.bias


# -- plans and passes ----------------------------------------------------------------------------------------


def test_text_and_depth() -> None:
    plan = Plan.parse("0-3 4-6b 7-9")
    assert str(plan) == "0-3 4-6b 7-9" and plan == Plan.full(10).only(Part.BRIDGE, 4, 5, 6)
    assert plan.depth == 7 and plan.counts(10) == (1, 1, 1, 1, 0, 0, 0, 1, 1, 1)
    assert [slot is None for slot in plan.slots] == [False] * 4 + [True] * 3 + [False] * 3
    assert str(Plan.parse("0-1 3*2 6").crossed((2, 3, 5))) == "0-1 2b 3*2 5b 6"
    assert Plan.parse("0 1b 2").crossed(range(3)) == Plan.parse("0 1b 2") == Plan.parse("0 1b 2").crossed(())
    numbered = plan.crossed_by(2)
    assert str(numbered) == "0-3 4-6b2 7-9" and numbered != plan and numbered.crossed_by(0) == plan
    assert (
        numbered.depth == 7
        and numbered.slots == plan.slots
        and str(numbered.skip(5).crossed((5,))) == "0-3 4b2 5b 6b2 7-9"
    )
    block = Plan.parse("1-2*2")
    assert block.crossed((1, 2)) is block
    with pytest.raises(ValueError, match="goes back to earlier layers"):
        block.crossed((0, 1))


@torch.no_grad()
def test_what_is_kept_of_a_model_is_named_after_its_bridges(tmp_path: Path) -> None:
    def file(model: LayerwiseForCausalLM) -> Path:
        return _file(tmp_path, "margins", model, [])

    model = bridged()
    before = file(model)
    assert before == file(model) != file(attach(model.base))
    next(iter(model.runtime.backbone.bridges.values())).up.bias[0] += 1e-3
    assert file(model) != before


@torch.no_grad()
def test_a_bridge_takes_the_place_of_its_layer() -> None:
    model, ids = bridged(), tiny.tokens(2, 9)
    runtime, states = model.runtime, model.embed(ids)
    before = runtime.forward(states, [Plan.parse("0")] * 2)
    expected = runtime.forward(by_hand(model.bridges[1], before), [Plan.parse("2-5")] * 2)
    torch.testing.assert_close(runtime.forward(states, [Plan.parse("0 1b 2-5")] * 2), expected, **CLOSE)
    before = runtime.forward(states, [Plan.parse("0-1")] * 2)
    for text, bridge in (("0-1 2b 3-5", model.bridges[2]), ("0-1 2b3 3-5", model.bridges[Visit(2, Part.BRIDGE, 3)])):
        expected = runtime.forward(by_hand(bridge, before), [Plan.parse("3-5")] * 2)
        torch.testing.assert_close(runtime.forward(states, [Plan.parse(text)] * 2), expected, **CLOSE)
    fresh = attach(tiny.model("llama"))
    fresh.cross_by(Bridges(fresh.runtime.backbone, [1], 2))
    nothing = fresh(ids, plans=["0 1b 2-5"] * 2).logits
    assert torch.equal(nothing, fresh(ids, plans=["0 2-5"] * 2).logits)  # a new bridge adds nothing


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_cached_equals_uncached_and_batches_equal_rows(name: str) -> None:
    tiny.assert_rows_and_caches_agree(bridged(name), with_bridges, random.Random(name))


@torch.no_grad()
def test_cost_is_what_is_counted() -> None:
    backbone = bridged().runtime.backbone
    for text in ("0-5", "0 1-2b 3-5", "0 2b*2 3a 4b 5", "0 1b 2b3 3-5"):
        plan, inputs = Plan.parse(text), embedded(backbone, 1, 7)
        found = counted(lambda plan=plan, inputs=inputs: backbone.logits(Runtime(backbone).forward(inputs, [plan])))
        assert found == pass_cost(backbone.shape, plan, 7).flops
    bridge, layer = Plan.parse("1b"), Plan.parse("1")
    assert pass_cost(backbone.shape, bridge, 1).weight_bytes < pass_cost(backbone.shape, layer, 1).weight_bytes


@pytest.mark.skipif(not compiler_available(), reason="no C++ compiler")
def test_kernels_and_drafts_equal_eager() -> None:
    plan, ids = "0 1-2b 2b3 3 4b 5", tiny.tokens(1, 8)
    eager, compiled = bridged(engine="eager"), bridged(engine="compiled")
    expected = eager.generate(ids, max_new_tokens=12, do_sample=False, plans=[plan])
    assert torch.equal(compiled.generate(ids, max_new_tokens=12, do_sample=False, plans=[plan]), expected)
    kernels = compiled.runtime.engine._layers
    assert kernels[Visit(1, Part.BRIDGE), "layerwise_one_token"] is not None
    full = eager.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(compiled.generate(ids, max_new_tokens=12, do_sample=False, draft=f"plan:{plan}"), full)


def test_what_is_not_there_is_told_in_one_line() -> None:
    model = bridged()
    for wrong in ("0 1b 3b 4-5", Plan.parse("0 3b")):
        one_line(lambda wrong=wrong: model.read_plan(wrong), "layer 3", "has none there")
    one_line(lambda: model.read_plan("0 1b3 4-5"), "a bridge of set 3 in place of layer 1", "has none there")
    one_line(lambda: model.read_draft("plan:0 5b"), "layer 5")
    one_line(lambda: Bridges(model.runtime.backbone, [LAYERS], 1), "layers to bridge")
    one_line(lambda: Bridges(model.runtime.backbone, [], 1), "layers to bridge")
    one_line(lambda: Bridges(model.runtime.backbone, [0], 33), "1 to 32")
    policy = GatedPolicy(torch.zeros(LAYERS, 32), torch.zeros(LAYERS))
    one_line(lambda: replace(policy, bridged=(LAYERS,)), "bridged names layers")


# -- policies ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_closed_gates_take_bridges(tmp_path: Path) -> None:
    model, (ids, mask) = bridged(), tiny.padded(9, [9, 6, 4], "right")
    weight = torch.randn(LAYERS, 32, generator=torch.Generator().manual_seed(1))
    model.policy = GatedPolicy(weight, torch.zeros(LAYERS), keep=(0,), bridged=(1, 2, 4), reads="last")
    route = model.policy.route([9, 6, 4])
    hidden = model.runtime.forward(model.embed(ids), route, [9, 6, 4])
    plans = route.plans
    assert len(set(plans)) > 1 and any(visit.part is Part.BRIDGE for plan in plans for visit in plan)
    for plan in plans:
        ran = {visit.layer for visit in plan}
        assert {1, 2, 4} <= ran  # as a layer or as a bridge
    torch.testing.assert_close(model.runtime.forward(model.embed(ids), plans, [9, 6, 4]), hidden, **CLOSE)
    routed = model(ids, attention_mask=mask, labels=ids).loss
    model.save_pretrained(tmp_path / "saved")
    again = from_pretrained(_base(tmp_path), adapter=tmp_path / "saved", engine="eager")
    assert again.policy.bridged == (1, 2, 4) and again.bridges.names == ["1", "2", "4", "2b3"]
    torch.testing.assert_close(again(ids, attention_mask=mask, labels=ids).loss, routed, **CLOSE)
    fixed = from_pretrained(_base(tmp_path), adapter=tmp_path / "saved", engine="eager", plan="0 1b 2-5")
    assert str(fixed.plan) == "0 1b 2-5"
    own = [model.policy.plan([1, 2, 4]).crossed_by(0), Plan.parse("0 1b 2b3 3-5")]
    for plan in own:
        torch.testing.assert_close(again(ids[:1], plans=[plan]).logits, model(ids[:1], plans=[plan]).logits, **CLOSE)
    (tmp_path / "saved" / "bridges.safetensors").write_bytes(b"no")
    one_line(lambda: from_pretrained(_base(tmp_path), adapter=tmp_path / "saved"), "the bridges", "cannot be loaded")


@torch.no_grad()
def test_closed_gates_may_leave_the_attention(tmp_path: Path) -> None:
    model, (ids, mask) = bridged(), tiny.padded(9, [9, 6, 4], "right")
    weight = torch.randn(LAYERS, 32, generator=torch.Generator().manual_seed(1))
    closed = GatedPolicy(weight, torch.zeros(LAYERS), (0,), "last", bridged=(1, 2), attending=(2, 3, 4))
    model.policy = closed
    assert str(closed.plan(range(1, 6))) == "0 1b 2a 2b 3-4a" and closed.plan([]) == Plan.full(LAYERS)
    route = closed.route([9, 6, 4])
    hidden = model.runtime.forward(model.embed(ids), route, [9, 6, 4])
    assert len(set(route.plans)) > 1 and any(Visit(2, Part.ATTENTION) in plan.visits for plan in route.plans)
    torch.testing.assert_close(model.runtime.forward(model.embed(ids), route.plans, [9, 6, 4]), hidden, **CLOSE)
    whole = model(ids, attention_mask=mask).logits
    for row, length in enumerate((9, 6, 4)):
        own = ids[row : row + 1, :length]
        torch.testing.assert_close(whole[row : row + 1, :length], model(own).logits, **CLOSE)
        plan = route.plans[row]
        found = model.generate(own, max_new_tokens=4, do_sample=False)
        assert torch.equal(found, model.generate(own, max_new_tokens=4, do_sample=False, plans=[plan]))
        for at in range(length, found.shape[1]):  # from the cache as without it
            assert model(found[:, :at], plans=[plan]).logits[0, -1].argmax() == found[0, at]
    model.save_pretrained(tmp_path / "saved")
    again = from_pretrained(_base(tmp_path), adapter=tmp_path / "saved", engine="eager")
    assert again.policy.attending == (2, 3, 4) and again.policy.bridged == (1, 2)
    one_line(lambda: replace(closed, attending=(LAYERS,)), "attending names layers")


def _base(folder: Path) -> Path:
    base = folder / "base-model"
    if not base.is_dir():
        tiny.model("llama").save_pretrained(base)
    return base


# -- fitting and training ------------------------------------------------------------------------------------


def test_low_rank_regression_finds_a_low_rank_map() -> None:
    def fitted(rank: int, weights: torch.Tensor) -> torch.Tensor:
        moments = Moments()
        for some in torch.arange(4000).split(1500):
            moments.add(inputs[some], outputs[some], weights[some])
        down, up, bias = moments.low_rank(rank)
        assert torch.allclose(down.norm(dim=1), up.norm(dim=0), rtol=1e-4)
        return inputs @ down.T @ up.T + bias

    chance = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 12, generator=chance)
    whole = torch.randn(9, 3, generator=chance) @ torch.randn(3, 12, generator=chance)
    outputs = inputs @ whole.T + 2.0
    assert ((fitted(3, torch.ones(4000)) - outputs).norm() / outputs.norm()) < 0.03  # the ridge is 2%
    assert 0.2 < ((fitted(1, torch.ones(4000)) - outputs).norm() / outputs.norm()) < 1
    heavy = torch.ones(4000)
    outputs[0], heavy[0] = 50.0, 1e6  # a row of such weight is met
    assert (fitted(3, heavy)[0] - 50.0).abs().max() < 1


@torch.no_grad()
def test_fitted_bridges_come_near_their_layers() -> None:
    model = bridged(layers=(2, 3))
    texts = [tiny.tokens(1, 9, seed)[0].tolist() for seed in range(40)]
    plan = Plan.parse("0-1 2-3b 4-5")

    def away(short: str) -> float:
        states = model.embed(torch.tensor(texts))
        ends = (model.runtime.forward(states, [one] * 40) for one in (Plan.parse(short), Plan.parse("0-3")))
        found, wanted = ends
        return (found - wanted).norm().item()

    def forget() -> None:
        for bridge in model.runtime.backbone.bridges.values():
            for parameter in bridge.up.parameters():
                parameter.zero_()

    forget()
    skipped, third = away("0-1 2-3b"), away("0-2 3b")
    fit_bridges(model, texts, plan)
    both = away("0-1 2-3b")
    assert both < 0.7 * skipped
    forget()
    fit_every_bridge(model, texts)
    # Each does for its own layer; the second of two does not mend what the first one lacks.
    assert away("0-2 3b") < 0.7 * third and both < away("0-1 2-3b") < 0.8 * skipped


@torch.no_grad()
def test_a_bridge_after_attention_stands_in_for_the_mlp() -> None:
    model = bridged(layers=(2, 3))
    texts = [tiny.tokens(1, 9, seed)[0].tolist() for seed in range(40)]
    states = model.embed(torch.tensor(texts))

    def after(text: str) -> torch.Tensor:
        return model.runtime.forward(states, [Plan.parse(text)] * 40)

    fit_bridges(model, texts, Plan.parse("0-1 2a 2b 3a 3b 4-5"))
    for layer, entering, wanted in ((2, "0-1 2a", "0-2"), (3, "0-1 2a 2b 3a", "0-3")):
        moments = Moments()
        moments.add(*_rows(after(entering), after(wanted), [9] * 40))
        down, up, bias = moments.low_rank(3)
        bridge = model.bridges[layer]
        torch.testing.assert_close(bridge.up.weight @ bridge.down.weight, up @ down, **CLOSE)
        torch.testing.assert_close(bridge.up.bias, bias, **CLOSE)
    assert (after("0-1 2a 2b 3a 3b") - after("0-3")).norm() < (after("0-1 2-3a") - after("0-3")).norm()


def test_closed_gates_leave_what_the_recipe_says() -> None:
    recipe: dict[str, Any] = {"keep": "0 3-5", "fits": 1, "start_closed": "1-2", "leave": "attention"}
    made = module(10, **recipe, bridge_rank=2)
    assert str(made.model.policy.plan([1, 2])) == "0 1a 1b 2a 2b 3-5"
    assert str(module(10, **recipe).model.policy.plan([1, 2])) == "0 1-2a 3-5"


def test_bridges_learn_in_held_steps_and_are_fitted_to_what_bears_them(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: dict[str, Any] = {"keep": "0 3-5", "fits": 1, "start_closed": "1-2", "hold": 0.9, "bridge_rank": 2}
    made = module(10, **recipe)
    assert made.model.policy.bridged == (1, 2) and made.model.runtime.backbone.bridged == (1, 2)
    examples = [answered(tiny.tokens(1, 6 + seed, seed)[0].tolist()) for seed in range(6)]
    monkeypatch.setattr(layerroute, "lost", lambda *_: torch.tensor([0.9, 0.1, 0.8, 0.2, 0.3, 0.7]))
    taken: list[list[list[int]]] = []
    monkeypatch.setattr(layerroute, "fit_bridges", lambda model, those, plan: taken.append(list(those)))
    made.fit_bridges(examples)
    assert taken == [[examples[at].input_ids for at in (1, 3, 4)]]
    ids = torch.tensor([examples[0].input_ids])
    loss = made(ids, torch.tensor([examples[0].labels]), step=0)["loss"]
    assert any("bridges" in name for name in gradients(made, loss))


@torch.no_grad()
def test_routers_are_fitted_to_what_closed_gates_lead_to() -> None:
    """The states that a router sees in the fit are those it will see: bridged where gates before it are closed."""
    model, lengths = bridged(), (5, 9, 7, 4)
    examples = [answered(tiny.tokens(1, length, seed)[0].tolist()) for seed, length in enumerate(lengths)]
    weight, basis = torch.zeros(LAYERS, 16), torch.zeros(LAYERS, 16, 32)
    bias = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0])
    model.policy = GatedPolicy(weight, bias, (0, 3, 5), "last", torch.zeros(LAYERS, 32), basis, bridged=(1, 2, 4))
    choose_basis(model, examples)
    plan = model.policy.plan([1, 2, 4])
    for layer in range(1, LAYERS):
        seen = []
        for one in examples:
            hidden = model.embed(torch.tensor([one.input_ids[: one.prompt_length]]))
            seen.append(summary(model.runtime.forward(hidden, [plan[:layer]]), [one.prompt_length], "last"))
        torch.testing.assert_close(model.policy.center[layer], torch.cat(seen).mean(0), **CLOSE)


@pytest.mark.skipif(not compiler_available(), reason="no C++ compiler")
def test_kernels_follow_bridges_that_are_replaced() -> None:
    model, ids = bridged(engine="compiled"), tiny.tokens(1, 6)
    asked: list[Visit] = []
    usual = model.runtime.engine._build
    model.runtime.engine._build = lambda visit, form: asked.append(visit) or usual(visit, form)  # type: ignore[method-assign]
    model.policy = GatedPolicy(torch.zeros(LAYERS, 32), -torch.ones(LAYERS), keep=(0, 3, 5), bridged=(1, 2, 4))
    model.prepare()
    assert {Visit(layer, Part.BRIDGE) for layer in (1, 2, 4)} <= set(asked)  # so that no answer waits for them
    found = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, bridged().generate(ids, max_new_tokens=3, do_sample=False, plans=["0 1-2b 3 4b 5"]))
    model.cross_by(Bridges(model.runtime.backbone, [1], 2))
    one_line(lambda: model.generate(ids, max_new_tokens=3), "layer 2", "has none there")
    found = model.generate(ids, max_new_tokens=3, do_sample=False, plans=["0 1b 3 5"])
    assert torch.equal(found, attach(tiny.model("llama")).generate(ids, max_new_tokens=3, plans=["0 3 5"]))


def test_a_strip_draws_a_bridge_as_what_it_is() -> None:
    assert _cell([Visit(1, Part.BRIDGE)])[0] == "bridge" == _cell([Visit(1, Part.BRIDGE)] * 2)[0]
    assert _cell([Visit(1), Visit(1, Part.BRIDGE)]) == _cell([Visit(1)])
