"""The slow way to score a plan: the model's own forward, one plan at a time, every choice a row of its own.

What anyone would write first, and what the search is measured and tested against.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from layerwise.data.short_answers import Question
from layerwise.plan import Part, Plan
from layerwise.search.packed import choice_rows, margin

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def rearranged(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """`model` with the plan's whole visits for its list of layers; without a cache that is all it takes."""
    if any(visit.part is not Part.BOTH for visit in plan):
        raise ValueError(f"plan '{plan}' visits layers in part, which the model's own forward cannot")
    decoder, config = model.get_decoder(), model.get_decoder().config
    layers, count, types = decoder.layers, config.num_hidden_layers, getattr(config, "layer_types", None)
    order = [visit.layer for visit in plan.check(len(layers))]
    try:
        decoder.layers = nn.ModuleList(layers[at] for at in order)
        config.num_hidden_layers = len(order)
        if types is not None:
            config.layer_types = [types[at] for at in order]
        yield
    finally:
        decoder.layers, config.num_hidden_layers = layers, count
        if types is not None:
            config.layer_types = types


@torch.inference_mode()
def plain_margin(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: Question, plan: Plan) -> float:
    """The margin of the right choice along `plan`, by one plain forward pass over a batch of prompt and choice."""
    rows, prompt_tokens = choice_rows(tokenizer, question.prompt, question.choices)
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    kept = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    with rearranged(model, plan):
        logits = model(input_ids=ids, attention_mask=kept, use_cache=False).logits.float()
    likelihoods = []
    for number, row in enumerate(rows):
        start = min(prompt_tokens, len(row) - 1)
        predicted = logits[number, start - 1 : len(row) - 1].log_softmax(-1)
        likelihoods.append(predicted.gather(1, torch.tensor(row[start:], device=model.device)[:, None]).sum().item())
    return margin(likelihoods, question)
