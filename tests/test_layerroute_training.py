"""The losses of LayerRoute against slow ones, and what routers are fitted to."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_layerroute import CLOSE, FULL, IDS, LABELS, LAYERS, LENGTHS, MASK, Calls, alone, decided
from torch import Tensor
from torch.nn.functional import cross_entropy

from layerwise import Plan, attach
from layerwise.data import Tokens
from layerwise.training import layerroute
from layerwise.training.gate_fits import choose_basis, parting
from layerwise.training.layerroute import LayerRoute, LayerRouteRecipe


def module(steps: int = 1, **recipe: Any) -> LayerRoute:
    """LayerRoute of a tiny model whose LoRA and routers are random."""
    torch.manual_seed(3)
    lora = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
    model = attach(get_peft_model(tiny.model("llama"), lora))
    made = LayerRoute(model, LayerRouteRecipe(**recipe), steps).train()
    if made.weight is not None:
        if made.model.policy.reads == "last":
            choose_basis(made.model, [answered(IDS[row, :length].tolist()) for row, length in enumerate(LENGTHS)])
        with torch.no_grad():
            made.weight.normal_(generator=torch.Generator().manual_seed(2))
            made.bias.zero_()
    return made


def answered(prompt: list[int]) -> Tokens:
    return Tokens([*prompt, 7, 8, 9], [-100] * len(prompt) + [7, 8, 9])


def slow(made: LayerRoute) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row: summed cross entropy, labelled positions, mean soft and mean straight-through gate."""
    backbone, results = made.model.runtime.backbone, []
    for row, length in enumerate(LENGTHS):
        hidden, softs, hards = made.model.embed(alone(row)), [], []
        for layer in range(LAYERS):
            seen = hidden[0, :3].mean(0)
            if made.model.policy.reads == "last":
                seen = hidden[0, 2] / (hidden[0, 2].square().mean() + 1e-6).sqrt()
            if made.model.policy.basis is not None:
                seen = made.model.policy.basis[layer] @ (seen - made.model.policy.center[layer])
            soft = torch.sigmoid(made.weight[layer] @ seen + made.bias[layer])
            gate = (soft > 0.5).float() - soft.detach() + soft
            after = made.model.runtime.forward(hidden, [Plan.of([layer])])
            hidden = gate * after + (1 - gate) * hidden
            softs.append(soft)
            hards.append(gate)
        loss = cross_entropy(backbone.logits(hidden)[0, :-1], LABELS[row, 1:length], reduction="sum")
        count = (LABELS[row, 1:length] != -100).sum()
        results.append((loss, count, torch.stack(softs).mean(), torch.stack(hards).mean()))
    return tuple(torch.stack(column) for column in zip(*results, strict=True))


