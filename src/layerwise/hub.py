"""Saving, loading and sharing: adapters, and the models they sit on.

An adapter is a directory: `layerwise.json` (what decides the plan, which base model), a PEFT configuration with its
safetensors, and a model card. PEFT can load the directory by itself and then sees the weights without the plan.
The base model's *fingerprint* is stored beside its name and compared at load: an adapter trained on other weights
does not fail, it answers a little worse, so nobody would notice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerwise.model.causal_lm import EngineName, LayerwiseForCausalLM, attach
from layerwise.plan import Plan
from layerwise.policies.fixed import policy_from_dict
from layerwise.sources import load_base, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "layerwise.json"
_SAMPLES = 64


def fingerprint(model: PreTrainedModel) -> str:
    """A short digest of a model's weights: the same for float32 and bfloat16 copies, another for other weights.

    Digests names, shapes and some 64 evenly spaced values of each tensor, rounded to bfloat16; adapters are left out.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tied_head = "lm_head" in name and getattr(model.config, "tie_word_embeddings", False)
        if "lora_" in name or tied_head:
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLES)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name.replace('base_layer.', '')} {tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def save_adapter(model: LayerwiseForCausalLM, directory: str | Path) -> None:
    """Write `model` as an adapter directory that `from_pretrained` and PEFT load."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    inner = model.runtime.backbone.model
    about = {
        "format": 1,
        "policy": model.policy.to_dict(),
        "base_model": inner.config.name_or_path,
        "base_fingerprint": fingerprint(inner),
        "layers": model.depth,
        "layerwise_version": _version(),
    }
    if hasattr(model.base, "peft_config"):
        model.base.save_pretrained(str(folder), safe_serialization=True)
    else:
        _save_empty_peft(inner, folder)
    (folder / FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    card = folder / "README.md"
    if not card.exists() or "library_name: layerwise" not in card.read_text(encoding="utf-8"):
        card.write_text(_card(about), encoding="utf-8")


def push_adapter(model: LayerwiseForCausalLM, repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Upload the adapter to the Hugging Face hub; returns the address of the commit."""
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="layerwise adapter").commit_url


def from_pretrained(
    name: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    plan: Plan | str | None = None,
    dtype: torch.dtype | str = "auto",
    engine: EngineName = "auto",
    device: str | torch.device = "cpu",
    notify: Callable[[str], None] | None = None,
) -> LayerwiseForCausalLM:
    """Load a model, or an adapter with its model, ready to run.

    Args:
        name: a name from `layerwise models`, a local folder, a Hugging Face id, or an adapter's folder; the
            embedded model if None.
        adapter: an adapter's folder; its own base model is loaded unless `name` says another.
        plan: overrides the adapter's policy.
        dtype: "float32", "bfloat16", or "auto" for what the checkpoint holds.
        engine, notify: as in `attach`.

    Raises:
        ValueError: no such model or adapter, or the adapter belongs to another base; one line that says so.
    """
    if adapter is None and name is not None and (Path(name) / FILE).is_file():
        name, adapter = None, name
    about = _read_about(Path(adapter)) if adapter is not None else None
    base: nn.Module = load_base(name or (about["base_model"] if about else None), dtype, device)
    if about is None:
        return attach(base, plan, engine, notify)
    if fingerprint(base) != about["base_fingerprint"]:
        raise ValueError(
            f"adapter '{adapter}' was made for other weights than '{base.config.name_or_path}': "
            f"load it with the base model '{about['base_model']}' it was trained on"
        )
    if _has_weights(Path(adapter)):
        from peft import PeftModel

        base = PeftModel.from_pretrained(base, str(adapter))
        if engine != "eager":
            base = base.merge_and_unload()  # merged weights are read once; separate ones cost extra calls
    model = attach(base, plan, engine, notify)
    if plan is None:
        model.policy = policy_from_dict(about["policy"], model.depth)
    return model


def adapter_base(adapter: str | Path) -> str:
    """The base model that an adapter's folder names; ValueError if it is none."""
    return _read_about(Path(adapter))["base_model"]


def _read_about(folder: Path) -> dict[str, Any]:
    file = folder / FILE
    if not file.is_file():
        raise ValueError(f"'{folder}' is no adapter: it has no {FILE}")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        return {"base_model": about["base_model"], "base_fingerprint": about["base_fingerprint"], **about}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"'{file}' is damaged ({error}): save the adapter again") from error


def _has_weights(folder: Path) -> bool:
    """Whether the adapter changes the base: a plan alone is saved with an empty LoRA, which need not be loaded."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return config.get("r") != 1 or config.get("layers_to_transform") != [0]


def _save_empty_peft(model: PreTrainedModel, folder: Path) -> None:
    """A rank-1 LoRA of zeros on one projection.

    PEFT has no notion of a plan and refuses a folder without weights; this one it loads, and leaves the model as
    it is.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    target = "q_proj"
    LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=[target],
        layers_to_transform=[0],
        layers_pattern="layers",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config.name_or_path,
        inference_mode=True,
    ).save_pretrained(str(folder))
    module_name, module = next((n, m) for n, m in model.named_modules() if n.endswith(f"layers.0.self_attn.{target}"))
    prefix = f"base_model.model.{module_name}"
    save_file(
        {
            f"{prefix}.lora_A.weight": torch.zeros(1, module.in_features),
            f"{prefix}.lora_B.weight": torch.zeros(module.out_features, 1),
        },
        str(folder / "adapter_model.safetensors"),
        metadata={"format": "pt"},
    )


def _card(about: dict[str, Any]) -> str:
    return f"""---
library_name: layerwise
base_model: {about["base_model"]}
tags: [layerwise, peft]
---

# A layerwise adapter for {about["base_model"]}

Policy: `{json.dumps(about["policy"])}`, for the base model with fingerprint `{about["base_fingerprint"]}`.

```python
from layerwise import from_pretrained

model = from_pretrained("PATH-OF-THIS-FOLDER")
```
"""


def _version() -> str:
    try:
        return version("layerwise")
    except PackageNotFoundError:
        return "unknown"


__all__ = ["adapter_base", "fingerprint", "from_pretrained", "load_tokenizer", "push_adapter", "save_adapter"]
