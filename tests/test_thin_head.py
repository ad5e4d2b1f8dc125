"""The thin LM head: its logits against slow ones, the laws with it in plans, its gate, its fit, and training it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_bridges import _base
from test_compiled import stepwise_logits
from test_cost import counted, embedded
from test_layerroute_runs import config
from test_layerroute_training import answered, module
from test_token_layers import wide
from test_training_runs import files  # noqa: F401 (a fixture)
from tiny import ARCHITECTURES, LAYERS, VOCABULARY, one_line, random_plan

from layerwise import Plan, attach, from_pretrained
from layerwise.cost import head_run, pass_cost
from layerwise.evaluation import routing as suite
from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.model.compiled import compiler_available
from layerwise.model.runtime import Runtime
from layerwise.model.thin_head import FEW, ThinHead
from layerwise.policies.gates import GatedPolicy
from layerwise.training.head_fits import final_states, fit_thin_head
from layerwise.training.layerroute import train

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
RANK, CANDIDATES = 5, 9


def with_thin_head(base: Any, rank: int = RANK, candidates: int = CANDIDATES, **options: Any) -> LayerwiseForCausalLM:
    """A model with a random thin head."""
    model = attach(base, **options)
    generator, hidden = torch.Generator().manual_seed(2), model.runtime.backbone.shape.hidden
    center, down = torch.randn(hidden, generator=generator), torch.randn(rank, hidden, generator=generator)
    model.thin_head_by(ThinHead(model.runtime.backbone, center, down / hidden, down.T, candidates))
    return model


def thin(name: str = "llama", **options: Any) -> LayerwiseForCausalLM:
    return with_thin_head(tiny.model(name), **options)


def sometimes_thin(rng: random.Random) -> Plan:
    return Plan(random_plan(rng).visits, rng.random() < 0.6)


def test_text_and_edits_keep_the_head() -> None:
    plan = Plan.parse("0-2 3*2 5 ht")
    assert plan.thin_head and str(plan) == "0-2 3*2 5 ht" and plan == Plan.parse(str(plan)) != Plan(plan.visits)
    assert plan.skip(1).thin_head and plan[:3].thin_head and plan.crossed((4,)).thin_head
    assert (Plan.full(2) + plan).thin_head and not (plan + Plan.full(2)).thin_head
    one_line(lambda: Plan.parse("0 ht 1"), "'ht' is not part of a plan")
    one_line(lambda: Plan.parse("ht"), "at least one layer")


@torch.no_grad()
def test_candidates_have_their_logits_and_the_others_the_preview() -> None:
    model = thin()
    backbone, head = model.runtime.backbone, model.thin_head
    hidden = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))
    found, exact = backbone.logits(hidden, thin=True), backbone.logits(hidden)
    alone = torch.stack([backbone.logits(one[None], thin=True)[0] for one in hidden])  # no more than FEW at once
    torch.testing.assert_close(alone, found, **CLOSE)
    for row, column in ((0, 0), (2, 3)):
        state = backbone.norm(hidden[row, column])
        z, sketch = head.down @ (state - head.center), backbone.head.weight @ head.up
        preview = backbone.head.weight @ head.center + sketch @ z
        rounding = sketch.abs().amax(1) / 254 * z.abs().sum()  # at most, in 8 bits
        likely = preview.argsort(descending=True)[:CANDIDATES]
        torch.testing.assert_close(found[row, column, likely], backbone.head.weight[likely] @ state, **CLOSE)
        others = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, likely, False)
        gap = (found[row, column] - preview).abs()
        assert (gap <= rounding + 1e-5)[others].all() and rounding.mean() < 0.02 * preview.std()
    assert (found - exact).abs().max() > 0 and found.shape == exact.shape
    everything = with_thin_head(tiny.model("llama"), candidates=VOCABULARY).runtime.backbone
    torch.testing.assert_close(everything.logits(hidden, thin=True), exact, **CLOSE)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_cached_equals_uncached_and_batches_equal_rows(name: str) -> None:
    tiny.assert_rows_and_caches_agree(thin(name), sometimes_thin, random.Random(name))


@torch.no_grad()
def test_cost_is_what_is_counted() -> None:
    backbone = thin().runtime.backbone
    plan, inputs = Plan.parse("0 2-3 ht"), embedded(backbone, 1, FEW)
    found = counted(lambda: backbone.logits(Runtime(backbone).forward(inputs, [plan]), thin=True))
    assert found == pass_cost(backbone.shape, plan, FEW).flops < pass_cost(backbone.shape, Plan(plan.visits), FEW).flops
    weights = RANK * 32 + VOCABULARY * RANK + CANDIDATES * 32
    assert head_run(backbone.shape, plan) == weights / (VOCABULARY * 32) and head_run(backbone.shape, Plan.full(6)) == 1


@pytest.mark.skipif(not compiler_available(), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_eager(dtype: torch.dtype) -> None:
    found = []
    for engine in ("eager", "compiled"):
        model = with_thin_head(wide("llama").to(dtype), rank=32, candidates=40, engine=engine)
        model.prepare(["0-5 ht"])
        logits = stepwise_logits(model, Plan.full(6))
        hidden = torch.randn(1, 1, 238, generator=torch.Generator().manual_seed(3)).to(dtype)
        with torch.no_grad():
            found.append((logits, model.runtime.logits(hidden, [Plan.parse("0-5 ht")]).float()))
    tolerance = CLOSE if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(found[1][1], found[0][1], **tolerance)


@pytest.mark.skipif(not compiler_available(), reason="no C++ compiler")
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("candidates", [1, 30, 509])
@torch.no_grad()
def test_kernels_choose_the_largest(candidates: int, threads: int) -> None:
    """Whatever the signs and however close: the exact logits are where the preview is largest."""
    model = with_thin_head(wide("llama"), rank=32, candidates=candidates, engine="compiled")
    model.prepare(["0-5 ht"])
    backbone = model.runtime.backbone
    for scale in (1e-3, 1.0, 50.0):
        hidden = scale * torch.randn(1, 1, 238, generator=torch.Generator().manual_seed(3))
        found = model.runtime.logits(hidden, [Plan.parse("0-5 ht")])
        torch.testing.assert_close(found, backbone.logits(hidden, thin=True), rtol=1e-4, atol=1e-4 * (1 + scale))


@pytest.mark.skipif(not compiler_available(), reason="no C++ compiler")
@torch.no_grad()
def test_kernels_choose_as_many_when_all_are_alike() -> None:
    model = with_thin_head(wide("llama"), rank=32, candidates=40, engine="compiled")
    model.thin_head.scale.zero_(), model.thin_head.offset.fill_(0.5)
    model.prepare(["0-5 ht"])
    found = model.runtime.logits(
        torch.randn(1, 1, 238, generator=torch.Generator().manual_seed(3)), [Plan.parse("0 ht")]
    )
    assert (found != 0.5).sum() == 40


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_as_a_draft_it_loses_nothing(engine: str) -> None:
    if engine == "compiled" and not compiler_available():
        pytest.skip("no C++ compiler")
    model, ids = thin(engine=engine), tiny.tokens(2, 8)
    full = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, draft="plan:0-5 ht"), full)
    thinned = model.generate(ids, max_new_tokens=12, do_sample=False, plans=["0-5", "0-5 ht"])
    assert torch.equal(thinned[0], full[0])
    assert torch.equal(thinned[1:], model.generate(ids[1:], max_new_tokens=12, do_sample=False, plans=["0-5 ht"]))


def test_what_does_not_fit_is_told_in_one_line(tmp_path: Path) -> None:
    one_line(lambda: attach(tiny.model("llama")).read_plan("0-5 ht"), "the model has none", "load an adapter")
    backbone, ones = thin().runtime.backbone, torch.ones(RANK, 32)
    one_line(lambda: ThinHead(backbone, torch.ones(31), ones, ones.T, 3), "hidden size 32")
    one_line(lambda: ThinHead(backbone, torch.ones(32), ones, ones, 3), "hidden size 32")
    one_line(lambda: ThinHead(backbone, torch.ones(32), ones, ones.T, VOCABULARY + 1), "1 to 97 candidates")
    model = thin()
    model.policy = GatedPolicy(torch.zeros(7, 32), torch.full((7,), -1.0), (0, 1, 2, 3, 4, 5), "last", thin_head=True)
    model.thin_head_by(None)
    one_line(lambda: model.generate(tiny.tokens(1, 4), max_new_tokens=2), "the model has none")
    model = thin()
    model.base.resize_token_embeddings(VOCABULARY + 3)
    one_line(lambda: model(tiny.tokens(1, 4), plans=["0-5 ht"]), "the vocabulary is another")
    one_line(lambda: ThinHead.load(tmp_path, backbone), "the thin head", "cannot be loaded")
    one_line(lambda: module(10, fits=1, keep="0-4", head_rank=32, hold=1.0, hold_full=1.0), "head-rank", "32")


@torch.no_grad()
def test_its_gate_reads_what_leaves_the_last_layer(tmp_path: Path) -> None:
    model, (ids, mask) = thin(), tiny.padded(9, [9, 6, 4], "right")
    weight = torch.randn(LAYERS + 1, 32, generator=torch.Generator().manual_seed(1))
    model.policy = GatedPolicy(weight, torch.zeros(LAYERS + 1), (0, 3, 5), "last", thin_head=True)
    assert model.policy.layers == LAYERS and model.policy.free == (1, 2, 4, LAYERS)
    route = model.policy.route([9, 6, 4])
    hidden = model.runtime.forward(model.embed(ids), route, [9, 6, 4])
    for row, (plan, length) in enumerate(zip(route.plans, [9, 6, 4], strict=True)):
        assert plan.thin_head == bool(model.policy.scores(LAYERS, hidden[row : row + 1], [length]) <= 0.5)
    assert len({plan.thin_head for plan in route.plans}) == 2
    logits = model(ids, attention_mask=mask).logits
    for row, (plan, length) in enumerate(zip(route.plans, [9, 6, 4], strict=True)):
        expected = model.runtime.backbone.logits(hidden[row, :length], plan.thin_head)
        torch.testing.assert_close(logits[row, :length], expected, **CLOSE)
    model.save_pretrained(tmp_path / "saved")
    about = json.loads((tmp_path / "saved" / "layerwise.json").read_text())
    assert about["thin_head"] == {"rank": RANK, "candidates": CANDIDATES} and about["policy"]["thin_head"] is True
    again = from_pretrained(_base(tmp_path), adapter=tmp_path / "saved", engine="eager")
    torch.testing.assert_close(again(ids, attention_mask=mask).logits, logits, **CLOSE)


@torch.no_grad()
def test_a_fit_keeps_the_directions_that_matter() -> None:
    """With as many candidates as one, the preview alone has to tell; and no other projection does better."""
    model = attach(tiny.model("llama"))
    examples = [answered(tiny.tokens(1, 9, seed)[0].tolist()) for seed in range(30)]
    backbone, plan = model.runtime.backbone, Plan.parse("0-3")
    states = torch.cat([*final_states(model, examples, plan)])
    assert len(states) == sum(len(one.input_ids) for one in examples)  # of prompts as well as answers
    weight = backbone.head.weight

    def error(head: ThinHead) -> float:
        return (states @ weight.T - head.preview(states)).square().sum().item()

    errors = []
    for rank in (2, 8, 31):
        fit_thin_head(model, examples, plan, rank, 1)
        assert model.thin_head.rank == rank
        errors.append(error(model.thin_head))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02 * errors[0]
    fit_thin_head(model, examples, plan, 2, 1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        best = model.thin_head
        down, up = (
            one + 0.05 * torch.randn(one.shape, generator=generator) * one.std() for one in (best.down, best.up)
        )
        assert error(ThinHead(backbone, best.center, down, up, 1)) > errors[0]


def test_training_fits_it_and_its_gate(files: Path, tmp_path: Path) -> None:  # noqa: F811
    out = train(
        config(
            files,
            tmp_path / "out",
            fits=1,
            leave="neurons",
            neurons=0.2,
            keep="0 3",
            hold=1.0,
            hold_full=1.0,
            head_rank=6,
        )
    )
    model = from_pretrained(json.loads((out / "layerwise.json").read_text())["base_model"], adapter=out, engine="eager")
    assert isinstance(model.policy, GatedPolicy) and model.policy.thin_head and len(model.policy.weight) == LAYERS + 1
    assert model.thin_head is not None and model.thin_head.rank == 6
    assert model.policy.basis[LAYERS].abs().sum() > 0  # the router of the head was fitted
    one_line(lambda: config(files, tmp_path / "other", fits=1, keep="0 3", head_rank=6), "hold 1")
    one_line(lambda: config(files, tmp_path / "other", head_rank=6), "give fits")


def test_controls_leave_out_the_head_too() -> None:
    shape = thin().runtime.backbone.shape
    policy = GatedPolicy(torch.zeros(LAYERS + 1, 2), torch.zeros(LAYERS + 1), (0, 5), thin_head=True)
    plans = [policy.plan(those) for those in ([1, 2, 6], [6], [6, 3], [], [1, 2, 3, 4, 6])] * 20
    ran = sum(suite._weights_run(shape, plan) for plan in plans)
    found = suite.control_plans(plans, policy, shape, seed=1)
    for name, draws in found.items():
        for those in draws:
            assert sum(suite._weights_run(shape, plan) for plan in those) == pytest.approx(ran, abs=1), name
    assert all(any(plan.thin_head for plan in found[name][0]) for name in ("random", "static"))
