"""Dr.LLM: routers that skip, run and repeat layers, in every way of running a model; their adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_layerroute import Calls, alone, decided
from tiny import one_line, padded

from layerwise import Cache, Phase, Plan, Trace, attach, from_pretrained
from layerwise.hub import save_adapter
from layerwise.policies.router import (
    REPEAT,
    SKIP,
    WINDOWS,
    MenuPolicy,
    PerLayerPolicy,
    Routers,
    classes_of,
    plan_of,
    shared_visits,
    summary,
    windows,
)
from layerwise.policies.tensors import FILE

LAYERS, HIDDEN = tiny.LAYERS, 32
FULL = Plan.full(LAYERS)
IDS, MASK = padded(11, [11, 7, 9, 4], "right")
LENGTHS = MASK.sum(1).tolist()
MENU = tuple(Plan.parse(text) for text in ("0-5", "0*2 1-5", "0-2 4-5", "0-1 3*2 5"))


def per_layer(seed: int = 1, size: float = 4.0, threshold: float = 0.0) -> PerLayerPolicy:
    """Random routers that take all three classes; layer 0's always repeats, as no public implementation can."""
    routers = Routers.random(LAYERS, HIDDEN, 3, units=8, seed=seed)
    routers.outer_weight.mul_(size)
    routers.outer_bias[0, REPEAT] = 100.0
    return PerLayerPolicy(routers, threshold)


def menu(seed: int = 2, size: float = 6.0, threshold: float = 0.0) -> MenuPolicy:
    routers = Routers.random(1, 2 * HIDDEN, len(MENU), units=8, seed=seed)
    routers.outer_weight.mul_(size)
    return MenuPolicy(MENU, routers, threshold)


FORMS = {"per-layer": per_layer, "menu": menu}


def routed(form: str, name: str = "llama", **options: Any) -> Any:
    model = attach(tiny.model(name))
    model.policy = FORMS[form](**options)
    return model


both_forms = pytest.mark.parametrize("form", FORMS)

# -- what routers read ---------------------------------------------------------------------------------------


