"""A model's fingerprint: tells whether an adapter sits on the weights it was made for."""

from __future__ import annotations

import hashlib

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


def _plain(name: str) -> str:
    return name.replace("base_layer.", "").replace("original_module.", "").replace("token_adapter.", "")
