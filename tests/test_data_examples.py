"""Chat examples: files of them, their tokens and labels, and batches of these."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from layerwise.data import (
    IGNORED,
    Example,
    Tokens,
    collate,
    length_sorted_batches,
    prompt_ids,
    read_jsonl,
    tokenize,
    write_jsonl,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte; the end-of-sequence token is not what ends a turn."""
    alphabet = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


# -- tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["4", "im", "assistant", " two\nlines\n", "2 + 2?"])
def test_labels_cover_the_answer_and_the_end_of_turn(answer: str) -> None:
    chatml = tokenizer(CHATML)
    example = Example.of("2 + 2?", answer, "sums", "a", system="Count.")
    tokens = tokenize(example, chatml)
    assert tokens is not None
    prompt = chatml.apply_chat_template(list(example.prompt), add_generation_prompt=True, tokenize=False)
    width = len(prompt_ids(example, chatml))
    assert chatml.decode(prompt_ids(example, chatml)) == prompt
    assert tokens.input_ids[:width] == prompt_ids(example, chatml) and tokens.prompt_length == width
    assert tokens.labels == [IGNORED] * width + tokens.input_ids[width:]
    assert chatml.decode(tokens.input_ids[width:]) == f"{answer}<|im_end|>"
    assert tokens.labels[-1] == chatml.convert_tokens_to_ids("<|im_end|>")


def test_without_a_template_the_answer_ends_with_the_sequence() -> None:
    plain = tokenizer(None)
    tokens = tokenize(Example.of("2 + 2?", "4", "sums", "a", system="Count."), plain)
    assert tokens is not None and plain.decode(tokens.input_ids) == "Count.\n\n2 + 2?4<|endoftext|>"
    plain.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        tokenize(Example.of("a", "b", "", ""), plain)


def test_too_long_examples_are_dropped_not_cut() -> None:
    chatml = tokenizer(CHATML)
    example = Example.of("2 + 2?", "4", "sums", "a")
    whole = tokenize(example, chatml)
    assert whole is not None
    assert tokenize(example, chatml, len(whole.input_ids)) == whole
    assert tokenize(example, chatml, len(whole.input_ids) - 1) is None


def test_a_prompt_without_an_answer_is_not_learnt_from() -> None:
    assert tokenize(Example.of("2 + 2?", "", "sums", "a"), tokenizer(CHATML)) is None


def test_the_prompt_is_what_generation_is_fed() -> None:
    from layerwise.decoding.text import encode

    for one in (tokenizer(CHATML), tokenizer(None)):
        for system in (None, "Count."):
            fed = encode(one, "2 + 2?", system)["input_ids"][0].tolist()
            assert prompt_ids(Example.of("2 + 2?", "4", "sums", "a", system), one) == fed


def test_a_template_that_refuses_a_system_message_is_told_in_one_line() -> None:
    from layerwise.decoding.text import encode

    strict = CHATML.replace(
        "{%", "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{%", 1
    )
    with pytest.raises(ValueError, match="refuses this prompt: no system"):
        encode(tokenizer(strict), "2 + 2?", "Count.")


# -- batches -----------------------------------------------------------------------------------------------------


def test_collation_pads_on_the_right() -> None:
    batch = collate([Tokens([5, 6, 7], [IGNORED, 6, 7]), Tokens([8], [8])], pad_id=9)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[IGNORED, 6, 7], [8, IGNORED, IGNORED]],
    }
    with pytest.raises(ValueError, match="at least one row"):
        collate([], 0)


def test_batches_keep_the_limit_and_every_index() -> None:
    lengths = [(37 * number) % 200 + 1 for number in range(500)] + [5000]
    batches = length_sorted_batches(lengths, 1000, seed=1)
    assert sorted(index for batch in batches for index in batch) == list(range(501))
    assert [500] in batches
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 1000
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)


