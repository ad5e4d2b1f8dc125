"""A Hugging Face causal LM, seen as embedding, layers, norm and head.

The library does not fork modelling files. It needs five parts of a decoder (embedding, rotary embedding, layers,
final norm, head) and calls each as it is. Whether a model is *nothing but* these parts cannot be read from its
attributes: some scale the embedding or the logits inside their own `forward`. So `Backbone` looks for the parts and
refuses by name what lacks one; `runtime.check_fit` then compares logits with the model's own on a few tokens.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerwise.cost import LayerShape, ModelShape
from layerwise.plan import Part, Plan, Visit

if TYPE_CHECKING:
    from layerwise.model.thin_head import ThinHead

TESTED = "Llama, Qwen2, Qwen3, Mistral and Gemma3 text models are tested"
_LAYER_ARGUMENTS = ("hidden_states", "attention_mask", "past_key_values", "position_embeddings")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the others rescale with the length of the text


class UnsupportedModelError(ValueError):
    """The model lacks a part that layerwise needs, or does more than its parts."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What differs between layers of one model: sliding window (tokens; None is all) and rotary embedding."""

    window: int | None
    rotary: str | None


class _Nothing(nn.Module):
    """Stands in for the attention or MLP that a partial visit leaves out: adds zero to the residual stream."""

    def __init__(self, tuple_result: bool) -> None:
        super().__init__()
        self.tuple_result = tuple_result

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        zero = torch.zeros_like(hidden_states)
        return (zero, None) if self.tuple_result else zero


