"""generate: token for token what transformers does, with plans, and no row run longer than it must."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import tiny
import torch
from tiny import one_line, padded, surgery, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from layerwise import Cache, LayerwiseForCausalLM, Phase, Plan, Trace, attach

NAMES = list(tiny.ARCHITECTURES)
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
WIDTH, NEW = 7, 12
FREE: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None}


def ragged(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch, as `generate` takes it."""
    ids, mask = padded(max(lengths), list(lengths), "left", seed)
    return {"input_ids": ids, "attention_mask": mask}


def stops(new: Tensor, ends: list[int]) -> list[int]:
    """Index of the first of `ends` in each row of generated tokens; the last index if there is none."""
    return [next((i for i, token in enumerate(row) if token in ends), len(row) - 1) for row in new.tolist()]


def staggered(base: PreTrainedModel, *lengths: int) -> tuple[dict[str, Tensor], list[int]]:
    """A batch and end tokens that end each of its rows at another time, none at once, none at the run's end."""
    for seed in range(20):
        batch = ragged(*lengths, seed=seed)
        new = base.generate(**batch, **FREE)[:, WIDTH:]
        for ends in combinations(new.unique().tolist(), len(new)):
            found = stops(new, list(ends))
            if len(set(found)) == len(new) and min(found) > 0 and max(found) < NEW - 1:
                return batch, list(ends)
    raise AssertionError("no tokens stop the rows at different times")


def run(model: PreTrainedModel, seed: int = 0, **options: Any) -> Any:
    """A generation with everything recorded."""
    torch.manual_seed(seed)
    return model.generate(return_dict_in_generate=True, output_logits=True, output_scores=True, **options)


def assert_same(model: LayerwiseForCausalLM, base: PreTrainedModel, **options: Any) -> Any:
    """Tokens are equal, and so are scores and logits of rows that still run; returns the output."""
    criteria = options.pop("stopping_criteria", None)
    found, expected = (
        run(each, **options, **({"stopping_criteria": criteria()} if criteria else {})) for each in (model, base)
    )
    assert torch.equal(found.sequences, expected.sequences)
    ends = options.get("eos_token_id") or []
    width = found.sequences.shape[1] - len(expected.logits)
    last = stops(expected.sequences[:, width:], ends if isinstance(ends, list) else [ends])
    assert len(found.scores) == len(found.logits) == len(expected.logits)
    for step in range(len(expected.logits)):
        rows = [row for row, stop in enumerate(last) if stop >= step]
        torch.testing.assert_close(found.logits[step][rows], expected.logits[step][rows], **CLOSE)
        torch.testing.assert_close(found.scores[step][rows], expected.scores[step][rows], **CLOSE)
    return found


# -- greedy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_transformers(name: str, attention: str) -> None:
    base = tiny.model(name, attention=attention)
    model = attach(base)
    ids = tokens(1, WIDTH)
    assert torch.equal(model.generate(ids, **FREE), base.generate(ids, **FREE))
    assert_same(model, base, input_ids=ids, **FREE)
    assert_same(model, base, **ragged(WIDTH, 4, 2), **FREE)


@pytest.mark.parametrize("name", NAMES)
def test_rows_end_at_different_times(name: str) -> None:
    base = tiny.model(name)
    model, (batch, ends) = attach(base), staggered(base, 5, WIDTH, 2)
    found = assert_same(model, base, **batch, max_new_tokens=NEW, eos_token_id=ends)
    last = stops(found.sequences[:, WIDTH:], ends)
    assert found.sequences.shape[1] == WIDTH + max(last) + 1 < WIDTH + NEW
    for row, stop in enumerate(last):
        assert (found.sequences[row, WIDTH + stop + 1 :] == 0).all()
    alone = model.generate(batch["input_ids"][1:2], max_new_tokens=NEW, eos_token_id=ends)
    assert torch.equal(alone[0], found.sequences[1, : WIDTH + last[1] + 1])


