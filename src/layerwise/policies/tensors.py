"""The file beside `layerwise.json` that holds what a routing policy has learnt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from layerwise import tensor_files
from layerwise.tensor_files import Made

FILE = "routers.safetensors"


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
    return tensor_files.read_tensors(Path(folder) / FILE, "the routers", lambda _, tensors: make(tensors))
