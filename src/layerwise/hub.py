"""Saving, loading and sharing: adapters, and the models they sit on.

An adapter is a directory: `layerwise.json` (what decides the plan, which base model), a PEFT configuration with its
safetensors, and a model card. PEFT can load the directory by itself and then sees the weights without the plan.
The base model's *fingerprint* is stored beside its name and compared at load: an adapter trained on other weights
does not fail, it answers a little worse, so nobody would notice.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerwise import __version__
from layerwise.decoding.ngram_model import NGramModel
from layerwise.model.bridges import Bridges
from layerwise.model.causal_lm import EngineName, LayerwiseForCausalLM, attach
from layerwise.model.exit_head import ExitHead
from layerwise.model.fingerprint import fingerprint, is_adapted, is_changed
from layerwise.model.routed_layers import RoutedLayers
from layerwise.model.thin import ThinMlps
from layerwise.model.thin_head import ThinHead
from layerwise.plan import Plan
from layerwise.policies.fixed import RoutingPolicy, policy_from_dict
from layerwise.sources import load_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "layerwise.json"
FORMAT = 1
# Entries of FILE for what a model may have besides.
PARTS = ("exits", "exit_head", "ngrams", "routed_layers", "bridges", "thin", "thin_head")


def save_adapter(model: LayerwiseForCausalLM, directory: str | Path) -> None:
    """Write `model` as an adapter directory that `from_pretrained` and PEFT load.

    If the base's own weights were trained since `attach`, or came with the adapter, they are saved too, in `base/`.

    Raises:
        ValueError: weights that adapters sit on were changed, or which adapter to save cannot be told.
    """
    folder = Path(directory)
    inner = model.runtime.backbone.model
    if model.merged:
        _save_merged(model, folder)
        return
    adapted, trained = is_adapted(model.base), _is_trained(model)
    if adapted and (trained or _is_merged(model.base)):
        raise ValueError(
            "the weights below the PEFT adapter were changed: undo merge_adapter() with unmerge_adapter(), "
            "or save what merge_and_unload() returns as a model of its own and load that"
        )
    folder.mkdir(parents=True, exist_ok=True)
    inside = trained or _has_own_base(model)
    about = {
        "format": FORMAT,
        "policy": model.policy.to_dict(),
        "base_model": "base" if inside else _lasting(inner.config.name_or_path),
        "base_inside": inside,
        "base_fingerprint": fingerprint(inner),
        "adapted": adapted,
        "layers": model.depth,
        "layerwise_version": __version__,
    }
    _save_parts(model, folder, about)
    card = folder / "README.md"
    kept = _card_of_the_user(folder)
    if inside:
        _save_base(model, folder, trained)
    if adapted:
        _save_peft(model.base, folder)
    else:
        _save_empty_peft(inner, folder)
    (folder / FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    card.write_text(_card(about) if kept is None else kept, encoding="utf-8")  # PEFT has written one of its own


def _lasting(name: str) -> str:
    """A model's name; that of a local folder as it is from any working directory."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def _is_trained(model: LayerwiseForCausalLM) -> bool:
    """Whether the base's own weights changed since `attach`, or are to be saved whatever they are."""
    inner = model.runtime.backbone.model
    return fingerprint(inner) != model.attached_to or is_changed(inner, model.attached_digests)


def _is_merged(model: nn.Module) -> bool:
    """Whether PEFT adapters are merged into the weights below them for now."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(one, BaseTunerLayer) and one.merged for one in model.modules())


def _has_own_base(model: LayerwiseForCausalLM) -> bool:
    """Whether it runs on the base that came inside its adapter's folder."""
    name, folder = model.runtime.backbone.model.config.name_or_path, model.adapter_folder
    return folder is not None and Path(name) == folder / "base"


def _save_base(model: LayerwiseForCausalLM, folder: Path, trained: bool) -> None:
    """The weights as they are now, if they were trained; else the files they came from."""
    source, own = model.adapter_folder, folder / "base"
    if trained or source is None:
        model.runtime.backbone.model.save_pretrained(str(own))
    elif source.resolve() != folder.resolve():
        shutil.copytree(source / "base", own, dirs_exist_ok=True)


def _save_parts(model: LayerwiseForCausalLM, folder: Path, about: dict[str, Any]) -> None:
    """What the policy is made of, and whatever drafts, if there is any."""
    if isinstance(model.policy, RoutingPolicy):
        model.policy.save(folder)
    about |= {"exits": list(model.exits)} if model.exits else {}
    if model.exit_head is not None:
        about["exit_head"] = {"exit": model.exit_head.exit, "tokens": len(model.exit_head.vocabulary)}
        model.exit_head.save(folder)
    if model.ngrams is not None:
        about["ngrams"] = len(model.ngrams)
        model.ngrams.save(folder)
    if model.routed_layers is not None:
        about["routed_layers"] = list(model.routed_layers.numbers)
        model.routed_layers.save(folder)
    if model.bridges is not None:
        about["bridges"] = model.bridges.names
        model.bridges.save(folder)
    if model.thin is not None:
        about["thin"] = list(model.thin.numbers)
        model.thin.save(folder)
    if model.thin_head is not None:
        about["thin_head"] = {"rank": model.thin_head.rank, "candidates": model.thin_head.candidates}
        model.thin_head.save(folder)


