"""LayerSkip training: schedules, real dropout, exit losses, checkpoints, processes; and the quality of exits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tiny import one_line, padded
from torch import Tensor
from torch.nn.functional import cross_entropy

from layerwise import Plan, attach
from layerwise.evaluation.exits import exit_quality
from layerwise.training import layerskip
from layerwise.training.exit_loss import exit_losses, labelled
from layerwise.training.global_batches import GlobalBatches
from layerwise.training.layerskip import LayerSkip, LayerSkipRecipe, survivors
from layerwise.training.schedules import drop_rates, exit_weights, gradual, rotational

LAYERS = tiny.LAYERS
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
IDS, MASK = padded(11, [11, 7, 9, 4], "right")
LABELS = torch.where((MASK == 1) & (torch.arange(11) >= 2), IDS, -100)


# -- schedules -----------------------------------------------------------------------------------------------


def test_drop_rates_are_the_papers() -> None:
    root = math.sqrt(2)
    assert drop_rates(3, 0.4, 0, 5) == pytest.approx((0, 0.4 * (root - 1), 0.4))
    assert drop_rates(3, 0.4, 4, 5) == drop_rates(3, 0.4, 0, 5)
    assert drop_rates(3, 0.4, 0, 5, "growing") == (0, 0, 0)
    assert drop_rates(3, 0.4, 2, 5, "growing") == pytest.approx((0, 0.4 * (root - 1) ** 2, 0.4 * (root - 1)))
    assert drop_rates(3, 0.4, 4, 5, "growing") == pytest.approx(drop_rates(3, 0.4, 0, 5))
    assert drop_rates(3, 0.4, 0, 5, "decaying") == pytest.approx(drop_rates(3, 0.4, 0, 5))
    assert drop_rates(3, 0.4, 4, 5, "decaying") == (0, 0, 0)


def test_schedules_of_one_step_or_one_layer() -> None:
    assert drop_rates(1, 0.4, 0, 1) == (0,)
    assert drop_rates(2, 0.4, 0, 1) == pytest.approx((0, 0.4))
    assert drop_rates(2, 0.4, 0, 1, "growing") == (0, 0)
    assert drop_rates(2, 0.4, 0, 1, "decaying") == pytest.approx((0, 0.4))
    assert exit_weights(1, 0.5, (True,)) == (1,)
    assert rotational(1, 3, 1) == (True,) and gradual(1, 0, 1) == (True,)


def test_exit_weights_are_the_papers() -> None:
    # e = 0.5 * (0, 1, 3), and 3 + 0.5 * 3 at the last layer
    assert exit_weights(4, 0.5, (True,) * 4) == pytest.approx((0, 0.5 / 6.5, 1.5 / 6.5, 4.5 / 6.5))
    # the sums run over disabled layers too: 1.5 stays 1.5
    assert exit_weights(4, 0.5, (True, False, True, True)) == pytest.approx((0, 0, 1.5 / 6, 4.5 / 6))
    assert exit_weights(4, 0.0, (True,) * 4) == (0, 0, 0, 1)
    for layers in (1, 2, 7, 30):
        for step in range(9):
            for enabled in (rotational(layers, 4, step), gradual(layers, step, 9)):
                weights = exit_weights(layers, 0.3, enabled)
                assert sum(weights) == pytest.approx(1) and len(weights) == layers
                assert all(on or weight == 0 for on, weight in zip(enabled, weights, strict=True))


def test_curricula() -> None:
    def on(enabled: tuple[bool, ...]) -> list[int]:
        return [layer for layer, one in enumerate(enabled) if one]

    assert [on(rotational(8, 3, t)) for t in range(4)] == [[0, 3, 6, 7], [1, 4, 7], [2, 5, 7], [0, 3, 6, 7]]
    # T / 2L = 2 steps an exit
    assert [len(on(gradual(4, t, 16))) for t in range(16)] == [1, 1, 2, 2, 3, 3, 4, 4, *[4] * 8]
    assert on(gradual(4, 2, 16)) == [2, 3]


@pytest.mark.parametrize(
    ("call", "mention"),
    [
        (lambda: drop_rates(3, 1.0, 0, 5), "p_max"),
        (lambda: drop_rates(3, 0.1, 5, 5), "step 5"),
        (lambda: drop_rates(3, 0.1, 0, 5, "linear"), "'linear'"),
        (lambda: exit_weights(3, -1, (True,) * 3), "e_scale"),
        (lambda: exit_weights(3, 1, (True, True, False)), "last"),
        (lambda: rotational(3, 0, 0), "rotation"),
    ],
)
def test_schedules_refuse_nonsense(call: Callable[[], Any], mention: str) -> None:
    one_line(call, mention)


# -- the loss ------------------------------------------------------------------------------------------------


def module(model: Any, steps: int = 10, **recipe: Any) -> LayerSkip:
    return LayerSkip(attach(model), LayerSkipRecipe(**recipe), steps, seed=3).train()


def test_without_dropout_and_exits_the_loss_is_transformers_own() -> None:
    for name in ("llama", "gemma3"):
        made = module(tiny.model(name), p_max=0.0, e_scale=0.0)
        found = made(IDS, LABELS, MASK)
        expected = tiny.model(name)(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
        count = (LABELS[:, 1:] != -100).sum()
        assert found["last_layer_loss"][1] == count
        torch.testing.assert_close(found["loss"] / count, expected, **CLOSE)


def slow_loss(made: LayerSkip, step: int, rates: Any, weights: Any) -> Tensor:
    """J by one whole forward pass a row and exit, over a plan of the layers that the row keeps."""
    kept = survivors(rates, range(len(IDS)), step, made.seed)
    total = torch.tensor(0.0)
    for row in range(len(IDS)):
        length = int(MASK[row].sum())
        for layer, weight in enumerate(weights):
            visited = [other for other in range(layer + 1) if row in kept[other]]
            logits = made.model(input_ids=IDS[row : row + 1, :length], plans=[Plan.of(visited)]).logits[0]
            loss = cross_entropy(logits[:-1], LABELS[row, 1:length], reduction="sum", ignore_index=-100)
            total = total + weight * loss
    return total


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("curriculum", ["rotational", "gradual"])
def test_loss_and_gradients_equal_a_slow_computation(
    name: str, curriculum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerskip, "LOGITS_AT_ONCE", 5 * tiny.VOCABULARY)  # chunks of five positions
    made = module(tiny.model(name), p_max=0.8, e_scale=0.7, curriculum=curriculum, every=2)
    parameters = [p for p in made.parameters() if p.requires_grad]
    for step in (1, 4):
        rates = drop_rates(LAYERS, 0.8, step, 10)
        enabled = rotational(LAYERS, 2, step) if curriculum == "rotational" else gradual(LAYERS, step, 10)
        expected = slow_loss(made, step, rates, exit_weights(LAYERS, 0.7, enabled))
        found = made(IDS, LABELS, MASK, step=step)["loss"]
        torch.testing.assert_close(found, expected, **CLOSE)
        wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
        for got, want in zip(torch.autograd.grad(found, parameters, allow_unused=True), wanted, strict=True):
            if want is None or got is None:
                assert want is got or (want if got is None else got).abs().max() == 0
            else:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_each_exit_is_transformers_hidden_state_through_norm_and_head() -> None:
    base = tiny.model("llama")
    made = module(base, p_max=0.0, e_scale=1.0, every=1)
    states = base(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
    weights = exit_weights(LAYERS, 1.0, (True,) * LAYERS)
    total = torch.tensor(0.0)
    for layer, weight in enumerate(weights):
        # transformers applies the final norm to the last of its hidden states
        state = states[layer + 1] if layer == LAYERS - 1 else base.model.norm(states[layer + 1])
        logits = base.lm_head(state)
        total += weight * cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(made(IDS, LABELS, MASK)["loss"], total, **CLOSE)


def test_left_padding_changes_nothing() -> None:
    made = module(tiny.model("llama"), p_max=0.6, every=2)
    ids, labels, mask = (
        torch.stack([row.roll(11 - int(m.sum())) for row, m in zip(t, MASK, strict=True)]) for t in (IDS, LABELS, MASK)
    )
    assert not torch.equal(ids, IDS)
    torch.testing.assert_close(made(ids, labels, mask)["loss"], made(IDS, LABELS, MASK)["loss"], **CLOSE)


def test_labels_are_looked_for_among_the_tokens_of_a_row_alone() -> None:
    at, targets = labelled(torch.tensor([[5, 6, 7, 8], [-100, 2, 3, 4]]), [2, 4])
    assert at.tolist() == [0, 4, 5, 6] and targets.tolist() == [6, 2, 3, 4]


def test_evaluation_is_the_last_layer_without_dropout() -> None:
    made = module(tiny.model("llama"), p_max=0.9, every=1).eval()
    found = made(IDS, LABELS, MASK)
    plain = module(tiny.model("llama"), p_max=0.0, e_scale=0.0)(IDS, LABELS, MASK)
    assert torch.equal(found["loss"], plain["loss"]) and found["kept_layers"].tolist() == [4 * LAYERS] * 2


def test_inverse_survival_scales_what_layers_add() -> None:
    base = tiny.model("llama")
    made = module(base, p_max=0.5, e_scale=0.0, inverse_survival=True)
    rates = drop_rates(LAYERS, 0.5, 2, 10)
    kept = survivors(rates, range(4), 2, made.seed)

    def scaled(layer: int) -> Callable[..., Tensor]:
        def hook(_: Any, given: tuple[Tensor], out: Tensor) -> Tensor:
            alive = torch.tensor([float(row in kept[layer]) for row in range(4)])[:, None, None]
            return given[0] + (out - given[0]) * alive / (1 - rates[layer])

        return hook

    found = made(IDS, LABELS, MASK, step=2)["loss"]
    for number, layer in enumerate(base.model.layers):
        layer.register_forward_hook(scaled(number))
    expected = base(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
    torch.testing.assert_close(found / (LABELS[:, 1:] != -100).sum(), expected, **CLOSE)


# -- dropout -------------------------------------------------------------------------------------------------


def test_dropped_rows_are_not_run() -> None:
    made = module(tiny.model("llama"), p_max=0.9, every=2)
    seen: dict[int, int] = {}
    for number, layer in enumerate(made.model.runtime.backbone.layers):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, number=number: seen.update({number: len(args[0])}), with_kwargs=True
        )
    dropped = 0
    for step in range(8):
        seen.clear()
        kept = survivors(drop_rates(LAYERS, 0.9, step, 10), range(4), step, made.seed)
        found = made(IDS, LABELS, MASK, step=step)
        assert [seen.get(layer, 0) for layer in range(LAYERS)] == [len(rows) for rows in kept]
        assert found["kept_layers"].tolist() == [sum(map(len, kept)), 4 * LAYERS]
        dropped += sum(not rows for rows in kept)
    assert dropped  # a layer that every row skips is not called at all


def test_draws_depend_on_seed_step_and_place_alone_and_have_the_rate() -> None:
    rates = (0.0, 0.3, 0.7)
    whole = survivors(rates, range(2000), 4, 1)
    for layer, rate in enumerate(rates):
        assert len(whole[layer]) / 2000 == pytest.approx(1 - rate, abs=0.04)
    for part in (range(0, 2000, 2), range(1, 2000, 2)):
        shared = survivors(rates, part, 4, 1)
        assert [[part[row] for row in rows] for rows in shared] == [
            [row for row in rows if row in part] for rows in whole
        ]
    assert survivors(rates, range(50), 5, 1) != survivors(rates, range(50), 4, 1) != survivors(rates, range(50), 4, 2)


def test_processes_share_each_batch() -> None:
    lengths = [3, 9, 4, 4, 8, 5, 30]
    whole = list(GlobalBatches(lengths, 20, 5, 2, seed=1))
    parts = [list(GlobalBatches(lengths, 20, 5, 2, 1, process, 3)) for process in range(3)]
    assert len(whole) == 10
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(item for share in shares for item in share if item[2]) == sorted(batch)
        assert all(shares)
    for first, second in zip(whole[::2], whole[1::2], strict=True):
        assert [place for _, place, _ in first + second] == list(range(len(first + second)))


def test_a_process_without_rows_gets_zero_gradients() -> None:
    made = module(tiny.model("llama"), every=2)
    loss = made(IDS[:1], torch.full_like(IDS[:1], -100), MASK[:1])["loss"]
    loss.backward()
    gradients = [p.grad for p in made.parameters() if p.grad is not None]
    assert loss == 0 and gradients and all((gradient == 0).all() for gradient in gradients)


def test_nothing_of_the_head_is_computed_for_frozen_models() -> None:
    hidden = torch.randn(2, 5, 4)
    total, sums = exit_losses(torch.nn.Linear(4, 7).requires_grad_(False), [], hidden, torch.arange(5), [0.5, 2.0], 3)
    assert not total.requires_grad and total == pytest.approx(float(0.5 * sums[0] + 2 * sums[1]))


def test_gradients_reach_lora_under_autocast() -> None:
    base = tiny.model("llama").to(torch.bfloat16)
    lora = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    made = module(lora, p_max=0.0, every=2)
    with torch.autocast("cpu", torch.bfloat16):
        made(IDS, LABELS, MASK)["loss"].backward()
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    assert trained and all(p.dtype == torch.float32 for p in trained.values())
    assert all(p.grad.abs().max() > 0 for name, p in trained.items() if "lora_B" in name)


# -- exits ---------------------------------------------------------------------------------------------------


def test_exit_quality_is_that_of_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    import layerwise.evaluation.exits as exits

    monkeypatch.setattr(exits, "LOGITS_AT_ONCE", 4 * tiny.VOCABULARY)
    model = attach(tiny.model("llama"), "0 2")
    batches = [{"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}, {"input_ids": IDS[:1], "labels": IDS[:1]}]
    found = exit_quality(model, batches)
    assert [one.exit for one in found] == list(range(1, LAYERS + 1))
    assert exit_quality(model, batches, [4, 2]) == [found[1], found[3]]
    assert found[-1].agreement == 1 and str(model.plan) == "0 2"
    with torch.no_grad():
        for one in found:
            total, count, same = 0.0, 0, 0
            for batch in batches:
                inputs = {name: batch[name] for name in batch if name != "labels"}
                targets = batch["labels"][:, 1:]
                here = model(**inputs, plans=[Plan.full(one.exit)] * len(targets)).logits[:, :-1]
                last = model(**inputs, plans=[Plan.full(LAYERS)] * len(targets)).logits[:, :-1]
                total += cross_entropy(here.flatten(0, 1), targets.flatten(), reduction="sum").item()
                count += int((targets != -100).sum())
                same += int(((here.argmax(-1) == last.argmax(-1)) & (targets != -100)).sum())
            assert one.tokens == count and one.agreement == same / count
            assert one.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    one_line(lambda: exit_quality(model, batches, [0]), "1 to 6")
    one_line(lambda: exit_quality(model, []), "labels")
