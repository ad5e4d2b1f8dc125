"""Speculation gives what plain decoding gives: the same tokens for any draft, model and plan, and the same cache."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import tiny
import torch
from test_generate import ragged, stops
from test_laws import close, same_content
from tiny import one_line, tokens
from torch import Tensor

from layerwise import Cache, LayerwiseForCausalLM, attach
from layerwise.decoding.ngram_model import NGramModel
from layerwise.model.exit_head import ExitHead

WIDTH, NEW = 12, 20
LENGTHS = (5, WIDTH, 1, 7, 3, 9, 2, 6)
FREE: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None}
PERFECT = "plan:0-5,8"  # the target itself drafts, so all that is drafted stands
RANDOM = f"plan:{tiny.random_plan(random.Random(3))}"
PLAIN = ["ngram", "exit:2", "exit:3,4", "plan:0-1 4-5", "plan:0 2 2 5,3", "plan:3-5", RANDOM, "ngram+exit:2", PERFECT]
BY_HEAD = ["head", "head,3", "ngram+head", "exit:4", "tree", "tree,9", "auto"]
FEW = ["ngram", "exit:3,4", "plan:0 2 2 5,3", "head,3", "tree,6", PERFECT]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def attached(name: str = "llama", exit: int | None = 0, plan: str | None = None) -> LayerwiseForCausalLM:
    """With an untrained exit head after `exit` layers, which cannot draft all tokens, and n-grams for trees."""
    model = attach(tiny.model(name), plan, engine="eager")
    model.exits = (2, 4)
    if exit is not None:
        model.ngrams = crossed([model.generate(**batch, **FREE) for batch in (one(), ragged(*LENGTHS))])
        torch.manual_seed(0)
        model.exit_head = ExitHead(model.runtime.backbone, exit, range(0, tiny.VOCABULARY - 7)).eval()
    return model


def crossed(texts: Sequence[Tensor], width: int = WIDTH) -> NGramModel:
    """Of answers behind `width` columns. A token of them is the second guess as often as the first, for what two tokens
    say counts more than what one says, and at every other place it is something else."""
    told = []
    for row in torch.cat(texts).tolist():
        for at in range(width, len(row)):
            told += [(row[at - 1 : at], row[at : at + 1])] * 4
            if at % 2:
                told += [(row[at - 2 : at], [(row[at] + 1) % 90 + 3])] * 3
    return NGramModel.fit(told, 2)


def one(seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": tokens(1, WIDTH, seed)}


def kept(model: LayerwiseForCausalLM, **options: Any) -> Any:
    return model.generate(return_dict_in_generate=True, **options)


def assert_same_text(model: LayerwiseForCausalLM, drafts: list[str], **options: Any) -> Tensor:
    expected = model.generate(**options)
    for draft in drafts:
        assert torch.equal(model.generate(**options, draft=draft), expected), draft
    return expected


# -- any draft, any model, any plan --------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_any_draft_gives_the_greedy_text(name: str) -> None:
    bare = attached(name, None)
    for batch in (one(), ragged(*LENGTHS)):
        free = assert_same_text(bare, PLAIN, **batch, **FREE)
        ends = [free[0, WIDTH + 5].item(), free[-1, WIDTH + 9].item()]
        assert_same_text(bare, PLAIN[:4], **batch, max_new_tokens=NEW, eos_token_id=ends)
        for exit in (0, 2):
            assert_same_text(attached(name, exit), BY_HEAD, **batch, max_new_tokens=NEW, eos_token_id=ends)
    assert_same_text(attached(name, 2), BY_HEAD[:2], **ragged(*LENGTHS), **FREE)


@pytest.mark.parametrize("plan", ["0 2-3 3 5", "1 1 0 4a 5m 2", "5 3 3", str(tiny.random_plan(random.Random(8)))])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_target_that_skips_and_repeats(name: str, plan: str) -> None:
    model = attached(name, 2, plan)
    for batch in (one(), ragged(*LENGTHS[:4])):
        assert_same_text(model, [*FEW, "exit:1", f"plan:{plan}", "auto", "ngram+head"], **batch, **FREE)


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_rows_with_targets_of_their_own(name: str) -> None:
    plans = ["0-5", "0 2-5", "0-3 3 5", "5 1m 0a"]
    batch = ragged(*LENGTHS[:4])
    free = attached(name).generate(**batch, **FREE, plans=plans)
    ends = [free[0, WIDTH + 5].item(), free[3, WIDTH + 9].item()]
    for options in (FREE, {"max_new_tokens": NEW, "eos_token_id": ends}):
        assert_same_text(attached(name), [*FEW, "ngram+exit:2", "auto"], **batch, **options, plans=plans)
        assert_same_text(attached(name, 2), ["exit:3", "auto"], **batch, **options, plans=plans)


def test_a_head_inside_the_layers_asks_for_one_plan_that_is_long_enough() -> None:
    model, batch = attached("llama", 2), ragged(3, 2)
    one_line(lambda: model.generate(**batch, **FREE, plans=["0-5", "0-4"], draft="head"), "2 visits", "plan")
    one_line(lambda: model.generate(**batch, **FREE, plans=["0-1"] * 2, draft="head"), "2 visits", "plan")
    assert_same_text(model, ["head", "auto"], **batch, **FREE, plans=["0-2"] * 2)


def test_prompts_as_embeddings() -> None:
    model, batch = attached("gemma3"), ragged(*LENGTHS[:4])
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach()
    assert_same_text(model, FEW, inputs_embeds=embedded, attention_mask=batch["attention_mask"], **FREE)


def test_a_new_exit_head_takes_the_place_of_the_old() -> None:
    model = attach(tiny.model("llama"))
    used = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model.exit_head = ExitHead(model.runtime.backbone, 0, [3 + seed, 9]).eval()
        assert_same_text(model, ["head", "exit:2"], **one(), **FREE)
        used.append(model.head_runtime.backbone.layers[0] is model.exit_head.layer)
        assert model.draft_logits()[1].tolist() == [3 + seed, 9]
        assert model._cut_runtime.backbone.head is model.exit_head.head
    assert used == [True, True]


# -- the cache ----------------------------------------------------------------------------------------------


def with_an_end(model: LayerwiseForCausalLM) -> tuple[dict[str, Tensor], list[int], int]:
    """A prompt, its free text, and the place of a token in the middle of it that is new there."""
    for seed in range(20):
        free = model.generate(**one(seed), **FREE)[0].tolist()
        for at in range(WIDTH + 3, WIDTH + 7):
            if free[at] not in free[WIDTH:at]:
                return one(seed), free, at
    raise AssertionError("every text repeats itself at once")


def stop_tokens(model: LayerwiseForCausalLM, batch: dict[str, Tensor]) -> list[int]:
    """Two end tokens that end the rows of a batch at times as different as can be, none at once."""
    new = model.generate(**batch, **FREE)[:, WIDTH:]
    pairs = [list(pair) for pair in product(new[0].tolist(), new[-1].tolist())]
    found = [(stops(new, pair), pair) for pair in pairs]
    return max((min(at) > 1, len(set(at)), pair) for at, pair in found)[2]


@pytest.mark.parametrize("ending", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_cache_is_that_of_plain_decoding(name: str, ending: bool) -> None:
    model = attached(name)
    for batch in (with_an_end(model)[0], ragged(*LENGTHS[:5])):
        ends = stop_tokens(model, batch) if ending else None
        options = {**batch, "max_new_tokens": NEW, "eos_token_id": ends}
        expected = kept(model, **options).past_key_values
        following = tokens(expected.rows, 3, seed=5)
        logits = model(following, past_key_values=expected.part(range(expected.rows)), use_cache=True).logits
        for draft in [*FEW, "ngram+exit:2"]:
            found = kept(model, **options, draft=draft).past_key_values
            assert found.rows == expected.rows and found.lengths == expected.lengths, draft
            same_content(found, expected, close)
            close(model(following, past_key_values=found, use_cache=True).logits, logits)


@pytest.mark.parametrize("plans", [None, ["0-5", "0 2-5", "0 1 1 4"]])
def test_going_on_with_the_cache_equals_starting_anew(plans: list[str] | None) -> None:
    model, batch = attached("gemma3"), ragged(*LENGTHS[:3])
    whole = model.generate(**batch, **FREE, plans=plans)
    for draft in FEW:
        mine = Cache(3, 8)  # grows
        part = kept(model, **batch, **{**FREE, "max_new_tokens": 7}, draft=draft, past_key_values=mine, plans=plans)
        assert part.past_key_values is mine and mine.lengths == [length + 6 for length in LENGTHS[:3]]
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 7, dtype=torch.long)], 1)
        rest = {"input_ids": part.sequences, "attention_mask": mask, "past_key_values": mine, "plans": plans}
        found = model.generate(**rest, **{**FREE, "max_new_tokens": NEW - 7}, draft=draft)
        assert torch.equal(found, whole), draft
        assert mine.lengths == [length + NEW - 1 for length in LENGTHS[:3]]


def test_a_conversation() -> None:
    """The user's words follow an answer that ended inside a draft."""
    model = attached()
    batch, free, at = with_an_end(model)
    prompt, words, end = batch["input_ids"], tokens(1, 5, seed=2), free[at]
    for draft in ["off", *FEW]:
        first = kept(model, input_ids=prompt, max_new_tokens=NEW, eos_token_id=end, draft=draft)
        asked = torch.cat([first.sequences, words], 1)
        with_cache = model.generate(asked, **FREE, draft=draft, past_key_values=first.past_key_values)
        assert torch.equal(with_cache, model.generate(asked, **FREE)), draft