def test_windows_are_contiguous_equal_and_of_the_prompt_alone() -> None:
    hidden = torch.randn(3, 23, 5)
    hidden[0, 20:], hidden[1, 3:] = torch.nan, torch.inf  # padding
    means, share = windows(hidden, [20, 3, 8])
    states = hidden / hidden.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    bounds = [-(-20 * at // WINDOWS) for at in range(WINDOWS + 1)]
    for at, (start, stop) in enumerate(pairwise(bounds)):
        assert stop - start in (2, 3)
        torch.testing.assert_close(means[0, at], states[0, start:stop].mean(0))
    torch.testing.assert_close(means[1, :3], states[1, :3])
    assert share[1].tolist() == pytest.approx([1 / 3] * 3 + [0] * 5) and not means[1, 3:].any()
    torch.testing.assert_close(means[2], states[2, :8])
    read = summary(hidden, [20, 3, 8])
    torch.testing.assert_close(read[0], torch.cat([means[0].mean(0), states[0, 19]]))
    torch.testing.assert_close(read[1], torch.cat([states[1, :3].mean(0), states[1, 2]]))


def test_the_per_layer_form_is_the_papers_formula() -> None:
    model, ids = routed("per-layer"), alone(0)
    routers, hidden, classes = model.policy.routers, model.embed(ids), []
    for layer in range(LAYERS):
        states = hidden[0] / hidden[0].square().mean(-1, keepdim=True).add(1e-6).sqrt()
        logits = []
        for window in range(WINDOWS):
            mean = torch.stack([states[t] for t in range(11) if t * WINDOWS // 11 == window]).mean(0)
            inner = torch.nn.functional.gelu(routers.inner_weight[layer] @ mean + routers.inner_bias[layer])
            logits.append(routers.outer_weight[layer] @ inner + routers.outer_bias[layer])
        classes.append(int(torch.stack(logits).mean(0).argmax()))
        for _ in range(classes[-1]):
            hidden = model.runtime.forward(hidden, [Plan.of([layer])])
    assert decided(model, ids) == [plan_of(classes)]
    assert classes[0] == REPEAT and SKIP in classes


def test_the_menu_is_read_after_the_layers_that_its_plans_share() -> None:
    assert menu().shared == 1 and shared_visits(MENU[2:]) == 2 and shared_visits([FULL, FULL.skip(4)]) == 4
    model, ids = routed("menu"), alone(0)
    states = model.runtime.forward(model.embed(ids), [Plan.of([0])])
    best = model.policy.routers.logits(0, summary(states, [11])).argmax()
    assert decided(model, ids) == [MENU[best]]


# -- deciding ------------------------------------------------------------------------------------------------


@both_forms
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rows_of_a_batch_decide_and_compute_as_rows_alone(form: str, name: str) -> None:
    model = routed(form, name)
    plans = [decided(model, alone(row))[0] for row in range(4)]
    assert len(set(plans)) > 1
    assert decided(model, IDS, attention_mask=MASK) == plans
    left, left_mask = torch.zeros_like(IDS), torch.zeros_like(MASK)
    for row, length in enumerate(LENGTHS):
        left[row, 11 - length :], left_mask[row, 11 - length :] = IDS[row, :length], 1
    assert decided(model, left, attention_mask=left_mask) == plans
    assert decided(model, IDS + 5 * (1 - MASK), attention_mask=MASK) == plans
    with torch.no_grad():
        together = model(IDS, attention_mask=MASK).logits
        for row, length in enumerate(LENGTHS):
            own = model(alone(row), plans=[plans[row]]).logits[0]  # a fixed plan: the route ran the same visits
            torch.testing.assert_close(together[row, :length], own, rtol=1e-4, atol=1e-4)


@both_forms
def test_routers_look_at_the_prompt_alone(form: str) -> None:
    model = routed(form)
    expected = decided(model, IDS[:, :3])
    assert len(set(expected)) > 1
    for seed in range(4):
        torch.manual_seed(seed)
        answer = torch.cat([IDS[:, :3], torch.randint(3, tiny.VOCABULARY, (4, 8))], 1)
        assert decided(model, answer, prompt_lengths=[3] * 4) == expected
        labels = torch.cat([torch.full((4, 3), -100), answer[:, 3:]], 1)
        assert decided(model, answer, labels=labels) == expected


@both_forms
def test_layers_run_as_often_as_decided(form: str) -> None:
    model = routed(form)
    plans = decided(model, IDS, attention_mask=MASK)
    calls = Calls(model)
    with torch.no_grad():
        model(IDS, attention_mask=MASK)
    expected = [sum(plan.counts(LAYERS)[layer] for plan in plans) for layer in range(LAYERS)]
    assert [calls.rows[layer] for layer in range(LAYERS)] == expected


@both_forms
def test_without_confidence_everything_runs_once(form: str) -> None:
    unsure = FORMS[form](size=0.0)
    unsure.routers.outer_bias[:] = torch.tensor([0.0, 0.0, 0.2, 0.0][: unsure.routers.classes])
    model = attach(tiny.model("llama"))
    model.policy = unsure
    assert decided(model, IDS, attention_mask=MASK) == [MENU[2] if form == "menu" else plan_of([REPEAT] * LAYERS)] * 4
    model.policy = replace(unsure, threshold=0.5)
    assert decided(model, IDS, attention_mask=MASK) == [FULL] * 4
    model.policy = FORMS[form](size=100.0, threshold=0.5)
    assert decided(model, IDS, attention_mask=MASK) != [FULL] * 4


def test_one_layer_always_runs() -> None:
    policy = per_layer(size=0.0)
    policy.routers.outer_bias[:] = torch.tensor([9.0, 0.0, 0.0])
    model = attach(tiny.model("llama"))
    model.policy = policy
    assert decided(model, IDS) == [Plan.of([LAYERS - 1])] * 4


# -- generating ----------------------------------------------------------------------------------------------


@both_forms
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_generation_keeps_the_decision_of_the_prompt(form: str, name: str) -> None:
    model = routed(form, name)
    plans = decided(model, IDS, attention_mask=MASK)
    trace, options = Trace(), {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    left = torch.zeros_like(IDS)
    for row, length in enumerate(LENGTHS):
        left[row, 11 - length :] = IDS[row, :length]
    made = model.generate(left, attention_mask=MASK.flip(1), trace=trace, **options)
    assert trace.targets == plans
    for row, plan in enumerate(plans):
        assert set(trace.plans(row)) == {plan} and trace.tokens(Phase.DECODE) == 4 * 6
        own = model.generate(alone(row), **options)
        assert torch.equal(own[0, LENGTHS[row] :], made[row, 11:])
        slow = alone(row)  # without a cache, token by token
        for _ in range(7):
            logits = model(slow, prompt_lengths=[LENGTHS[row]]).logits[:, -1].detach()
            logits[:, 1] = -torch.inf  # min_new_tokens
            slow = torch.cat([slow, logits.argmax(-1)[None]], 1)
        assert torch.equal(own, slow)


@both_forms
@torch.no_grad()
def test_a_cache_keeps_the_decision(form: str) -> None:
    model, cache, trace = routed(form), Cache(4, 16), Trace()
    plans, expected = decided(model, IDS[:, :3]), model(IDS, prompt_lengths=[3] * 4).logits
    assert len(set(plans)) > 1 and any(plan.counts(LAYERS)[0] == 2 for plan in plans)
    found = [model(IDS[:, :3], past_key_values=cache).logits]
    found += [model(IDS[:, at : at + 1], past_key_values=cache, trace=trace).logits for at in range(3, 11)]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)
    assert [set(trace.plans(row)) for row in range(4)] == [{plan} for plan in plans]


@both_forms
@pytest.mark.parametrize("draft", ["policy", "policy,3", "ngram+policy"])
def test_as_a_draft_it_is_lossless(form: str, draft: str) -> None:
    model, plain = routed(form), attach(tiny.model("llama"))
    options = {"max_new_tokens": 12, "do_sample": False}
    trace, expected = Trace(), plain.generate(IDS[:, :4], **options)
    assert torch.equal(model.generate(IDS[:, :4], draft=draft, trace=trace, **options), expected)
    assert trace.targets == [FULL] * 4 and trace.drafts["policy"] > 0
    assert len({plan for row in range(4) for plan in trace.plans(row, Phase.DRAFT)}) > 1
    assert torch.equal(model.generate(alone(0), draft=draft, **options), plain.generate(alone(0), **options))


@both_forms
@pytest.mark.parametrize("draft", ["ngram", "exit:2,3", "auto"])
def test_drafts_for_a_routed_model_change_nothing(form: str, draft: str) -> None:
    model, options = routed(form), {"max_new_tokens": 10, "do_sample": False}
    for ids in (alone(1), IDS[:, :4]):
        assert torch.equal(model.generate(ids, draft=draft, **options), model.generate(ids, **options))


@both_forms
def test_without_a_prompt_there_is_no_plan(form: str) -> None:
    model = routed(form)
    assert model.plan is None
    one_line(lambda: model.row_plans(1), "give plans")


# -- classes and plans ---------------------------------------------------------------------------------------


def test_classes_and_plans_convert_where_they_can() -> None:
    for text, classes in {"0*2 1-3 5": (2, 1, 1, 1, 0, 1), "0-5": (1,) * 6, "4": (0, 0, 0, 0, 1, 0)}.items():
        assert classes_of(Plan.parse(text), LAYERS) == classes and str(plan_of(classes)) == text
    for text in ("0-5 0-5", "3-4*2", "0*3 1-5", "0a 1-5", "1 0 2-5"):
        assert classes_of(Plan.parse(text), LAYERS) is None


# -- saving --------------------------------------------------------------------------------------------------


@both_forms
def test_saved_routers_decide_as_before(form: str, base: Path, tmp_path: Path) -> None:
    model = from_pretrained(base, engine="eager")
    model.policy = FORMS[form](threshold=0.4).rounded()
    save_adapter(model, tmp_path / "adapter")
    for engine in ("eager", "auto"):
        loaded = from_pretrained(adapter=tmp_path / "adapter", engine=engine)
        assert type(loaded.policy) is type(model.policy) and loaded.policy.to_dict() == model.policy.to_dict()
        assert decided(loaded, IDS, attention_mask=MASK) == decided(model, IDS, attention_mask=MASK)
        save_adapter(loaded, tmp_path / engine)
        again = from_pretrained(adapter=tmp_path / engine, engine="eager").policy.routers
        assert all(torch.equal(again.tensors()[name], one) for name, one in model.policy.routers.tensors().items())
    assert from_pretrained(adapter=tmp_path / "adapter", engine="eager", plan="0-3").plan == Plan.parse("0-3")


@both_forms
def test_damaged_routers_are_refused_in_one_line(form: str, base: Path, tmp_path: Path) -> None:
    model = from_pretrained(base, engine="eager")
    model.policy = FORMS[form]()
    save_adapter(model, tmp_path)
    about = json.loads((tmp_path / "layerwise.json").read_text())

    def load() -> Any:
        return from_pretrained(adapter=tmp_path, engine="eager")

    for change in ({"form": "other"}, {"threshold": 2.0}, {"threshold": None}, {"menu": ["0-9", "0"], "form": "menu"}):
        (tmp_path / "layerwise.json").write_text(json.dumps(about | {"policy": about["policy"] | change}))
        one_line(load, "routers")
    (tmp_path / "layerwise.json").write_text(json.dumps(about))
    (tmp_path / FILE).write_bytes(b"nonsense")
    one_line(load, "routers")
    (tmp_path / FILE).unlink()
    one_line(load, "routers")


def test_policies_refuse_what_does_not_fit() -> None:
    routers = Routers.random(1, 4, 2, units=3)
    two = (FULL, FULL.skip(4))
    one_line(lambda: PerLayerPolicy(routers), "3 classes")
    one_line(lambda: PerLayerPolicy(Routers.random(2, 4, 3, units=3), -0.1), "between 0 and 1")
    one_line(lambda: MenuPolicy((FULL,), routers), "two or more plans")
    one_line(lambda: MenuPolicy((FULL, FULL), routers), "two or more plans")
    one_line(lambda: MenuPolicy((FULL, FULL.skip(0)), routers), "leave that plan out")
    one_line(lambda: MenuPolicy((*two, FULL.skip(3)), routers), "so many classes")
    one_line(lambda: MenuPolicy(two, routers, 1.5), "between 0 and 1")
    one_line(
        lambda: Routers(torch.zeros(1, 3, 4), torch.zeros(1, 3), torch.zeros(1, 2, 4), torch.zeros(1, 2)), "biases"
    )
    other = attach(tiny.model("llama"))
    other.policy = PerLayerPolicy(Routers.random(LAYERS, 16, 3, units=3))
    one_line(lambda: other(IDS), "the model it was trained on")
