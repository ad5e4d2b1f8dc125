"""From a prompt to text: pieces, sampling options, encoding, and what an answer tells."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import tiny
import torch
from tiny import one_line
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from layerwise import Phase, Plan, Trace, attach
from layerwise.decoding.text import Answer, Detokenizer, Sampling, answer, encode
from layerwise.trace import Source

CONTEXT = 48
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


@lru_cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox and the other fox went there then"], trainer)
    return tokenizer.to_str()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges: every character beyond ASCII takes several tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), pad_token="<pad>", eos_token="<end>"
    )


def word_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A tiny model of the tokenizer's vocabulary that says printable ASCII only, and never ends by itself."""
    config = tiny.config("llama")
    config.vocab_size, config.max_position_embeddings = len(tokenizer), CONTEXT
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    pieces = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    model.generation_config.suppress_tokens = [
        token for token, piece in enumerate(pieces) if not (piece and piece.isascii() and piece.isprintable())
    ]
    return model


def pieces_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.piece(token) for token in ids]


# -- pieces --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "the quick brown fox went there, and then the other fox went",
        " leading space",
        "   three spaces  and   more ",
        "\n",
        "\n\n  the\n\n\nfox \n went",
        "tabs\tand\r\nlines",
        "é",
        "fox é",
        "日本",
        "a 🙂",
        "🙂\n🙂\nfox 🙂\n",
        "é\nñ\n日\n",
        "the fox " * 60,
        "the\nfox " * 60,
    ],
)
def test_pieces_join_to_what_the_tokenizer_decodes(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(pieces) == len(ids)


def test_spaces_survive_a_tokenizer_that_strips_the_first_one() -> None:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["▁the", "▁fox", "▁", "\n", "?"])}, "?"))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
    for ids in ([0, 1, 3, 1, 0, 3, 3, 1], [0, 2, 2, 1], [0, 1] * 90, [2, 3, 0]):
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_comes_whole_with_its_last_token() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a🙂b")["input_ids"]
    assert len(ids) == 6
    assert pieces_of(tokenizer, ids) == ["a", "", "", "", "🙂", "b"]


def test_what_is_held_at_the_end_is_flushed() -> None:
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer("a🙂🙂")["input_ids"]
    pieces = [detokenizer.piece(token) for token in ids[:7]]  # the second is cut off
    assert pieces[-3:] == ["🙂", "", ""] and detokenizer.rest() == tokenizer.decode(ids[5:7])
    assert detokenizer.piece(ids[7]) == "" and [detokenizer.piece(ids[8]), detokenizer.rest()] == ["🙂", ""]


def test_special_tokens_give_no_text() -> None:
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    fox = tokenizer("fox")["input_ids"]
    pieces = pieces_of(tokenizer, [end, *fox, end, *fox, end])
    assert "".join(pieces) == "foxfox" and pieces[0] == pieces[-1] == ""


def test_text_is_not_decoded_from_the_start_again_and_again() -> None:
    tokenizer = byte_tokenizer()
    decoded: list[int] = []

    class Counting:
        def decode(self, ids: list[int], **options: Any) -> str:
            decoded.append(len(ids))
            return tokenizer.decode(ids, **options)

    ids = tokenizer("the fox went " * 100)["input_ids"]
    assert "".join(pieces_of(Counting(), ids)) == "the fox went " * 100
    assert len(ids) > 300 and max(decoded) < 80


# -- sampling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "mention"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e-40}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.1}, "top-p"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_sampling_refuses_what_makes_no_sense(options: dict[str, float], mention: str) -> None:
    one_line(lambda: Sampling(**options), mention, str(next(iter(options.values()))))


