"""The answers a model writes itself: those of a stopped run are gone on from, those of another one are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_hub import with_lora
from test_path_suite import number_tokenizer
from tiny import one_line

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


def test_answers_of_another_model_or_to_other_prompts_are_not_mixed(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    whole = written(file)[1]
    before = file.read_bytes()
    one_line(lambda: written(file, seed=1), str(file), "another model:", "another folder")
    one_line(lambda: written(file, most=5), "another max-new-tokens:")
    others = (ASKED[1:], ASKED[:5], [*ASKED[:5], ASKED[0]], [*ASKED, ASKED[0]])
    for asked in others:
        one_line(lambda asked=asked: written(file, asked), "another set of prompts:")
    (tmp_path / "answers.json").unlink()  # as earlier versions left it
    for asked in others[:3]:
        one_line(lambda asked=asked: written(file, asked), "another set of prompts:")
    assert file.read_bytes() == before and written(file) == ([], whole)
    one_line(lambda: written(file, seed=1), "another model:")
    adapted = attach(with_lora(tiny.model("llama")), engine="eager")
    one_line(lambda: list(write_answers(adapted, number_tokenizer(), ASKED, file, 4)), "another model:")
    file.write_bytes(b"")
    assert written(file, seed=1)[1] != whole
