"""How good each exit of a model is: its perplexity, and how often it says what the last layer says.

An exit after E layers applies the model's own norm and head to the hidden states that layers 0 .. E-1 leave. Agreement
of its likeliest token with the last layer's is what self-speculative decoding lives on: a draft by layers 0 .. E-1 is
accepted about that often. All exits are measured in one walk over the layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.model.frame import Frame
from layerwise.model.modes import evaluating
from layerwise.model.packing import Packing
from layerwise.plan import Plan, Step, schedule
from layerwise.training.exit_loss import LOGITS_AT_ONCE, labelled


@dataclass(frozen=True, slots=True)
class ExitQuality:
    """One exit on `tokens` labelled tokens, each predicted from the reference text before it."""

    exit: int  # layers run
    perplexity: float
    agreement: float  # share of tokens where the likeliest token is the last layer's
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def exit_quality(
    model: LayerwiseForCausalLM, batches: Iterable[Mapping[str, Tensor]], exits: Sequence[int] | None = None
) -> list[ExitQuality]:
    """Measure exits on labelled text, whatever the model's own plan is; in evaluation mode, which is restored.

    Args:
        batches: `input_ids`, `labels` (-100 where nothing is measured) and, if padded, `attention_mask`.
        exits: numbers of layers to run, in 1 .. L; all if None.

    Returns:
        One entry an exit, in rising order.

    Raises:
        ValueError: there is no such exit, or nothing is labelled.
    """
    wanted = sorted(set(range(1, model.depth + 1) if exits is None else exits))
    if not wanted or wanted[0] < 1 or wanted[-1] > model.depth:
        raise ValueError(f"an exit is after 1 to {model.depth} layers, not {list(exits or [])}")
    losses, agreed, tokens = [0.0] * len(wanted), [0] * len(wanted), 0
    with evaluating(model):
        for batch in batches:
            states, targets = _exit_states(model, batch, {*wanted, model.depth})
            tokens += len(targets)
            _score(model, states, targets, wanted, losses, agreed)
    if not tokens:
        raise ValueError("nothing is labelled: give batches with labels other than -100")
    return [
        ExitQuality(exit, math.exp(min(loss / tokens, 700.0)), same / tokens, tokens)
        for exit, loss, same in zip(wanted, losses, agreed, strict=True)
    ]


def _exit_states(
    model: LayerwiseForCausalLM, batch: Mapping[str, Tensor], exits: set[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """Hidden states (positions, hidden size) after each of `exits` layers where a token is labelled; the tokens."""
    rows, width = batch["input_ids"].shape
    packing = Packing.of(rows, width, batch.get("attention_mask"))
    at, targets = labelled(packing.pack(batch["labels"].to(model.device)), packing.counts)
    hidden = packing.pack(model.embed(batch["input_ids"]))
    states: dict[int, Tensor] = {}

    def observe(step: Step, after: Tensor) -> None:
        if step.visit.layer + 1 in exits:
            states[step.visit.layer + 1] = after.flatten(0, 1)[at]

    frame = Frame(model.runtime.backbone, packing.counts, width, hidden.device, hidden.dtype)
    model.runtime.run(hidden, schedule((Plan.full(model.depth),) * rows), frame, observe=observe)
    return states, targets


def _score(
    model: LayerwiseForCausalLM,
    states: Mapping[int, Tensor],
    targets: Tensor,
    wanted: Sequence[int],
    losses: list[float],
    agreed: list[int],
) -> None:
    """Add the loss and the agreement of each exit to `losses` and `agreed`; a chunk of positions at a time."""
    backbone = model.runtime.backbone
    chunk = max(1, LOGITS_AT_ONCE // backbone.head.weight.shape[0])
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        last = backbone.logits(states[model.depth][part]).float()
        choice = last.argmax(-1)
        for number, exit in enumerate(wanted):
            logits = last if exit == model.depth else backbone.logits(states[exit][part]).float()
            losses[number] += cross_entropy(logits, targets[part], reduction="sum").item()
            agreed[number] += int((logits.argmax(-1) == choice).sum())
