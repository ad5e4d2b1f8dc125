"""Where things that can be made again are kept: converted models and compiled kernels."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import lru_cache
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """A folder (made if need be) under $LAYERWISE_CACHE, or else the user's cache directory."""
    root = os.environ.get("LAYERWISE_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerwise"
    folder = base.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kernel_dir() -> Path:
    """The folder of code compiled for this CPU. A cache may be shared by machines, and another one's code may die here
    of an instruction that this one lacks."""
    return cache_dir("kernels", hashlib.sha256(cpu_features().encode()).hexdigest()[:12])


@lru_cache
def cpu_features() -> str:
    """What tells CPUs apart for which a compiler makes different code."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def bundled_adapter(name: str) -> Path | None:
    """The folder of an adapter that the source tree brings; None where layerwise was installed without it."""
    folder = Path(__file__).resolve().parents[2] / "adapters" / name
    return folder if (folder / "layerwise.json").is_file() else None
