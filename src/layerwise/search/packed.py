"""A question as one row of tokens: the prompt once, then all choices side by side.

Choices continue the same prompt, so its states are the same for all of them. In the packed row each choice's tokens
have the positions that follow the prompt, and attend to the prompt and to their own choice only:

    tokens     p p p p | a a | b b b | c
    positions  0 1 2 3 | 4 5 | 4 5 6 | 4

so one pass over 10 tokens gives what three passes over 6, 7 and 5 tokens give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from layerwise.data.short_answers import Question
from layerwise.model.backbone import Backbone
from layerwise.model.frame import Rows
from layerwise.plan import Slot

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PackedChoices:
    """The row: `ids`, `positions` and `owners` (number of the choice, -1 for the prompt), one entry a token.

    Each token of a choice is one to predict: `targets` are their ids, `predictors` the columns whose states predict
    them, `scored` the choices they belong to.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    owners: tuple[int, ...]
    targets: tuple[int, ...]
    predictors: tuple[int, ...]
    scored: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], prompt_tokens: int) -> PackedChoices:
        """Pack the token ids of prompt and choice, one row a choice.

        What the rows share, up to `prompt_tokens`, is the prompt; the rest of each row belongs to its choice.
        """
        shared = 0
        most = min(prompt_tokens, *(len(row) - 1 for row in rows))
        while shared < most and len({row[shared] for row in rows}) == 1:
            shared += 1
        if shared == 0:
            raise ValueError("a question needs a prompt of at least one token before its choices")
        ids, positions, owners = list(rows[0][:shared]), list(range(shared)), [-1] * shared
        targets: list[int] = []
        predictors: list[int] = []
        scored: list[int] = []
        for number, row in enumerate(rows):
            own = row[shared:]
            start = len(ids)
            predictors += [shared - 1, *range(start, start + len(own) - 1)]
            targets += own
            scored += [number] * len(own)
            ids += own
            positions += range(shared, len(row))
            owners += [number] * len(own)
        return cls(*map(tuple, (ids, positions, owners, targets, predictors, scored)))

    def __len__(self) -> int:
        return len(self.ids)


def choice_rows(tokenizer: PreTrainedTokenizerBase, prompt: str, choices: Sequence[str]) -> tuple[list[list[int]], int]:
    """Token ids of the prompt with each choice, and how many tokens the prompt has alone."""
    rows = [list(cast(Any, tokenizer(prompt + choice))["input_ids"]) for choice in choices]
    return rows, len(cast(Any, tokenizer(prompt))["input_ids"])


def margin(log_likelihoods: Sequence[float], question: Question) -> float:
    """By how many nats the right choice beats the best wrong one; negative if it does not.

    If choices are compared per character, a log-likelihood is scaled to the mean length of the choices, so that a nat
    means the same in every task.
    """
    scores = list(log_likelihoods)
    if question.by_length:
        lengths = [len(choice) for choice in question.choices]
        mean = sum(lengths) / len(lengths)
        scores = [score * mean / length for score, length in zip(scores, lengths, strict=True)]
    return scores[question.right] - max(score for at, score in enumerate(scores) if at != question.right)


class PackedFrame:
    """What an engine asks of a frame (`model.frame.Frame`), for rows that all are the packed row, without a cache."""

    cache = None

    def __init__(self, backbone: Backbone, packed: PackedChoices) -> None:
        self.backbone = backbone
        self._positions = torch.tensor([packed.positions], device=backbone.device)
        self._owners = torch.tensor(packed.owners, device=backbone.device)
        self._stop = max(packed.positions) + 1
        self._masks: dict[int | None, Tensor] = {}
        self._tables: dict[str | None, tuple[Tensor, Tensor]] = {}

    def positions(self, rows: Rows) -> Tensor:
        """(1, width): the same for every row."""
        return self._positions

    def rotary(self, layer: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """Cosines and sines for the layer's kind of rotary embedding, each (1, width, head size)."""
        kind = self.backbone.kinds[layer].rotary
        if kind not in self._tables:
            self._tables[kind] = self.backbone.rotary(kind, self._positions, self._stop, self.backbone.dtype)
        return self._tables[kind]

    def mask(self, layer: int, slot: Slot | None, rows: Rows) -> Tensor:
        """Additive mask (1, 1, width, width): what comes before in the prompt, or in one's own choice."""
        window = self.backbone.kinds[layer].window
        if window not in self._masks:
            position, owner = self._positions[0], self._owners
            distance = position[:, None] - position[None]
            allowed = (distance >= 0) & ((owner[None] == -1) | (owner[None] == owner[:, None]))
            if window is not None:
                allowed &= distance < window
            dtype = self.backbone.dtype
            self._masks[window] = torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]
        return self._masks[window]

    def view(self, slot: Slot | None, rows: Rows) -> None:
        return None
