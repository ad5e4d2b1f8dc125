"""Chat examples: what they are, which split they belong to, and how they become batches of tokens.

An example is a conversation whose last message is the answer to learn. Files hold one a line:

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}], "kind": "sums"}

`kind` says where it comes from; examples that share a `key` belong together and never fall into different splits
(both may be left out).
Labels cover the answer and the token that ends it, not the prompt; and the prompt's tokens are exactly those that
generation feeds the model, so that what is trained is what is run.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that cross entropy leaves out
ROLES = ("system", "user", "assistant", "tool")
SPLITS = ("train", "validation", "test")
_FORM = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


@dataclass(frozen=True)
class Example:
    """A conversation; an empty answer means that none is known (a prompt to measure with, not to learn from).

    Raises:
        ValueError: a message has no known role or no text, or the last one is not the assistant's.
    """

    messages: tuple[dict[str, str], ...]
    kind: str
    key: str

    def __post_init__(self) -> None:
        for message in self.messages:
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise ValueError(f"a message needs a role, one of {', '.join(ROLES)}: write {_FORM}")
            if not isinstance(message.get("content"), str):
                raise ValueError(f"the content of a message must be a text: write {_FORM}")
        if len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            raise ValueError(f"messages must be a prompt and, last, the assistant's answer: write {_FORM}")

    @classmethod
    def of(cls, prompt: str, answer: str, kind: str, key: str, system: str | None = None) -> Example:
        """One question, one answer."""
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return cls(tuple(messages), kind, key)

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


# -- files -------------------------------------------------------------------------------------------------------


def read_jsonl(path: str | Path) -> list[Example]:
    """The examples of a JSON lines file (gzipped if its name ends in .gz); empty lines are passed over.

    Without a `key`, the first message of the user is the key, so that repeated questions stay in one split.

    Raises:
        ValueError: there is no such file, or a line is no example; names the file and the line.
    """
    try:
        with _open(path, "r") as lines:
            return [_read(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"there is no file '{path}': give a file of JSON lines, one example a line") from error
    except gzip.BadGzipFile as error:
        raise ValueError(f"{path} is not gzipped: give it a name that does not end in .gz") from error
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path} is cut short or damaged: copy or make it again") from error


def _read(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}); write {_FORM}") from error
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise ValueError(f"{where}: no list of messages; write {_FORM}")
    kind, key = row.get("kind", "chat"), row.get("key")
    if not isinstance(kind, str) or not isinstance(key, str | None):
        raise ValueError(f"{where}: kind and key must be texts; quote them or leave them out")
    try:
        example = Example(tuple(row["messages"]), kind, key or "")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if key is not None:
        return example
    first = next((one["content"] for one in example.prompt if one["role"] == "user"), example.prompt[0]["content"])
    return Example(example.messages, kind, " ".join(first.lower().split()))


def write_jsonl(path: str | Path, examples: Iterable[Example]) -> None:
    """One example a line, as `read_jsonl` reads them; gzipped if the name ends in .gz."""
    with _open(path, "w") as out:
        for one in examples:
            row = {"messages": list(one.messages), "kind": one.kind, "key": one.key}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def complete_lines(file: Path) -> list[Any]:
    """The JSON lines that a stopped run wrote; the last one is cut off the file if it was not finished."""
    if not file.exists():
        return []
    text = file.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        with file.open("r+b") as out:
            out.truncate(whole)
    return [json.loads(line) for line in text[:whole].splitlines()]


def _open(path: str | Path, mode: str) -> IO[str]:
    if str(path).endswith(".gz"):
        return cast(IO[str], gzip.open(path, f"{mode}t", encoding="utf-8"))
    return open(path, mode, encoding="utf-8")


# -- splits ------------------------------------------------------------------------------------------------------


def split_of(key: str, validation: float = 0.08, test: float = 0.12) -> str:
    """One of SPLITS, by a hash of the key: the same on every machine and in every run."""
    digest = hashlib.sha256(key.encode("utf-8")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < test else "validation" if place < test + validation else "train"


def connected_keys(labels: Sequence[Collection[str]]) -> list[str]:
    """A key for each item such that items that share a label, directly or through others, share the key.

    `labels[i]` are the things (names, questions) that must not be in two splits; a union-find over them. The key is
    the smallest label of the connected component, so it does not depend on the items' order.
    """
    parent: dict[str, str] = {}

    def root(label: str) -> str:
        parent.setdefault(label, label)
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    for group in labels:
        if not group:
            raise ValueError("an item without labels belongs to no split: give it at least one")
        roots = sorted({root(label) for label in group})
        for other in roots[1:]:
            parent[other] = roots[0]  # the smaller one stays the root: roots are the smallest labels
    return [root(next(iter(group))) for group in labels]


# -- tokens ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """Token ids of a prompt and its answer; `labels` are the same ids, IGNORED on the prompt."""

    input_ids: list[int]
    labels: list[int]

    @property
    def prompt_length(self) -> int:
        """How many tokens come before the answer."""
        return next((at for at, label in enumerate(self.labels) if label != IGNORED), len(self.labels))


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens generation starts from; without a chat template the messages' texts, blank lines between them."""
    if tokenizer.chat_template:
        encoded = tokenizer.apply_chat_template(list(example.prompt), add_generation_prompt=True, return_dict=True)
    else:
        encoded = tokenizer("\n\n".join(message["content"] for message in example.prompt))
    return list(cast(Any, encoded)["input_ids"])


