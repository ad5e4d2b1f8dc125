"""A model's fingerprint: tells whether an adapter sits on the weights it was made for."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel

SAMPLES = 64


def fingerprint(model: PreTrainedModel) -> str:
    """A short digest of a model's weights: the same for float32 and bfloat16 copies, another for other weights.

    Digests names, shapes and some 64 evenly spaced values of each tensor, rounded to bfloat16. What PEFT adds is left
    out, so that a model has the same fingerprint with and without adapters (unless they are merged).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(
        (_plain(name), tensor) for name, tensor in model.state_dict().items() if not _added(name)
    ):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLES)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _added(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


def _plain(name: str) -> str:
    return name.replace("base_layer.", "").replace("original_module.", "")
