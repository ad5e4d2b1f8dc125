"""Early exit without verification: by confidence, and what its two ends must be."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_text import byte_tokenizer, word_model

from layerwise.decoding.drafts import MOST, Draft
from layerwise.decoding.text import answer
from layerwise.model.causal_lm import LayerwiseForCausalLM, attach
from layerwise.trace import Source, Trace


@pytest.fixture(scope="module")
def model() -> LayerwiseForCausalLM:
    made = attach(tiny.model("llama"))
    made.generation_config.eos_token_id = None
    return made


def prompt(rows: int = 1) -> torch.Tensor:
    return torch.randint(6, 97, (rows, 7), generator=torch.Generator().manual_seed(4))


def greedy(model: LayerwiseForCausalLM, ids: torch.Tensor, **options: object) -> torch.Tensor:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, pad_token_id=0, **options
    )


def test_never_sure_is_the_whole_model(model: LayerwiseForCausalLM) -> None:
    assert torch.equal(greedy(model, prompt(), draft=Draft.early_exit("3@1.0", 6)), greedy(model, prompt()))


def test_always_sure_is_the_exit(model: LayerwiseForCausalLM) -> None:
    """After the first token, which reading the prompt gives, the exit writes MOST tokens on its own."""
    trace = Trace()
    found = greedy(model, prompt(), draft=Draft.early_exit("3@.0001", 6), trace=trace)
    first = found[:, : prompt().shape[1] + 1]
    alone = model.generate(
        first,
        attention_mask=torch.ones_like(first),
        max_new_tokens=MOST,
        do_sample=False,
        plans=["0-2"],
        pad_token_id=0,
    )
    assert torch.equal(found[:, : alone.shape[1]], alone)
    assert trace.sources[0][1 : MOST + 1] == [Source.DRAFTED] * MOST
    assert trace.sources[0][MOST + 1] is Source.VERIFIED


def test_the_surer_it_must_be_the_fewer_leave_early(model: LayerwiseForCausalLM) -> None:
    counts = []
    for trust in (".0001", "0.015", "0.0175", "0.02", "0.025", "0.03", "0.04", "1.0"):
        trace = Trace()
        greedy(model, prompt(), draft=Draft.early_exit(f"4@{trust}", 6), trace=trace)
        counts.append(trace.sources[0].count(Source.DRAFTED))
        assert trace.accepted == trace.drafted
    assert counts[0] > 20 and counts[-1] == 0
    assert any(0 < count < counts[0] for count in counts), counts


@pytest.mark.parametrize("text", ["8", "8@", "@0.9", "8@1.5", "8@-0.1", "x@0.9", "8@0"])
def test_bad_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no early exit: write layers@probability"):
        Draft.early_exit(text)


def test_an_exit_that_the_model_lacks() -> None:
    with pytest.raises(ValueError, match="an exit is after 1 to 5"):
        Draft.early_exit("6@0.9", 6)
    with pytest.raises(ValueError, match="an exit is after 1 to 5"):
        attach(tiny.model("llama")).read_draft(Draft.early_exit("40@0.9"))


def test_generation_arguments_count(model: LayerwiseForCausalLM) -> None:
    """Nobody looks at trusted tokens again, so they are chosen with all that `generate` was told, in every row."""
    exit = Draft.early_exit("3@.0001", 6)
    ids = torch.cat([prompt(), prompt().flip(1)])
    for row in greedy(model, ids, draft=exit, no_repeat_ngram_size=1).tolist():
        assert len(set(row[6:])) == len(row[6:])
    alone = [greedy(model, one[None], draft=exit, repetition_penalty=5.0) for one in ids]
    assert torch.equal(greedy(model, ids, draft=exit, repetition_penalty=5.0), torch.cat(alone))
    first = alone[0][:, : ids.shape[1] + 1]
    options = {"attention_mask": torch.ones_like(first), "plans": ["0-2"], "pad_token_id": 0}
    shallow = model.generate(first, max_new_tokens=MOST, do_sample=False, repetition_penalty=5.0, **options)
    assert torch.equal(alone[0][:, : shallow.shape[1]], shallow)
    with pytest.raises(ValueError, match="scores and logits are not kept"):
        greedy(model, prompt(), draft=exit, return_dict_in_generate=True, output_scores=True)


def test_rows_leave_as_they_would_alone(model: LayerwiseForCausalLM) -> None:
    """Each by its own plan and its own confidence, whatever its neighbours do."""
    ids, rows = prompt(3), [["0-5"], ["3-5 0-2"], ["0 2-5"]]
    for trust in (".0001", ".02", ".03", ".04"):
        exit = Draft.early_exit(f"3@{trust}", 6)
        for plans in (rows, [["0-5"]] * 3):
            both = greedy(model, ids, draft=exit, plans=[plan for (plan,) in plans])
            alone = [greedy(model, ids[row : row + 1], draft=exit, plans=plans[row]) for row in range(3)]
            assert torch.equal(both, torch.cat(alone)), (trust, plans)


def test_an_answer_tells_which_tokens_left() -> None:
    tokenizer = byte_tokenizer()
    model = attach(word_model(tokenizer))
    reply = answer(model, tokenizer, "the fox", max_new_tokens=9, draft=Draft.early_exit("3@.0001", 6))
    assert [str(plan) for plan in reply.plans] == ["0-5"] + ["0-2"] * 7 + ["0-5"]
    assert set(reply.sources) == {Source.DECODED} and reply.acceptance is None
    assert "7 of them by 3 layers" in reply.summary()
    assert reply.to_dict()["plan"] == "0-5" and reply.to_dict()["exited_tokens"] == 7
    assert reply.text.isprintable()  # what the model is told to suppress, an exit does not say either