def gradients(made: LayerRoute, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in made.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def assert_same_gradients(made: LayerRoute, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, **CLOSE)
    ours, theirs = gradients(made, found), gradients(made, expected)
    assert ours.keys() == theirs.keys() and {"weight", "bias"} < ours.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert ours["weight"].abs().sum(1).min() > 0  # routers of layers that are skipped learn too


@pytest.mark.parametrize("reads", ["mean", "last"])
def test_the_papers_loss_and_its_straight_through_gradient_equal_a_slow_computation(reads: str) -> None:
    made = module(objective="paper", penalty=1.0, reads=reads)
    losses, counts, soft, _ = slow(made)
    found = made(IDS, LABELS, MASK)
    assert_same_gradients(made, found["loss"] / counts.sum(), losses.sum() / counts.sum() + soft.mean())
    torch.testing.assert_close(found["routed_loss"][0] / found["routed_loss"][1], losses.sum() / counts.sum(), **CLOSE)


def test_budget_and_quality_losses_equal_a_slow_computation() -> None:
    made = module(objective="budget")
    made.price = 0.7
    losses, counts, _, hard = slow(made)
    found = made(IDS, LABELS, MASK)
    assert_same_gradients(made, found["loss"] / counts.sum(), losses.sum() / counts.sum() + 0.7 * hard.mean())
    assert made.seen / made.rows_seen == pytest.approx(hard.mean().item())

    made = module(objective="quality", tolerance=0.5, penalty=0.3)
    losses, counts, _, hard = slow(made)
    full = made.model(IDS, plans=["0-5"] * 4).logits[:, :-1].transpose(1, 2)
    full = cross_entropy(full, LABELS[:, 1:], reduction="none").sum(1)
    gap = ((losses - full) / counts).detach()
    expected = losses.sum() / counts.sum() + 0.3 * ((1 - gap / 0.5).clamp(-1, 1) * hard).mean()
    found = made(IDS, LABELS, MASK)
    assert_same_gradients(made, found["loss"] / counts.sum(), expected)
    torch.testing.assert_close(found["quality_gap"][0] / 4, gap.mean(), rtol=1e-4, atol=1e-4)
    made.adapt(0.25)
    assert made.price == pytest.approx(0.3 * (1 + 0.05 * 0.5))


def test_routers_see_the_directions_in_which_prompts_differ() -> None:
    made, prompts = module(start_bias=0.5), [IDS[0].tolist(), IDS[1, :3].tolist(), IDS[2, :5].tolist()]
    with torch.no_grad():
        made.weight.zero_()
        made.bias.fill_(0.5)
        made.bias[2] = -0.5
    choose_basis(made.model, [answered(ids) for ids in prompts])
    policy = made.model.policy
    assert policy.weight is made.weight and policy.reads == "last" and made.training
    layer, states = 4, []
    for ids in prompts:
        hidden = made.model.runtime.forward(made.model.embed(torch.tensor([ids])), [Plan.of([0, 1, 3])])[0, -1]
        states.append(hidden / hidden.square().mean().sqrt())
    centred = torch.stack(states) - policy.center[layer]
    torch.testing.assert_close(centred.mean(0), torch.zeros(32), rtol=0, atol=1e-5)
    seen = (centred @ policy.basis[layer].T)[:, :2]
    assert policy.basis[:, 2:].abs().max() == 0  # three prompts have two components
    torch.testing.assert_close(seen.T @ seen / 3, torch.eye(2), rtol=0, atol=1e-3)
    restored = seen @ torch.linalg.pinv(policy.basis[layer, :2]).T
    torch.testing.assert_close(restored, centred, rtol=0, atol=1e-4)


def test_routers_are_fitted_to_who_bears_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module(objective="quality", fits=1, keep="0-1 5", tolerance=0.01)
    torch.manual_seed(0)
    examples = [answered([*torch.randint(20, 90, (length,)).tolist(), 3 + length % 2]) for length in range(4, 20)]
    bears = torch.tensor([1.0 if one.input_ids[one.prompt_length - 1] == 3 else -0.5 for one in examples])
    choose_basis(made.model, examples, bears)
    assert made.training
    for one, bearing in zip(examples, bears.tolist(), strict=True):
        plan = decided(made.model, torch.tensor([one.input_ids[: one.prompt_length]]))[0]
        assert plan == (FULL.skip(2, 3, 4) if bearing > 0 else FULL)

    gaps = []
    for one in examples:
        ids, labels = torch.tensor([one.input_ids]), torch.tensor([one.labels])
        with torch.no_grad():
            short, full = (made.model(ids, labels=labels, plans=[p]).loss.item() for p in (FULL.skip(2, 3, 4), FULL))
        gaps.append(short - full)
    mean = sum(gaps) / len(gaps)
    seen: list[Tensor] = []
    monkeypatch.setattr(layerroute, "choose_basis", lambda model, examples, bears: seen.append(bears))
    found, share = made.fit_gates(examples)
    assert found == pytest.approx(mean, abs=1e-5)
    bearable = max(0.01, min(parting(torch.tensor(gaps)), mean))
    expected = torch.tensor([max(-1.0, min(1.0, 1 - gap / bearable)) for gap in gaps])
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-3)
    assert 0 < share < 1 and share == pytest.approx(sum(gap < bearable for gap in gaps) / len(gaps))


