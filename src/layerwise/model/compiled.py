"""The compiled engine: one fused kernel per layer call for batch-1 decoding.

A decoding step of one token reads every weight once and does almost nothing with it, so it should take as long as
reading the weights. Eager PyTorch misses that twice: each layer is some forty operations of which most time is
call overhead, and a matrix-vector product done by a matrix-matrix routine streams memory at a third of the speed.

So for one token of one row a layer is compiled, by torch.export and Inductor, into a single kernel:

- the layer's own `forward` is traced; no modelling code is rewritten. Its weights are *arguments*, so that one
  kernel serves all layers of a kind, and no weight is copied or repacked;
- `nn.Linear` becomes `(weight * x).sum(-1)`, which Inductor turns into vectorised row reductions that stream the
  weights at memory speed and fuse with what stands around them;
- attention over the cached keys and the write of the new one are part of the same kernel.

Kernels are packaged ahead of time (AOTInductor), kept in the cache directory, and found there by the next process.
Every other call (prefill, batches, a cache with holes, training) runs on the eager engine, which each kernel is
compared with before it is used.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AttentionInterface

from layerwise.model.backbone import Backbone
from layerwise.model.cache import Cache
from layerwise.model.frame import Frame
from layerwise.model.runtime import EagerEngine
from layerwise.paths import cache_dir
from layerwise.plan import Part, Plan, Step, Visit

log = logging.getLogger("layerwise")
ATTENTION = "layerwise_token"
_INDUCTOR = {
    # A normed vector read by several projections is stored once and not recomputed in every row's reduction.
    "realize_reads_threshold": 0,
    "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-adds
}


def compiler_available() -> bool:
    """Whether Inductor finds a C++ compiler on this machine."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))


class CompiledEngine:
    """Kernels for single tokens, eager for the rest. `notify` gets a line when a kernel has to be compiled."""

    name = "compiled"

    def __init__(self, backbone: Backbone, notify: Callable[[str], None] = log.info) -> None:
        self.backbone = backbone
        self.eager = EagerEngine(backbone)
        self.notify = notify
        self.compile_seconds = 0.0
        self._kernels: dict[Visit, _Kernel | None] = {}
        self._index = torch.arange(0)

    @torch.no_grad()
    def prepare(self, plans: Iterable[Plan]) -> None:
        """Find or compile the head and every kind of visit in `plans`.

        Kernels hold on to the parameters they were made for. Values may change under them; if parameters were
        replaced since (another dtype or device, an adapter attached), their kernels are made anew here.
        """
        if self._head is not None and self._head.outdated(_Head(self.backbone)):
            del self._head
        _ = self._head
        for visit in dict.fromkeys(visit for plan in plans for visit in plan):
            known = self._kernels.get(visit)
            if visit not in self._kernels or (known and known.outdated(_Layer(self.backbone, visit))):
                self._build(visit)

    def visit(self, step: Step, hidden: Tensor, frame: Frame) -> Tensor:
        cache = frame.cache
        if hidden.shape[:2] != (1, 1) or cache is None or cache.rows != 1 or torch.is_grad_enabled():
            return self.eager.visit(step, hidden, frame)
        visit, slot, start = step.visit, step.slot, frame.starts[0]
        kernel = self._kernels[visit] if visit in self._kernels else self._build(visit)
        if kernel is None:
            return self.eager.visit(step, hidden, frame)
        if slot is None:
            return kernel.run([hidden, *kernel.weights])[0]
        store = cache.slots.get(slot)
        if store is None or store.seen is not None or store.ends[0] != start:
            return self.eager.visit(step, hidden, frame)
        cosine, sine = frame.rotary(visit.layer, None)
        state = [hidden, store.keys, store.values, self._upto(start + 1), cosine, sine]
        (hidden,) = kernel.run(state + kernel.weights)
        store.ends[0] = start + 1
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """As `Engine.logits`; of a single token in float32, which is what its sums are made in."""
        if hidden.shape[:-1] != (1, 1) or torch.is_grad_enabled() or self._head is None:
            return self.eager.logits(hidden)
        return self._head.run([hidden, *self._head.weights])[0]

    def _upto(self, stop: int) -> Tensor:
        """0 .. stop-1: its length tells the kernel how many keys there are."""
        if len(self._index) < stop:
            self._index = torch.arange(2 * stop, device=self.backbone.device)
        return self._index[:stop]

    # -- building ----------------------------------------------------------------------------------------

    def _build(self, visit: Visit) -> _Kernel | None:
        """Make, or find, the kernel of `visit`; None (with a warning) if the layer cannot be compiled."""
        layer = _Layer(self.backbone, visit)
        self._kernels[visit] = kernel = self._load(layer)
        if kernel is not None and not self._agrees(visit):
            log.warning("layerwise: the kernel for layer %s differs from eager and is not used", visit)
            self._kernels[visit] = None
        return self._kernels[visit]

    @cached_property
    def _head(self) -> _Kernel | None:
        return self._load(_Head(self.backbone))

    def _load(self, source: _Layer | _Head) -> _Kernel | None:
        try:
            path = cache_dir("kernels") / f"{source.key}.pt2"
            if not path.exists():
                began = time.perf_counter()
                self.notify(f"compiling a kernel for {source.title} (once; kept for later runs)")
                _package(source, path)
                seconds = time.perf_counter() - began
                self.notify(f"compiled in {seconds:.1f} s")
                self.compile_seconds += seconds
            return _Kernel(path, source)
        except Exception as error:  # whatever the compiler stack raises, eager still gives the right answer
            reason = str(error).strip().splitlines()[:1]
            log.warning("layerwise: no kernel for %s, running it eagerly (%s)", source.title, *reason or ["no reason"])
            return None

    @torch.no_grad()
    def _agrees(self, visit: Visit) -> bool:
        """Compare the kernel with the eager layer on one token after a few others."""
        generator = torch.Generator().manual_seed(0)
        size = (1, 4, self.backbone.shape.hidden)
        states = torch.randn(size, generator=generator).to(self.backbone.device, self.backbone.dtype)
        (slot,) = Plan((visit,)).slots
        step = Step(visit, slot)
        results = []
        for engine in (self.eager, self):
            cache = Cache(1, 8)
            self.eager.visit(step, states[:, :3], Frame(self.backbone, [3], 3, states.device, states.dtype, cache))
            cache.advance([3])
            frame = Frame(self.backbone, [1], 1, states.device, states.dtype, cache)
            results.append(engine.visit(step, states[:, 3:], frame).float())
        change = (results[0] - states[:, 3:].float()).abs().max()
        tolerance = 1e-3 if self.backbone.dtype == torch.float32 else 5e-2
        return bool((results[0] - results[1]).abs().max() <= tolerance * change.clamp(min=1.0))


