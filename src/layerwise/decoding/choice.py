"""What every token of an answer asks for besides the model: which token is likeliest, and whether that was the last.

By torch's argmax and transformers' criteria that takes .4 ms a token on a CPU, as long as a layer of a small model.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

BLOCKS = 256  # of a vocabulary, at most: a power of two


def likeliest(scores: Tensor) -> Tensor:
    """The place of the greatest of (..., vocabulary), the first of equals: argmax over the last dimension.

    On a CPU argmax looks at one number after the other, and amax at many: so the block with the greatest comes first.
    """
    size = scores.shape[-1]
    blocks = gcd(size, BLOCKS)
    if blocks == 1 or scores.device.type != "cpu":
        return scores.argmax(-1)
    within = scores.unflatten(-1, (blocks, size // blocks))
    block = within.amax(-1).argmax(-1, keepdim=True)
    best = within.take_along_dim(block[..., None], -2).squeeze(-2)
    return block.squeeze(-1) * (size // blocks) + best.argmax(-1)


class Endings:
    """When a row is done, by the criteria that transformers prepared; the common ones are looked up.

    Attributes:
        tokens: that end a row.
        longest: tokens that a row may have, None if there is no limit.
        others: criteria that have to be asked.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        self.tokens: set[int] = set()
        self.longest: int | None = None
        self.others = StoppingCriteriaList()
        for one in criteria:
            if type(one) is EosTokenCriteria:
                self.tokens |= set(one.eos_token_id.tolist())
            elif type(one) is MaxLengthCriteria:
                self.longest = one.max_length if self.longest is None else min(self.longest, one.max_length)
            else:
                self.others.append(one)

    def reached(self, token: int, length: int) -> bool:
        """Whether a row of `length` tokens, the last of which is `token`, is done, if `others` do not say so."""
        return token in self.tokens or (self.longest is not None and length >= self.longest)

    def asked(self, sequence: Tensor, scores: tuple[Tensor, ...] | None) -> list[bool]:
        """Which rows of (rows, length) tokens are done as the others see it."""
        return torch.as_tensor(self.others(sequence, scores)).expand(len(sequence)).tolist()
