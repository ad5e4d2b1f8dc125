"""The n-gram model of answers: counts against slow ones, files, and what the drafter makes of it."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from test_generate import ragged
from test_speculative import FREE, attached, one

from layerwise import from_pretrained
from layerwise.decoding.ngram_model import ALIKE, FILE, GUESSES, NGramModel
from layerwise.decoding.ngrams import HOPES, CorpusDrafter, NGramDrafter
from layerwise.decoding.target import Read

Answers = list[tuple[list[int], list[int]]]


def answers(seed: int, count: int = 40, tokens: int = 5) -> Answers:
    draw = random.Random(seed)

    def text(most: int) -> list[int]:
        return [draw.randrange(tokens) for _ in range(draw.randint(0, most))]

    return [(text(6), [*text(9), 0]) for _ in range(count)]


def counted(given: Answers, order: int) -> dict[tuple[int, ...], Counter[int]]:
    found: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for prompt, answer in given:
        text = [*prompt[-order:], *answer]
        for at in range(len(text) - len(answer), len(text)):
            for length in range(1, min(order, at) + 1):
                found[tuple(text[at - length : at])][text[at]] += 1
    return found


@pytest.mark.parametrize("order", [1, 3, 6])
def test_the_longest_known_suffix_decides_as_counts_by_hand_do(order: int) -> None:
    given = answers(order)
    model, counts = NGramModel.fit(given, order), counted(given, order)
    assert len(model) < len(counts) or order == 1  # some n-grams say what their suffix says
    draw, known = random.Random(1), 0
    for _ in range(400):
        text = [draw.randrange(6) for _ in range(draw.randint(0, 8))]  # 5 occurs nowhere
        suffixes = [tuple(text[len(text) - length :]) for length in range(min(order, len(text)), 0, -1)]
        best = next((counts[one] for one in suffixes if one in counts), None)
        found = model.after(text)
        assert (found is None) == (best is None)
        if best is not None:
            known += 1
            token, sure = found
            assert best[token] == max(best.values()) or any(counts[one][token] for one in suffixes if one in counts)
            assert sure == pytest.approx(max(best.values()) / (best.total() + 1), abs=ALIKE * order)
            if len([count for count in best.values() if count == max(best.values())]) == 1:
                assert best[token] == max(best.values())
    assert known > 100


def test_second_guesses_are_the_next_likeliest() -> None:
    given = answers(7)
    model, counts = NGramModel.fit(given, 1), counted(given, 1)
    for (token,), following in counts.items():
        ordered = sorted(following.items(), key=lambda pair: (-pair[1], pair[0]))[:GUESSES]
        ((*guesses,),) = model.known([token])
        assert [guess for guess, _ in guesses] == [guess for guess, _ in ordered]
        assert [sure for _, sure in guesses] == pytest.approx(
            [count / (following.total() + 1) for _, count in ordered], abs=1e-3
        )
    model = NGramModel.fit([([], [1, 2, 3])] * 9 + [([], [4, 2, 5])] * 3, 3)
    assert [[token for token, _ in guesses] for guesses in model.known([4, 2])] == [[5], [3, 5]]


def test_a_file_with_one_guess_an_n_gram_is_read(tmp_path: Path) -> None:
    model = NGramModel.fit(answers(4), 4)
    NGramModel(model.keys, model.tokens[:, 0].clone(), model.sure[:, 0].clone(), 4).save(tmp_path)
    again = NGramModel.load(tmp_path, 5)
    assert again.tokens.shape == (len(model), 1) and again.after([1, 2]) == model.after([1, 2])


def test_what_a_shorter_suffix_says_as_surely_is_left_out() -> None:
    model = NGramModel.fit([([], [1, 2, 3])] * 9, 3)
    assert len(model) == 2  # after 1 comes 2, after 2 comes 3; (1, 2) says nothing new
    assert model.after([1]) == (2, pytest.approx(0.9, abs=1e-3)) and model.after([7, 1, 2])[0] == 3
    assert model.after([3]) is None and model.after([]) is None
    model = NGramModel.fit([([], [1, 2, 3])] * 9 + [([], [4, 2, 5])] * 3, 3)
    assert model.after([1, 2])[0] == 3 and model.after([4, 2])[0] == 5 and model.after([9, 2])[0] == 3


def test_no_n_gram_goes_from_one_text_to_the_next_and_prompts_are_not_counted() -> None:
    model = NGramModel.fit([([1, 2], [3]), ([4, 5], [6])], 4)
    assert model.after([2])[0] == 3 and model.after([5])[0] == 6
    assert model.after([1]) is None and model.after([3]) is None and model.after([4]) is None


def test_tokens_of_a_large_vocabulary_are_told_apart() -> None:
    given = [([token], [token + 1]) for token in range(0, 300_000, 3)]
    model = NGramModel.fit(given, 2)
    assert all(model.after([token])[0] == token + 1 for token in range(0, 300_000, 999))


def test_a_file_brings_back_what_was_saved_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    model = NGramModel.fit(answers(4), 4)
    model.save(tmp_path)
    again = NGramModel.load(tmp_path, 5)
    assert again.order == 4 and torch.equal(again.keys, model.keys) and again.after([1, 2]) == model.after([1, 2])
    with pytest.raises(ValueError, match="do not belong to this model"):
        NGramModel.load(tmp_path, 3)
    (tmp_path / FILE).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be loaded"):
        NGramModel.load(tmp_path, 5)
    with pytest.raises(ValueError, match="no answers"):
        NGramModel.fit([])


# -- drafting ------------------------------------------------------------------------------------------------


def drafter(model: NGramModel, *texts: list[int]) -> CorpusDrafter:
    made = CorpusDrafter(SimpleNamespace(), model)
    counts = [len(text) for text in texts]
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], True)
    made.begin(Read(rows, counts, {}, rows))
    return made


def test_a_draft_goes_on_while_it_is_worth_it() -> None:
    model = NGramModel.fit([([], [1, 2, 3, 4, 5])] * 3, 2)  # each sure to 3/4
    made, last = drafter(model, [9], [9, 9]), torch.tensor([[1], [3]])
    assert made.propose(last, 3, lambda trust: True).tokens == [[2, 3, 4], [4, 5]]
    assert made.propose(last, 3, lambda trust: trust > 0.6).tokens == [[2, 3], [4, 5]]
    assert made.propose(last, 3, lambda trust: False).tokens == [[2], [4]]
    # Of the two rows one knows a token less.
    assert made.hopes(last, 3) == pytest.approx([0.75, 0.75**2, 0.75**3 / 2])
    assert made.hopes(last, 1) == pytest.approx([0.75]) and made.hopes(torch.tensor([[5], [5]]), 3) == []


def test_a_match_that_stands_is_a_longer_match() -> None:
    made = NGramDrafter(SimpleNamespace())
    text = torch.tensor([[7, 1, 2, 3, 9, 8, 1]])
    made.begin(Read(text, [7], {}, text))
    hopes = made.hopes(torch.tensor([[2]]), 4)  # a match of two tokens, then of three, of four, and no longer
    after = HOPES[2] * HOPES[3]
    assert hopes == pytest.approx([HOPES[2], after, after * HOPES[4], after * HOPES[4] ** 2])
    assert made.hopes(torch.tensor([[5]]), 4) == []


def test_what_was_read_is_context_for_what_follows() -> None:
    model = NGramModel.fit([([], [1, 2, 3])] * 3 + [([], [4, 2, 5])] * 3, 2)
    made = drafter(model, [8, 8], [8, 8])
    made.learn(Read(torch.tensor([[1, 7], [8, 4]]), [1, 2], {}, torch.zeros(2, 2, 1)))
    last = torch.tensor([[2], [2]])
    assert made.propose(last, 1, lambda trust: True).tokens == [[3], [5]]
    made.select([1])
    assert made.propose(last[:1], 1, lambda trust: True).tokens == [[5]]


def own_answers(model: Any, batch: dict[str, torch.Tensor]) -> Answers:
    texts = model.generate(**batch, **FREE)
    width = batch["input_ids"].shape[1]
    return [(row[:width].tolist(), row[width:].tolist()) for row in texts]


def test_a_model_that_says_it_again_is_drafted_for_without_a_miss() -> None:
    model = attached("llama", None)
    model.ngrams = NGramModel.fit(own_answers(model, one()), 6)
    try:
        from layerwise.trace import Trace

        trace = Trace()
        text = model.generate(**one(), **FREE, draft="corpus,5", trace=trace)
        assert torch.equal(text, model.generate(**one(), **FREE))
        assert trace.accepted > 8 and trace.accepted >= 0.6 * trace.drafted
        for draft in ("corpus", "ngram+corpus,3", "auto"):
            for batch in (one(), ragged(5, 12, 3)):
                assert torch.equal(model.generate(**batch, **FREE, draft=draft), model.generate(**batch, **FREE)), draft
    finally:
        model.ngrams = None


def test_an_adapter_brings_its_n_grams(tmp_path: Path) -> None:
    model = attached("llama", None)
    base = tmp_path / "base"
    model.runtime.backbone.model.save_pretrained(base)
    model = from_pretrained(base, engine="eager")
    model.ngrams = NGramModel.fit(answers(2), 3)
    model.save_pretrained(tmp_path / "adapter")
    loaded = from_pretrained(tmp_path / "adapter", engine="eager")
    assert len(loaded.ngrams) == len(model.ngrams)
    assert from_pretrained(base, engine="eager").ngrams is None
    assert tiny.VOCABULARY > 5
