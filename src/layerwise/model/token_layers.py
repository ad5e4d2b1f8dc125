"""Layers of Llama and its kin for one token of one row, or a few, by one operator (`token_layers.cpp`).

A kernel that a compiler makes of any layer spends as long on calls and on threads waiting for each other as on reading
the weights. For the commonest kind of layer there is an operator that does not: it runs any number of layers in a row.
Whether a layer is of that kind is read from its class and modules, and what it gives is compared with the layer's own
by the engine before it is used, as with every kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from layerwise.model.backbone import Backbone
from layerwise.model.thin_head import ThinHead
from layerwise.plan import Part, Visit

STREAMS = (6, 1)  # places that a thread can read at once
MOST = 8  # tokens at once
CLEARLY = 0.9  # of the time: machines that gain by several places gain a third, and others nothing but noise
ENOUGH = 32 * 2**20  # bytes of weights, by reading which it is told which of these is faster
LANES = 16  # numbers of a vector: heads are a multiple of it
# Layers of other models have the same parts and do more with them, by the position or the layer's number.
_KNOWN = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_SILU = ("SiLU", "SiLUActivation")


@dataclass(frozen=True, slots=True)
class TokenLayer:
    """What the operator is told of a visit: as in its file, `weights` are empty where there is none."""

    weights: list[Tensor]
    epsilon: float
    scale: float

    @classmethod
    def of(cls, backbone: Backbone, visit: Visit) -> TokenLayer | None:
        """None if the layer is of another kind."""
        if visit.part is Part.BRIDGE or backbone.kinds[visit.layer].window is not None:
            return None
        if type(backbone.layers[visit.layer]).__name__ not in _KNOWN:
            return None
        layer = backbone.module(visit)
        norms = [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
        if {name for name, _ in layer.named_children()} != _CHILDREN or not all(map(_is_rms_norm, norms)):
            return None
        none = norms[0].weight.new_empty(0)
        halves = [none] * 9, [none] * 5
        attends, maps = visit.attends, visit.part is not Part.ATTENTION
        if attends:
            attention = layer.self_attn
            if not _is_of(attention, _MAPS) or getattr(attention, "head_dim", 1) % LANES:
                return None
            linear = [getattr(attention, name) for name in _MAPS]
            halves[0][:] = [norms[0].weight, *(one.weight for one in linear), *(_or(one.bias, none) for one in linear)]
        if maps:
            mlp = layer.mlp
            if not _is_of(mlp, _MLP, "act_fn") or type(mlp.act_fn).__name__ not in _SILU:
                return None
            gate, up, down = (getattr(mlp, name) for name in _MLP)
            if gate.bias is not None or up.bias is not None:
                return None
            halves[1][:] = [norms[1].weight, gate.weight, up.weight, down.weight, _or(down.bias, none)]
        weights = [weight for half in halves for weight in half]
        epsilons = {norm.variance_epsilon for norm in norms}
        scale = getattr(backbone.layers[visit.layer].self_attn, "scaling", None)
        if not _usable(weights) or len(epsilons) > 1 or scale is None:
            return None
        return cls(weights, epsilons.pop(), scale)

    @property
    def alike(self) -> tuple[object, ...]:
        """Layers that can run in one call have the same."""
        return self.epsilon, self.scale, self.weights[0].dtype


@dataclass(frozen=True, slots=True)
class TokenHead:
    """The same for the final norm and the LM head; `bias` is empty if there is none."""

    norm: Tensor
    epsilon: float
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, backbone: Backbone) -> TokenHead | None:
        """None if they are of another kind."""
        norm, head = backbone.norm, backbone.head
        if not _is_rms_norm(norm) or type(head) is not nn.Linear:
            return None
        if getattr(backbone.config, "final_logit_softcapping", None) is not None:
            return None
        found = [norm.weight, head.weight, _or(head.bias, norm.weight.new_empty(0))]
        if not _usable(found):
            return None
        return cls(found[0], norm.variance_epsilon, *found[1:])

    def run(self, hidden: Tensor, streams: int = STREAMS[0]) -> Tensor:
        """Logits (1, width, vocabulary) in float32 of states (1, width, hidden size), MOST at most."""
        return torch.ops.layerwise.token_head.default(hidden, self.norm, self.epsilon, self.weight, self.bias, streams)

    def run_thin(self, hidden: Tensor, thin: ThinHead, streams: int = STREAMS[0]) -> Tensor:
        """The same by a thin head, of one state."""
        return torch.ops.layerwise.token_thin_head.default(
            hidden, self.norm, self.epsilon, self.weight, self.bias, thin.parts, thin.candidates, streams
        )


def _usable(weights: Sequence[Tensor]) -> bool:
    """Whether the operator can read these: all of one dtype that it knows, as they lie in memory."""
    dtype = weights[0].dtype
    alike = all(one.dtype == dtype and one.is_contiguous() and one.is_cpu for one in weights)
    return alike and dtype in (torch.float32, torch.bfloat16)


def _is_rms_norm(norm: nn.Module | None) -> bool:
    return norm is not None and type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon")


def _is_of(module: nn.Module, maps: Sequence[str], *others: str) -> bool:
    """Whether these maps, plain ones, and the others are all that it has."""
    children = dict(module.named_children())
    plain = all(type(children.get(name)) is nn.Linear for name in maps)
    return plain and set(children) <= {*maps, *others}


def _or(bias: Tensor | None, none: Tensor) -> Tensor:
    return none if bias is None else bias


def run(
    layers: Sequence[TokenLayer],
    hidden: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    place: int,
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    streams: int = STREAMS[0],
) -> Tensor:
    """Tokens (1, width, hidden size), MOST at most, through layers that are alike, to the same shape.

    Args:
        keys, values: (1, kv heads, capacity, head size) of each layer, where the tokens' are put from `place` on; empty
            for layers whose attention is left out.
        rotary: cosines and sines (1, width, head size).
        mask: (1, 1, width, place + width) added to scores, float32; a single token needs none, it sees all.
        streams: of STREAMS, in how many places a thread reads at once.
    """
    weights = [weight for layer in layers for weight in layer.weights]
    first = layers[0]
    return torch.ops.layerwise.token_layers.default(
        hidden,
        weights,
        keys,
        values,
        place,
        *rotary,
        rotary[0][:0] if mask is None else mask,
        first.epsilon,
        first.scale,
        streams,
    )


def greedy(
    token: int,
    embedding: Tensor,
    layers: Sequence[TokenLayer],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    place: int,
    tables: tuple[Tensor, Tensor],
    head: TokenHead,
    thin: ThinHead | None = None,
    streams: int = STREAMS[0],
) -> int:
    """The likeliest token after this one: as `run` and the head, whole or thin, in one call.

    Args:
        embedding: (vocabulary, hidden size).
        tables: cosines and sines (places, head size) of all places up to this one at least.
    """
    first = layers[0]
    return torch.ops.layerwise.token_greedy.default(
        token,
        embedding,
        [weight for layer in layers for weight in layer.weights],
        keys,
        values,
        place,
        *tables,
        first.epsilon,
        first.scale,
        head.norm,
        head.epsilon,
        head.weight,
        head.bias,
        [] if thin is None else thin.parts,
        0 if thin is None else thin.candidates,
        streams,
    )


@torch.no_grad()
def faster_streams(layers: Sequence[TokenLayer]) -> int | None:
    """Several of STREAMS if this machine clearly reads the MLPs of these layers faster so, else one; None if they are
    too little to tell."""
    none = layers[0].weights[0][:0]
    mlps = [TokenLayer([none] * 9 + layer.weights[9:], layer.epsilon, layer.scale) for layer in layers]
    if sum(one.nbytes for layer in mlps for one in layer.weights) < ENOUGH:
        return None
    hidden, empty = layers[0].weights[9].new_ones(1, 1, len(layers[0].weights[9])), [none] * len(mlps)
    taken: dict[int, list[float]] = {streams: [] for streams in STREAMS}
    for _ in range(5):
        for streams in STREAMS:
            began = perf_counter()
            run(mlps, hidden, empty, empty, 0, (hidden[..., :LANES],) * 2, None, streams)
            taken[streams].append(perf_counter() - began)
    several, one = (min(taken[streams]) for streams in STREAMS)
    return STREAMS[0] if several < CLEARLY * one else STREAMS[1]
