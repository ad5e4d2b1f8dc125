"""Thin MLPs: the laws hold for plans with them, policies take them, training chooses and saves them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from test_bridges import _base
from test_cost import counted, embedded
from test_layerroute_runs import config
from test_layerroute_training import answered, module
from test_training_runs import files  # noqa: F401 (a fixture)
from tiny import ARCHITECTURES, LAYERS, one_line, random_plan
from torch.nn.functional import cross_entropy

from layerwise import Plan, attach, from_pretrained
from layerwise.cost import pass_cost
from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.model.compiled import compiler_available
from layerwise.model.runtime import Runtime
from layerwise.model.thin import ThinMlps, thinned
from layerwise.plan import Part, Visit
from layerwise.policies.gates import GatedPolicy
from layerwise.report.html import _cell
from layerwise.training import layerroute, neuron_fits
from layerwise.training.layerroute import train
from layerwise.training.neuron_fits import (
    OF_PROMPTS,
    RIDGE,
    Moments,
    Thinned,
    cheapest,
    eliminated,
    low_rank,
    moments,
    thin_mlps,
)

LORA = "adapter_model.safetensors"
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
KEPT = {1: [40, 3, 5, 7, 11], 2: list(range(0, 48, 3)), 4: [0]}


def thin(name: str = "llama", **options: Any) -> LayerwiseForCausalLM:
    """A tiny model with thin MLPs."""
    model = attach(tiny.model(name), **options)
    model.thin_by(ThinMlps(model.runtime.backbone, {layer: torch.tensor(those) for layer, those in KEPT.items()}))
    return model


def with_thin(rng: random.Random) -> Plan:
    visits = [
        Visit(visit.layer, Part.THIN) if visit.layer in KEPT and rng.random() < 0.6 else visit
        for visit in random_plan(rng)
    ]
    return Plan((*visits, Visit(2, Part.THIN), Visit(3), Visit(2)))


def test_text_depth_and_slots() -> None:
    plan = Plan.parse("0-2 3-5t 6t*2 7")
    assert str(plan) == "0-2 3-5t 6t*2 7" and plan == Plan.parse("0-6 6-7").only(Part.THIN, 3, 4, 5, 6)
    assert plan.depth == 9 and plan.counts(8) == (1, 1, 1, 1, 1, 1, 2, 1) and None not in plan.slots
    assert _cell((Visit(3, Part.THIN),)) == ("thin", "t")
    one_line(lambda: Plan.parse("3t2"), "'3t2' is not part of a plan")  # they have no sets


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_thin_mlp_is_the_whole_one_without_some_neurons(name: str) -> None:
    model, ids = thin(name), tiny.tokens(2, 9)
    found = model(ids, plans=["0 1-2t 3 4t 5"] * 2).logits
    other = attach(tiny.model(name))
    for layer, those in KEPT.items():
        down = other.runtime.backbone.layers[layer].mlp.down_proj
        gone = [neuron for neuron in range(down.in_features) if neuron not in those]
        down.weight[:, gone] = 0
    torch.testing.assert_close(found, other(ids).logits, **CLOSE)
    assert (found - model(ids).logits).abs().max() > 0.01


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_cached_equals_uncached_and_batches_equal_rows(name: str) -> None:
    tiny.assert_rows_and_caches_agree(thin(name), with_thin, random.Random(name))


@torch.no_grad()
def test_cost_is_what_is_counted() -> None:
    backbone = thin().runtime.backbone
    for text in ("0-5", "0 1-2t 3-5", "0 2t*2 3a 4t 5"):
        plan, inputs = Plan.parse(text), embedded(backbone, 1, 7)
        found = counted(lambda plan=plan, inputs=inputs: backbone.logits(Runtime(backbone).forward(inputs, [plan])))
        assert found == pass_cost(backbone.shape, plan, 7).flops


@pytest.mark.skipif(not compiler_available(), reason="no C++ compiler")
def test_kernels_and_drafts_equal_eager() -> None:
    plan, ids = "0-1 2t 3-5", tiny.tokens(1, 8)
    eager, compiled = thin(engine="eager"), thin(engine="compiled")
    expected = eager.generate(ids, max_new_tokens=12, do_sample=False, plans=[plan])
    assert torch.equal(compiled.generate(ids, max_new_tokens=12, do_sample=False, plans=[plan]), expected)
    kernels = compiled.runtime.engine._layers
    assert kernels[Visit(2, Part.THIN), "layerwise_one_token"] is not None
    full = eager.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(compiled.generate(ids, max_new_tokens=12, do_sample=False, draft=f"plan:{plan}"), full)


def test_what_is_not_there_is_told_in_one_line() -> None:
    model = thin()
    backbone = model.runtime.backbone
    one_line(lambda: model.read_plan("0 1t 3t 4-5"), "a thin MLP in layer 3", "has none there")
    one_line(lambda: model.read_draft("plan:0 5t"), "layer 5")
    one_line(lambda: ThinMlps(backbone, {LAYERS: torch.arange(3)}), "layers with a thin MLP")
    one_line(lambda: ThinMlps(backbone, {}), "layers with a thin MLP")
    for wrong in ([], [1, 1], [48], [-1]):
        one_line(lambda wrong=wrong: thinned(backbone.layers[0].mlp, torch.tensor(wrong).long()), "neurons 0-47")
    one_line(lambda: thinned(torch.nn.Identity(), torch.arange(2)), "Identity does not fit", "gate_proj")


@torch.no_grad()
def test_closed_gates_take_thin_mlps(tmp_path: Path) -> None:
    model, (ids, mask) = thin(), tiny.padded(9, [9, 6, 4], "right")
    weight = torch.randn(LAYERS, 32, generator=torch.Generator().manual_seed(1))
    model.policy = GatedPolicy(weight, torch.zeros(LAYERS), keep=(0, 3, 5), reads="last", thin=(1, 2, 4))
    route = model.policy.route([9, 6, 4])
    hidden = model.runtime.forward(model.embed(ids), route, [9, 6, 4])
    assert len(set(route.plans)) > 1 and any(visit.part is Part.THIN for plan in route.plans for visit in plan)
    torch.testing.assert_close(model.runtime.forward(model.embed(ids), route.plans, [9, 6, 4]), hidden, **CLOSE)
    routed = model(ids, attention_mask=mask, labels=ids).loss
    model.save_pretrained(tmp_path / "saved")
    again = from_pretrained(_base(tmp_path), adapter=tmp_path / "saved", engine="eager")
    assert again.policy.thin == (1, 2, 4) and again.thin.numbers == (1, 2, 4)
    torch.testing.assert_close(again(ids, attention_mask=mask, labels=ids).loss, routed, **CLOSE)
    one_line(lambda: replace(model.policy, thin=(LAYERS,)), "thin names layers")
    (tmp_path / "saved" / "thin.safetensors").write_bytes(b"no")
    one_line(lambda: from_pretrained(_base(tmp_path), adapter=tmp_path / "saved"), "the thin MLPs", "cannot be loaded")


# -- choosing neurons ----------------------------------------------------------------------------------------


def test_moments_are_sums_over_the_tokens_of_rows_alone() -> None:
    made = module()
    model, layer = made.model, 2
    examples = [answered(tiny.tokens(1, length, length)[0].tolist()) for length in (5, 8, 6)]
    says, matters = torch.zeros(49, 49), torch.zeros(32, 32)
    down = model.runtime.backbone.layers[layer].mlp.down_proj
    for one in examples:
        calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        hook = down.register_forward_hook(lambda _, given, output, calls=calls: calls.append((given[0], output)))
        logits = model(torch.tensor([one.input_ids]), plans=[Plan.full(LAYERS)]).logits[0]
        hook.remove()
        loss = cross_entropy(logits[:-1], torch.tensor(one.labels)[1:], reduction="sum", ignore_index=-100)
        (gradient,) = torch.autograd.grad(loss, [calls[0][1]])
        for at, activation in enumerate(calls[0][0][0].detach()):
            row = torch.cat([activation, torch.ones(1)])
            answers = len(one.labels) - 4 <= at < len(one.labels) - 1
            says += (1.0 if answers else OF_PROMPTS) * torch.outer(row, row)
        matters += gradient[0].T @ gradient[0]
    found = moments(model, examples)
    assert len(found) == LAYERS
    torch.testing.assert_close(found[layer].says, says, **CLOSE)
    torch.testing.assert_close(found[layer].matters, matters, rtol=1e-3, atol=1e-6)


def test_what_stays_makes_up_for_what_is_left_out_as_well_as_it_can() -> None:
    """Beside least squares for the neurons that stay; and the cheapest of all single ones goes first."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 7, generator=generator) @ torch.randn(7, 7, generator=generator)
    rows = torch.cat([rows + 1, torch.ones(200, 1)], 1)
    weight, felt = torch.randn(4, 7, generator=generator), torch.randn(200, 4, generator=generator)
    of = Moments(rows.T @ rows, felt.T @ felt)
    ridge = RIDGE * of.says.diagonal()[:-1].mean() * torch.eye(8).double()
    ridge[-1, -1] = 0
    whole = torch.cat([weight, torch.zeros(4, 1)], 1).double()

    def made_up(kept: list[int]) -> tuple[float, torch.Tensor]:
        stay = [*kept, 7]
        square = of.says.double() + ridge
        changed = torch.zeros(4, 8).double()
        changed[:, stay] = torch.linalg.solve(square[stay][:, stay], square[stay] @ whole.T).T
        lost = whole - changed
        return torch.trace(of.matters.double() @ lost @ square @ lost.T).item(), changed

    found = list(eliminated(weight, of, sizes=7))
    assert [len(one.kept) for one in found] == [6, 5, 4, 3, 2, 1]
    for one in found:
        cost, changed = made_up(one.kept.tolist())
        assert one.cost == pytest.approx(cost, rel=1e-6)
        torch.testing.assert_close(torch.cat([one.weight, one.bias[:, None]], 1), changed[:, [*one.kept, 7]].float())
    singles = [made_up([one for one in range(7) if one != gone])[0] for gone in range(7)]
    assert found[0].cost == pytest.approx(min(singles), rel=1e-6)


