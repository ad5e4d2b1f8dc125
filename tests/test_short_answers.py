"""Questions with short answers: splits that share nothing, choices that can be told apart, answers that are checked."""

from __future__ import annotations

import pytest

from layerwise.data import SPLITS, short_answers
from layerwise.data.short_answers import IN_DOMAIN, OUT_OF_DOMAIN, SHARES, TASKS, Question, questions

NUMBERS = ("addition", "subtraction", "multiplication", "sums", "lcm")  # made here; the others come out of a package


@pytest.mark.parametrize("task", NUMBERS)
def test_splits_are_disjoint_by_text_whatever_the_order_of_numbers(task: str) -> None:
    stems = {
        split: {tuple(sorted(word for word in one.prompt.splitlines()[-1].split())) for one in questions(task, split)}
        for split in SPLITS
    }
    assert all(stems.values())
    assert not stems["train"] & stems["test"] and not stems["train"] & stems["validation"]
    assert not stems["validation"] & stems["test"]


@pytest.mark.parametrize("task", NUMBERS)
def test_examples_come_from_training_and_never_say_the_answer(task: str) -> None:
    texts = [line for one in questions(task, "train") for line in one.prompt.splitlines()[-1:]]
    for one in questions(task, "test")[:40] + questions(task, "train"):
        *examples, asked = one.prompt.splitlines()
        assert len(examples) == TASKS[task].shots
        for example in examples:
            assert any(example.startswith(text) for text in texts)
            assert sorted(example.removesuffix(example.split()[-1]).split()) != sorted(asked.split())


@pytest.mark.parametrize("task", NUMBERS)
def test_the_right_number_is_right_and_the_others_are_not(task: str) -> None:
    for one in questions(task, "validation"):
        stem = one.prompt.splitlines()[-1]
        if task == "lcm":
            first, second = (int(word) for word in stem.split() if word.isdigit())
            right = next(n for n in range(1, 999) if n % first == 0 and n % second == 0)
        else:
            right = eval(stem.removesuffix("="))
        assert one.answer == f" {right}\n" and len(one.choices) == 1 + short_answers.WRONG_NUMBERS
        assert one.accepts(f" {right}\n3 + 4") and not one.accepts(f" {right}5") and not one.accepts("none")
        assert not any(one.accepts(choice) for choice in one.choices if choice != one.answer)


def test_questions_are_the_same_in_every_run() -> None:
    short_answers._all.cache_clear()
    first = questions("addition", "train")
    short_answers._all.cache_clear()
    assert questions("addition", "train") == first
    assert first[0].id == "addition-003305ecae1f" and first[0].variants[0] != first[0].prompt
    share = len(questions("addition", "test")) / 891
    assert share == pytest.approx(SHARES["test"], abs=0.05)


def test_an_accepted_number_stands_first_and_alone() -> None:
    one = Question("sums", "a", "1 + 1 =", " 2\n", (" 2\n", " 3\n"))
    assert one.generated and not one.by_length
    assert one.accepts("2") and one.accepts(" 2, of course") and one.accepts(" 2.\n")
    assert not one.accepts(" 2.5") and not one.accepts(" -2") and not one.accepts("is 2") and not one.accepts(" 2,000")
    assert not one.accepts(" 2/3") and one.accepts(" 2/x")


def test_bad_questions_are_refused() -> None:
    for choices in ((" 2",), (" 2", " 2"), (" 3", " 4")):
        with pytest.raises(ValueError, match="two or more different choices"):
            Question("sums", "a", "1 + 1 =", " 2", choices)
    with pytest.raises(ValueError, match="no task 'history'"):
        questions("history", "test")
    with pytest.raises(ValueError, match="no split 'dev'"):
        questions("sums", "dev")
    with pytest.raises(ValueError, match="'piqa' is out of domain"):
        questions("piqa", "train")
    assert set(IN_DOMAIN) | set(OUT_OF_DOMAIN) == set(TASKS) and not set(IN_DOMAIN) & set(OUT_OF_DOMAIN)


def test_options_keep_their_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    docs = [
        {"query": f"Question: What is {number}?\nAnswer:", "choices": ["one", f"two {number}"], "gold": 1}
        for number in range(60)
    ]
    docs += [{"query": "Question: What is 7?\nAnswer:", "choices": ["a", "b"], "gold": 0}]  # asked before
    docs += [{"query": "Question: Twice?\nAnswer:", "choices": ["a", "a "], "gold": 0}]  # no right one
    monkeypatch.setattr(short_answers, "documents", lambda task, variant: iter(docs))
    short_answers._all.cache_clear()
    try:
        found = [one for split in SPLITS for one in questions("arc_easy", split)]
    finally:
        short_answers._all.cache_clear()
    assert len(found) == 60
    assert all(one.answer.startswith(" two ") and one.choices[0] == " one" and one.by_length for one in found)
    assert all(one.prompt.startswith("Question: What is") and one.prompt.endswith("?\nAnswer:") for one in found)
    assert all(one.prompt in variant for one in found for variant in one.variants)