class _Kernel:
    """A loaded package and the weights of the one layer it is bound to."""

    def __init__(self, path: Path, source: _Layer | _Head) -> None:
        self.run = _loaded(path)
        self.weights = source.weights
        self.made_for = [(id(weight), weight.dtype, weight.device) for weight in source.weights]

    def outdated(self, source: _Layer | _Head) -> bool:
        """Whether the module that `source` describes no longer has the parameters this kernel was made for."""
        return self.made_for != [(id(weight), weight.dtype, weight.device) for weight in source.weights]


_packages: dict[Path, Callable[[list[Tensor]], list[Tensor]]] = {}


def _loaded(path: Path) -> Callable[[list[Tensor]], list[Tensor]]:
    if path not in _packages:
        # The loader under the Python wrapper: the wrapper flattens its arguments anew in every call.
        _packages[path] = torch._inductor.aoti_load_package(str(path)).loader.run
    return _packages[path]


# -- what is traced --------------------------------------------------------------------------------------


class _RowSum(nn.Module):
    """`nn.Linear` as row reductions, for one token."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = (self.weight * x.reshape(1, -1)).sum(-1).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class _KernelSlot:
    """The cache as the traced layer sees it: the newest of `length` tokens is written in place."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:] = keys
        self.values[:, :, -1:] = values
        return self.keys, self.values


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of one query token, written as reductions so that Inductor fuses it; grouped heads share keys."""
    for name in ("softcap", "s_aux", "sinks", "position_bias", "head_mask"):
        if options.get(name) is not None:
            raise NotImplementedError(f"attention with '{name}'")
    _, heads, _, size = query.shape
    groups = key.shape[1]
    query = query.reshape(1, groups, heads // groups, 1, size).float()
    scores = (key[:, :, None].float() * query).sum(-1) * options["scaling"]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, -1)
    mixed = (weights[..., None] * value[:, :, None].float()).sum(-2)
    return mixed.reshape(1, 1, heads, size).to(value.dtype), None


AttentionInterface.register(ATTENTION, _attend)


def _kernel_form(module: nn.Module) -> nn.Module:
    """A copy of `module` with row reductions for its linear maps and one-token attention; weights are copied."""
    module = copy.deepcopy(module).eval().requires_grad_(False)
    for child in module.modules():
        if hasattr(child, "config"):
            child.config = copy.copy(child.config)
            child.config._attn_implementation = ATTENTION
        for name, linear in list(child.named_children()):
            if type(linear) is nn.Linear:
                setattr(child, name, _RowSum(linear))
    return _RowSum(module) if type(module) is nn.Linear else module


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class _Layer:
    """A visit of a layer as something to compile."""

    def __init__(self, backbone: Backbone, visit: Visit) -> None:
        self.backbone, self.visit = backbone, visit
        self.module = backbone.module(visit)
        self.kind = backbone.kinds[visit.layer]
        self.weights = list(_named_tensors(self.module).values())
        part = {Part.BOTH: "layers", Part.ATTENTION: "attention", Part.MLP: "MLPs"}[visit.part]
        self.title = f"{type(self.module).__name__} {part}"

    @property
    def key(self) -> str:
        """Same key, same kernel: everything that tracing can see but the weights and the layer's number."""
        attributes = {
            f"{name}.{key}": value
            for name, child in self.module.named_modules()
            for key, value in vars(child).items()
            if key not in ("layer_idx", "training") and isinstance(value, (int, float, str, bool, type(None)))
        }
        return _key(
            self.backbone, [repr(self.module), sorted(attributes.items(), key=str), repr(self.kind)], self.weights
        )

    def traced(self) -> nn.Module:
        return _TracedLayer(self)

    def example(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arguments to trace with, and which of their sizes vary."""
        from torch.export import Dim

        weights = tuple(weight.detach() for weight in self.weights)
        hidden = weights[0].new_zeros(1, 1, self.backbone.shape.hidden)
        fixed = tuple(None for _ in self.weights)
        if not self.visit.attends:
            return (hidden, (), weights), (None, (), fixed)
        index = torch.arange(40, device=hidden.device)
        cosine, sine = self.backbone.rotary(self.kind.rotary, index[None, -1:], 40, hidden.dtype)
        size = self.module.self_attn.head_dim
        cached = [hidden.new_zeros(1, self.module.self_attn.k_proj.out_features // size, 256, size) for _ in "kv"]
        varies = ({2: Dim.DYNAMIC}, {2: Dim.DYNAMIC}, {0: Dim.DYNAMIC}, None, None)
        return (hidden, (*cached, index, cosine, sine), weights), (None, varies, fixed)


class _TracedLayer(nn.Module):
    def __init__(self, source: _Layer) -> None:
        super().__init__()
        # Kept out of the module's own children: export would bake the weights of the template in.
        self.__dict__["template"] = _kernel_form(source.module)
        self.names = list(_named_tensors(source.module))
        self.window = source.kind.window

    def forward(self, hidden: Tensor, state: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        arguments: dict[str, Any] = {"attention_mask": None, "past_key_values": None, "position_embeddings": None}
        if state:
            keys, values, index, cosine, sine = state
            length = index.shape[0]
            torch._check(length <= keys.shape[2])
            torch._check(length <= values.shape[2])
            if self.window is not None:
                outside = index <= length - 1 - self.window
                arguments["attention_mask"] = torch.where(outside, torch.finfo(torch.float32).min, 0.0)
            arguments["past_key_values"] = _KernelSlot(keys, values, length)
            arguments["position_embeddings"] = (cosine, sine)
        return functional_call(self.template, dict(zip(self.names, weights, strict=True)), (hidden,), arguments)


class _Head:
    """The final norm and LM head as something to compile."""

    title = "the LM head"

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.tensors = {
            f"{name}.{key}": tensor
            for name, module in (("norm", backbone.norm), ("head", backbone.head))
            for key, tensor in _named_tensors(module).items()
        }
        self.weights = list(self.tensors.values())

    @property
    def key(self) -> str:
        return _key(self.backbone, ["head", repr(self.backbone.norm), repr(self.backbone.head)], self.weights)

    def traced(self) -> nn.Module:
        return _TracedHead(self)

    def example(self) -> tuple[tuple[Any, ...], None]:
        weights = tuple(weight.detach() for weight in self.weights)
        return (weights[0].new_zeros(1, 1, self.backbone.shape.hidden), weights), None


class _TracedHead(nn.Module):
    def __init__(self, source: _Head) -> None:
        super().__init__()
        parts = {"norm": source.backbone.norm, "head": source.backbone.head}
        self.__dict__["parts"] = nn.ModuleDict({name: _kernel_form(part) for name, part in parts.items()})
        self.__dict__["forms"] = _HeadParts(
            self.parts, getattr(source.backbone.config, "final_logit_softcapping", None)
        )
        self.names = [f"parts.{name}" for name in source.tensors]

    def forward(self, hidden: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        return functional_call(self.forms, dict(zip(self.names, weights, strict=True)), (hidden,))


class _HeadParts(nn.Module):
    def __init__(self, parts: nn.ModuleDict, cap: float | None) -> None:
        super().__init__()
        self.parts, self.cap = parts, cap

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.parts["head"](self.parts["norm"](hidden)).float()
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


# -- packages --------------------------------------------------------------------------------------------


def _key(backbone: Backbone, facts: list[Any], weights: list[Tensor]) -> str:
    config = {k: v for k, v in backbone.config.to_dict().items() if k not in ("_name_or_path", "dtype", "torch_dtype")}
    facts = [
        *facts,
        json.dumps(config, sort_keys=True, default=str),
        [(tuple(w.shape), w.stride(), str(w.dtype), str(w.device)) for w in weights],
        (torch.__version__, transformers.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()),
        Path(__file__).read_text(encoding="utf-8"),
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def _package(source: _Layer | _Head, path: Path) -> None:
    """Trace, compile and store; the file appears whole or not at all."""
    arguments, varies = source.example()
    with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        warnings.simplefilter("ignore")
        program = torch.export.export(source.traced(), arguments, dynamic_shapes=varies, strict=False)
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=os.path.join(folder, path.name), inductor_configs=_INDUCTOR
        )
        os.replace(made, path)
