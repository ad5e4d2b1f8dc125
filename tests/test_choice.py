"""The likeliest token is argmax's, and endings are what transformers' criteria say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from layerwise.decoding.choice import BLOCKS, Endings, likeliest


@pytest.mark.parametrize("shape", [(97,), (1, 509), (3, 512), (2, 5, 768), (1, 4 * BLOCKS), (1, 2)])
def test_the_likeliest_is_the_first_of_the_greatest(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    for draw in range(20):
        scores = torch.randn(shape, generator=generator)
        if draw % 2:  # ties, within a block and across blocks
            scores = scores.round()
        if draw == 7:
            scores[..., : shape[-1] // 2] = -torch.inf
        expected = (scores == scores.amax(-1, keepdim=True)).int().argmax(-1)
        assert torch.equal(likeliest(scores), expected)


class Odd(StoppingCriteria):
    """Rows with an odd last token are done."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids[:, -1] % 2 == 1


def test_endings_are_what_the_criteria_say() -> None:
    criteria = StoppingCriteriaList([MaxLengthCriteria(7), EosTokenCriteria([4, 8]), MaxLengthCriteria(6), Odd()])
    endings = Endings(criteria)
    assert (endings.tokens, endings.longest, len(endings.others)) == ({4, 8}, 6, 1)
    for length in (4, 6, 7):
        sequence = torch.arange(10)[:, None].expand(-1, length)
        found = [
            endings.reached(token, length) or other
            for token, other in zip(range(10), endings.asked(sequence, None), strict=True)
        ]
        assert found == criteria(sequence, None).tolist()


def test_a_criterion_may_answer_for_all_rows_at_once() -> None:
    class Once(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> bool:
            return True

    assert Endings(StoppingCriteriaList([Once()])).asked(torch.zeros(3, 2), None) == [True] * 3
