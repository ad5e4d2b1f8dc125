"""Where things that can be made again are kept: converted models and compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """A folder (made if need be) under $LAYERWISE_CACHE, or else the user's cache directory."""
    root = os.environ.get("LAYERWISE_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerwise"
    folder = base.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def bundled_adapter(name: str) -> Path | None:
    """The folder of an adapter that the source tree brings; None where layerwise was installed without it."""
    folder = Path(__file__).resolve().parents[2] / "adapters" / name
    return folder if (folder / "layerwise.json").is_file() else None
