"""The file beside `layerwise.json` that holds what a routing policy has learnt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import Tensor

FILE = "routers.safetensors"
Made = TypeVar("Made")


def write_tensors(folder: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` in the numbers they are in."""
    from safetensors.torch import save_file

    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(kept, str(Path(folder) / FILE), metadata={"format": "pt"})


def read_tensors(folder: str | Path, make: Callable[[dict[str, Tensor]], Made]) -> Made:
    """What `make` makes of the tensors in `folder`.

    Raises:
        ValueError: the file is missing or damaged, or `make` cannot use it; one line that names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / FILE
    try:
        return make(load_file(str(path)))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the routers '{path}' cannot be loaded: {reason}") from error