def test_batches_depend_on_the_seed_alone() -> None:
    lengths = [(37 * number) % 200 + 1 for number in range(500)]
    first, again, other = (length_sorted_batches(lengths, 1000, seed) for seed in (1, 1, 2))
    assert first == again
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in other}
    longest = [max(lengths[index] for index in batch) for batch in first]
    assert longest != sorted(longest)
    with pytest.raises(ValueError, match="at least 1"):
        length_sorted_batches(lengths, 0)


# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_files_read_back_what_was_written(tmp_path: Path, name: str) -> None:
    examples = [Example.of("2 + 2?\n", "4 ✓", "sums", "a", "Count."), Example.of("x", "", "chat", "")]
    write_jsonl(tmp_path / name, examples)
    assert read_jsonl(tmp_path / name) == examples
    assert (gzip.open if name.endswith("gz") else open)(tmp_path / name).read(1)  # really packed, or really not


def test_kind_and_key_may_be_left_out(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "Two  plus\nTWO?"}, {"role": "assistant", "content": "4"}]
    file.write_text("\n" + json.dumps({"messages": messages}) + "\n\n")
    (example,) = read_jsonl(file)
    assert (example.kind, example.key) == ("chat", "two plus two?")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"messages": [', "not JSON"),
        ("[1]", "no list of messages"),
        ('{"prompt": "a"}', "no list of messages"),
        ('{"messages": ["a", "b"]}', "needs a role"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "needs a role"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "must be a text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "last, the assistant's answer"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "last, the assistant's answer"),
        ('{"messages": [], "key": 1}', "kind and key must be texts"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "a.jsonl"
    write_jsonl(file, [Example.of("a", "b", "c", "d")])
    file.write_text(file.read_text() + "\n" + line + "\n")
    with pytest.raises(ValueError, match=says) as error:
        read_jsonl(file)
    assert f"{file}, line 3: " in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"messages": "\xe9"}')
    with pytest.raises(ValueError, match="save it as UTF-8"):
        read_jsonl(tmp_path / "latin.jsonl")
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    with pytest.raises(ValueError, match="not gzipped"):
        read_jsonl(tmp_path / "plain.jsonl.gz")
    cut = tmp_path / "cut.jsonl.gz"
    write_jsonl(cut, [Example.of("2 + 2?", "4", "sums", "a")])
    whole = cut.read_bytes()
    for damaged in (whole[:-12], whole[:14] + b"\xff" * 8 + whole[22:]):
        cut.write_bytes(damaged)
        with pytest.raises(ValueError, match="cut short or damaged"):
            read_jsonl(cut)


def test_the_command_counts_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from layerwise.cli.data import data
    from layerwise.data import tasks

    monkeypatch.setattr(tasks, "TASKS", tasks.TASKS)
    for task in list(tasks.TASKS):
        monkeypatch.setitem(tasks.TASKS, task, lambda: [Example.of(f"q{n}", "a", "k", str(n)) for n in range(50)])
    monkeypatch.setattr(tasks, "human_eval", list)
    tasks._all.cache_clear()
    try:
        data("tools", "train", tmp_path / "a.jsonl", json=True)
        written = read_jsonl(tmp_path / "a.jsonl")
        last = capsys.readouterr().out.splitlines()
        assert last[0] == f"tools, train: {len(written)} examples written to {tmp_path / 'a.jsonl'}"
        assert json.loads(last[-1])["examples"] == len(written) == len(tasks.load("tools", "train"))
        data(list_tasks=True, json=True)
        counts = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
        mixed = counts.pop("routing")
        assert set(counts) == set(tasks.TASKS) and all(sum(found.values()) == 50 for found in counts.values())
        assert all(found == counts["tools"][split] // 4 * 10 for split, found in mixed.items())
        with pytest.raises(ValueError, match="--list"):
            data()
        with pytest.raises(ValueError, match="does not exist"):
            data("tools", "train", tmp_path / "none" / "a.jsonl")
    finally:
        tasks._all.cache_clear()