def test_the_cheapest_steps_of_all_layers_are_taken_in_order() -> None:
    costs = [[5.0, 6.0, 20.0], [1.0, 3.0, 9.0], [2.0, 2.5, 100.0]]
    asked: list[float] = []

    def way(of: list[float]) -> Iterator[Thinned]:
        for cost in of:
            asked.append(cost)
            yield Thinned(cost, torch.zeros(0), torch.zeros(0), torch.zeros(0))

    def taken(costs: list[list[float]], steps: int) -> list[int]:
        chosen = cheapest(map(way, costs), steps)
        return [0 if one is None else of.index(one.cost) + 1 for of, one in zip(costs, chosen, strict=True)]

    assert taken(costs, 3) == [0, 2, 1] and taken(costs, 4) == [0, 2, 2]
    assert taken([[nan, nan, nan], costs[1], costs[2]], 4) == [0, 2, 2]
    assert taken(costs, 6) == [2, 2, 2] and taken(costs, 0) == [0, 0, 0]  # the second of the first: 5, as its first
    asked.clear()
    assert taken(costs[::-1], 2) == [1, 1, 0] and asked == [*costs[2], *costs[1][:2], costs[0][0]]  # and no more


def test_a_change_is_cut_to_the_directions_that_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(4, 2, generator=generator) @ torch.randn(2, 9, generator=generator)
    rows = torch.cat([torch.randn(50, 9, generator=generator) + 1, torch.ones(50, 1)], 1)
    felt = torch.randn(50, 4, generator=generator) * torch.tensor([5.0, 1.0, 0.1, 0.1])
    of = Moments(rows.T @ rows, felt.T @ felt)

    def loss(left: torch.Tensor) -> float:
        added = (rows[:, :-1] - rows[:, :-1].mean(0)) @ left.T
        return torch.trace(of.matters @ (added.T @ added)).item()

    into, out = low_rank(change, of, 2)
    torch.testing.assert_close(out @ into, change, **CLOSE)
    into, out = low_rank(change, of, 1)
    assert into.shape == (1, 9) and out.shape == (4, 1)
    torch.testing.assert_close(into.norm(dim=1), out.norm(dim=0))
    found = loss(change - out @ into)
    for _ in range(200):  # no other map of rank one is better, along its outputs or its inputs
        worse = (
            out + 0.05 * torch.randn(4, 1, generator=generator),
            into + 0.05 * torch.randn(1, 9, generator=generator),
        )
        assert found < loss(change - worse[0] @ worse[1]) * 1.001


