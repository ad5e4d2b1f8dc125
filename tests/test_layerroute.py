"""LayerRoute: gates that decide from the prompt, in every way of running a model; their adapters."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tiny import one_line, padded, tokens
from torch import Tensor

from layerwise import Cache, Phase, Plan, Trace, attach, from_pretrained
from layerwise.decoding import speculative
from layerwise.decoding.drafts import Draft
from layerwise.decoding.target import Watched
from layerwise.hub import save_adapter
from layerwise.plan import Step
from layerwise.policies.gates import GatedPolicy
from layerwise.policies.tensors import FILE

LAYERS = tiny.LAYERS
FULL = Plan.full(LAYERS)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
IDS, MASK = padded(11, [11, 7, 9, 4], "right")
LENGTHS = MASK.sum(1).tolist()
LABELS = torch.where((MASK == 1) & (torch.arange(11) >= 3), IDS, -100)


def gates(seed: int = 1, size: float = 1.0, **options: Any) -> GatedPolicy:
    """Random routers that open and close about equally often."""
    generator = torch.Generator().manual_seed(seed)
    weight = size * torch.randn(LAYERS, 32, generator=generator)
    return GatedPolicy(weight, torch.zeros(LAYERS), reads="last", **options)


def gated(name: str = "llama", **options: Any) -> Any:
    model = attach(tiny.model(name))
    model.policy = gates(**options)
    return model


def alone(row: int) -> Tensor:
    return IDS[row : row + 1, : LENGTHS[row]]


def decided(model: Any, ids: Tensor, **options: Any) -> list[Plan]:
    """The plan of each row, as the trace of a forward has it."""
    trace = Trace()
    with torch.no_grad():
        model(ids, trace=trace, **options)
    return [spans[0].plan for spans in trace.rows]


class Calls:
    """How often each layer is called, and with how many rows."""

    def __init__(self, model: Any) -> None:
        self.rows: Counter[int] = Counter()
        for number, layer in enumerate(model.runtime.backbone.layers):
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, number=number: self.rows.update({number: len(args[0])}), with_kwargs=True
            )


# -- deciding ------------------------------------------------------------------------------------------------


def test_a_gate_is_the_papers_formula() -> None:
    model, ids = gated(), alone(1)
    policy = replace(model.policy, reads="mean")
    hidden, kept = model.embed(ids), []
    for layer in range(LAYERS):
        soft = torch.sigmoid(policy.weight[layer] @ hidden[0].mean(0) + policy.bias[layer])
        if soft > 0.5 or (layer == LAYERS - 1 and not kept):
            kept.append(layer)
            hidden = model.runtime.forward(hidden, [Plan.of([layer])])
    model.policy = policy
    assert decided(model, ids) == [Plan.of(kept)] and 0 < len(kept) < LAYERS


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rows_of_a_batch_decide_and_compute_as_rows_alone(name: str) -> None:
    model = gated(name)
    plans = [decided(model, alone(row))[0] for row in range(4)]
    assert len(set(plans)) > 1 and all(len(plan) < LAYERS for plan in plans)
    assert decided(model, IDS, attention_mask=MASK) == plans
    left, left_mask = torch.zeros_like(IDS), torch.zeros_like(MASK)
    for row, length in enumerate(LENGTHS):
        left[row, 11 - length :], left_mask[row, 11 - length :] = IDS[row, :length], 1
    assert decided(model, left, attention_mask=left_mask) == plans
    assert decided(model, IDS + 5 * (1 - MASK), attention_mask=MASK) == plans
    with torch.no_grad():
        together = model(IDS, attention_mask=MASK).logits
        for row, length in enumerate(LENGTHS):
            torch.testing.assert_close(together[row, :length], model(alone(row)).logits[0], rtol=1e-4, atol=1e-4)


def test_gates_look_at_the_prompt_alone() -> None:
    model = gated()
    for seed in range(6):
        answer = torch.cat([IDS[:, :3], tokens(4, 8, seed)], 1)
        expected = decided(model, IDS[:, :3])
        labels = torch.cat([torch.full((4, 3), -100), answer[:, 3:]], 1)
        assert decided(model, answer, labels=labels) == expected
        assert decided(model, answer, prompt_lengths=[3] * 4) == expected
    assert decided(model, IDS, labels=IDS) == decided(
        model, IDS[:, :1]
    )  # no label is predicted before the second token
    one_line(lambda: model(IDS, prompt_lengths=[3, 3, 3]), "prompt_lengths")
    one_line(lambda: model(IDS, attention_mask=MASK, prompt_lengths=[3, 8, 3, 3]), "prompt_lengths")


def test_what_is_skipped_does_not_run() -> None:
    model = gated()
    plans = decided(model, IDS, attention_mask=MASK)
    calls = Calls(model)
    with torch.no_grad():
        model(IDS, attention_mask=MASK)
    expected = Counter(visit.layer for plan in plans for visit in plan)
    assert calls.rows == expected and sum(expected.values()) < 4 * LAYERS
    calls.rows.clear()
    made = model.generate(alone(0), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape[1] == 15 and calls.rows == Counter({visit.layer: 4 for visit in plans[0]})


def test_kept_layers_run_and_one_layer_always_does() -> None:
    closed = GatedPolicy(torch.zeros(LAYERS, 32), torch.full((LAYERS,), -9.0))
    model = attach(tiny.model("llama"))
    model.policy = closed
    assert decided(model, alone(0)) == [Plan.of([LAYERS - 1])]
    model.policy = replace(closed, keep=(0, 3))
    assert decided(model, alone(0)) == [Plan.of([0, 3])]


# -- generating ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_generation_keeps_the_decision_of_the_prompt(name: str) -> None:
    model = gated(name)
    plans = decided(model, IDS, attention_mask=MASK)
    trace = Trace()
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    left = torch.zeros_like(IDS)
    for row, length in enumerate(LENGTHS):
        left[row, 11 - length :] = IDS[row, :length]
    made = model.generate(left, attention_mask=MASK.flip(1), trace=trace, **options)
    for row, plan in enumerate(plans):
        assert set(trace.plans(row)) == {plan} and trace.tokens(Phase.DECODE) == 4 * 8
        single = Trace()
        own = model.generate(alone(row), trace=single, **options)
        assert torch.equal(own[0, LENGTHS[row] :], made[row, 11:]) and single.targets == [plan]
        # without a cache, token by token
        slow = alone(row)
        for _ in range(9):
            logits = model(slow, prompt_lengths=[LENGTHS[row]]).logits[:, -1].detach()
            logits[:, 1] = -torch.inf  # min_new_tokens
            slow = torch.cat([slow, logits.argmax(-1)[None]], 1)
        assert torch.equal(own, slow)
    assert trace.targets == plans


@torch.no_grad()
def test_a_cache_keeps_the_decision() -> None:
    model, cache, trace = gated(), Cache(4, 16), Trace()
    (plans, expected) = (decided(model, IDS[:, :3]), model(IDS, prompt_lengths=[3] * 4).logits)
    assert len(set(plans)) > 1
    found = [model(IDS[:, :3], past_key_values=cache).logits]
    found += [model(IDS[:, at : at + 1], past_key_values=cache, trace=trace).logits for at in range(3, 11)]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)
    assert [set(trace.plans(row)) for row in range(4)] == [{plan} for plan in plans]
    part = cache.part([2, 0])
    assert part.plans == [plans[2], plans[0]]
    cache.join([part], [4, 1])
    assert cache.plans == [plans[2], plans[1]]


@pytest.mark.parametrize("draft", ["policy", "policy,3", "ngram+policy"])
def test_a_policy_that_drafts_changes_nothing(draft: str) -> None:
    model = gated(seed=4, keep=(0, 1))
    options = {"max_new_tokens": 14, "do_sample": False}
    plain = attach(tiny.model("llama")).generate(IDS[:, :4], **options)
    trace = Trace()
    assert torch.equal(model.generate(IDS[:, :4], draft=draft, trace=trace, **options), plain)
    assert trace.targets == [FULL] * 4 and trace.drafts["policy"] > 0
    assert len({plan for row in range(4) for plan in trace.plans(row, Phase.DRAFT)}) > 1
    single = attach(tiny.model("llama")).generate(alone(0), **options)
    assert torch.equal(model.generate(alone(0), draft=draft, **options), single)
    skipping = ["0-3 5"] * 4  # a target of one's own
    assert torch.equal(
        model.generate(IDS[:, :4], draft=draft, plans=skipping, **options),
        model.generate(IDS[:, :4], plans=skipping, **options),
    )
    model.plan = "0 2-5"  # a fixed plan is a policy too
    assert torch.equal(model.generate(IDS[:, :4], draft=draft, **options), plain)


@pytest.mark.parametrize("draft", ["ngram", "exit:2,3", "plan:0 2-4,2", "auto"])
def test_drafts_for_a_routed_model_change_nothing(draft: str) -> None:
    model = gated()
    options = {"max_new_tokens": 12, "do_sample": False}
    for ids in (alone(0), alone(1), IDS[:, :4]):
        trace, plain = Trace(), Trace()
        expected = model.generate(ids, trace=plain, **options)
        assert torch.equal(model.generate(ids, draft=draft, trace=trace, **options), expected)
        assert trace.targets == plain.targets


def test_drafts_by_policy_as_text() -> None:
    for text in ("policy", "policy,4", "ngram+policy"):
        assert str(Draft.parse(text, LAYERS)) == text
    one_line(lambda: Draft.parse("policy:3"), "no draft")


def test_a_routing_policy_has_no_plan_without_a_prompt() -> None:
    model = gated()
    assert model.plan is None
    one_line(lambda: model.row_plans(1), "give plans")
    assert decided(model, IDS, plans=["0-5"] * 4) == [FULL] * 4


# -- saving --------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> tuple[Path, Any]:
    """A saved adapter of a LoRA and gates, and the model it was saved from."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = attach(get_peft_model(from_pretrained(base, engine="eager").base, lora).eval())
    model.policy = gates(keep=(2,)).rounded()
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_saved_gates_decide_as_before(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = adapter
    assert (folder / FILE).stat().st_size < 2 * LAYERS * 33 + 400
    for engine in ("eager", "auto"):
        loaded = from_pretrained(adapter=folder, engine=engine)
        assert loaded.policy.keep == (2,) and loaded.policy.weight.dtype == torch.bfloat16
        assert decided(loaded, IDS, attention_mask=MASK) == decided(model, IDS, attention_mask=MASK)
        save_adapter(loaded, tmp_path / engine)
        again = from_pretrained(adapter=tmp_path / engine, engine="eager")
        assert torch.equal(again.policy.weight, model.policy.weight)
    assert from_pretrained(adapter=folder, engine="eager", plan="0-3").plan == Plan.parse("0-3")


def test_peft_loads_the_directory(adapter: tuple[Path, Any]) -> None:
    folder, model = adapter
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(IDS, plans=["0-5"] * 4).logits
        torch.testing.assert_close(theirs(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_damaged_routers_are_refused_in_one_line(adapter: tuple[Path, Any]) -> None:
    folder, _ = adapter
    about = json.loads((folder / "layerwise.json").read_text())["policy"]
    one_line(lambda: GatedPolicy.load(about, 4, folder), "layers")
    (folder / FILE).write_bytes(b"nonsense")
    one_line(lambda: from_pretrained(adapter=folder, engine="eager"), "routers")
    (folder / FILE).unlink()
    one_line(lambda: from_pretrained(adapter=folder, engine="eager"), "routers")
    one_line(lambda: GatedPolicy(torch.zeros(3, 4), torch.zeros(2)), "bias")
    one_line(lambda: GatedPolicy(torch.zeros(3, 4), torch.zeros(3), keep=(3,)), "keep")
    one_line(lambda: GatedPolicy(torch.zeros(3, 4), torch.zeros(3), reads="first"), "read")
    one_line(lambda: GatedPolicy(torch.zeros(3, 4), torch.zeros(3), center=torch.zeros(3, 4)), "both or neither")


def test_the_states_of_the_prompt_are_released_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(tiny.model("llama"))
    model.policy = GatedPolicy(torch.zeros(LAYERS, 32), torch.full((LAYERS,), 9.0))  # every layer runs
    states: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    observe, play = Watched.observe, speculative._round

    def noting(self: Watched, step: Step, hidden: Tensor) -> None:
        states.append(weakref.ref(hidden))
        observe(self, step, hidden)

    def counting(*arguments: Any) -> None:
        alive.append(sum(one() is not None for one in states))
        play(*arguments)

    monkeypatch.setattr(Watched, "observe", noting)
    monkeypatch.setattr(speculative, "_round", counting)
    model.generate(tokens(1, 9), max_new_tokens=8, eos_token_id=None, draft="ngram")
    assert len(states) == LAYERS and alive and max(alive) <= 1  # the route keeps the last
