"""Reading files of tensors that an adapter brings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import Tensor

Made = TypeVar("Made")


def read_tensors(path: Path, what: str, make: Callable[[dict[str, str], dict[str, Tensor]], Made]) -> Made:
    """What `make` makes of the metadata and the tensors in the safetensors file at `path`.

    Raises:
        ValueError: the file is missing or damaged, or `make` cannot use it; one line that names `what` it is.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return make(about, tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{what} '{path}' cannot be loaded: {reason}") from error