@pytest.mark.parametrize(
    ("hold", "gaps", "bearable"),
    [
        (1.0, [-0.1, 0.05, 0.2, 0.3, 0.9], 0.1),
        (0.0, [-0.1, 0.05, 0.2, 0.3, 0.9], 0.27),  # the mean: the LoRA goes on
        (1.0, [0.2] * 11 + [0.05], 0.125),  # hardly anything is within it: where they part
    ],
)
def test_the_tolerance_counts_as_it_is_once_nothing_learns(
    hold: float, gaps: list[float], bearable: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module(10, objective="quality", fits=1, keep="0-1 5", tolerance=0.1, hold=hold, hold_full=hold)
    seen: list[Tensor] = []
    monkeypatch.setattr(layerroute, "choose_basis", lambda model, examples, bears: seen.append(bears))
    monkeypatch.setattr(layerroute, "lost", lambda *_: torch.tensor(gaps))
    made.fit_gates([], prudence=3.0)
    expected = (1 - torch.tensor(gaps) / bearable).clamp(-3, 1)
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-3)


def test_gates_decide_as_before_once_they_are_rounded_though_prompts_end_alike() -> None:
    prompts = IDS.clone()
    prompts[:, -1] = 7
    made = module(objective="quality")
    weight = made.weight.clone()
    with torch.no_grad():
        made.weight.zero_()
        made.bias.fill_(1)
        choose_basis(made.model, [answered(ids) for ids in prompts.tolist()])
        made.weight.copy_(weight)
    policy, hidden = made.model.policy, made.model.embed(prompts)
    assert not policy.basis[0].any()  # nothing tells the prompts apart yet
    for layer in range(LAYERS):
        before, after = (
            one.scores(layer, hidden, [prompts.shape[1]] * len(prompts)) for one in (policy, policy.rounded())
        )
        torch.testing.assert_close(after, before, rtol=0, atol=0.05)
        assert layer == 0 or policy.basis[layer, : len(prompts) - 1].any(1).all()
        hidden = made.model.runtime.forward(hidden, [Plan.of([layer])] * len(prompts))


def test_only_layers_that_cost_least_may_be_skipped() -> None:
    made = module(candidates=2, start_bias=0.5, keep="5")
    examples = [answered(IDS[row].tolist()) for row in range(3)]
    made.choose_candidates(examples)
    rises = []
    for layer in range(LAYERS):
        rise = 0.0
        for one in examples:
            ids, labels = torch.tensor([one.input_ids]), torch.tensor([one.labels])
            plans = [Plan.full(LAYERS), Plan.full(LAYERS).skip(layer)]
            full, without = (made.model(ids, labels=labels, plans=[plan]).loss.item() for plan in plans)
            rise += without - full
        rises.append(rise)
    first, second = sorted(range(LAYERS - 1), key=rises.__getitem__)[:2]  # layer 5 is kept
    assert set(made.model.policy.keep) == set(range(LAYERS)) - {first, second}
    assert made.bias[first].item() == pytest.approx(0.5) and made.bias[second].item() == pytest.approx(1.0)


def test_held_and_settled_gates_get_no_gradient_cost_nothing_and_really_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module(10, objective="quality", hold=0.5, hold_full=0.5, settle=0.8, penalty=0.3)
    free, settled = made(IDS, LABELS, MASK, step=5), made(IDS, LABELS, MASK, step=8)
    assert "weight" in gradients(made, free["loss"]) and made.rows_seen == 4
    calls = Calls(made.model)
    made(IDS, LABELS, MASK, step=8)
    assert sum(calls.rows.values()) == settled["layers_run"][0] < 4 * LAYERS
    assert "weight" not in gradients(made, settled["loss"])
    torch.testing.assert_close(settled["loss"], settled["routed_loss"][0], **CLOSE)
    torch.testing.assert_close(settled["routed_loss"], free["routed_loss"], **CLOSE)
    with torch.no_grad():
        made.bias[:] = torch.tensor([1.0, -1, 1, -1, 1, 1])
    monkeypatch.setattr(torch, "rand", lambda rows: torch.tensor([0.1, 0.9, 0.9, 0.1]))
    held = made(IDS, LABELS, MASK, step=4)
    plans = [FULL, FULL.skip(1, 3), FULL.skip(1, 3), FULL]
    with torch.no_grad():
        expected = made.model(IDS, attention_mask=MASK, labels=LABELS, plans=plans).loss
    torch.testing.assert_close(held["loss"] / held["routed_loss"][1], expected, **CLOSE)
    assert held["layers_run"][0] == 4 * LAYERS - 4 and "weight" not in gradients(made, held["loss"])
    assert made.rows_seen == 4  # the dual variable does not move while routers do not learn


