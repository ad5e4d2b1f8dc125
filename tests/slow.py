"""The oracle of the laws: one token at a time, one visit at a time, with nothing of the package but plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from tiny import WINDOW
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerwise.plan import Part, Plan


def slow_walk(name: str, whole: PreTrainedModel, row: Sequence[int], plans: Sequence[Plan]) -> Tensor:
    """Logits of a row whose token t goes through plans[t]: token by token, visit by visit, no keys kept.

    Each slot remembers the states that entered it, with their positions; a visit runs the layer's attention on all
    of them again. Uses the modules of Hugging Face and nothing of the package.
    """
    visitors: dict[tuple[int, int], tuple[list[int], list[Tensor]]] = {}
    logits = []
    for position, (token, plan) in enumerate(zip(row, plans, strict=True)):
        hidden = whole.get_input_embeddings()(torch.tensor([[token]]))
        attended: Counter[int] = Counter()
        for visit in plan.visits:
            layer = whole.model.layers[visit.layer]
            if visit.part is not Part.MLP:
                places, states = visitors.setdefault((visit.layer, attended[visit.layer]), ([], []))
                attended[visit.layer] += 1
                places.append(position)
                states.append(hidden)
                hidden = hidden + slow_attention(name, whole.model, visit.layer, places, torch.cat(states, 1))
            if visit.part is not Part.ATTENTION and name == "gemma3":
                normed = layer.pre_feedforward_layernorm(hidden)
                hidden = hidden + layer.post_feedforward_layernorm(layer.mlp(normed))
            elif visit.part is not Part.ATTENTION:
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits.append(whole.lm_head(whole.model.norm(hidden))[0])
    return torch.cat(logits)


def slow_attention(name: str, decoder: nn.Module, number: int, places: list[int], states: Tensor) -> Tensor:
    """What the attention of layer `number` adds to the last of `states` (1, n, hidden), which stand at `places`."""
    layer = decoder.layers[number]
    at = torch.tensor(places)
    distance = at[:, None] - at[None]
    allowed = distance >= 0
    if name == "mistral-window" or (name == "gemma3" and number % 2 == 0):
        allowed &= distance < WINDOW
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
    kind = [["sliding_attention", "full_attention"][number % 2]] if name == "gemma3" else []
    rotary = decoder.rotary_emb(states, at[None], *kind)
    added, _ = layer.self_attn(layer.input_layernorm(states), position_embeddings=rotary, attention_mask=mask)
    return (layer.post_attention_layernorm(added) if name == "gemma3" else added)[:, -1:]
