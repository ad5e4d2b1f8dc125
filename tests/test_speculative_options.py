"""Speculation beside all that `generate` offers: ends inside a draft, streams, processors, breaks, the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from test_generate import CLOSE, EndsAt, Recorder, ragged
from test_laws import close, same_content
from test_speculative import (
    FEW,
    FREE,
    LENGTHS,
    NEW,
    PERFECT,
    WIDTH,
    assert_same_text,
    attached,
    kept,
    one,
    stop_tokens,
    with_an_end,
)
from tiny import one_line
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerFast, StoppingCriteriaList

from layerwise import Cache, LayerwiseForCausalLM, Phase, Trace, attach
from layerwise.decoding.judge import Judge
from layerwise.decoding.trees import TreeDrafter
from layerwise.trace import Source


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# -- ends inside a draft -------------------------------------------------------------------------------------


def inside_a_draft(model: LayerwiseForCausalLM, **options: Any) -> Tensor:
    """All drafts give the text that plain decoding gives, and the perfect one drafts beyond its end."""
    expected = assert_same_text(model, [*FEW, "exit:4"], **options)
    trace = Trace()
    model.generate(**options, draft=PERFECT, trace=trace)
    assert trace.accepted > trace.sources[0].count(Source.DRAFTED)
    return expected


def test_an_end_token_inside_a_draft() -> None:
    model = attached()
    prompt, free, at = with_an_end(model)
    found = inside_a_draft(model, **prompt, max_new_tokens=NEW, eos_token_id=free[at])
    assert found[0].tolist() == free[: at + 1]


def test_a_stop_string_inside_a_draft() -> None:
    model = attached()
    words = {f"w{chr(97 + i // 26)}{chr(97 + i % 26)}": i for i in range(1, tiny.VOCABULARY)}
    inner = Tokenizer(WordLevel({"abcdef": 0, **words}, unk_token="abcdef"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="abcdef")
    prompt, free, at = with_an_end(model)
    stop = tokenizer.convert_ids_to_tokens(free[at])
    found = inside_a_draft(model, **prompt, **FREE, stop_strings=[stop], tokenizer=tokenizer)
    assert found[0].tolist() == free[: at + 1]


@pytest.mark.parametrize("batch", [one, lambda: ragged(*LENGTHS[:3])], ids=["one row", "three"])
def test_the_longest_answer_ends_inside_a_draft(batch: Callable[[], dict[str, Tensor]]) -> None:
    model = attached()
    for new in (1, 2, 5, 8):
        found = assert_same_text(model, FEW, **batch(), max_new_tokens=new, eos_token_id=None)
        assert found.shape[1] == WIDTH + new


def test_criteria_without_padding_let_rows_go_on_until_all_are_done() -> None:
    model, batch = attached(), ragged(*LENGTHS[:3])
    free = model.generate(**batch, **FREE)
    marks = [free[row, WIDTH + at].item() for row, at in enumerate((3, 6, 9))]

    def ends(ids: Tensor, scores: Any) -> Tensor:
        return torch.isin(ids[:, -1], torch.tensor(marks))

    options = {**batch, **FREE, "stopping_criteria": StoppingCriteriaList([ends])}
    assert assert_same_text(model, FEW, **options).shape[1] < WIDTH + NEW
    expected = kept(model, **options).past_key_values
    for draft in FEW:
        found = kept(model, **options, draft=draft).past_key_values
        assert found.lengths == expected.lengths
        same_content(found, expected, close)


# -- everything else that generate offers --------------------------------------------------------------------


def test_criteria_and_processors_that_tell_rows_apart() -> None:
    model, batch = attached(), ragged(*LENGTHS[:3])

    def by_place(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.arange(10, 40), -1e9) if len(ids) != 3 else scores + bias

    bias = 3 * torch.randn(3, tiny.VOCABULARY, generator=torch.Generator().manual_seed(0))
    criteria = StoppingCriteriaList([EndsAt(WIDTH + 4, WIDTH + 2, WIDTH + 9)])
    options = {**batch, "max_new_tokens": NEW, "eos_token_id": [1], "stopping_criteria": criteria}
    assert assert_same_text(model, FEW, **options).shape[1] == WIDTH + 9
    assert_same_text(model, FEW, **options, logits_processor=LogitsProcessorList([by_place]))


def test_a_streamer_gets_the_same_tokens_in_order() -> None:
    model, plain = attached(), Recorder()
    free = model.generate(**one(), **FREE)
    options = {**one(), "max_new_tokens": NEW, "eos_token_id": free[0, WIDTH + 13].item()}
    model.generate(**options, streamer=plain)
    for draft in [*FEW, "auto"]:
        recorder = Recorder()
        model.generate(**options, streamer=recorder, draft=draft)
        assert recorder.got == plain.got, draft
    batch = ragged(*LENGTHS[:2])
    one_line(lambda: model.generate(**batch, max_new_tokens=NEW, streamer=Recorder(), draft="ngram"), "one row")


@pytest.mark.parametrize(
    "option",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 17, "max_new_tokens": NEW},
        {"bad_words_ids": [[40], [50, 60], [41], [42]]},
        {"suppress_tokens": list(range(20, 60))},
        {"forced_eos_token_id": 9},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(5 + 9 * row, 60 + 9 * row))},
        {"exponential_decay_length_penalty": (0, 4.0), "max_new_tokens": NEW},
    ],
    ids=lambda option: next(iter(option)),
)
def test_logits_processors(option: dict[str, Any]) -> None:
    model = attached()
    for batch in (one(), ragged(*LENGTHS[:4], seed=1)):
        free = model.generate(**batch, **FREE)
        ends = None if "max_new_tokens" not in option else stop_tokens(model, batch)
        if ends:
            free = model.generate(**batch, max_new_tokens=NEW, eos_token_id=ends)
        options = {**batch, **FREE, "eos_token_id": ends, **option}
        found = assert_same_text(model, [*FEW, "ngram+exit:2"], **options)
        if "bad_words_ids" not in option:
            assert not torch.equal(found, free)  # the option did something


def test_a_processor_that_remembers_sees_one_row_grow_token_by_token() -> None:
    model = attached()
    free = model.generate(**one(), **FREE)
    assert not torch.equal(assert_same_text(model, FEW, **one(), **FREE, guidance_scale=1.7), free)
    one_line(lambda: model.generate(**ragged(3, 2), **FREE, guidance_scale=1.7, draft="ngram"), "off", "one row")


def test_scores_and_logits_of_one_row() -> None:
    model = attached()
    prompt, free, at = with_an_end(model)
    for ends, options in ((None, {}), (free[at], {"repetition_penalty": 1.3}), (free[at], {})):
        options = {**prompt, "max_new_tokens": NEW, "eos_token_id": ends, **options}
        options |= {"output_scores": True, "output_logits": True}
        expected = kept(model, **options)
        for draft in FEW:
            found = kept(model, **options, draft=draft)
            assert torch.equal(found.sequences, expected.sequences)
            assert len(found.scores) == len(found.logits) == len(expected.scores) == len(expected.logits)
            for name in ("scores", "logits"):
                for ours, theirs in zip(getattr(found, name), getattr(expected, name), strict=True):
                    torch.testing.assert_close(ours, theirs, **CLOSE)
    one_line(lambda: kept(model, **ragged(3, 2), **FREE, output_scores=True, draft="ngram"), "off", "one row")


@pytest.mark.parametrize("output_scores", [True, False])
def test_criteria_get_the_scores_made_so_far(output_scores: bool) -> None:
    shown: list[tuple[int, Any]] = []

    def criterion(ids: Tensor, scores: Any) -> Tensor:
        shown.append((ids.shape[1], scores))
        return torch.zeros(len(ids), dtype=torch.bool)

    model, criteria = attached(), StoppingCriteriaList([criterion])
    options = {**one(), **FREE, "output_scores": output_scores, "stopping_criteria": criteria}
    for draft in ("off", "exit:3,4", PERFECT):
        shown.clear()
        scores = kept(model, **options, draft=draft).scores
        assert [length for length, _ in shown] == list(range(WIDTH + 1, WIDTH + NEW + (draft == "off")))
        for length, given in shown:
            assert given is None if scores is None else len(given) == length - WIDTH
            assert given is None or given[-1] is scores[length - WIDTH - 1]


def test_what_is_no_draft_for_this_model_is_refused() -> None:
    model, bare = attached(), attached("llama", None)
    for draft, mentions in (
        ("exit:99", ("'exit:99'", "6 layers")),
        ("exit:6", ("1 to 5",)),
        ("plan:0-6", ("layer 6",)),
        ("fast", ("'fast'", "ngram")),
        (3, ("a draft is a Draft or its text", "3")),
        (["ngram"], ("a draft is",)),
    ):
        one_line(lambda draft=draft: model.generate(**one(), **FREE, draft=draft), *mentions)
    one_line(lambda: bare.generate(**one(), **FREE, draft="head"), "no exit head")
    one_line(lambda: bare.generate(**one(), **FREE, draft="ngram+head"), "no exit head")
    one_line(lambda: bare.generate(**one(), **FREE, draft="ngram+corpus"), "no corpus")
    with pytest.raises(ValueError, match="no exit head"):
        bare.draft = "head"
    assert str(bare.draft) == "off"


def test_the_draft_of_a_model_is_used_unless_told_otherwise() -> None:
    model, trace = attach(tiny.model("llama")), Trace()
    plain = model.generate(**one(), **FREE, trace=trace)
    assert not trace.drafts
    model.draft = "exit:3,4"
    assert torch.equal(model.generate(**one(), **FREE, trace=trace), plain)
    assert trace.drafted and list(trace.drafts) == ["plan:0-2"]
    off = Trace()
    assert torch.equal(model.generate(**one(), **FREE, trace=off, draft="off"), plain) and not off.drafts


# -- breaks --------------------------------------------------------------------------------------------------


def breaks(ids: Tensor, scores: Any) -> Any:
    if ids.shape[1] >= WIDTH + 9:
        raise KeyboardInterrupt
    return scores if isinstance(scores, Tensor) else torch.zeros(len(ids), dtype=torch.bool)


BROKEN = {
    "streamer": lambda: {"streamer": Recorder(breaks_at=9)},
    "criterion": lambda: {"stopping_criteria": StoppingCriteriaList([lambda ids, _: breaks(ids, None)])},
    "processor": lambda: {"logits_processor": LogitsProcessorList([breaks])},
    "drafter": dict,
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("draft", ["exit:3,4", PERFECT, "plan:0 2 2 5,3", "head,3", "tree,6"])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_break_leaves_model_and_cache_usable(
    broken: str, draft: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "streamer" and rows > 1:
        pytest.skip("a streamer follows one row")
    model = attached("gemma3", 2)
    batch = ragged(*LENGTHS[1 : 1 + rows])
    free = model.generate(**batch, **FREE)
    ends = None if rows == 1 else [free[2, WIDTH + 3].item()]  # one row has left the batch when it happens
    options = {**batch, "max_new_tokens": NEW, "eos_token_id": ends}
    plain, mine = model.generate(**options), Cache(rows, 8)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if broken == "drafter":
            kind, method = (TreeDrafter, "propose") if draft.startswith("tree") else (Judge, "pick")
            whole_method, calls = getattr(kind, method), []

            def late(*args: Any) -> Any:
                calls.append(args)
                if len(calls) == 4:
                    raise KeyboardInterrupt
                return whole_method(*args)

            patch.setattr(kind, method, late)
        model.generate(**options, draft=draft, past_key_values=mine, **BROKEN[broken]())
    assert torch.equal(model.generate(**options, draft=draft), plain)
    assert mine.rows == rows
    # What the cache holds is a beginning of the text; with the rest of it, all goes on as if nothing had been.
    assert all(0 <= n < length + NEW for n, length in zip(mine.lengths, LENGTHS[1:], strict=False))
    whole = model.generate(**batch, **FREE) if rows == 1 else plain
    mask = torch.cat([batch["attention_mask"], torch.ones(rows, whole.shape[1] - WIDTH, dtype=torch.long)], 1)
    found = model(whole, attention_mask=mask, use_cache=False).logits
    packed = [whole[row][mask[row].bool()] for row in range(rows)]
    for row, text in enumerate(packed):
        alone = mine.part([row])
        logits = model(text[None, alone.lengths[0] :], past_key_values=alone).logits[0]
        close(logits, found[row][mask[row].bool()][mine.lengths[row] :])


# -- the trace -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4])
def test_the_trace_counts_what_was_drafted_and_what_stood(rows: int) -> None:
    model, batch = attached(), ragged(*LENGTHS[1 : 1 + rows])
    shares = {}
    for draft in ("off", "ngram", "exit:3,4", "exit:5,3", "head,3", "tree,6", PERFECT):
        trace = Trace()
        model.generate(**batch, **FREE, draft=draft, trace=trace)
        if draft == "off":
            assert not (trace.drafted or trace.drafts or trace.acceptance)
            continue
        assert [len(made) for made in trace.sources] == [NEW] * rows
        assert all(made[0] is Source.DECODED for made in trace.sources)
        assert all(Source.DECODED not in made[1:-1] for made in trace.sources) or draft in ("ngram", "tree,6")
        drafted = sum(made.count(Source.DRAFTED) for made in trace.sources)
        assert drafted <= trace.accepted <= trace.drafted
        readers = 2 if draft == "head,3" else 1  # the head reads the prompt too
        assert trace.tokens(Phase.PREFILL) == readers * sum(LENGTHS[1 : 1 + rows])
        # A round gives each row one token more than was accepted of it.
        rounds = sum(len(made) - 1 - made.count(Source.DRAFTED) for made in trace.sources)
        assert rounds <= rows * sum(trace.drafts.values())
        shares[draft] = trace.acceptance
    assert shares[PERFECT] == 1.0
    assert any(0.1 < share < 0.9 for share in shares.values())  # drafts that stand in part are what is tested here


def test_a_perfect_draft_always_stands() -> None:
    for plan, draft in (("0-5", "plan:0-5,6"), ("0 2*2 4a 5", "plan:0 2*2 4a 5,6")):
        model, trace = attached("gemma3", None, plan), Trace()
        model.generate(**one(), max_new_tokens=1 + 3 * 7, eos_token_id=None, draft=draft, trace=trace)
        assert trace.drafted == trace.accepted == 18 and trace.drafts.total() == 3
        assert trace.sources == [[Source.DECODED, *([Source.DRAFTED] * 6 + [Source.VERIFIED]) * 3]]


def test_what_draft_and_target_share_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = attach(tiny.model("llama")), []
    visit = model.runtime.engine.visit

    def spy(step: Any, hidden: Tensor, frame: Any) -> Tensor:
        ran.append((step.visit.layer, hidden.shape[1]))
        return visit(step, hidden, frame)

    monkeypatch.setattr(model.runtime.engine, "visit", spy)
    model.generate(**one(), max_new_tokens=6, eos_token_id=None, draft="exit:2,4")
    after = ran[tiny.LAYERS :]
    tokens_of = [sum(width for layer, width in after if layer == number) for number in range(tiny.LAYERS)]
    assert tokens_of[0] == tokens_of[1] == tokens_of[2] == tokens_of[5]
    assert {width for layer, width in after if layer < 2} == {1}
    assert {width for layer, width in after if layer >= 2} <= {1, 2, 3, 4, 5}