def test_gaps_part_where_least_variance_is_left() -> None:
    chance = torch.Generator().manual_seed(0)
    low, high = 0.1 + 0.03 * torch.randn(70, generator=chance), 0.6 + 0.05 * torch.randn(50, generator=chance)
    mixed = torch.cat([high, low])[torch.randperm(120, generator=chance)]
    assert low.max() < parting(mixed) < high.min()
    assert low.max() < parting(torch.cat([mixed, torch.tensor([40.0, 60.0])])) < high.min()  # outliers

    def within(values: Tensor, cut: float) -> float:
        parts = (values[values < cut], values[values >= cut])
        return sum(((part - part.mean()) ** 2).sum().item() for part in parts if len(part))

    values = torch.rand(30, generator=chance).clamp(max=0.9)
    clipped = values.clamp(max=values.quantile(0.95))
    assert within(clipped, parting(values)) == pytest.approx(min(within(clipped, one) for one in clipped[1:].tolist()))


def test_what_is_bearable_follows_the_mean_gap_down_to_the_tolerance() -> None:
    made = module(objective="quality", tolerance=0.001, penalty=0.3)
    gap = made(IDS, LABELS, MASK)["quality_gap"][0].item() / 4
    penalties = []
    for mean in (0.0, 10.0):  # all that was lost so far: nothing, much
        made.gap = mean
        found = made(IDS, LABELS, MASK)
        penalties.append((found["loss"] - found["routed_loss"][0]).item())
    assert penalties[0] < penalties[1]  # against a tolerance of 0.001 these gates should open, against 8 they may close
    made.gap = 0.0
    made.adapt(0.5)
    made.adapt(1.0)
    assert made.gap == pytest.approx(0.5 + 0.2 * 0.5) and abs(gap) > 0.001


def test_evaluation_skips_and_gives_the_loss_of_training() -> None:
    made = module(objective="paper")
    found = made(IDS, LABELS, MASK)
    calls = Calls(made.model)
    with torch.no_grad():
        judged = made.eval()(IDS, LABELS, MASK)
    assert sum(calls.rows.values()) == judged["layers_run"][0] < 4 * LAYERS
    torch.testing.assert_close(judged["loss"], found["routed_loss"][0], **CLOSE)
    torch.testing.assert_close(judged["layers_run"], found["layers_run"].to(judged["layers_run"].dtype))
    loss = made.model(IDS, attention_mask=MASK, labels=LABELS).loss
    torch.testing.assert_close(loss, judged["loss"] / judged["routed_loss"][1], **CLOSE)


def test_a_row_without_labels_counts_for_nothing() -> None:
    without = LABELS.clone()
    without[2] = -100
    rows = [0, 1, 3]
    for objective in ("paper", "budget", "quality", "none"):
        made = module(objective=objective)
        found, expected = made(IDS, without, MASK), made(IDS[rows], LABELS[rows], MASK[rows])
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **CLOSE)


def test_gates_begin_as_the_paper_says() -> None:
    model = attach(tiny.model("llama"))
    made = LayerRoute(model, LayerRouteRecipe(objective="paper"))
    assert made.bias.tolist() == [1, 1, -1, -1, 1, 1] and not made.weight.any()
    assert decided(model, alone(0)) == [Plan.parse("0-1 4-5")]
    other = LayerRoute(model, LayerRouteRecipe(start_closed="4", start_bias=0.5, keep="0 5"))
    assert other.bias.tolist() == [0.5, 0.5, 0.5, 0.5, -0.5, 0.5] and model.policy.keep == (0, 5)


def test_without_routing_it_is_an_ordinary_fine_tuning() -> None:
    made = module(objective="none")
    found = made(IDS, LABELS, MASK)
    expected = made.model(IDS, attention_mask=MASK, labels=LABELS).loss
    torch.testing.assert_close(found["loss"] / found["routed_loss"][1], expected, **CLOSE)
    assert made.weight is None and made.model.plan == FULL
