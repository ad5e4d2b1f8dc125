"""Data: chat examples from files, and built-in tasks from packages. See `examples` and `tasks`."""

from layerwise.data.examples import (
    IGNORED,
    SPLITS,
    Example,
    Tokens,
    collate,
    complete_lines,
    connected_keys,
    length_sorted_batches,
    prompt_ids,
    read_jsonl,
    split_of,
    tokenize,
    write_jsonl,
)
from layerwise.data.tasks import MIXES, TASKS, TEXTS, load, text

__all__ = [
    "IGNORED",
    "MIXES",
    "SPLITS",
    "TASKS",
    "TEXTS",
    "Example",
    "Tokens",
    "collate",
    "complete_lines",
    "connected_keys",
    "length_sorted_batches",
    "load",
    "prompt_ids",
    "read_jsonl",
    "split_of",
    "text",
    "tokenize",
    "write_jsonl",
]
