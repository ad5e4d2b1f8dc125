"""Fixtures that several files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import torch

from layerwise.paths import cache_dir


@pytest.fixture(scope="session", autouse=True)
def _kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One fresh kernel cache for the whole run and all its processes: nothing that an earlier version left behind is
    used. Converted models are those at hand."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    models, cache = cache_dir("models"), root / "cache"
    cache.mkdir(exist_ok=True)
    with suppress(FileExistsError):
        (cache / "models").symlink_to(models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYERWISE_CACHE", str(cache))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, as the hub would give it."""
    folder = tmp_path_factory.mktemp("base")
    tiny.model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch has so many threads for a test: parametrize it with `indirect`."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
