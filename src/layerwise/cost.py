"""Costs: the FLOPs and bytes of a plan, LM head included.

Two numbers bound the time of a forward pass: the multiplications it makes and the memory it streams. Prefill is
bound by the first, batch-1 decoding by the second (every weight of every visited layer is read for one token).
Both are counted here from the sizes of the model's own weight matrices, for any plan, and both count the LM head:
in a small model with a large vocabulary it weighs as much as a quarter of the layers, so a saving that leaves it
out is no saving a clock would see.

Conventions: a multiply-add is 2 FLOPs; attention is the full rectangle of queries by keys, which is what dense
kernels run; norms, activations and the embedding look-up are 0 FLOPs (they are below 1%), as in torch's
FlopCounterMode. Bytes are weights and keys and values; activations stay in the processor's caches.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerwise.plan import Part, Plan, Visit


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The sizes of one decoder layer, in numbers of values."""

    attention_weights: int  # entries of the matrices of the attention: q, k, v, o
    mlp_weights: int
    other_weights: int  # norms and biases: read, but not multiplied as matrices
    query_width: int  # query heads x head size
    key_width: int  # key heads x head size: what one token adds to K, and again to V
    bridge_weights: tuple[tuple[int, int], ...] = ()  # of the maps that stand in for the layer, by their set's number
    thin_weights: int | None = None  # of the thin MLP, if there is one


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model, and the bytes of one value (2 for bfloat16)."""

    layers: tuple[LayerShape, ...]
    hidden: int
    vocabulary: int
    value_bytes: int
    thin_head_weights: int | None = None  # of the thin head, if there is one

    def head_weights(self, plan: Plan) -> int:
        """Entries of the matrices that a plan's logits of one position are made by."""
        if not plan.thin_head:
            return self.hidden * self.vocabulary
        assert self.thin_head_weights is not None, "there is no thin head"
        return self.thin_head_weights


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs and bytes of some forward passes; costs add up.

    `weight_bytes` are the weights read, `cache_bytes` the keys and values read and written.
    """

    flops: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops, self.weight_bytes + other.weight_bytes, self.cache_bytes + other.cache_bytes
        )


def pass_cost(
    shape: ModelShape, plan: Plan, tokens: int, context: int = 0, head_tokens: int | None = None, rows: int = 1
) -> Cost:
    """The cost of one forward pass of `rows` rows with the same plan.

    Args:
        tokens: new tokens per row in this pass.
        context: tokens per row already in the cache.
        head_tokens: positions per row whose logits are computed (all of `tokens` if None; 0 leaves the head out).
    """
    head_tokens = tokens if head_tokens is None else head_tokens
    keys = context + tokens
    multiplied = attention = read = cached = 0
    for visit in plan:
        layer = shape.layers[visit.layer]
        multiplied += _multiplied(layer, visit)
        if visit.part is Part.BRIDGE:
            read += shape.hidden  # its bias
            continue
        read += layer.other_weights
        if visit.attends:
            attention += 2 * 2 * layer.query_width * tokens * keys  # scores, then the weighted sum of values
            cached += 2 * layer.key_width * (keys + tokens)  # all keys and values read, the new ones written
    head = shape.head_weights(plan) if head_tokens else 0
    embedding = shape.hidden * tokens
    return Cost(
        flops=rows * (2 * multiplied * tokens + attention + 2 * head * head_tokens),
        weight_bytes=shape.value_bytes * (multiplied + read + head + rows * embedding),
        cache_bytes=shape.value_bytes * rows * cached,
    )


def layers_run(shape: ModelShape, plan: Plan, layer: int | None = None) -> float:
    """How many layers' worth of weights a plan multiplies by, or one of its layers: 1 for a whole visit, for a visit in
    part, a thin MLP or a bridge the share of the layer's matrices."""
    found = 0.0
    for visit in plan:
        if layer is None or visit.layer == layer:
            one = shape.layers[visit.layer]
            found += _multiplied(one, visit) / (one.attention_weights + one.mlp_weights)
    return found


def head_run(shape: ModelShape, plan: Plan) -> float:
    """How much of the LM head's weights a plan multiplies by for one token: 1, or less with a thin head."""
    return shape.head_weights(plan) / (shape.hidden * shape.vocabulary)


def _multiplied(layer: LayerShape, visit: Visit) -> int:
    """Entries of the matrices that a visit multiplies by."""
    if visit.part is Part.BRIDGE:
        return dict(layer.bridge_weights)[visit.set]
    mlp = layer.thin_weights if visit.part is Part.THIN else 0 if visit.part is Part.ATTENTION else layer.mlp_weights
    assert mlp is not None, f"there is no thin MLP in layer {visit.layer}"
    return mlp + (layer.attention_weights if visit.attends else 0)


def prefill_cost(shape: ModelShape, plan: Plan, prompt: int) -> Cost:
    """Reading a prompt of `prompt` tokens; logits for its last position only."""
    return pass_cost(shape, plan, prompt, head_tokens=1)


def decode_cost(shape: ModelShape, plan: Plan, context: int, new_tokens: int = 1) -> Cost:
    """`new_tokens` decoding steps of one token each, the first with `context` tokens in the cache."""
    total = Cost()
    for step in range(new_tokens):
        total += pass_cost(shape, plan, 1, context + step)
    return total


def ideal_speedup(shape: ModelShape, plan: Plan, context: int) -> float:
    """How much faster than the full plan a memory-bound decoding step of `plan` can be, head included."""
    full = decode_cost(shape, Plan.full(len(shape.layers)), context)
    return full.bytes / decode_cost(shape, plan, context).bytes