class Backbone:
    """The parts of `model`.

    Raises:
        UnsupportedModelError: names the model's class and what does not fit.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.name = type(model).__name__
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        self.own: dict[str, nn.Module] = {}  # a norm or head to take in place of the model's
        self._embedding = _place(model, _part(self.name, "an input embedding", model.get_input_embeddings()))
        self.layers: Sequence[nn.Module] = _part(self.name, "'layers'", getattr(decoder, "layers", None))
        self._norm = _place(model, _part(self.name, "a final 'norm'", getattr(decoder, "norm", None)))
        self._rotary: nn.Module = _part(self.name, "'rotary_emb'", getattr(decoder, "rotary_emb", None))
        self._head = _place(model, _part(self.name, "an LM head", model.get_output_embeddings()))
        self.config = decoder.config
        for layer in self.layers:
            for part in ("self_attn", "mlp"):
                _part(self.name, f"'{part}' in {type(layer).__name__}", getattr(layer, part, None))
            missing = set(_LAYER_ARGUMENTS) - set(inspect.signature(type(layer).forward).parameters)
            if missing:
                raise UnsupportedModelError(f"{self.name} does not fit: its layers do not take {sorted(missing)}")
        implementation = self.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise UnsupportedModelError(
                f"{self.name} does not fit: attention '{implementation}' has no per-visit cache here; "
                "load it with attn_implementation='sdpa'"
            )
        self.sdpa = implementation == "sdpa"
        self.kinds = self._kinds()
        self.attention: dict[int, nn.Module] = {}  # run in place of a layer's own attention
        self.bridges: dict[Visit, nn.Module] = {}  # run in place of a layer, where a plan says so
        self.thin: dict[int, nn.Module] = {}  # run in place of a layer's MLP, where a plan says so
        self.thin_head: ThinHead | None = None  # and of the head
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}

    # -- the parts ---------------------------------------------------------------------------------------
    # Looked up each time where they stood, since PEFT wraps them and a resized vocabulary replaces them.

    @property
    def embedding(self) -> nn.Module:
        return getattr(*self._embedding)

    @property
    def norm(self) -> nn.Module:
        return self.own.get("norm") or getattr(*self._norm)

    @property
    def head(self) -> nn.Module:
        return self.own.get("head") or getattr(*self._head)

    def over(self, **own: nn.Module) -> Backbone:
        """A copy that takes `norm` or `head` from `own`, and all the rest from where this one does."""
        made = copy.copy(self)
        made.own = self.own | own
        if "head" in own:
            made.thin_head = None
        return made

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def context(self) -> int | None:
        """The most tokens, prompt and answer together, that the model was made for; None if it does not say."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def module(self, visit: Visit) -> nn.Module:
        """The module that runs `visit`.

        A partial visit gets a copy of the layer that shares all its weights and has a stand-in for the branch
        left out; since every decoder layer adds its branches to the residual stream, that leaves the rest as is.
        In the same way attention is replaced where `attention` says so, and the MLP by a thin one.
        """
        if visit.part is Part.BRIDGE:
            return self._bridge(visit)
        own = self.attention.get(visit.layer)
        if visit.part is Part.BOTH and own is None:
            return self.layers[visit.layer]
        # Copied anew for each call: a kept copy would miss a later train(), eval() or gradient checkpointing.
        part = copy.copy(self.layers[visit.layer])
        part._modules = dict(part._modules)
        if own is not None:
            part._modules["self_attn"] = own
        if visit.part is Part.THIN:
            part._modules["mlp"] = self._thin(visit)
        elif visit.part is not Part.BOTH:
            left_out = "mlp" if visit.part is Part.ATTENTION else "self_attn"
            part._modules[left_out] = _Nothing(tuple_result=left_out == "self_attn")
        return part

    def check(self, plan: Plan) -> Plan:
        """Return the plan itself if the model can run it, else raise ValueError."""
        for visit in plan.check(self.depth):
            if visit.part is Part.BRIDGE:
                self._bridge(visit)
            elif visit.part is Part.THIN:
                self._thin(visit)
        if plan.thin_head:
            self.known_thin_head()
        return plan

    def known_thin_head(self) -> ThinHead:
        """The thin head, if there is one for the head that the model has now; else ValueError."""
        if self.thin_head is None:
            raise ValueError("a plan has a thin head, but the model has none: load an adapter that brings it")
        if len(self.thin_head.sketch) != len(self.head.weight):
            raise ValueError("the vocabulary is another than that of the thin head: fit it anew, or leave 'ht' out")
        return self.thin_head

    def _thin(self, visit: Visit) -> nn.Module:
        if visit.layer not in self.thin:
            raise ValueError(
                f"a plan has a thin MLP in layer {visit.layer}, but the model has none there: load an adapter that "
                "brings it, or run the layer whole"
            )
        return self.thin[visit.layer]

    def _bridge(self, visit: Visit) -> nn.Module:
        if visit not in self.bridges:
            of_set = f" of set {visit.set}" if visit.set else ""
            raise ValueError(
                f"a plan has a bridge{of_set} in place of layer {visit.layer}, but the model has none there: load an "
                "adapter that brings it, or leave the layer out"
            )
        return self.bridges[visit]

    @property
    def bridged(self) -> tuple[int, ...]:
        """The layers that any plan can cross: those with a bridge of set 0."""
        return tuple(visit.layer for visit in self.bridges if not visit.set)

    def rotary(self, kind: str | None, positions: Tensor, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines at `positions` (rows, width), all below `stop`; each (rows, width, head size)."""
        tables = self.rotary_tables(kind, stop, dtype, positions.device)
        if tables is None:
            return self._make_rotary(kind, positions, dtype)
        cosine, sine = tables
        return cosine[positions], sine[positions]

    def rotary_tables(
        self, kind: str | None, stop: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of all positions below `stop`, and maybe more, each (positions, head size); None if those
        of a position depend on how long the text is."""
        if not self._static_rope(kind):
            return None
        table = self._tables.get((kind, dtype, device))  # kept in a local: another thread may put a shorter one there
        if table is None or table[0].shape[0] < stop:
            everything = torch.arange(max(256, 2 * stop), device=device)[None]
            cosine, sine = self._make_rotary(kind, everything, dtype)
            self._tables[kind, dtype, device] = table = (cosine[0], sine[0])
        return table

    def logits(self, hidden: Tensor, thin: bool = False) -> Tensor:
        """Final norm and LM head, or the thin one: (..., hidden size) to (..., vocabulary)."""
        normed = self.norm(hidden)
        logits = self.known_thin_head()(normed, self.head) if thin else self.head(normed)
        return self.capped(logits)

    def capped(self, logits: Tensor) -> Tensor:
        """What the model makes of the head's outputs."""
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @property
    def shape(self) -> ModelShape:
        """The sizes that costs are computed from, read off the modules as they are now."""
        layers = []
        bridges: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for visit, bridge in self.bridges.items():
            bridges[visit.layer].append((visit.set, _matrix_entries(bridge)))
        for number, layer in enumerate(self.layers):
            attention, mlp = _matrix_entries(layer.self_attn), _matrix_entries(layer.mlp)
            everything = sum(parameter.numel() for parameter in layer.parameters())
            queries = layer.self_attn.o_proj.in_features  # not of q_proj: some models have one map for all three
            keys = queries // layer.self_attn.num_key_value_groups
            thin = _matrix_entries(self.thin[number]) if number in self.thin else None
            others = everything - attention - mlp
            layers.append(LayerShape(attention, mlp, others, queries, keys, tuple(bridges[number]), thin))
        vocabulary, hidden = self.head.weight.shape
        thin_head = None if self.thin_head is None else self.thin_head.weights
        return ModelShape(tuple(layers), hidden, vocabulary, self.head.weight.element_size(), thin_head)

    # -- what fits ---------------------------------------------------------------------------------------

    def _kinds(self) -> tuple[LayerKind, ...]:
        types = getattr(self.config, "layer_types", None) or [None] * len(self.layers)
        unknown = set(types) - {None, "full_attention", "sliding_attention"}
        if unknown:
            raise UnsupportedModelError(f"{self.name} does not fit: it has layers of type {sorted(unknown)}; {TESTED}")
        window = getattr(self.config, "sliding_window", None)
        typed = "layer_type" in inspect.signature(type(self._rotary).forward).parameters
        return tuple(
            LayerKind(window if kind in (None, "sliding_attention") else None, kind if typed else None)
            for kind in types
        )

    def _static_rope(self, kind: str | None) -> bool:
        rope = self._rotary.rope_type
        return (rope[kind] if isinstance(rope, dict) else rope) in _STATIC_ROPE

    @torch.no_grad()
    def _make_rotary(self, kind: str | None, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        like = torch.empty(0, dtype=dtype, device=positions.device)
        return self._rotary(like, positions) if kind is None else self._rotary(like, positions, kind)


def _part(model: str, what: str, found: Any) -> Any:
    if found is None:
        raise UnsupportedModelError(f"{model} does not fit: it lacks {what}; {TESTED}")
    return found


def _place(model: nn.Module, part: nn.Module) -> tuple[nn.Module, str]:
    """The module that `part` stands in, and its name there."""
    return next((owner, name) for owner in model.modules() for name, one in owner.named_children() if one is part)


def _matrix_entries(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
