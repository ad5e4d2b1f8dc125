"""The answers a model writes itself: those of a stopped run are gone on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_path_suite import number_tokenizer

from layerwise import attach
from layerwise.data import Example
from layerwise.training.answers import write_answers

ASKED = [Example.of(f"w{number} w7 w{number + 1}", "w3", "sums", str(number)) for number in range(10, 16)]


def written(file: Path, asked: list[Example] = ASKED, seed: int = 0, most: int = 4) -> tuple[list[int], dict[int, Any]]:
    """What is reported, two rows at a time, and then the file's lines by their ids."""
    model = attach(tiny.model("llama", seed), engine="eager")
    reported = list(write_answers(model, number_tokenizer(), asked, file, most, rows=2))
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return reported, {line["id"]: line for line in lines}


@pytest.mark.parametrize("left", [b"", b'{"id": 3, "ki', '{"id": 3, "kind": "\u00e9'.encode()[:-1]])
def test_a_stopped_run_goes_on_even_in_the_middle_of_a_line(tmp_path: Path, left: bytes) -> None:
    file = tmp_path / "answers.jsonl"
    reported, whole = written(file)
    assert reported == [2, 4, 6] and sorted(whole) == list(range(6))
    assert all(0 < len(line["answer"]) <= 4 for line in whole.values())
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + left)
    assert written(file) == ([5, 6], whole)
    assert written(file) == ([], whole)