def test_a_finished_row_is_not_run_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.model("llama")
    model, trace, (batch, ends) = attach(base), Trace(), staggered(base, 5, WIDTH, 2)
    visit, ran = model.runtime.engine.visit, []

    def spy(step: Any, hidden: Tensor, frame: Any) -> Tensor:
        ran.append(hidden.shape[:2])
        return visit(step, hidden, frame)

    monkeypatch.setattr(model.runtime.engine, "visit", spy)
    output = model.generate(**batch, max_new_tokens=NEW, eos_token_id=ends, trace=trace)
    last = stops(output[:, WIDTH:], ends)
    decoding = [rows for rows, width in ran if width == 1]
    assert sum(decoding) == tiny.LAYERS * sum(last)  # the first token comes from the prompt's pass
    assert len(decoding) == tiny.LAYERS * max(last) and decoding[0] == 3 and decoding[-1] == 1
    assert trace.calls == len(ran)
    assert [len(list(trace.plans(row, Phase.PREFILL))) for row in range(3)] == [5, WIDTH, 2]
    assert [len(list(trace.plans(row, Phase.DECODE))) for row in range(3)] == last


# -- everything else that generate offers --------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7, "top_p": 0.9, "top_k": 0}, {"temperature": 1.5, "top_k": 20}, {"min_p": 0.05}],
)
def test_sampling_with_the_same_seed_equals_transformers(options: dict[str, Any]) -> None:
    base, batch = tiny.model("llama"), ragged(WIDTH, 4, 2)
    model, options = attach(base), {**batch, **options, "do_sample": True}
    answers = set()
    for seed in range(3):
        new = assert_same(model, base, seed=seed, **options, **FREE).sequences[:, WIDTH:]
        answers.add(tuple(new.flatten().tolist()))
        ends = [new[0, 3].item(), new[1, 6].item()]
        assert_same(model, base, seed=seed, **options, max_new_tokens=NEW, eos_token_id=ends)
    assert len(answers) == 3