def _save_merged(model: LayerwiseForCausalLM, folder: Path) -> None:
    """An adapter whose weights were merged at load: its files are copied, policy and exits are the model's own."""
    source = model.adapter_folder
    if (
        source is None
        or not (source / FILE).is_file()
        or is_adapted(model.base)  # put in since
        or _is_trained(model)
    ):
        raise ValueError(
            "this adapter's weights are merged into the model: load it with engine='eager' to train and save it again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    about = {name: value for name, value in _read_about(source).items() if name not in PARTS}
    about |= {"policy": model.policy.to_dict(), "layerwise_version": __version__}
    if about.get("base_inside"):
        about["base_model"] = "base"
        _save_base(model, folder, trained=False)
    for part in source.iterdir() if source.resolve() != folder.resolve() else ():
        if part.name.startswith("adapter_") or part.name == "README.md":
            shutil.copy2(part, folder / part.name)
    _save_parts(model, folder, about)
    (folder / FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def push_adapter(
    model: LayerwiseForCausalLM,
    repo_id: str,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "layerwise adapter",
) -> str:
    """Upload the adapter to the Hugging Face hub; returns the address of the commit."""
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message).commit_url


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
        adapter: an adapter's folder or Hugging Face id; its own base model is loaded unless `name` says another.
        plan: overrides the adapter's policy.
        dtype: "float32", "bfloat16", or "auto" for what the checkpoint holds.
        engine, notify: as in `attach`.

    Raises:
        ValueError: no such model or adapter, or the adapter belongs to another base; one line that says so.
    """
    name, adapter = _told_apart(name, adapter)
    adapter = _adapter_folder(adapter) if adapter is not None else None
    about = _read_about(adapter) if adapter is not None else None
    base: nn.Module = load_base(name or (_named_base(adapter, about) if about else None), dtype, device)
    if about is None:
        return attach(base, plan, engine, notify)
    if fingerprint(base) != about["base_fingerprint"]:
        raise ValueError(
            f"adapter '{adapter}' was made for other weights than '{base.config.name_or_path}': "
            f"load it with the base model '{about['base_model']}' it was trained on"
        )
    if about["adapted"]:
        base = _with_adapter(base, adapter)
        if engine != "eager":
            base = base.merge_and_unload()  # merged weights are read once; separate ones cost extra calls
    model = attach(base, None, engine, notify)
    model.merged = about["adapted"] and engine != "eager"
    model.adapter_folder = adapter
    model.exits = tuple(exit for exit in about.get("exits") or () if 0 < exit < model.depth)
    if about.get("exit_head"):
        model.exit_head = ExitHead.load(adapter, model.runtime.backbone)
    if about.get("ngrams"):
        model.ngrams = NGramModel.load(adapter, model.config.vocab_size)
    if about.get("routed_layers"):
        model.routed_layers = RoutedLayers.load(adapter, model.runtime.backbone)
        model.routed_layers.attach(model.runtime.backbone)
    if about.get("bridges"):
        model.cross_by(Bridges.load(adapter, model.runtime.backbone).to(model.dtype))
    if about.get("thin"):
        model.thin_by(ThinMlps.load(adapter, model.runtime.backbone).fold())
    if about.get("thin_head"):
        model.thin_head_by(ThinHead.load(adapter, model.runtime.backbone))
    if plan is None:
        model.policy = policy_from_dict(about["policy"], model.depth, adapter)
    else:
        model.plan = plan
    return model


def _with_adapter(base: nn.Module, folder: Path) -> Any:
    """`base` with the PEFT adapter in `folder`; ValueError if its files are missing or damaged."""
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        return PeftModel.from_pretrained(base, str(folder)).eval()
    except Exception as error:  # PEFT trusts its files: a wrong value in one may fail as anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        unread = isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
        if isinstance(error, SafetensorError):
            reason = f"adapter_model.safetensors is damaged ({reason}): save or fetch the adapter again"
        elif unread or not isinstance(error, (OSError, RuntimeError, ValueError, MemoryError)):
            reason = (
                f"adapter_config.json is damaged ({type(error).__name__}: {reason}): save or fetch the adapter again"
            )
        raise ValueError(f"the weights of adapter '{folder}' cannot be loaded: {reason}") from error


def base_name(name: str | Path | None, adapter: str | Path | None) -> str | None:
    """The model that `from_pretrained(name, adapter=adapter)` puts under the adapter; None is the embedded one.

    Raises:
        ValueError: there is no such adapter, or it names no base.
    """
    name, adapter = _told_apart(name, adapter)
    if name is None and adapter is not None:
        return adapter_base(adapter)
    return None if name is None else str(name)


def _told_apart(name: str | Path | None, adapter: str | Path | None) -> tuple[str | Path | None, str | Path | None]:
    """Model and adapter; an adapter's folder may be given as the model's name."""
    if adapter is None and name is not None and (Path(name) / FILE).is_file():
        return None, name
    return name, adapter


def adapter_base(adapter: str | Path) -> str:
    """The base model that an adapter names; ValueError if it is none."""
    folder = _adapter_folder(adapter)
    return _named_base(folder, _read_about(folder))


def _named_base(folder: Path, about: dict[str, Any]) -> str:
    if not about["base_model"]:
        raise ValueError(f"adapter '{folder}' was made for a model without a name: say which base model to load")
    return about["base_model"]


def _adapter_folder(adapter: str | Path) -> Path:
    """A local folder, absolute; else that of the hub, or what is kept of it where the hub cannot be reached."""
    if Path(adapter).is_dir():
        return Path(adapter).absolute()
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(str(adapter), FILE), str):
            HfApi().model_info(str(adapter), timeout=10)
        return Path(snapshot_download(str(adapter)))
    except Exception as error:  # no such name, no network, no permission: the answer is the same
        raise ValueError(
            f"no adapter '{adapter}': it is no folder here, and none on the hub that can be reached"
        ) from error


def _read_about(folder: Path) -> dict[str, Any]:
    """The contents of layerwise.json, checked; a base model inside the folder gets its path."""
    file = folder / FILE
    if not file.is_file():
        raise ValueError(f"'{folder}' is no adapter: it has no {FILE}")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        expected = {"base_model": str, "base_fingerprint": str, "policy": dict, "adapted": bool}
        wrong = [key for key, kind in expected.items() if not isinstance(about[key], kind)]
        exits = about.get("exits") or []
        wrong += [] if isinstance(exits, list) and all(isinstance(one, int) for one in exits) else ["exits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{file}' is damaged ({error!r}): save the adapter again") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"'{file}' has format {about.get('format')}, this version reads {FORMAT}: update layerwise")
    if wrong:
        raise ValueError(f"'{file}' is damaged (wrong {', '.join(wrong)}): save the adapter again")
    if about.get("base_inside"):
        about["base_model"] = str(folder / "base")
    return about


def _save_peft(model: Any, folder: Path) -> None:
    """PEFT's own files, for the one active adapter; PEFT puts any but "default" into a folder of its name."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuned = next((one for one in model.modules() if isinstance(one, BaseTunerLayer)), model)
    active = tuned.active_adapters
    if len(active) != 1:
        raise ValueError(f"{len(active)} PEFT adapters are active: activate one before saving")
    if not isinstance(model, PeftModel):
        _save_injected(model, active[0], folder)
        return
    config = model.peft_config[active[0]]
    config.base_model_name_or_path = _lasting(config.base_model_name_or_path or "") or None
    model.save_pretrained(str(folder), selected_adapters=active)
    own = folder / active[0]
    if active[0] != "default" and own.is_dir():
        for file in own.iterdir():
            shutil.move(str(file), str(folder / file.name))
        own.rmdir()


def _save_injected(model: PreTrainedModel, adapter: str, folder: Path) -> None:
    """The same of an adapter put into the model's own layers: by transformers' `add_adapter`, or by PEFT after
    `attach`."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = copy.copy(model.peft_config[adapter])
    config.inference_mode, config.base_model_name_or_path = True, _lasting(model.config.name_or_path)
    config.save_pretrained(str(folder))
    tensors = {
        f"base_model.model.{name}": tensor.contiguous()
        for name, tensor in get_peft_model_state_dict(model, adapter_name=adapter).items()
    }
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def _save_empty_peft(model: PreTrainedModel, folder: Path) -> None:
    """A rank-1 LoRA of zeros on one map of the first layer's attention.

    PEFT has no notion of a plan and refuses a folder without weights; this one it loads, and leaves the model as
    it is.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    prefix = "layers.0.self_attn."
    name, module = next(
        (name, one) for name, one in model.named_modules() if hasattr(one, "in_features") and prefix in name
    )
    LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=[name.rpartition(".")[2]],
        layers_to_transform=[0],
        layers_pattern="layers",
        task_type="CAUSAL_LM",
        base_model_name_or_path=_lasting(model.config.name_or_path),
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_file(
        {
            f"base_model.model.{name}.lora_A.weight": torch.zeros(1, module.in_features),
            f"base_model.model.{name}.lora_B.weight": torch.zeros(module.out_features, 1),
        },
        str(folder / "adapter_model.safetensors"),
        metadata={"format": "pt"},
    )


def _card_of_the_user(folder: Path) -> str | None:
    """The model card in `folder`, unless there is none or it is, word for word, what was written for its adapter."""
    try:
        written = (folder / "README.md").read_text(encoding="utf-8")
    except OSError:
        return None
    try:
        return None if written == _card(json.loads((folder / FILE).read_text(encoding="utf-8"))) else written
    except (OSError, ValueError, KeyError, TypeError):
        return written


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
