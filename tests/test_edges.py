"""Edges of forward, generate, attach, cache and detokenizer: each test is of something that once went wrong."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny
import torch
from peft import PromptTuningConfig, get_peft_model
from test_generate import CLOSE, EndsAt, run
from test_laws import FULL, alone, close, exact, feed, row_of
from test_text import byte_tokenizer, pieces_of
from tiny import one_line, padded, tokens
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    StoppingCriteriaList,
)

from layerwise import Cache, Plan, UnsupportedModelError, attach
from layerwise.model.backbone import Backbone
from layerwise.model.runtime import Runtime
from layerwise.plan import Slot

CONTEXT = 256  # of the tiny models
WITHOUT_LAYER_0 = Plan.parse("1-5")


def endless(new: int) -> dict[str, Any]:
    return {"max_new_tokens": new, "eos_token_id": None}


def ones(rows: int, width: int) -> Tensor:
    return torch.ones(rows, width, dtype=torch.long)


# -- text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "hello there world 🙂 yes",
        "the 日本語 the quick brown 日本語 fox",
        "🙂" * 30,
        "é" * 40,
        "the fox went there 🙂",
    ],
)
def test_no_character_is_cut_where_the_detokenizer_starts_anew(text: str) -> None:
    tokenizer = byte_tokenizer()
    assert "".join(pieces_of(tokenizer, tokenizer(text)["input_ids"])) == text


# -- padding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_forward_takes_more_padding_than_the_context_is_long(side: str) -> None:
    base = tiny.model("llama")
    ids, mask = padded(CONTEXT + 44, [6, 4], side)
    found, expected = (each(ids, attention_mask=mask).logits[mask.bool()] for each in (attach(base), base))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_padding_does_not_count_towards_the_context() -> None:
    base = tiny.model("llama")
    ids, mask = padded(CONTEXT + 44, [6, 4], "left")
    found, expected = (each.generate(ids, attention_mask=mask, **endless(3)) for each in (attach(base), base))
    assert torch.equal(found, expected)


# -- continued generations -----------------------------------------------------------------------------------


def assert_continues(base: PreTrainedModel, cache: Cache, given: Tensor, whole: Tensor, mask: Tensor) -> None:
    """Two more tokens of `given` with `cache` are those that the base finds for `whole` without a cache."""
    expected = run(base, input_ids=whole, attention_mask=mask, **endless(2))
    found = run(attach(base), input_ids=given, attention_mask=mask, past_key_values=cache, **endless(2))
    assert torch.equal(found.sequences[:, -2:], expected.sequences[:, -2:])
    for ours, reference in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, reference, **CLOSE)


def test_continuing_after_a_row_ended_early() -> None:
    base, ids = tiny.model("llama"), tokens(2, 6)
    ends_early, goes_on = base.generate(ids, **endless(8))[:, 6:].tolist()
    end = ends_early[2]
    assert end not in goes_on
    first = run(attach(base), input_ids=ids, max_new_tokens=8, eos_token_id=end)
    whole = torch.cat([first.sequences, tokens(2, 2, seed=3)], 1)
    mask = ones(2, 16)
    mask[0, 6 + ends_early.index(end) + 1 : 14] = 0  # what follows the end token is padding, in the middle
    assert_continues(base, first.past_key_values, whole, whole, mask)


def test_continuing_a_batch_that_was_padded() -> None:
    base, (ids, mask) = tiny.model("llama"), padded(8, [6, 3], "left")  # no row is as wide as the batch
    first = run(attach(base), input_ids=ids, attention_mask=mask, **endless(3))
    mask = torch.cat([mask, ones(2, 3)], 1)
    assert_continues(base, first.past_key_values, first.sequences, first.sequences, mask)


def test_continuing_with_the_new_tokens_alone() -> None:
    base = tiny.model("llama")
    first = run(attach(base), input_ids=tokens(1, 6), **endless(3))
    whole = torch.cat([first.sequences, tokens(1, 2, seed=2)], 1)
    assert first.past_key_values.lengths == [8]  # the last token is not read yet
    assert_continues(base, first.past_key_values, whole[:, 8:], whole, ones(1, 11))


def test_caches_that_cannot_be_continued_are_refused() -> None:
    base = tiny.model("llama")
    model, ids = attach(base), tokens(2, 6)
    first = run(model, input_ids=ids, **endless(3))

    def refuses(cache: Any, *mentions: str, **prompt: Any) -> None:
        one_line(lambda: model.generate(**prompt, past_key_values=cache, **endless(2)), *mentions)

    embedded = base.get_input_embeddings()(first.sequences).detach()
    refuses(first.past_key_values, "a cache is continued with input_ids", inputs_embeds=embedded)
    refuses(first.past_key_values, "cache has 2 rows", "prompt 1", input_ids=first.sequences[:1])
    refuses(first.past_key_values, "cache has 2 rows", "prompt 3", input_ids=tokens(3, 9))
    refuses(DynamicCache(), "layerwise.Cache", "DynamicCache", input_ids=ids)
    assert first.past_key_values.lengths == [8, 8]


# -- attach --------------------------------------------------------------------------------------------------


def test_prompt_learning_is_refused() -> None:
    prompted = get_peft_model(tiny.model("llama"), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    one_line(lambda: attach(prompted), "prompt learning", "LoRA", error=UnsupportedModelError)


def test_attention_without_a_cache_per_visit_is_refused() -> None:
    model = tiny.model("llama", attention="flex_attention")
    one_line(lambda: attach(model), "LlamaForCausalLM", "flex_attention", "sdpa", error=UnsupportedModelError)


def test_a_model_without_a_part_is_told_which_in_plain_english() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1))
    one_line(
        lambda: attach(model), "MambaForCausalLM does not fit: it lacks a final 'norm'", error=UnsupportedModelError
    )


# -- what generate returns, calls and refuses ----------------------------------------------------------------


@pytest.mark.parametrize("detailed", [False, True])
def test_sequences_are_contiguous_when_all_rows_end_early(detailed: bool) -> None:
    base, ids = tiny.model("llama"), tokens(1, 6).repeat(2, 1)
    end = base.generate(ids, **endless(3))[0, 8].item()
    output = attach(base).generate(ids, max_new_tokens=30, eos_token_id=end, return_dict_in_generate=detailed)
    sequences = output.sequences if detailed else output
    assert sequences.is_contiguous() and sequences.shape[1] <= 9


@pytest.mark.parametrize(
    ("option", "mention"),
    [
        ({"output_hidden_states": True}, "output_hidden_states is not recorded"),
        ({"output_attentions": True}, "output_attentions is not recorded"),
        ({"prompt_lookup_num_tokens": 2}, "decodes greedily or by sampling"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, "position_ids must count each row's tokens in order"),
    ],
    ids=["hidden states", "attentions", "prompt lookup", "positions"],
)
def test_what_generate_cannot_do_is_refused(option: dict[str, Any], mention: str) -> None:
    model = attach(tiny.model("llama", attention="eager"))
    one_line(lambda: model.generate(tokens(1, 4), **endless(2), return_dict_in_generate=True, **option), mention)


def test_beams_are_refused_wherever_they_are_asked_for() -> None:
    base, ids = tiny.model("llama"), tokens(1, 4)
    model = attach(base)
    one_line(lambda: model.generate(ids, GenerationConfig(num_beams=2, max_new_tokens=2)), "num_beams=1")
    base.generation_config.num_beams = 2
    one_line(lambda: model.generate(ids, max_new_tokens=2), "num_beams=1")
    assert model.generate(ids, num_beams=1, **endless(2)).shape == (1, 6)


def test_stopping_criteria_get_the_scores_so_far() -> None:
    base, seen = tiny.model("llama"), []

    def criterion(input_ids: Tensor, scores: tuple[Tensor, ...]) -> Tensor:
        seen.append(scores)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    output = run(
        attach(base), input_ids=tokens(1, 4), **endless(2), stopping_criteria=StoppingCriteriaList([criterion])
    )
    assert [len(scores) for scores in seen] == [1, 2]
    assert all(torch.equal(ours, kept) for ours, kept in zip(seen[-1], output.scores, strict=True))


def test_without_a_padding_token_finished_rows_go_on_as_in_transformers() -> None:
    base, ids = tiny.model("llama"), tokens(2, 4)
    base.generation_config.pad_token_id = base.generation_config.eos_token_id = None
    options = {"max_new_tokens": 6, "stopping_criteria": StoppingCriteriaList([EndsAt(6, 9)])}
    assert torch.equal(attach(base).generate(ids, **options), base.generate(ids, **options))


# -- runtime and cache ---------------------------------------------------------------------------------------


def fresh() -> Runtime:
    """A runtime that no other test has used."""
    return Runtime(Backbone(tiny.model("llama")))


@torch.no_grad()
def test_padding_columns_may_lie_beyond_the_rotary_table() -> None:
    runtime, cache, rng = fresh(), Cache(2, 1), random.Random(0)
    long, short, plans = row_of(rng, 251), row_of(rng, 50), [FULL, FULL]
    for start in range(0, 250, 50):  # in small passes, so that the table keeps its first size: 256
        feed(runtime, [long[start : start + 50], []], plans, cache)
    found = feed(runtime, [long[250:], short], plans, cache)  # the first row's padding reaches to 300
    close(found[0], alone(runtime, long, FULL)[250:])
    close(found[1], alone(runtime, short, FULL))


def test_partial_visits_follow_the_model_from_training_to_evaluation() -> None:
    runtime, plan, row = fresh(), Plan.parse("0-1 2a 3-5"), row_of(random.Random(0), 4)
    model = runtime.backbone.model
    model.gradient_checkpointing_enable()
    model.train()
    feed(runtime, [row[:3]], [plan])  # checkpointed layers in training store no keys
    model.eval()
    cache = Cache(1, 1)
    with torch.no_grad():
        found = torch.cat([feed(runtime, [part], [plan], cache)[0] for part in (row[:3], row[3:])])
        close(found, alone(runtime, row, plan))


@torch.no_grad()
def test_an_interrupted_pass_leaves_no_keys_behind() -> None:
    runtime, interrupted, undisturbed = fresh(), Cache(1, 1), Cache(1, 1)
    prompt, lost, *rest = (row_of(random.Random(seed), count) for seed, count in enumerate([5, 3, 1, 1, 1]))

    def breaks(*_: Any) -> None:
        raise KeyboardInterrupt

    for cache in (interrupted, undisturbed):
        feed(runtime, [prompt], [FULL], cache)
    hook = runtime.backbone.layers[3].register_forward_pre_hook(breaks)
    with pytest.raises(KeyboardInterrupt):
        feed(runtime, [lost], [FULL], interrupted)
    hook.remove()
    assert interrupted.lengths == [5]
    for row, plan in zip(rest, (FULL, WITHOUT_LAYER_0, FULL), strict=True):
        found, expected = (feed(runtime, [row], [plan], cache)[0] for cache in (interrupted, undisturbed))
        close(found, expected)


@torch.no_grad()
def test_rolling_back_to_before_the_first_hole_forgets_the_hole() -> None:
    runtime, rolled, straight = fresh(), Cache(1, 1), Cache(1, 1)
    prompt, skipped, lost, last = (row_of(random.Random(seed), count) for seed, count in enumerate([5, 1, 1, 1]))
    for cache in (rolled, straight):
        feed(runtime, [prompt], [FULL], cache)
    feed(runtime, [skipped], [WITHOUT_LAYER_0], rolled)
    feed(runtime, [lost], [FULL], rolled)
    assert rolled.slots[Slot(0, 0)].seen is not None
    rolled.rollback(5)
    assert rolled.slots[Slot(0, 0)].seen is None
    exact(feed(runtime, [last], [FULL], rolled)[0], feed(runtime, [last], [FULL], straight)[0])


@torch.no_grad()
def test_a_slot_rolled_back_into_a_hole_ends_where_its_keys_do() -> None:
    runtime, cache, rng = fresh(), Cache(1, 1), random.Random(0)
    for count, plan in ((2, FULL), (2, WITHOUT_LAYER_0), (1, FULL)):
        feed(runtime, [row_of(rng, count)], [plan], cache)
    assert cache.slots[Slot(0, 0)].ends == [5]
    cache.rollback(4)
    assert cache.slots[Slot(0, 0)].ends == [2] and cache.slots[Slot(1, 0)].ends == [4]


@torch.no_grad()
def test_selecting_no_rows_leaves_an_empty_cache() -> None:
    runtime, cache = fresh(), Cache(1, 1)
    feed(runtime, [[3]], [FULL], cache)
    cache.select([])
    assert cache.rows == 0 and cache.lengths == []
    assert all(store.keys.shape[0] == 0 and store.ends == [] for store in cache.slots.values())
