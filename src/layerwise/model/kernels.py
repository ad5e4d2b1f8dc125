"""Kernels: what runs a layer or the head for one token or a few, with the weights that it was made for.

And a walk: all that the operator for single tokens (`token_layers.py`) takes in one call, with the caches it writes to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.model.backbone import Backbone
from layerwise.model.cache import Cache, SlotStore
from layerwise.model.token_layers import TokenHead, TokenLayer
from layerwise.model.tracing import ONE, HeadSource, LayerSource
from layerwise.plan import Slot, Step, Visit

_packages: dict[Path, Callable[[list[Tensor]], list[Tensor]]] = {}


class Kernel:
    """A loaded package and the weights of the one layer it is bound to."""

    def __init__(self, path: Path, source: LayerSource | HeadSource) -> None:
        self.run = _loaded(path)
        self.form = source.form
        self.weights = source.weights
        self.dtype = source.weights[0].dtype
        self.made_for = identity(*source.modules)


class TokenKernel:
    """The operator for single tokens, bound to one layer."""

    form = ONE

    def __init__(self, backbone: Backbone, visit: Visit, layer: TokenLayer) -> None:
        self.layer = layer
        self.dtype = layer.weights[0].dtype
        self.made_for = identity(backbone.module(visit))
        self.rotary = backbone.kinds[visit.layer].rotary
        self.with_others = (*layer.alike, self.rotary)  # those of one call have the same


class TokenHeadKernel:
    """The same, bound to the head."""

    form = ONE

    def __init__(self, backbone: Backbone, head: TokenHead) -> None:
        self.head = head
        self.dtype = head.weight.dtype
        self.made_for = identity(backbone.norm, backbone.head)


@dataclass(frozen=True, slots=True)
class Walk:
    """What the operator for single tokens runs in one call on a walk along `steps`; `dtype` is None if nothing."""

    steps: Sequence[Step]
    slots: list[Slot | None]
    layers: list[TokenLayer]
    dtype: torch.dtype | None
    rotary: str | None  # the kind of the layers' rotary embedding

    def stores(self, cache: Cache, starts: list[int]) -> list[SlotStore | None]:
        """Those of its layers; they end with the first that does not hold all tokens so far."""
        found: list[SlotStore | None] = []
        for slot in self.slots:
            if not holds(slot, cache, starts, self.dtype):
                break
            found.append(None if slot is None else cache.slots[slot])
        return found


def holds(slot: Slot | None, cache: Cache, starts: list[int], dtype: torch.dtype) -> bool:
    """Whether there is all that a kernel reads of the tokens before; a visit that does not attend needs nothing."""
    if slot is None:
        return True
    store = cache.slots.get(slot)
    return store is not None and store.seen is None and store.ends == starts and store.keys.dtype == dtype


def contents(stores: Sequence[SlotStore | None], none: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of each store, `none` where there is no store."""
    keys = [none if store is None else store.keys for store in stores]
    return keys, [none if store is None else store.values for store in stores]


def note_ends(stores: Sequence[SlotStore | None], stop: int) -> None:
    """The only row's tokens up to `stop` are in these stores now."""
    for store in stores:
        if store is not None:
            store.ends = [stop]


def identity(*modules: nn.Module) -> list[Any]:
    """What a kernel of these was made for, their tensors and PEFT adapters; another one is needed if it changes.

    Every answer asks this of every kernel that it uses, so the modules are walked by hand: by `named_parameters` it
    takes four times as long.
    """
    found: list[Any] = []
    left: list[Any] = list(modules)
    while left:
        module = left.pop()
        for tensors in (module._parameters, module._buffers):
            found += [(id(one), one.dtype, one.device) for one in tensors.values() if one is not None]
        if hasattr(type(module), "merged_adapters"):
            found.append((module.disable_adapters, list(module.merged_adapters), list(module.active_adapters)))
        left += [child for child in module._modules.values() if child is not None]
    return found


def _loaded(path: Path) -> Callable[[list[Tensor]], list[Tensor]]:
    if path not in _packages:
        # The loader under the Python wrapper: the wrapper flattens its arguments anew in every call.
        _packages[path] = torch._inductor.aoti_load_package(str(path)).loader.run
    return _packages[path]
