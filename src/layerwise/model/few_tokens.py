"""Loads `few_tokens.cpp`: a layer's products for a few tokens at memory speed, as operators of `torch.ops.layerwise`.

Verifying a draft means running 2 to 16 tokens at once. The weights have to be read from memory once, as for a single
token, so it should take about as long; measured on 2 cores in float32, all layers of a 135M model take 17 ms for one
token and 20 ms for eight with this operator, and 53 ms for eight with `torch.nn.functional.linear`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from layerwise.paths import kernel_dir

SOURCE = Path(__file__).with_name("few_tokens.cpp")
HEADERS = [SOURCE.with_name(name) for name in ("vectors.h", "attention.h", "one_token.h", "thin_head.h")]
_FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-DAT_PARALLEL_OPENMP=1")


def compiler() -> str | None:
    """The C++ compiler of this machine, or None."""
    return next((name for name in (os.environ.get("CXX") or "g++", "g++", "clang++") if shutil.which(name)), None)


def source_text() -> str:
    """What is compiled: whoever keeps a result of it keeps it under this."""
    return _text(*HEADERS, SOURCE)


def load_operators(notify: Callable[[str], None]) -> None:
    """Make `torch.ops.layerwise` ready: compiled once, kept on disk.

    few_token_linear: input (..., k) and any number of weights (n, k), to as many outputs (..., n).
    few_token_attention: query (rows, heads, tokens, size), keys and values (rows, key heads, capacity, size), additive
        float32 mask (rows, 1, tokens, length), scale, to (rows, tokens, heads, size); the first `length` keys count.
        Without a mask `length` is an argument, and all tokens see all of these keys.

    Raises:
        OSError, subprocess.CalledProcessError: there is no compiler, or it fails.
    """
    if hasattr(torch.ops.layerwise, "few_token_linear"):  # a process can register operators once only
        return
    _load(SOURCE, source_text(), notify)

    @torch.library.register_fake("layerwise::few_token_linear")
    def _(input: Tensor, weights: list[Tensor]) -> list[Tensor]:
        return [input.new_empty((*input.shape[:-1], weight.shape[0])) for weight in weights]

    @torch.library.register_fake("layerwise::few_token_attention")
    def _(
        query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, length: int | None = None
    ) -> Tensor:
        rows, heads, tokens, size = query.shape
        return query.new_empty((rows, tokens, heads, size))


def load_operator(name: str, notify: Callable[[str], None]) -> None:
    """Make `torch.ops.layerwise` ready for one token of one row, by an operator that has a file of its own:
    "routed_token", "routed_layer" or "token_layers". Errors as in `load_operators`, whose operators some call."""
    load_operators(notify)
    if not hasattr(torch.ops.layerwise, name):
        source = SOURCE.with_name(f"{name}.cpp")
        _load(source, _text(*HEADERS, source), notify)


def _text(*files: Path) -> str:
    return "".join(file.read_text(encoding="utf-8") for file in files)


def _load(source: Path, text: str, notify: Callable[[str], None]) -> None:
    facts = (text, _FLAGS, torch.__version__, torch.backends.cpu.get_cpu_capability())
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
    path = kernel_dir() / f"{key}.so"
    if not path.exists():
        notify(f"compiling {source.stem.replace('_', ' ')} operators (once; kept for later runs)")
        _build(source, path)
    torch.ops.load_library(str(path))


def _build(source: Path, path: Path) -> None:
    """Compile `source` into `path`; the file appears whole or not at all."""
    from torch.utils.cpp_extension import include_paths

    found = compiler()
    if found is None:
        raise FileNotFoundError("no C++ compiler")
    library = Path(torch.__file__).parent / "lib"
    includes = [f"-I{folder}" for folder in [*include_paths(), sysconfig.get_paths()["include"]]]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [found, *_FLAGS, str(source), "-o", str(made), *includes, f"-L{library}", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True, capture_output=True)
        os.replace(made, path)
