"""What the compiled engine compiles: a layer, or the head, traced for one token or for a few.

The layer's own `forward` is traced; no modelling code is rewritten. Its weights are *arguments*, so that one kernel
serves all layers of a kind, and no weight is copied or repacked. Two things in it are put into another form:

- `nn.Linear`. For one token it becomes `(weight * x).sum(-1)`, which Inductor turns into vectorised row reductions that
  stream the weights at memory speed and fuse with what stands around them. For a few tokens it is the operator of
  `few_tokens.cpp`;
- attention, which reads the cached keys and writes the new ones inside the same kernel.

Kernels are packaged ahead of time (AOTInductor) and found on disk by the next process.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AttentionInterface

from layerwise.model import bridges
from layerwise.model.backbone import Backbone
from layerwise.model.few_tokens import source_text
from layerwise.plan import Part, Visit
from layerwise.policies import prompts

ONE, FEW = "layerwise_one_token", "layerwise_few_tokens"  # names of attention functions, one a form
_INDUCTOR = {
    # A normed vector read by several projections is stored once and not recomputed in every row's reduction.
    "realize_reads_threshold": 0,
    "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-adds
}
# For a few tokens the products are operators with threads of their own; what stands between them is a few thousand
# numbers, done sooner by one thread than two threads can agree that it is done.
_INDUCTOR_OF = {ONE: _INDUCTOR, FEW: _INDUCTOR | {"cpp.threads": 1}}
_PARTS = {
    Part.BOTH: " layers",
    Part.ATTENTION: " attention",
    Part.MLP: " MLPs",
    Part.THIN: " layers with thin MLPs",
    Part.BRIDGE: "s",
}
_TITLES = {ONE: "one token", FEW: "a few tokens"}


class _RowSum(nn.Module):
    """`nn.Linear` as row reductions, for one token."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = (self.weight * x.reshape(1, -1)).sum(-1).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class _FewTokens(nn.Module):
    """`nn.Linear` by the operator for a few tokens. Maps of one input, such as q, k and v, share one call of it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.__dict__["group"] = [self]  # not children: each map is one already where it stands
        self.__dict__["made"] = None  # (input, output), left here by the first map of the group that was called
        self.__dict__["inputs"] = None  # a list, while groups are being found

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            self.inputs.append((self, x))
        if self.made is None or self.made[0] is not x:
            outputs = torch.ops.layerwise.few_token_linear(x, [one.weight for one in self.group])
            for one, output in zip(self.group, outputs, strict=True):
                one.__dict__["made"] = (x, output)
        output = self.made[1]
        self.__dict__["made"] = None
        return output if self.bias is None else output + self.bias


def _find_groups(module: nn.Module, run: Callable[[], Any]) -> None:
    """Join the linear maps in `module` that get the same input when it is `run`."""
    maps = [one for one in module.modules() if isinstance(one, _FewTokens)]
    inputs: list[tuple[_FewTokens, Tensor]] = []
    for one in maps:
        one.__dict__["inputs"] = inputs
    run()
    for one in maps:
        one.__dict__["inputs"] = None
        one.__dict__["group"] = [other for other, x in inputs if any(x is y for known, y in inputs if known is one)]


class _NewestSlot:
    """The cache as a layer traced for one token sees it: the newest of `length` tokens is written in place."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:] = keys
        self.values[:, :, -1:] = values
        return self.keys, self.values


class _ScatterSlot:
    """The cache as a layer traced for a few tokens sees it: token (row, column) is written at columns[row, column]."""

    def __init__(self, keys: Tensor, values: Tensor, columns: Tensor) -> None:
        self.keys, self.values = keys, values
        self.places = (torch.arange(columns.shape[0], device=columns.device)[:, None], columns)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.transpose(1, 2)[self.places] = keys.transpose(1, 2)
        self.values.transpose(1, 2)[self.places] = values.transpose(1, 2)
        return self.keys, self.values