def test_neurons_are_chosen_for_those_that_bear_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module(10, fits=1, leave="neurons", neurons=0.3, hold=0.5, keep="0 3")
    assert made.model.policy.keep == tuple(range(LAYERS)) and made.crossed_from == 5
    examples = [answered(tiny.tokens(1, 6 + seed, seed)[0].tolist()) for seed in range(6)]
    monkeypatch.setattr(layerroute, "lost", lambda *_: torch.tensor([0.9, 0.1, 0.8, 0.2, 0.3, 0.7]))
    asked: list[list[Any]] = []

    def noted(model: LayerwiseForCausalLM, those: list[Any]) -> list[Moments]:
        asked.append([*those])
        return moments(model, those)

    monkeypatch.setattr(layerroute, "moments", noted)
    made.choose_neurons(examples)
    assert asked == [examples, [examples[at] for at in (1, 3, 4)]]
    layers = made.model.thin.numbers
    assert not {0, 3} & {*layers}
    assert made.model.policy.thin == layers and set(made.model.policy.keep) == {*range(LAYERS)} - {*layers}
    left_out = sum(48 - len(those) for those in made.model.thin.kept.values())
    assert left_out == round(0.3 * LAYERS * 48 / 6) * 6  # whole eighths


def test_inputs_skip_what_they_would_bear_more_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """What routers are fitted to is lost by so many times the neurons; what gates leave out is the fewer."""
    given: dict[str, Any] = {"fits": 1, "leave": "neurons", "neurons": 0.1, "keep": "0", "hold": 1.0}
    made = module(10, margin=3.0, **given)
    examples = [answered(tiny.tokens(1, 6 + seed, seed)[0].tolist()) for seed in range(6)]
    made.choose_neurons(examples)
    parts: list[int] = []

    def measured(model: LayerwiseForCausalLM, those: list[Any], plan: Plan) -> torch.Tensor:
        assert {visit.layer for visit in plan if visit.part is Part.THIN} == {*model.thin.numbers}
        parts.append(sum(48 - len(kept) for kept in model.thin.kept.values()) // 6)
        return torch.tensor([0.9, 0.0, 0.8, 0.0, 0.0, 0.7])

    monkeypatch.setattr(layerroute, "lost", measured)
    own, policy = made.model.thin, made.model.policy
    assert made.fit_gates(examples) == (pytest.approx(0.4), 0.5)
    assert parts == [round(0.3 * LAYERS * 8)]
    assert made.model.thin is own and made.model.policy.thin == policy.thin == own.numbers
    assert sum(48 - len(kept) for kept in own.kept.values()) // 6 == round(0.1 * LAYERS * 8)
    one_line(lambda: module(10, margin=0.5, **given), "margin must be at least 1")
    one_line(lambda: module(10, margin=10.0, **given), "below 10 for that many neurons")
    one_line(lambda: module(10, margin=2.0, **given | {"hold": 0.5}), "hold 1 too")


@torch.no_grad()
def test_mends_fold_into_the_maps_they_mend(tmp_path: Path) -> None:
    model, ids, plan = attach(tiny.model("llama")), tiny.tokens(2, 9), "0 1-2t 3 4t 5"
    kept = {layer: torch.tensor(those) for layer, those in KEPT.items()}
    model.thin_by(ThinMlps(model.runtime.backbone, kept, rank=2))
    unmended = thin()(ids, plans=[plan] * 2).logits
    torch.testing.assert_close(model(ids, plans=[plan] * 2).logits, unmended, **CLOSE)  # a new mend adds nothing
    for parameter in model.thin.mends.parameters():
        parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    mended = model(ids, plans=[plan] * 2).logits
    assert (mended - unmended).abs().max() > 0.01
    model.save_pretrained(tmp_path / "saved")
    again = from_pretrained(_base(tmp_path), adapter=tmp_path / "saved", engine="eager")
    assert all(type(again.thin[layer].down_proj) is torch.nn.Linear for layer in KEPT)
    torch.testing.assert_close(again(ids, plans=[plan] * 2).logits, mended, **CLOSE)
    again.save_pretrained(tmp_path / "twice")
    twice = from_pretrained(_base(tmp_path), adapter=tmp_path / "twice", engine="eager")
    torch.testing.assert_close(twice(ids, plans=[plan] * 2).logits, mended, **CLOSE)


@torch.no_grad()
def test_neurons_that_others_can_speak_for_go_first_and_are_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """In layer 2 each of six neurons has a twin; one of its eight parts is six neurons."""
    monkeypatch.setattr(neuron_fits, "RIDGE", 1e-6)
    model = attach(tiny.model("llama"))
    mlp = model.runtime.backbone.layers[2].mlp
    for neuron in range(6):
        mlp.gate_proj.weight[neuron + 6] = mlp.gate_proj.weight[neuron]
        mlp.up_proj.weight[neuron + 6] = 2 * mlp.up_proj.weight[neuron]
    examples = [answered(tiny.tokens(1, 30, seed)[0].tolist()) for seed in range(40)]
    ids, off = tiny.tokens(2, 9, 99), {}
    for rank in (0, 6):
        model.thin_by(thin_mlps(model, moments(model, examples), 1 / (LAYERS * 8), rank))
        assert model.thin.numbers == (2,) and len(model.thin.kept[2]) == 42
        assert all((neuron in model.thin.kept[2]) != (neuron + 6 in model.thin.kept[2]) for neuron in range(6))
        off[rank] = (model(ids, plans=["0-1 2t 3-5"] * 2).logits - model(ids).logits).norm()
    assert off[6] < 0.2 * off[0]


def test_an_adapter_is_routed_as_it_is(files: Path, tmp_path: Path) -> None:  # noqa: F811
    plain = train(config(files, tmp_path / "none", objective="none", lora_dropout=0.0))
    given: dict[str, Any] = {"fits": 1, "hold": 1.0, "hold_full": 1.0, "leave": "neurons", "mend_rank": 2}
    chosen = config(files, tmp_path / "routed", adapter=str(plain), **given)
    routed, ids = from_pretrained(train(chosen), engine="eager"), tiny.tokens(2, 7)
    full = routed(ids, plans=[Plan.full(LAYERS)] * 2).logits
    assert torch.equal(full, from_pretrained(plain, engine="eager")(ids).logits)
    assert routed.policy.weight.any() and routed.thin.mends["1"].out.weight.any()
    with safe_open(train(replace(chosen, out=str(tmp_path / "half"), precision="bfloat16")) / LORA, "pt") as lora:
        assert {lora.get_tensor(name).dtype for name in lora.keys()} == {torch.bfloat16}  # noqa: SIM118
    one_line(lambda: train(chosen, resume=True), "nothing to resume")
    one_line(
        lambda: train(replace(chosen, out=str(tmp_path / "few"), keep="0-4", neurons=0.5)), "1 layers cannot leave"
    )
    one_line(lambda: config(files, tmp_path, adapter=str(tmp_path), **given), "there is no LoRA in")
    one_line(lambda: config(files, tmp_path, adapter=str(plain)), "give hold 1")


@pytest.mark.parametrize("hold", [0.2, 1.0])
def test_a_training_chooses_neurons_and_saves_them(hold: float, files: Path, tmp_path: Path) -> None:  # noqa: F811
    given: dict[str, Any] = {"fits": 1, "hold": hold, "hold_full": 1.0, "leave": "neurons", "neurons": 0.4}
    out = train(config(files, tmp_path / "routed", **given, lora_dropout=0.0))
    routed = from_pretrained(out, engine="eager")
    assert json.loads((out / "layerwise.json").read_text(encoding="utf-8"))["thin"] == list(routed.thin.numbers)
    assert routed.policy.thin == routed.thin.numbers and routed.policy.weight.any()
    if hold == 1:
        plain = from_pretrained(
            train(config(files, tmp_path / "none", objective="none", lora_dropout=0.0)), engine="eager"
        )
        ids = tiny.tokens(2, 7)
        assert torch.equal(routed(ids, plans=[Plan.full(LAYERS)] * 2).logits, plain(ids).logits)


@pytest.mark.parametrize(
    ("change", "mention"),
    [
        ({"leave": "neurons"}, "give fits too"),
        ({"leave": "neurons", "fits": 1, "start_closed": "1"}, "leave out start-closed"),
        ({"leave": "neurons", "fits": 1, "bridge_rank": 2}, "leave out bridge-rank"),
        ({"leave": "neurons", "fits": 1, "neurons": 1.0}, "neurons must be"),
        ({"fits": 1, "keep": "0", "mend_rank": 2}, "give leave neurons"),
    ],
)
def test_recipes_refuse_nonsense(change: dict[str, Any], mention: str) -> None:
    one_line(lambda: layerroute.LayerRouteRecipe(**change), mention)
