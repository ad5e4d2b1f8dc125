"""Many paths at once: the same scores as one plain forward pass each, from far fewer layer calls."""

from __future__ import annotations

import random

import pytest
import tiny
import torch
from test_eval import word_tokenizer, words

from layerwise import Plan, attach
from layerwise.data.short_answers import Question
from layerwise.search import evaluator
from layerwise.search.evaluator import PathEvaluator
from layerwise.search.packed import PackedChoices, margin
from layerwise.search.reference import plain_margin


def question(seed: int, task: str = "lcm") -> Question:
    """Random words; longer than the sliding window of the tiny models; two choices of four begin alike."""
    chance = random.Random(seed)
    choices = [f" {words(chance, count)}" for count in (2, 1, 3)]
    choices = (*choices, f"{choices[0]} {words(chance, 2)}")
    return Question(task, f"q{seed}", words(chance, 11), choices[seed % 3], choices)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_equals_plain_forward_passes_with_skips_and_repeats(name: str) -> None:
    base, tokenizer, chance = tiny.model(name), word_tokenizer(), random.Random(1)
    plans = [Plan.full(tiny.LAYERS), Plan.parse("0*2 1-5"), Plan.parse("1-5"), Plan.parse("0-5*2")]
    plans += [tiny.random_plan(chance, parts=False) for _ in range(12)]
    for seed in range(3):
        asked = question(seed)
        found = PathEvaluator(attach(base), tokenizer, asked).margins(plans)
        expected = [plain_margin(base, tokenizer, asked, plan) for plan in plans]
        assert found == pytest.approx(expected, abs=2e-4)
        assert len({round(one, 3) for one in expected}) > 8  # the plans are told apart


def test_equals_plain_forward_passes_whatever_the_batches_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tokenizer, asked, chance = tiny.model("llama"), word_tokenizer(), question(0), random.Random(2)
    plans = [tiny.random_plan(chance, parts=False) for _ in range(12)]
    monkeypatch.setattr(evaluator, "BATCH_TOKENS", 40)
    monkeypatch.setattr(evaluator, "BATCH_LOGITS", 5000)
    monkeypatch.setattr(evaluator, "KEPT_BYTES", 20_000)
    scores = PathEvaluator(attach(base), tokenizer, asked)
    found = scores.margins(plans[:5]) + scores.margins(plans[5:])
    assert found == pytest.approx([plain_margin(base, tokenizer, asked, plan) for plan in plans], abs=2e-4)


def test_what_paths_share_is_run_once() -> None:
    model = attach(tiny.model("llama"))
    calls: list[tuple[int, int]] = []
    for number, layer in enumerate(model.runtime.backbone.layers):
        layer.register_forward_hook(lambda _, given, __, number=number: calls.append((number, len(given[0]))))
    scores = PathEvaluator(model, word_tokenizer(), question(0))
    scores.margins([Plan.full(6)])
    assert calls == [(number, 1) for number in range(6)]
    calls.clear()
    # One skips 3, one repeats 3: both start from the kept states after layer 2 or 3, then go on together.
    scores.margins([Plan.parse("0-2 4-5"), Plan.parse("0-3 3-5")])
    assert calls == [(3, 1), (4, 2), (5, 2)]
    calls.clear()
    assert scores.margins([Plan.full(6), Plan.parse("0-2 4-5")]) and not calls


def test_tokens_that_choices_share_stand_once_and_last_ones_not_at_all() -> None:
    packed = PackedChoices.of([[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 4, 3]], prompt_tokens=2)
    assert packed.ids == (5, 6, 7, 4) and packed.positions == (0, 1, 2, 3) and packed.parents == (-1, 0, 1, 2)
    assert packed.targets == (7, 8, 9, 7, 4, 3)
    assert packed.predictors == (1, 2, 1, 1, 2, 3) and packed.scored == (0, 0, 1, 2, 2, 2)
    # The same token after another one is another column.
    assert PackedChoices.of([[5, 6, 8, 1], [5, 7, 8, 1]], prompt_tokens=1).parents == (-1, 0, 1, 0, 3)
    # A choice that melts into the prompt's last token keeps a token of its own.
    assert PackedChoices.of([[5, 6], [5, 7, 8]], prompt_tokens=2).targets == (6, 7, 8)


def test_branches_do_not_see_each_other() -> None:
    packed = PackedChoices.of([[5, 6, 1], [5, 7, 1], [5, 6, 8, 1]], prompt_tokens=1)
    assert packed.ids == (5, 6, 7, 8)
    assert packed.ancestors.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]


def test_margins_are_per_character_where_the_task_says_so() -> None:
    asked = Question("arc_easy", "a", "w", " ab", (" ab", " abcdefgh"))
    assert margin([-3.0, -5.0], asked) == pytest.approx(-3 * 6 / 3 + 5 * 6 / 9)
    plain = Question("boolq", "a", "w", " ab", (" ab", " abcdefgh"))
    assert margin([-3.0, -5.0], plain) == 2.0


def test_a_question_longer_than_the_context_is_refused() -> None:
    long = Question("lcm", "long", words(random.Random(0), 256), " w11", (" w11", " w12"))
    with pytest.raises(ValueError, match="'long' has 257 tokens, more than the model's context of 256"):
        PathEvaluator(attach(tiny.model("llama")), word_tokenizer(), long)


def test_the_reference_leaves_the_model_as_it_was() -> None:
    base = tiny.model("gemma3")
    ids = torch.arange(5)[None]
    before = base(input_ids=ids).logits
    plain_margin(base, word_tokenizer(), question(0), Plan.parse("0 0 3"))
    assert torch.equal(base(input_ids=ids).logits, before)
    with pytest.raises(ValueError, match="in part"):
        plain_margin(base, word_tokenizer(), question(0), Plan.parse("0a 1"))
