"""Fixtures that several files share."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, as the hub would give it."""
    folder = tmp_path_factory.mktemp("base")
    tiny.model("llama").save_pretrained(folder)
    return folder
