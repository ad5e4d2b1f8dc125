"""Tiny random models of every tested architecture, tokens and random plans for them, and what tests share."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.plan import Part, Plan, Visit

LAYERS = 6
VOCABULARY = 97
WINDOW = 7

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_HEAD = {"head_dim": 8}  # Qwen2Config takes none; 32 / 4 gives it the same

ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _HEAD),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, _HEAD),
    "mistral": (MistralConfig, {**_HEAD, "sliding_window": None}),
    "mistral-window": (MistralConfig, {**_HEAD, "sliding_window": WINDOW}),
    "gemma3": (
        Gemma3TextConfig,
        {
            **_HEAD,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
            "query_pre_attn_scalar": 8,
        },
    ),
}


def config(name: str) -> PretrainedConfig:
    """A fresh config of the architecture `name`."""
    kind, special = ARCHITECTURES[name]
    return kind(**COMMON, **special)


def model(name: str, seed: int = 0, attention: str = "sdpa") -> PreTrainedModel:
    """A random model; noise is added to every parameter so that each layer, norm and bias matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(config(name), attn_implementation=attention).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return made


def tokens(rows: int, width: int, seed: int = 0) -> Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(seed))


def padded(width: int, lengths: list[int], side: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of rows of `lengths`, padded with zeros to `width` on `side`."""
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(length) if side == "right" else slice(width - length, None)] = 1
    return tokens(len(lengths), width, seed) * mask, mask


def random_plan(rng: random.Random, layers: int = LAYERS, parts: bool = True) -> Plan:
    """Skips, repeats, partial visits (if `parts`) and now and then a jump back; at least one visit attends."""
    visits: list[Visit] = []
    layer = 0
    while layer < layers and len(visits) < 4 * layers:
        if rng.random() < 0.75:
            part = rng.choice((Part.ATTENTION, Part.MLP)) if parts and rng.random() < 0.3 else Part.BOTH
            visits += [Visit(layer, part)] * rng.choice((1, 1, 1, 1, 2, 3))
        layer += 1
        if rng.random() < 0.08:
            layer = rng.randrange(layer)
    if not any(visit.attends for visit in visits):
        visits.insert(rng.randint(0, len(visits)), Visit(rng.randrange(layers)))
    return Plan(tuple(visits))


def surgery(base: PreTrainedModel, plan: str) -> PreTrainedModel:
    """A plain transformers model that does what `plan` says: layers copied in the plan's order, left-out parts zero.

    An oracle that shares no code with the library.
    """
    model, visits = copy.deepcopy(base), Plan.parse(plan).visits
    decoder, types = model.get_decoder(), getattr(base.config, "layer_types", None)
    layers = [copy.deepcopy(decoder.layers[visit.layer]) for visit in visits]
    with torch.no_grad():
        for index, (visit, layer) in enumerate(zip(visits, layers, strict=True)):
            layer.self_attn.layer_idx = index
            if visit.part is Part.MLP:
                layer.self_attn.o_proj.weight.zero_()
            if visit.part is Part.ATTENTION:
                layer.mlp.down_proj.weight.zero_()
    decoder.layers = nn.ModuleList(layers)
    decoder.config.num_hidden_layers = len(layers)
    if types:
        decoder.config.layer_types = [types[visit.layer] for visit in visits]
    return model


def one_line(function: Callable[[], Any], *mentions: str, error: type[Exception] = ValueError) -> None:
    """`function` must raise `error` with a message of one line that has every text of `mentions`."""
    with pytest.raises(error) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    assert [text for text in mentions if text not in message] == []


def assert_rows_and_caches_agree(
    model: LayerwiseForCausalLM, plan_of: Callable[[random.Random], Plan], rng: random.Random
) -> None:
    """Rows of a padded batch, each with a plan of its own, have the logits they have alone; and those of a cache."""
    for _ in range(4):
        plans, lengths = [plan_of(rng) for _ in range(3)], [11, 7, 4]
        ids, mask = padded(11, lengths, "left", seed=rng.randrange(99))
        whole = model(ids, attention_mask=mask, plans=plans).logits
        for row, length in enumerate(lengths):
            own = ids[row : row + 1, 11 - length :]
            alone = model(own, plans=[plans[row]]).logits
            torch.testing.assert_close(whole[row : row + 1, 11 - length :], alone, rtol=1e-4, atol=1e-4)
            first = model(own[:, :-2], plans=[plans[row]], use_cache=True)
            rest = model(own[:, -2:], plans=[plans[row]], past_key_values=first.past_key_values, use_cache=True)
            torch.testing.assert_close(rest.logits, alone[:, -2:], rtol=1e-4, atol=1e-4)