def test_sampling_options() -> None:
    assert Sampling().options() == {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    assert Sampling(temperature=0.5, top_p=1.0).options() == {
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 1.0,
        "top_k": 0,
    }
    assert Sampling(temperature=0.0, top_p=0.5).options()["do_sample"] is False


# -- encoding ------------------------------------------------------------------------------------------------


def test_prompts_are_encoded_with_and_without_a_chat_format() -> None:
    tokenizer = byte_tokenizer()
    for system, expected in ((None, "fox"), ("be brief", "be brief\n\nfox")):
        encoded = encode(tokenizer, "fox", system)
        assert tokenizer.decode(encoded["input_ids"][0]) == expected
        assert encoded["attention_mask"].tolist() == [[1] * encoded["input_ids"].shape[1]]
        assert set(encoded) == {"input_ids", "attention_mask"}
    tokenizer.chat_template = TEMPLATE
    for system, expected in ((None, "<user>fox\n<bot>"), ("be brief", "<system>be brief\n<user>fox\n<bot>")):
        assert tokenizer.decode(encode(tokenizer, "fox", system)["input_ids"][0]) == expected


def test_empty_and_long_prompts_are_refused() -> None:
    tokenizer = byte_tokenizer()
    for prompt in ("", "  \n\t"):
        one_line(lambda prompt=prompt: encode(tokenizer, prompt), "empty")
    width = encode(tokenizer, "the fox")["input_ids"].shape[1]
    assert encode(tokenizer, "the fox", context=width + 1)["input_ids"].shape[1] == width
    one_line(lambda: encode(tokenizer, "the fox", context=width), f"{width} tokens", f"ends at {width}", "shorten")
    one_line(lambda: encode(tokenizer, "fox", system="the fox", context=width), "shorten")


# -- answers -------------------------------------------------------------------------------------------------


def test_an_answer_is_what_generate_makes() -> None:
    tokenizer = byte_tokenizer()
    base, heard = word_model(tokenizer), []
    model = attach(base, "0-2 4m 5")
    reply = answer(model, tokenizer, "the fox", max_new_tokens=9, on_text=heard.append)
    ids = encode(tokenizer, "the fox")["input_ids"]
    expected = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    assert reply.text == tokenizer.decode(expected) and len(reply.text) >= 9
    assert tuple(heard) == reply.pieces and "".join(reply.pieces) == reply.text
    assert reply.tokens == len(reply.pieces) == len(reply.plans) == 9
    assert set(reply.plans) == {model.plan} and reply.layers_per_token == 4.5
    assert reply.prompt_tokens == ids.shape[1]
    assert reply.stop_reason == "max new tokens"
    assert reply.prefill_seconds > 0 and reply.decode_seconds > 0
    assert reply.tokens_per_second == pytest.approx(8 / reply.decode_seconds)


def test_an_answer_stops_at_the_end_token() -> None:
    tokenizer = byte_tokenizer()
    base = word_model(tokenizer)
    model = attach(base)
    ids = encode(tokenizer, "the fox")["input_ids"]
    free = model.generate(ids, max_new_tokens=9)[0, ids.shape[1] :].tolist()
    stop = next(i for i, token in enumerate(free) if i > 1 and token not in free[:i])
    for ends in (free[stop], [3, free[stop]]):
        base.generation_config.eos_token_id = ends
        reply = answer(model, tokenizer, "the fox", max_new_tokens=9)
        assert reply.stop_reason == "end of answer"
        assert reply.tokens == len(reply.pieces) == len(reply.plans) == stop + 1
    assert answer(model, tokenizer, "the fox", max_new_tokens=stop).stop_reason == "max new tokens"
    assert answer(model, tokenizer, "the fox", max_new_tokens=stop + 1).stop_reason == "end of answer"


def test_an_answer_ends_with_the_context() -> None:
    tokenizer = byte_tokenizer()
    model = attach(word_model(tokenizer))
    assert model.runtime.backbone.context == CONTEXT
    width = encode(tokenizer, "the fox")["input_ids"].shape[1]
    for asked, tokens, reason in (
        (1000, CONTEXT - width, "end of context"),
        (CONTEXT - width + 1, CONTEXT - width, "end of context"),
        (CONTEXT - width, CONTEXT - width, "max new tokens"),
        (1, 1, "max new tokens"),
    ):
        reply = answer(model, tokenizer, "the fox", max_new_tokens=asked)
        assert (reply.tokens, reply.stop_reason) == (tokens, reason)
        assert len(reply.plans) == tokens
    assert reply.tokens_per_second == 0.0  # one token says nothing about speed


def test_answers_that_cannot_be_given() -> None:
    tokenizer = byte_tokenizer()
    model = attach(word_model(tokenizer))
    one_line(lambda: answer(model, tokenizer, "fox", max_new_tokens=0), "max-new-tokens", "0")
    one_line(lambda: answer(model, tokenizer, " "), "empty")
    one_line(lambda: answer(model, tokenizer, "fox went " * CONTEXT), f"ends at {CONTEXT}")


def test_the_same_seed_gives_the_same_answer() -> None:
    tokenizer = byte_tokenizer()
    base = word_model(tokenizer)
    model = attach(base)

    def say(sampling: Sampling | None) -> str:
        torch.manual_seed(len(said))  # what was drawn before must not matter
        said.append(answer(model, tokenizer, "the fox", max_new_tokens=12, sampling=sampling).text)
        return said[-1]

    said: list[str] = []
    warm = Sampling(temperature=1.0, top_p=0.9, seed=4)
    assert say(warm) == say(warm) != say(Sampling(temperature=1.0, top_p=0.9, seed=5))
    assert say(None) == say(Sampling(seed=7)) != say(warm)
    torch.manual_seed(4)
    ids = encode(tokenizer, "the fox")["input_ids"]
    drawn = base.generate(ids, max_new_tokens=12, do_sample=True, temperature=1.0, top_p=0.9, top_k=0)
    assert tokenizer.decode(drawn[0, ids.shape[1] :]) == say(warm)


def test_the_system_prompt_and_the_plan_matter() -> None:
    tokenizer = byte_tokenizer()
    model, trace = attach(word_model(tokenizer)), Trace()
    plain = answer(model, tokenizer, "the fox", max_new_tokens=8)
    assert answer(model, tokenizer, "the fox", system="then", max_new_tokens=8).prompt_tokens > plain.prompt_tokens
    model.plan = "1 3"
    short = answer(model, tokenizer, "the fox", max_new_tokens=8)
    assert short.text != plain.text and short.plans == (Plan.of([1, 3]),) * 8
    model.generate(**encode(tokenizer, "the fox"), max_new_tokens=8, trace=trace)
    assert trace.layers_per_token(Phase.DECODE) == short.layers_per_token == 2


def test_what_an_answer_says_about_itself() -> None:
    plans = (Plan.full(4), Plan.full(4), Plan.parse("0 1m"))
    reply = Answer(("a", "", "é"), plans, 5, 0.25, 0.5, "end of answer")
    assert reply.text == "aé" and reply.tokens == 3 and reply.tokens_per_second == 4.0
    assert reply.layers_per_token == pytest.approx(9.5 / 3)
    told = "3 tokens, 1 of them by 2 layers, 4.0 tokens/s, 3.2 layers per token, stopped at end of answer"
    assert reply.summary() == told
    assert reply.to_dict() == {
        "text": "aé",
        "tokens": 3,
        "prompt_tokens": 5,
        "tokens_per_second": 4.0,
        "layers_per_token": 3.167,
        "prefill_seconds": 0.25,
        "decode_seconds": 0.5,
        "stop_reason": "end of answer",
        "plan": "0-3",
        "draft": "off",
        "drafted_tokens": 0,
        "exited_tokens": 1,
        "acceptance": None,
    }
    made = (Source.DECODED, Source.DRAFTED, Source.VERIFIED)
    drafted = Answer(("a", "b", "c"), plans, 5, 0.25, 0.5, "max new tokens", made, 12.0, 0.5, "ngram")
    assert drafted.layers_per_token == 4.0
    assert "3 tokens, 1 of them drafted (50% accepted), 4.0 tokens/s, 4.0 layers per token" in drafted.summary()
    assert (drafted.to_dict()["drafted_tokens"], drafted.to_dict()["acceptance"]) == (1, 0.5)