def tokenize(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Tokens | None:
    """Prompt, answer and end of turn as tokens; None if there is no answer or more than `max_length` tokens.

    Too long examples are dropped, not cut: half an answer teaches the model to stop nowhere.

    Raises:
        ValueError: the tokenizer has neither an end of turn in its chat template nor an end-of-sequence token.
    """
    if not example.answer:
        return None
    prompt = prompt_ids(example, tokenizer)
    text = example.answer + _end_of_turn(tokenizer)
    answer = list(cast(Any, tokenizer(text, add_special_tokens=False))["input_ids"])
    if max_length is not None and len(prompt) + len(answer) > max_length:
        return None
    return Tokens(prompt + answer, [IGNORED] * len(prompt) + answer)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes after an answer, `<|im_end|>` in ChatML; else the end-of-sequence token."""
    if tokenizer.chat_template:
        mark = "@@answer@@"
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
        _, found, ending = str(tokenizer.apply_chat_template(messages, tokenize=False)).rpartition(mark)
        if found and ending.strip():
            return ending.strip()
    if not tokenizer.eos_token:
        raise ValueError("the tokenizer has no end-of-sequence token: set tokenizer.eos_token")
    return str(tokenizer.eos_token)


def collate(rows: Sequence[Tokens], pad_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `labels`, each (rows, longest), int64, padded on the right.

    Raises:
        ValueError: there are no rows.
    """
    import torch

    if not rows:
        raise ValueError("a batch needs at least one row")
    width = max(len(row.input_ids) for row in rows)

    def padded(values: Iterable[list[int]], fill: int) -> Tensor:
        return torch.tensor([value + [fill] * (width - len(value)) for value in values], dtype=torch.int64)

    return {
        "input_ids": padded((row.input_ids for row in rows), pad_id),
        "attention_mask": padded(([1] * len(row.input_ids) for row in rows), 0),
        "labels": padded((row.labels for row in rows), IGNORED),
    }


def length_sorted_batches(lengths: Sequence[int], tokens_per_batch: int, seed: int = 0) -> list[list[int]]:
    """Indices in shuffled batches of similar length: rows times longest row is at most `tokens_per_batch`.

    Each index comes once. Lengths are blurred by a tenth before sorting, so that other seeds make other batches, not
    only another order. A row longer than the limit is a batch of its own.

    Raises:
        ValueError: the limit is below one token.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens per batch must be at least 1, not {tokens_per_batch}")
    chance = random.Random(seed)
    blurred = [length * chance.uniform(0.95, 1.05) for length in lengths]
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=blurred.__getitem__):
        longest = max(longest, lengths[index])
        if not batches or (len(batches[-1]) + 1) * longest > tokens_per_batch:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    chance.shuffle(batches)
    return batches
