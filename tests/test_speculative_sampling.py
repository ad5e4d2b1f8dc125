"""Sampled speculation has the target's distribution: chi-square against probabilities from plain forward passes."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from layerwise import LayerwiseForCausalLM, Trace, attach
from layerwise.decoding import judge as judging
from layerwise.decoding.judge import Judge
from layerwise.decoding.ngram_model import NGramModel
from layerwise.model.exit_head import ExitHead

WORDS, NEW, ROWS, CALLS = 6, 3, 256, 12  # words compared, and 3072 answers
FREE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
WARPED = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
# Holds every pair of words, so whatever the last two are, something followed them before.
PROMPT = torch.tensor([[word for pair in product(range(WORDS), repeat=2) for word in pair] + [3]])
DRAFTS = ["exit:3,2", "head,2", "ngram,2", "corpus,2"]
TREE = "tree,4"


def small_model() -> LayerwiseForCausalLM:
    """Six words, of which some are far likelier than others; the exit head knows four of them."""
    torch.manual_seed(0)
    config = tiny.config("llama")
    config.vocab_size = WORDS
    base = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        base.lm_head.weight *= 3
    model = attach(base, engine="eager")
    model.exit_head = ExitHead(model.runtime.backbone, 0, [0, 2, 3, 5]).eval()
    ids = PROMPT.expand(64, -1)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW + 1, "eos_token_id": None}
    said = model.generate(ids, do_sample=True, top_k=0, **options)[:, PROMPT.shape[1] :].tolist()
    model.ngrams = NGramModel.fit([(PROMPT[0].tolist(), answer) for answer in said], 2)
    return model


@torch.no_grad()
def probabilities(model: LayerwiseForCausalLM, options: dict[str, float]) -> Tensor:
    """Of every continuation of `NEW` words, (WORDS,) * NEW, by the model's own forward; warped by hand."""
    texts = torch.tensor(list(product(range(WORDS), repeat=NEW)))
    logits = model.base(torch.cat([PROMPT.expand(len(texts), -1), texts[:, :-1]], 1)).logits[:, -NEW:]
    logits = logits.double() / options["temperature"]
    ordered, order = logits.sort(-1, descending=True)
    if options["top_k"]:
        ordered[..., options["top_k"] :] = -torch.inf
    # The fewest words that hold `top_p` stay: those before which less than that is gathered.
    share = ordered.softmax(-1)
    ordered = ordered.masked_fill(share.cumsum(-1) - share >= options["top_p"], -torch.inf)
    steps = torch.empty_like(ordered).scatter(-1, order, ordered).softmax(-1)
    return steps.gather(-1, texts[..., None])[..., 0].prod(-1).reshape((WORDS,) * NEW)


def sampled(
    model: LayerwiseForCausalLM, draft: str, options: dict[str, Any], calls: int = CALLS
) -> tuple[Tensor, Trace]:
    """How often each continuation was drawn. More tokens are made, so that a draft reaches to the last."""
    torch.manual_seed(1)
    counts, trace = torch.zeros(WORDS**NEW, dtype=torch.double), Trace()
    ids = PROMPT.expand(ROWS, -1)
    for _ in range(calls):
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # one of the words is the padding token
            do_sample=True,
            max_new_tokens=NEW + (4 if draft == TREE else 1),
            eos_token_id=None,
            draft=draft,
            trace=trace,
            **options,
        )
        first = made[:, PROMPT.shape[1] :][:, :NEW]
        places = (first * torch.tensor([WORDS**at for at in reversed(range(NEW))])).sum(1)
        counts += torch.bincount(places, minlength=WORDS**NEW)
    return counts.reshape((WORDS,) * NEW), trace


def chance(counts: Tensor, probability: Tensor) -> float:
    """p of Pearson's chi-square test; cells that expect fewer than five are thrown together."""
    expected, found = (probability / probability.sum() * counts.sum()).flatten(), counts.flatten()
    assert not found[expected == 0].any(), "a continuation that cannot be"
    rare = expected < 5
    if rare.any():
        expected = torch.cat([expected[~rare], expected[rare].sum()[None].clamp(min=1e-9)])
        found = torch.cat([found[~rare], found[rare].sum()[None]])
    statistic = ((found - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(found) - 1) / 2).double(), statistic / 2))


@pytest.mark.parametrize("options", [FREE, WARPED], ids=["free", "warped"])
@pytest.mark.parametrize("draft", [*DRAFTS, TREE])
def test_sampled_speculation_has_the_targets_distribution(draft: str, options: dict[str, Any]) -> None:
    model = small_model()
    counts, trace = sampled(model, draft, options)
    assert 0.1 < trace.acceptance < 0.9  # some were taken and some were not
    assert chance(counts, probabilities(model, options)) > 0.001


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_test_finds_a_rule_that_takes_everything(draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(-1.0))
    counts, trace = sampled(model, draft, FREE, calls=4)
    assert trace.acceptance == 1.0
    assert chance(counts, probabilities(model, FREE)) < 1e-6


def test_second_guesses_stand_when_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stood = small_model(), []
    judged = Judge.judge

    def spy(judge: Judge, *args: Any) -> tuple[list[int], int]:
        found, drafted = judged(judge, *args), args[1]
        if drafted:  # a row at its end has no room for any
            stood.append(found[0])
        return found

    monkeypatch.setattr(Judge, "judge", spy)
    sampled(model, TREE, FREE, calls=1)
    shares = [sum(test(one) for one in stood) / len(stood) for test in (len, lambda one: one != [*range(len(one))])]
    assert shares[0] > 0.3 and shares[1] > 0.05


