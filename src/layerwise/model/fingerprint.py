"""What tells weights apart.

A *fingerprint* identifies a model: it tells whether an adapter sits on the weights it was made for, in whatever
precision they are loaded. It looks at samples, so it misses the training of a few rows. *Digests* see every bit of
every tensor: they tell whether weights were trained since a moment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

SAMPLES = 64


def fingerprint(model: PreTrainedModel, adapted: bool = False) -> str:
    """A short digest of a model's weights: the same for float32 and bfloat16 copies, another for other weights.

    Digests names, shapes and some 64 evenly spaced values of each tensor, rounded to bfloat16. What PEFT adds is left
    out, so that a model has the same fingerprint with and without adapters (unless they are merged); with `adapted` it
    counts too, for what depends on all that the model computes.
    """
    digest = hashlib.sha256()
    added = set() if adapted else _added(model)
    for name, tensor in sorted(
        (_plain(name), tensor) for name, tensor in model.state_dict().items() if name not in added
    ):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLES)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def digests(model: PreTrainedModel) -> dict[str, tuple[torch.dtype, str]]:
    """Type and digest of each of a model's tensors, by name; what PEFT adds is left out, and its names.

    A digest is of sums over the rows and over the columns of a tensor's bits, read as integers: additions run at the
    speed of memory (0.11 s for 135M float32 weights, where SHA-256 takes 0.42 s), on any device. A change within one
    row or column always shows; any other is missed only if it cancels in every row and every column.
    """
    added = _added(model)
    found: dict[str, tuple[torch.dtype, str]] = {}
    known: dict[tuple[int, torch.Size], str] = {}  # tied weights are read once
    for name, tensor in model.state_dict().items():
        if name not in added:
            place = tensor.data_ptr(), tensor.shape
            known[place] = known.get(place) or _digest(tensor)
            found[_plain(name)] = tensor.dtype, known[place]
    return found


def digest_of(modules: Mapping[Any, torch.nn.Module]) -> str:
    """A short digest of every bit of some named modules."""
    parts = [f"{at} {name} {_digest(one)}" for at, own in modules.items() for name, one in own.state_dict().items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def is_changed(model: PreTrainedModel, before: dict[str, tuple[torch.dtype, str]]) -> bool:
    """Whether a model's own weights are others than when `digests` returned `before`; a change of type is one too.

    Of a model with adapters neither is a change what comes of merging and unmerging them, rounding in the tensors below
    them, nor another type: nobody has trained that.
    """
    now = digests(model)
    if not is_adapted(model):
        return now != before
    tensors = model.state_dict()
    below = {tensor.data_ptr() for name, tensor in tensors.items() if _plain(name) != name}  # what is tied to them too
    own = [_plain(name) for name, tensor in tensors.items() if _plain(name) in now and tensor.data_ptr() not in below]
    return any(name not in before or (now[name][0] == before[name][0] and now[name] != before[name]) for name in own)


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether PEFT adapters are in `model`, whoever put them there: PEFT itself or transformers' `add_adapter`."""
    return bool(getattr(model, "peft_config", None))


def _added(model: PreTrainedModel) -> set[str]:
    """Names in the state dict of what PEFT adds: whatever stands beside a `base_layer`, and copies of whole modules."""
    modules = [(name, module) for name, module in model.named_modules() if "base_layer" in module._modules]
    beside = {
        f"{name}.{own}" for name, module in modules for own in module.state_dict() if not own.startswith("base_layer.")
    }
    return beside | {name for name in model.state_dict() if "modules_to_save" in name}


def _digest(tensor: torch.Tensor) -> str:
    rows = torch.atleast_2d(tensor.detach()).flatten(1).contiguous()
    aligned = rows.shape[1] * rows.itemsize % 8 == 0 and rows.storage_offset() * rows.itemsize % 8 == 0
    bits = rows.view(torch.int64 if aligned else torch.uint8)
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    for dim in (0, 1):
        digest.update(bits.sum(dim, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(name: str) -> str:
    return name.replace("base_layer.", "").replace("original_module.", "").replace("token_adapter.", "")