def _refuse(options: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux", "sinks", "position_bias", "head_mask"):
        if options.get(name) is not None:
            raise NotImplementedError(f"attention with '{name}'")


def _attend_one(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of one query token, written as reductions so that Inductor fuses it; grouped heads share keys."""
    _refuse(options)
    _, heads, _, size = query.shape
    groups = key.shape[1]
    query = query.reshape(1, groups, heads // groups, 1, size).float()
    scores = (key[:, :, None].float() * query).sum(-1) * options["scaling"]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, -1)
    mixed = (weights[..., None] * value[:, :, None].float()).sum(-2)
    return mixed.reshape(1, 1, heads, size).to(value.dtype), None


def _attend_few(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """Attention of a few query tokens over all capacity of a cache slot; the mask tells how many keys count."""
    _refuse(options)
    mixed = torch.ops.layerwise.few_token_attention(query, key, value, attention_mask, options["scaling"])
    return mixed, None


AttentionInterface.register(ONE, _attend_one)
AttentionInterface.register(FEW, _attend_few)
_LINEAR = {ONE: _RowSum, FEW: _FewTokens}


def _kernel_form(module: nn.Module, form: str) -> nn.Module:
    """A copy of `module` with the linear maps and the attention of `form`; weights are copied."""
    module = copy.deepcopy(module).eval().requires_grad_(False)
    for child in module.modules():
        if hasattr(child, "config"):
            child.config = copy.copy(child.config)
            child.config._attn_implementation = form
        for name, linear in list(child.named_children()):
            if type(linear) is nn.Linear:
                setattr(child, name, _LINEAR[form](linear))
    return _LINEAR[form](module) if type(module) is nn.Linear else module


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _adapters(module: nn.Module) -> list[Any]:
    """What PEFT has switched on or merged in `module`: tracing follows it."""
    return [
        (name, child.disable_adapters, list(child.merged_adapters), list(child.active_adapters))
        for name, child in module.named_modules()
        if hasattr(child, "merged_adapters")
    ]


class LayerSource:
    """A visit of a layer as something to compile."""

    def __init__(self, backbone: Backbone, visit: Visit, form: str = ONE) -> None:
        self.backbone, self.visit, self.form = backbone, visit, form
        self.module = backbone.module(visit)
        self.modules = (self.module,)
        self.kind = backbone.kinds[visit.layer]
        self.weights = list(_named_tensors(self.module).values())
        self.adapters = _adapters(self.module)
        part = _PARTS[visit.part]
        self.title = f"{type(self.module).__name__}{part}, {_TITLES[form]}"

    @property
    def key(self) -> str:
        """Same key, same kernel: everything that tracing can see but the weights and the layer's number."""
        attributes = {
            f"{name}.{key}": value
            for name, child in self.module.named_modules()
            for key, value in vars(child).items()
            if key not in ("layer_idx", "training") and isinstance(value, (int, float, str, bool, type(None)))
        }
        # The code of a layer has the version of transformers; that of a bridge is ours.
        files = (bridges.__file__, prompts.__file__) if self.visit.part is Part.BRIDGE else ()
        own = [Path(file).read_text(encoding="utf-8") for file in files]
        return _key(
            self.backbone,
            [self.form, repr(self.module), self.adapters, sorted(attributes.items(), key=str), repr(self.kind), own],
            self.weights,
        )

    def traced(self) -> nn.Module:
        return _TracedLayer(self)

    def example(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arguments to trace with, and which of their sizes vary."""
        from torch.export import Dim

        weights = tuple(weight.detach() for weight in self.weights)
        fixed = tuple(None for _ in self.weights)
        few = self.form == FEW
        hidden = weights[0].new_zeros(*((3, 5) if few else (1, 1)), self.backbone.shape.hidden)
        batch = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if few else None
        if not self.visit.attends:
            return (hidden, (), weights), (batch, (), fixed)
        size = self.module.self_attn.head_dim
        key_heads = self.module.self_attn.k_proj.out_features // size
        if few:
            columns = torch.arange(5, device=hidden.device).repeat(3, 1)
            cosine, sine = self.backbone.rotary(self.kind.rotary, columns, 40, hidden.dtype)
            cached = [hidden.new_zeros(3, key_heads, 256, size) for _ in "kv"]
            state = (
                *cached,
                columns,
                torch.zeros(3, 1, 5, 40, device=hidden.device),
                cosine.contiguous(),
                sine.contiguous(),
            )
            store = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
            mask = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
            return (hidden, state, weights), (batch, (store, store, batch, mask, batch, batch), fixed)
        index = torch.arange(40, device=hidden.device)
        cosine, sine = self.backbone.rotary(self.kind.rotary, index[None, -1:], 40, hidden.dtype)
        cached = [hidden.new_zeros(1, key_heads, 256, size) for _ in "kv"]
        varies = ({2: Dim.DYNAMIC}, {2: Dim.DYNAMIC}, {0: Dim.DYNAMIC}, None, None)
        return (hidden, (*cached, index, cosine, sine), weights), (None, varies, fixed)


class _TracedLayer(nn.Module):
    def __init__(self, source: LayerSource) -> None:
        super().__init__()
        # Kept out of the module's own children: export would bake the weights of the template in.
        self.__dict__["template"] = _kernel_form(source.module, source.form)
        self.form = source.form
        self.names = list(_named_tensors(source.module))
        self.window = source.kind.window
        if self.form == FEW:
            with torch.no_grad():
                _find_groups(self.template, lambda: self(*source.example()[0]))

    def forward(self, hidden: Tensor, state: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        arguments: dict[str, Any] = {"attention_mask": None, "past_key_values": None, "position_embeddings": None}
        if state and self.form == FEW:
            keys, values, columns, mask, cosine, sine = state
            arguments["attention_mask"] = mask
            arguments["past_key_values"] = _ScatterSlot(keys, values, columns)
            arguments["position_embeddings"] = (cosine, sine)
        elif state:
            keys, values, index, cosine, sine = state
            length = index.shape[0]
            torch._check(length <= keys.shape[2])
            torch._check(length <= values.shape[2])
            if self.window is not None:
                outside = index <= length - 1 - self.window
                arguments["attention_mask"] = torch.where(outside, torch.finfo(torch.float32).min, 0.0)
            arguments["past_key_values"] = _NewestSlot(keys, values, length)
            arguments["position_embeddings"] = (cosine, sine)
        return functional_call(self.template, dict(zip(self.names, weights, strict=True)), (hidden,), arguments)


class HeadSource:
    """The final norm and LM head as something to compile."""

    def __init__(self, backbone: Backbone, form: str = ONE) -> None:
        self.backbone, self.form = backbone, form
        self.title = f"the LM head, {_TITLES[form]}"
        self.tensors = {
            f"{name}.{key}": tensor
            for name, module in (("norm", backbone.norm), ("head", backbone.head))
            for key, tensor in _named_tensors(module).items()
        }
        self.modules = (backbone.norm, backbone.head)
        self.weights = list(self.tensors.values())
        self.adapters = [_adapters(backbone.norm), _adapters(backbone.head)]

    @property
    def key(self) -> str:
        return _key(
            self.backbone,
            ["head", self.form, repr(self.backbone.norm), repr(self.backbone.head), self.adapters],
            self.weights,
        )

    def traced(self) -> nn.Module:
        return _TracedHead(self)

    def example(self) -> tuple[tuple[Any, ...], Any]:
        from torch.export import Dim

        weights = tuple(weight.detach() for weight in self.weights)
        if self.form == ONE:
            return (weights[0].new_zeros(1, 1, self.backbone.shape.hidden), weights), None
        varies = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, tuple(None for _ in weights))
        return (weights[0].new_zeros(3, 5, self.backbone.shape.hidden), weights), varies


class _TracedHead(nn.Module):
    def __init__(self, source: HeadSource) -> None:
        super().__init__()
        parts = {"norm": source.backbone.norm, "head": source.backbone.head}
        self.__dict__["parts"] = nn.ModuleDict({name: _kernel_form(part, source.form) for name, part in parts.items()})
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
        source_text(),
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def package(source: LayerSource | HeadSource, path: Path) -> None:
    """Trace, compile and store; the file appears whole or not at all."""
    arguments, varies = source.example()
    with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        warnings.simplefilter("ignore")
        program = torch.export.export(source.traced(), arguments, dynamic_shapes=varies, strict=False)
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=os.path.join(folder, path.name), inductor_configs=_INDUCTOR_OF[source.form]
        )
        os.replace(made, path)