class NeverTwice(LogitsProcessor):
    """Forbids every token that a row already has, and keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids.tolist())
        return scores.scatter(1, input_ids, float("-inf"))


class EndsAt(StoppingCriteria):
    """Ends row r once the batch is counts[r] columns wide."""

    def __init__(self, *counts: int) -> None:
        self.counts = torch.tensor(counts)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids.shape[1] >= self.counts


@pytest.mark.parametrize(
    "option",
    [
        lambda free: {"repetition_penalty": 1.4},
        lambda free: {"no_repeat_ngram_size": 1},
        lambda free: {"bad_words_ids": [[free[0]], [free[2], free[3]]]},
        lambda free: {"suppress_tokens": free[:3]},
        lambda free: {"forced_eos_token_id": 9},
        lambda free: {"guidance_scale": 1.7},
    ],
    ids=["repetition", "ngram", "bad words", "suppress", "forced end", "guidance"],
)
def test_logits_processors(option: Callable[[list[int]], dict[str, Any]]) -> None:
    base, batch = tiny.model("llama"), ragged(WIDTH, 4)
    free = base.generate(**batch, **FREE)
    options = option(free[0, WIDTH:].tolist())
    found = assert_same(attach(base), base, **batch, **FREE, **options)
    assert not torch.equal(found.sequences, free)  # the option did something


def test_a_processor_sees_the_sequences_that_transformers_shows() -> None:
    base, batch, shown = tiny.model("llama"), ragged(WIDTH, 4, 2), []
    for model in (attach(base), base):
        processor = NeverTwice()
        output = model.generate(**batch, **FREE, logits_processor=LogitsProcessorList([processor]))
        shown.append((processor.seen, output.tolist()))
    assert shown[0] == shown[1] and len(shown[0][0]) == NEW


def test_min_new_tokens() -> None:
    base = tiny.model("llama")
    batch, ends = staggered(base, WIDTH, 4, 2)
    found = assert_same(attach(base), base, **batch, max_new_tokens=NEW, min_new_tokens=9, eos_token_id=ends)
    assert found.sequences.shape[1] >= WIDTH + 9


def test_stopping_criteria_end_rows() -> None:
    base, batch = tiny.model("llama"), ragged(WIDTH, 4, 2)

    def criteria() -> StoppingCriteriaList:
        return StoppingCriteriaList([EndsAt(WIDTH + 4, WIDTH + 2, WIDTH + 6)])

    # 1 never comes, but transformers pads finished rows only where there is an end token
    found = run(attach(base), **batch, max_new_tokens=NEW, eos_token_id=[1], stopping_criteria=criteria())
    expected = base.generate(**batch, max_new_tokens=NEW, eos_token_id=[1], stopping_criteria=criteria())
    assert torch.equal(found.sequences, expected)
    assert found.sequences.shape[1] == WIDTH + 6 and (found.sequences[1, WIDTH + 2 :] == 0).all()


def test_stop_strings() -> None:
    base = tiny.model("llama")
    words = {f"w{chr(97 + i // 26)}{chr(97 + i % 26)}": i for i in range(1, tiny.VOCABULARY)}
    # transformers probes how a tokenizer joins words with the text "abcdef", which must survive
    inner = Tokenizer(WordLevel({"abcdef": 0, **words}, unk_token="abcdef"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="abcdef")
    ids = tokens(1, WIDTH)
    free = base.generate(ids, **FREE)[0, WIDTH:].tolist()
    stop = tokenizer.convert_ids_to_tokens(free[free.index(free[3])])
    options = {"input_ids": ids, "max_new_tokens": NEW, "stop_strings": [stop], "tokenizer": tokenizer}
    found = attach(base).generate(**options)
    assert torch.equal(found, base.generate(**options))
    assert found.shape[1] == WIDTH + free.index(free[3]) + 1


def test_num_return_sequences() -> None:
    base, batch = tiny.model("llama"), ragged(WIDTH, 4)
    options = {**FREE, "do_sample": True, "top_k": 0, "num_return_sequences": 3}
    found = assert_same(attach(base), base, **batch, **options)
    assert len({tuple(row) for row in found.sequences.tolist()}) == 6
    plans = ["0-5", "0-2", "0-2", "5", "0-5", "1"]
    assert attach(base).generate(**batch, **options, plans=plans).shape == (6, WIDTH + NEW)
    for_rows, for_answers = ["0-5", "0-2"], ["0-5"] * 3 + ["0-2"] * 3
    of_rows, of_answers = (run(attach(base), **batch, **options, plans=one) for one in (for_rows, for_answers))
    assert torch.equal(of_rows.sequences, of_answers.sequences)


def test_generation_config_objects() -> None:
    base, ids = tiny.model("llama"), tokens(2, WIDTH)
    model = attach(base)
    config = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=0.8, eos_token_id=[3], pad_token_id=0)
    assert_same(model, base, input_ids=ids, generation_config=config)
    assert torch.equal(model.generate(ids, GenerationConfig(max_length=9)), base.generate(ids, max_length=9))
    base.generation_config.max_new_tokens = 3  # the model's own defaults are shared
    assert model.generate(ids, eos_token_id=None).shape == (2, WIDTH + 3)


def test_inputs_are_moved_to_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = attach(tiny.model("llama")).to("meta"), []
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, *args, **options: given.append((args, options)))
    model.generate(tokens(2, WIDTH), attention_mask=torch.ones(2, WIDTH), max_new_tokens=2)
    ((args, options),) = given
    assert args[0].is_meta and options["attention_mask"].is_meta and options["max_new_tokens"] == 2


def test_prompts_as_embeddings() -> None:
    base, batch = tiny.model("gemma3"), ragged(WIDTH, 4, 2)
    embedded = base.get_input_embeddings()(batch["input_ids"]).detach()
    model = attach(base)
    found = assert_same(model, base, inputs_embeds=embedded, attention_mask=batch["attention_mask"], **FREE)
    assert found.sequences.shape == (3, NEW)
    assert torch.equal(model.generate(**batch, **FREE)[:, WIDTH:], found.sequences)
    assert_same(model, base, **batch, inputs_embeds=embedded, **FREE)


class Recorder:
    """A streamer that keeps what it gets, and may break."""

    def __init__(self, breaks_at: int = 99) -> None:
        self.got: list[Any] = []
        self.breaks_at = breaks_at

    def put(self, value: Tensor) -> None:
        self.got.append(value.tolist())
        if len(self.got) == self.breaks_at:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.got.append("end")


def test_a_streamer_gets_the_prompt_each_token_and_the_end() -> None:
    base = tiny.model("llama")
    batch, ends = staggered(base, WIDTH)
    recorders = Recorder(), Recorder()
    for model, streamer in zip((attach(base), base), recorders, strict=True):
        output = model.generate(**batch, max_new_tokens=NEW, eos_token_id=ends, streamer=streamer)
    assert recorders[0].got == recorders[1].got
    assert recorders[0].got == [batch["input_ids"].tolist(), *([token] for token in output[0, WIDTH:].tolist()), "end"]


def test_what_is_returned() -> None:
    model, batch = attach(tiny.model("llama")), ragged(WIDTH, 4, 2)
    plain = model.generate(**batch, **FREE, return_dict_in_generate=True)
    assert plain.scores is None and plain.logits is None
    assert isinstance(plain.past_key_values, Cache)
    assert plain.past_key_values.lengths == [WIDTH + NEW - 1, 4 + NEW - 1, 2 + NEW - 1]
    full = run(model, **batch, **FREE, temperature=0.5, do_sample=True, top_k=0)
    assert [logits.shape for logits in full.logits] == [(3, tiny.VOCABULARY)] * NEW
    for scores, logits in zip(full.scores, full.logits, strict=True):
        torch.testing.assert_close(scores, logits / 0.5)


# -- plans ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_equals_a_model_rebuilt_by_hand(name: str) -> None:
    base, batch, model = tiny.model(name), ragged(WIDTH, 4, 2), attach(tiny.model(name))
    for plan in ("0 2-5", "0-3 3 1-5", "0-1 2a 3m 4-5 5a"):
        model.plan = plan
        assert_same(model, surgery(base, plan), **batch, **FREE)


@pytest.mark.parametrize("name", NAMES)
def test_rows_with_plans_of_their_own_equal_each_row_alone(name: str) -> None:
    base, rng, lengths = tiny.model(name), random.Random(name), (5, WIDTH, 2, 6)
    model, batch, trace = attach(base), ragged(*lengths), Trace()
    plans: list[Plan | str] = ["0-5", "0-2 4*2", *(tiny.random_plan(rng) for _ in range(2))]
    together = run(model, **batch, **FREE, plans=plans, trace=trace)
    for row, (plan, length) in enumerate(zip(plans, lengths, strict=True)):
        parsed = model.read_plan(plan)
        ids = batch["input_ids"][row : row + 1, WIDTH - length :]
        alone = run(attach(base, plan), input_ids=ids, **FREE)
        assert torch.equal(together.sequences[row, WIDTH - length :], alone.sequences[0])
        for ours, reference in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(ours[row], reference[0], **CLOSE)
        assert list(trace.plans(row, Phase.PREFILL)) == [parsed] * length
        assert list(trace.plans(row, Phase.DECODE)) == [parsed] * (NEW - 1)
    assert model.plan == Plan.full(tiny.LAYERS)


def test_the_trace_tells_layers_per_token() -> None:
    model, trace = attach(tiny.model("llama"), "0-2 3m 5"), Trace()
    model.generate(**ragged(WIDTH, 4), **FREE, trace=trace)
    assert trace.tokens(Phase.PREFILL) == WIDTH + 4 and trace.tokens(Phase.DECODE) == 2 * (NEW - 1)
    assert trace.layers_per_token(Phase.PREFILL) == trace.layers_per_token(Phase.DECODE) == 4.5
    assert trace.calls == 5 * NEW
    mixed = Trace()
    model.generate(**ragged(WIDTH, 4), **FREE, trace=mixed, plans=["0-5", "0-1"])
    assert mixed.layers_per_token(Phase.DECODE) == 4.0
    assert mixed.layers_per_token(Phase.PREFILL) == (6 * WIDTH + 2 * 4) / (WIDTH + 4)


def test_wrong_requests_are_refused() -> None:
    base, ids = tiny.model("llama"), tokens(2, WIDTH)
    model = attach(base)

    def refuses(*mentions: str, **options: Any) -> None:
        one_line(lambda: model.generate(ids, max_new_tokens=2, **options), *mentions)

    refuses("plans", "2 rows", plans=["0-5"])
    refuses("plans", "2 rows", plans=["0-5"] * 3)
    refuses("plans", "2 rows", plans="0-5")
    refuses("layer 6", plans=["0-5", "0-6"])
    refuses("hello", plans=["0-5", "hello"])
    refuses("num_beams=1", num_beams=2)
    refuses("num_beams=1", generation_config=GenerationConfig(num_beams=2))
    refuses("assistant_model", assistant_model=base)
    refuses("synced_gpus", synced_gpus=True)
    refuses("prefill_chunk_size", prefill_chunk_size=4)
    assert model.generate(ids, max_new_tokens=2, eos_token_id=None).shape == (2, WIDTH + 2)


# -- across calls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["0-5", "0-1 1-3 5a"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_continuing_equals_generating_in_one_go(name: str, plan: str) -> None:
    model, batch = attach(tiny.model(name), plan), ragged(WIDTH, 4, 2)
    whole = run(model, **batch, **FREE)
    part = run(model, **batch, max_new_tokens=5, eos_token_id=None)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 5, dtype=torch.long)], 1)
    options = {"input_ids": part.sequences, "attention_mask": mask, "past_key_values": part.past_key_values}
    trace = Trace()
    rest = run(model, **options, max_new_tokens=NEW - 5, eos_token_id=None, trace=trace)
    assert torch.equal(rest.sequences, whole.sequences)
    for ours, reference in zip(part.logits + rest.logits, whole.logits, strict=True):
        torch.testing.assert_close(ours, reference, **CLOSE)
    assert trace.tokens(Phase.PREFILL) == 3  # only what the first call did not run
    assert rest.past_key_values is part.past_key_values
    assert rest.past_key_values.lengths == whole.past_key_values.lengths


def breaks(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor that raises at the third token."""
    if input_ids.shape[1] >= WIDTH + 2:
        raise KeyboardInterrupt
    return scores


