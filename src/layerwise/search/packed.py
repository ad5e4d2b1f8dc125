"""A question as one row of tokens: the prompt once, then the tree of all choices.

Choices continue the same prompt, and often begin alike themselves. In the packed row each token stands once, with the
position it has in its own text, and attends to what precedes it there: the prompt and its ancestors in the tree. For
the choices `a b x`, `a c x` and `d x` after a prompt `p p p`:

    tokens     p p p | a b c d
    positions  0 1 2 | 3 4 4 3
    parents    - 0 1 | 2 3 3 2

The last token of a choice is predicted, but predicts nothing, so it is left out unless another choice goes on from it.
One pass over 7 tokens gives what three passes over 6, 6 and 5 tokens give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
    """The row: `ids`, `positions` and `parents` (column of the token before; -1 for the first), one entry a column.

    Every token of every choice is to be predicted: `targets` are their ids, `predictors` the columns whose states
    predict them, `scored` the choices they belong to.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    parents: tuple[int, ...]
    targets: tuple[int, ...]
    predictors: tuple[int, ...]
    scored: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], prompt_tokens: int) -> PackedChoices:
        """Pack the token ids of prompt and choice, one row a choice.

        What the rows share, up to `prompt_tokens`, is the prompt; the rest of each row belongs to its choice.
        """
        prompt = min(prompt_tokens, *(len(row) - 1 for row in rows))
        prompt = next((at for at in range(prompt) if len({row[at] for row in rows}) > 1), prompt)
        if prompt == 0:
            raise ValueError("a question needs a prompt of at least one token before its choices")
        ids, positions, parents = list(rows[0][:prompt]), list(range(prompt)), list(range(-1, prompt - 1))
        children: dict[tuple[int, int], int] = {}
        predicted: list[tuple[int, int, int]] = []
        for number, row in enumerate(rows):
            column = prompt - 1
            for token in row[prompt:-1]:
                predicted.append((token, column, number))
                if (column, token) not in children:
                    children[column, token] = len(ids)
                    ids.append(token)
                    positions.append(positions[column] + 1)
                    parents.append(column)
                column = children[column, token]
            predicted.append((row[-1], column, number))
        return cls(tuple(ids), tuple(positions), tuple(parents), *zip(*predicted, strict=True))

    @cached_property
    def ancestors(self) -> Tensor:
        """(columns, columns) booleans: which columns precede each one in its text, itself included."""
        seen = torch.zeros(len(self), len(self), dtype=torch.bool)
        for column, parent in enumerate(self.parents):
            if parent >= 0:
                seen[column] = seen[parent]
            seen[column, column] = True
        return seen

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
        self._ancestors = packed.ancestors.to(backbone.device)
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
        """Additive mask (1, 1, width, width): each column sees its ancestors, those within the layer's window."""
        window = self.backbone.kinds[layer].window
        if window not in self._masks:
            position, allowed = self._positions[0], self._ancestors
            if window is not None:
                allowed = allowed & (position[:, None] - position[None] < window)
            dtype = self.backbone.dtype
            self._masks[window] = torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]
        return self._masks[window]

    def view(self, slot: Slot | None, rows: Rows) -> None:
        return None