@pytest.mark.parametrize("draft", ["exit:3,2", TREE])
def test_the_test_finds_a_replacement_that_is_drawn_from_the_target(
    draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    monkeypatch.setattr(judging, "_rest", lambda p, token, q: p)
    counts, _ = sampled(model, draft, FREE)
    assert chance(counts, probabilities(model, FREE)) < 1e-6


# -- the judge alone -----------------------------------------------------------------------------------------


def a_judge(vocabulary: int, sampling: bool = True) -> Judge:
    config = GenerationConfig(do_sample=sampling)
    return Judge(LogitsProcessorList(), StoppingCriteriaList(), config, vocabulary)


P = torch.tensor([0.5, 0.3, 0.2, 0.0])
TRIES = 4000


def decided(drafted: int, q: Tensor | None) -> tuple[float, Tensor]:
    """How often `drafted` stands under P, and the shares of what replaces it."""
    torch.manual_seed(0)
    judge, text, logits = a_judge(4), torch.zeros(1, 4, dtype=torch.long), P.log().expand(2, -1)
    stood, replaced = 0, torch.zeros(4)
    for _ in range(TRIES):
        stands, token = judge.judge(logits, [drafted], [-1], None if q is None else [q], text, 1, 0)
        stood += len(stands)
        if not stands:
            replaced[token] += 1
        else:
            assert text[0, 1] == drafted
    return stood / TRIES, replaced / replaced.sum().clamp(min=1)


@pytest.mark.parametrize(
    ("drafted", "q", "stands", "replacement"),
    [
        (0, [0.25, 0.25, 0.25, 0.25], 1.0, None),  # likelier in the target
        (2, [0.1, 0.1, 0.8, 0.0], 0.25, [0.4 / 0.6, 0.2 / 0.6, 0.0, 0.0]),
        (1, [0.0, 0.9, 0.1, 0.0], 1 / 3, [0.5 / 0.6, 0.0, 0.1 / 0.6, 0.0]),
        (3, [0.0, 0.0, 0.0, 1.0], 0.0, [0.5, 0.3, 0.2, 0.0]),
        (1, [0.5, 0.3, 0.2, 0.0], 1.0, None),  # the same distribution
        (1, None, 0.3, [0.5 / 0.7, 0.0, 0.2 / 0.7, 0.0]),  # copied, not drawn
    ],
)
def test_how_often_a_token_stands_and_what_replaces_it(
    drafted: int, q: list[float] | None, stands: float, replacement: list[float] | None
) -> None:
    share, replaced = decided(drafted, None if q is None else torch.tensor(q))
    assert share == pytest.approx(stands, abs=4 * (stands * (1 - stands) / TRIES) ** 0.5 + 1e-9)
    if replacement is not None:
        assert torch.allclose(replaced, torch.tensor(replacement), atol=0.035)


def test_guesses_for_one_place_are_tried_one_after_the_other() -> None:
    torch.manual_seed(0)
    judge, text, places = a_judge(4), torch.zeros(1, 4, dtype=torch.long), Counter()
    logits = torch.stack([P, P, P.flip(0), P, P]).log()  # after the text, and after each drafted token
    for _ in range(TRIES):
        stands, token = judge.judge(logits, [2, 1, 3, 0], [-1, -1, 1, 1], None, text, 1, 0)
        assert text[0, 1 : 1 + len(stands)].tolist() == [[2, 1, 3, 0][number] for number in stands]
        places[*stands, -1 - token] += 1
    # 2 with .2, else 1 with .3, after which 3 with .5 (P turned round) and never 0; else one of the other two.
    flipped = [0.0, 0.2, 0.3, 0.5]
    expected = {(-1,): 0.5, (1, -2): 0.3 * 0.2, (1, -3): 0.3 * 0.3}
    expected |= {(0, -1 - token): 0.2 * share for token, share in enumerate(P.tolist()) if share}
    expected |= {(1, 2, -1 - token): 0.3 * flipped[3] * share for token, share in enumerate(P.tolist()) if share}
    assert set(places) == set(expected)
    for outcome, share in expected.items():
        assert places[outcome] / TRIES == pytest.approx(share, abs=4 * (share * (1 - share) / TRIES) ** 0.5)


def test_what_is_drawn_while_drafting() -> None:
    judge, logits = a_judge(8), torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    vocabulary = torch.tensor([6, 1, 4])
    pick = judge.pick(logits, vocabulary, range(2), [])
    expected = torch.zeros(2, 8).index_copy(1, vocabulary, logits.softmax(-1))
    assert torch.allclose(pick.q, expected) and torch.isin(pick.tokens, vocabulary).all()
    assert pick.sure == pytest.approx(expected.gather(1, pick.tokens)[:, 0].tolist())
    greedy = a_judge(8, sampling=False).pick(logits, vocabulary, range(2), [])
    assert greedy.q is None and greedy.tokens.tolist() == [[1], [6]]
    assert greedy.sure == pytest.approx(logits.softmax(-1).amax(-1).tolist())


def test_greedy_runs_stop_at_the_first_that_differs() -> None:
    judge = a_judge(5, sampling=False)
    logits = torch.nn.functional.one_hot(torch.tensor([2, 4, 1, 0]), 5).float()
    for drafted, expected in (([2, 4, 1], (3, 0)), ([2, 3, 1], (1, 4)), ([0, 4, 1], (0, 2)), ([], (0, 2))):
        text = torch.zeros(1, 8, dtype=torch.long)
        found = judge.judge(logits[: len(drafted) + 1], drafted, range(-1, len(drafted) - 1), None, text, 2, 0)
        assert found == (list(range(expected[0])), expected[1])
        assert text[0, 2 : 2 + expected[0]].tolist() == drafted[: expected[0]]