@pytest.mark.parametrize(
    "broken",
    [
        lambda: {"streamer": Recorder(breaks_at=3)},
        lambda: {"stopping_criteria": StoppingCriteriaList([lambda ids, _: breaks(ids, torch.zeros(len(ids)).bool())])},
        lambda: {"logits_processor": LogitsProcessorList([breaks])},
    ],
    ids=["streamer", "stopping criterion", "logits processor"],
)
def test_an_interrupted_generation_leaves_the_model_usable(broken: Callable[[], dict[str, Any]]) -> None:
    base, ids = tiny.model("llama"), tokens(1, WIDTH)
    model, trace = attach(base, "0-3 3 5"), Trace()
    before = run(model, input_ids=ids, **FREE)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, **FREE, **broken(), plans=["0-5"], trace=trace)
    assert trace.tokens(Phase.DECODE) in (1, 2)
    after = run(model, input_ids=ids, **FREE)
    assert torch.equal(after.sequences, before.sequences) and torch.equal(after.logits[-1], before.logits[-1])
    assert model.plan == Plan.parse("0-3 3 5") and not model.training


def test_an_interrupted_continuation_can_be_taken_up_again() -> None:
    model, ids = attach(tiny.model("gemma3"), "0-3 3 5"), tokens(1, WIDTH)
    whole = run(model, input_ids=ids, **FREE)
    cache, streamer = Cache(1, NEW), Recorder(breaks_at=6)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, **FREE, past_key_values=cache, streamer=streamer)
    so_far = torch.tensor([streamer.got[0][0] + [token for (token,) in streamer.got[1:]]])
    assert cache.lengths == [so_far.shape[1] - 1]
    left = WIDTH + NEW - so_far.shape[1]
    rest = run(model, input_ids=so_far, past_key_values=cache, max_new_tokens=left, eos_token_id=None)
    assert torch.equal(rest.sequences, whole.sequences)
    torch.testing.assert_close(rest.logits[-1], whole.logits[-1], **CLOSE)
