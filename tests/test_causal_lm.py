"""The wrapper as a model: forward against transformers' own, training, and PEFT."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tiny import one_line, padded, surgery, tokens
from transformers import (
    DynamicCache,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from layerwise import Cache, Phase, Plan, Trace, attach

NAMES = list(tiny.ARCHITECTURES)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
PLANS = ["0-5", "0 2-5", "0-2 2-5", "0-3 1-5", "0-1 2a 3m 4-5 5a", "5 0"]


# -- forward equals transformers -----------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_forward_equals_transformers_on_padded_batches(name: str, side: str) -> None:
    base = tiny.model(name)
    ids, mask = padded(12, [12, 5, 9], side)
    found = attach(base)(input_ids=ids, attention_mask=mask)
    expected = base(input_ids=ids, attention_mask=mask)
    assert isinstance(found, CausalLMOutputWithPast)
    assert found.loss is None and found.past_key_values is None
    assert found.logits.shape == (3, 12, tiny.VOCABULARY)
    torch.testing.assert_close(found.logits[mask.bool()], expected.logits[mask.bool()], **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_forward_takes_no_mask_embeddings_and_positions(attention: str) -> None:
    base = tiny.model("gemma3", attention=attention)
    model, ids = attach(base), tokens(2, 15)
    expected = base(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    torch.testing.assert_close(model(inputs_embeds=base.get_input_embeddings()(ids)).logits, expected, **CLOSE)
    for positions in (torch.arange(15), torch.arange(15)[None], torch.arange(15).repeat(2, 1) + 7):
        torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, **CLOSE)


@torch.no_grad()
def test_left_padding_comes_with_the_positions_that_generate_makes() -> None:
    base = tiny.model("llama")
    ids, mask = padded(8, [8, 3], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = attach(base)(ids, attention_mask=mask, position_ids=positions).logits
    expected = base(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_plan_equals_a_model_rebuilt_by_hand(name: str, plan: str) -> None:
    base = tiny.model(name)
    ids, mask = padded(11, [6, 11], "right")
    found = attach(base, plan)(ids, attention_mask=mask).logits
    expected = surgery(base, plan)(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


@torch.no_grad()
def test_logits_to_keep() -> None:
    base = tiny.model("llama")
    model, ids = attach(base), tokens(2, 9)
    everything = base(ids).logits
    for keep in (0, 1, 4, torch.tensor([7, 0, 3])):
        expected = base(ids, logits_to_keep=keep).logits
        found = model(ids, logits_to_keep=keep).logits
        torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(found, everything[:, [7, 0, 3]], **CLOSE)


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(31)}])
def test_loss_and_gradients_equal_transformers(options: dict[str, Any]) -> None:
    base, twin = tiny.model("qwen3"), tiny.model("qwen3")
    ids, mask = padded(10, [10, 6], "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 2:5] = -100
    found = attach(base)(ids, attention_mask=mask, labels=labels, **options)
    expected = twin(ids, attention_mask=mask, labels=labels, **options)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    found.loss.backward()
    expected.loss.backward()
    for (name, parameter), reference in zip(base.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, **CLOSE, msg=name)


def test_the_plan_decides_the_loss_and_which_layers_learn() -> None:
    base, ids = tiny.model("llama"), tokens(2, 10)
    model = attach(base)
    whole = model(ids, labels=ids).loss.item()
    model.plan = "0-1 3m 5"
    loss = model(ids, labels=ids).loss
    assert abs(loss.item() - whole) > 1e-3
    assert loss.item() == pytest.approx(surgery(base, "0-1 3m 5")(ids, labels=ids).loss.item(), rel=1e-5)
    loss.backward()
    learned = {i for i, layer in enumerate(base.model.layers) if any(p.grad is not None for p in layer.parameters())}
    assert learned == {0, 1, 3, 5}
    assert base.model.layers[3].self_attn.q_proj.weight.grad is None
    assert base.model.layers[3].mlp.up_proj.weight.grad.abs().sum() > 0


def test_gradient_checkpointing_changes_no_gradient() -> None:
    grads = []
    for checkpointing in (False, True):
        base = tiny.model("llama").train()
        model = attach(base, "0-3 3 5")
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens(2, 7), labels=tokens(2, 7)).loss.backward()
        grads.append(base.model.layers[3].mlp.up_proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], **CLOSE)


@torch.no_grad()
def test_rows_take_their_own_plans_and_the_trace_tells() -> None:
    base, trace = tiny.model("mistral-window"), Trace()
    ids, mask = padded(10, [10, 4, 8], "right")
    plans = [Plan.full(tiny.LAYERS), "0-2 5", "1*3 4a"]
    found = attach(base)(ids, attention_mask=mask, plans=plans, trace=trace).logits
    for row, plan in enumerate(plans):
        one = slice(row, row + 1)
        expected = surgery(base, str(plan))(ids[one], attention_mask=mask[one]).logits[0]
        torch.testing.assert_close(found[row][mask[row].bool()], expected[mask[row].bool()], **CLOSE)
    assert [len(list(trace.plans(row, Phase.PREFILL))) for row in range(3)] == [10, 4, 8]
    assert trace.layers_per_token() == (10 * 6 + 4 * 4 + 8 * 3.5) / 22


# -- the cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3"])
@torch.no_grad()
def test_continuing_with_a_cache_equals_one_pass(name: str, plan: str) -> None:
    model, ids = attach(tiny.model(name), plan), tokens(2, 21)
    expected = model(ids).logits
    cache, pieces = None, []
    for start, stop in ((0, 9), (9, 10), (10, 13), (13, 21)):
        output = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert isinstance(cache, Cache) and cache.lengths == [21, 21]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, **CLOSE)


@torch.no_grad()
def test_ragged_rows_continue_with_a_cache_and_masks_of_either_length() -> None:
    model = attach(tiny.model("gemma3"), "0-3 3a 4-5")
    first, mask = padded(9, [9, 4], "left")
    then, more = padded(3, [3, 2], "right", seed=1)
    for long in (True, False):
        cache = model(first, attention_mask=mask, use_cache=True).past_key_values
        found = model(
            then,
            attention_mask=torch.cat([mask, more], 1) if long else more,
            position_ids=torch.arange(3)[None] + torch.tensor([[9], [4]]),
            past_key_values=cache,
        )
        assert cache.lengths == [12, 6] and found.past_key_values is cache
        for row, (old, new) in enumerate(((9, 3), (4, 2))):
            whole = torch.cat([first[row, 9 - old :], then[row, :new]])[None]
            torch.testing.assert_close(found.logits[row, :new], model(whole).logits[0, -new:], **CLOSE)


# -- contradictions ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_wrong_arguments_are_refused() -> None:
    model, ids = attach(tiny.model("llama")), tokens(2, 6)
    embedded = model.embed(ids)
    one_line(lambda: model(), "either input_ids or inputs_embeds")
    one_line(lambda: model(ids, inputs_embeds=embedded), "either input_ids or inputs_embeds")
    one_line(lambda: model(ids, past_key_values=DynamicCache()), "layerwise.Cache", "DynamicCache")
    with torch.no_grad():
        one_line(lambda: model(ids, past_key_values=Cache(len(ids) + 1, 8)), f"cache has {len(ids) + 1} rows")
    one_line(lambda: model(ids, output_attentions=True), "output_attentions")
    one_line(lambda: model(ids, output_hidden_states=True), "output_hidden_states")
    assert model(ids, output_attentions=False, output_hidden_states=None).logits is not None
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    backwards = torch.arange(6).flip(0)[None]
    for positions in (packed, backwards, torch.zeros(2, 6, dtype=torch.long), torch.arange(4)[None]):
        one_line(lambda positions=positions: model(ids, position_ids=positions), "position_ids")
    one_line(lambda: model(ids, attention_mask=torch.ones(2, 1, 6, 6)), "attention_mask", "(2, 1, 6, 6)")
    one_line(lambda: model(ids, attention_mask=torch.ones(1, 6)), "attention_mask", "(1, 6)")
    one_line(lambda: model(ids, attention_mask=torch.ones(2, 5)), "attention_mask", "(2, 5)")
    one_line(lambda: model(ids, attention_mask=torch.tensor([[1] * 6, [0] * 6])), "row 1")
    one_line(lambda: model(ids, plans=["0-5"]), "plans", "2 rows")
    for not_a_list in ("0-5", "05", Plan.of([0, 5])):  # two characters, two visits: not two plans
        one_line(lambda plans=not_a_list: model(ids, plans=plans), "plans", "2 rows")
    one_line(lambda: model(ids, plans=["0-5", "0-6"]), "layer 6")


def test_a_cache_holds_no_gradients() -> None:
    model, ids = attach(tiny.model("llama")), tokens(1, 4)
    one_line(lambda: model(ids, use_cache=True), "no_grad")
    one_line(lambda: model(ids, past_key_values=Cache(1, 8)), "no_grad")
    with torch.inference_mode():
        assert model(ids, use_cache=True).past_key_values.lengths == [4]


def test_plans_are_read_and_checked() -> None:
    model = attach(tiny.model("llama"))
    assert model.plan == Plan.full(6) and model.depth == 6
    model.plan = "0-1 4*2"
    assert model.plan == Plan.of([0, 1, 4, 4])
    for wrong, mention in (("0-6", "layer 6"), ("hello", "hello"), ("", "at least one layer")):
        one_line(lambda wrong=wrong: setattr(model, "plan", wrong), mention)
        one_line(lambda wrong=wrong: model.read_plan(wrong), mention)
        one_line(lambda wrong=wrong: attach(tiny.model("llama"), wrong), mention)
    one_line(lambda: setattr(model, "plan", Plan.full(7)), "layer 6")
    assert model.plan == Plan.of([0, 1, 4, 4])
    one_line(lambda: attach(tiny.model("llama"), engine="fast"), "fast")


@torch.no_grad()
def test_the_base_model_is_left_as_it_was() -> None:
    base, ids = tiny.model("gemma3"), tokens(2, 9)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config, generation = base.config.to_dict(), base.generation_config.to_dict()
    logits, answer = base(ids).logits, base.generate(ids, max_new_tokens=4)
    layers, methods = list(base.model.layers), set(vars(base))
    model = attach(base, "0-2 2a 5m")
    model(ids)
    model.generate(ids, max_new_tokens=4)
    assert list(base.state_dict()) == list(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())
    assert base.config.to_dict() == config and base.generation_config.to_dict() == generation
    assert list(base.model.layers) == layers and set(vars(base)) == methods and not base.training
    assert torch.equal(base(ids).logits, logits)
    assert torch.equal(base.generate(ids, max_new_tokens=4), answer)
    assert {id(parameter) for parameter in model.parameters()} == {id(parameter) for parameter in base.parameters()}


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_base_is_kept(training: bool) -> None:
    base = tiny.model("llama").train(training)
    assert attach(base).training is training and base.training is training


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_bfloat16(name: str) -> None:
    exact, base = tiny.model(name), tiny.model(name).to(torch.bfloat16)
    model, (ids, mask) = attach(base), padded(12, [12, 7], "right")
    found = model(ids, attention_mask=mask).logits
    assert found.dtype == torch.bfloat16 and model.dtype == torch.bfloat16
    valid = mask.bool()
    torch.testing.assert_close(found[valid], base(ids, attention_mask=mask).logits[valid], rtol=0.05, atol=0.05)
    gap = (found.float() - exact(ids, attention_mask=mask).logits)[valid].abs().max()
    assert gap < 0.1 * found.float().abs().max()
    step = model(ids[:1, :11], use_cache=True)
    last = model(ids[:1, 11:], past_key_values=step.past_key_values).logits[0, 0]
    torch.testing.assert_close(last, found[0, 11], rtol=0.05, atol=0.05)


# -- training ------------------------------------------------------------------------------------------------


def test_trainer_changes_only_the_layers_that_the_plan_visits(tmp_path: Path) -> None:
    base = tiny.model("llama")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 8).tolist()]
    trainer = Trainer(
        model=attach(base, "0-1 3m 5"),
        args=TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=rows,
        eval_dataset=rows,
    )
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "layerwise.json").is_file()
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {int(name.split(".")[2]) for name in changed if ".layers." in name} == {0, 1, 3, 5}
    assert not any(name.startswith("model.layers.3.self_attn") for name in changed)
    assert {"model.layers.3.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"} <= changed


def test_lora_models_attach_and_only_lora_learns() -> None:
    torch.manual_seed(0)
    base = tiny.model("llama")
    lora = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model, ids = attach(lora.eval()), tokens(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, lora(ids).logits, **CLOSE)
        assert torch.equal(model.generate(ids, max_new_tokens=5), lora.generate(input_ids=ids, max_new_tokens=5))
        with lora.disable_adapter():
            plain = base(ids).logits
        assert (model(ids).logits - plain).abs().max() > 0.01
        model.plan = "0-2 4"
        merged = copy.deepcopy(lora).merge_and_unload()
        expected = surgery(merged, "0-2 4")
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, **CLOSE)
        assert torch.equal(model.generate(ids, max_new_tokens=5), expected.generate(ids, max_new_tokens=5))
    model.train()
    model(ids, labels=ids).loss.backward()
    learned = {name for name, parameter in lora.named_parameters() if parameter.grad is not None}
    assert learned and all("lora_" in name for name in learned)
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in learned} == {0, 1, 2, 4}


@torch.no_grad()
def test_parts_replaced_after_attaching_are_the_ones_that_run() -> None:
    base, ids = tiny.model("llama"), tokens(1, 6)
    model = attach(base)
    lora = get_peft_model(base, LoraConfig(target_modules=["lm_head", "embed_tokens"], init_lora_weights=False)).eval()
    assert (lora(ids).logits - tiny.model("llama")(ids).logits).abs().max() > 0.01
    torch.testing.assert_close(model(ids).logits, lora(ids).logits, **CLOSE)
    base = tiny.model("llama")
    model = attach(base)
    base.resize_token_embeddings(tiny.VOCABULARY + 3)
    torch.testing.assert_close(model(ids + 3).logits, base(ids + 3).logits, **CLOSE)
    assert torch.equal(model.generate(ids, max_new_tokens=5), base.generate(ids, max_new_tokens=5))
    assert model.runtime.backbone.shape.vocabulary == tiny.VOCABULARY + 3


def test_random_plans_equal_their_models_rebuilt_by_hand() -> None:
    base, ids, rng = tiny.model("qwen2"), tokens(1, 8), random.Random(5)
    model = attach(base)
    for _ in range(12):
        plan = tiny.random_plan(rng)
        with torch.no_grad():
            found, expected = model(ids, plans=[plan]).logits, surgery(base, str(plan))(ids).logits
        torch.testing.assert_close(found, expected, **CLOSE, msg=str(plan))
