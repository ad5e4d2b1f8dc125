"""Drafts that cost nothing: what followed these words before, in the row's own text or in the model's other answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

from torch import Tensor

from layerwise.decoding.drafters import Proposal, Worth
from layerwise.decoding.ngram_model import NGramModel
from layerwise.decoding.target import Read, Target

HOPES = {2: 0.55, 3: 0.7, 4: 0.85}  # by the length of the match: how often what followed follows again
LEAST = 0.05  # a token less likely to be reached is not drafted: to look it up alone costs more than it gives


@dataclass
class CorpusDrafter:
    """Proposes what the model's other answers go on with, as long as they are sure enough."""

    target: Target
    model: NGramModel
    name: str = "corpus"
    cuts: frozenset[int] = frozenset()
    texts: list[list[int]] = field(default_factory=list)  # the last tokens of each row, but for its very last

    def begin(self, prompt: Read) -> None:
        rows = prompt.tokens.tolist()
        self.texts = [row[:count][-self.model.order :] for row, count in zip(rows, prompt.counts, strict=True)]

    def hopes(self, last: Tensor, most: int) -> list[float]:
        """How likely each token of a draft is to stand, on average over rows, until no row has more."""
        return mean_by_place([[trust for _, trust in self._chain(row, token, most)] for row, token in _rows(last)])

    def propose(self, last: Tensor, most: int, worth: Worth) -> Proposal:
        proposal = Proposal([])
        for row, token in _rows(last):
            chain = self._chain(row, token, most)
            cut = next((at for at in range(1, len(chain)) if not worth(chain[at - 1][1])), len(chain))
            proposal.tokens.append([drafted for drafted, _ in chain[:cut]])
        return proposal

    def learn(self, read: Read) -> None:
        rows = zip(self.texts, read.tokens.tolist(), read.counts, strict=True)
        self.texts = [[*text, *tokens[:count]][-self.model.order :] for text, tokens, count in rows]

    def select(self, rows: Sequence[int]) -> None:
        self.texts = [self.texts[row] for row in rows]

    def _chain(self, row: int, last: int, most: int) -> list[tuple[int, float]]:
        """The likeliest tokens to follow, one after another, and how likely each is to be reached; at most `most`."""
        known, chain, trust = [*self.texts[row], last], [], 1.0
        while len(chain) < most and trust >= LEAST:
            found = self.model.after(known)
            if found is None:
                break
            trust *= found[1]
            known.append(found[0])
            chain.append((found[0], trust))
        return chain


@dataclass
class NGramDrafter:
    """Proposes what followed the last words where they occurred before in the row's own text (prompt lookup).

    The longest match from `longest` tokens down to `shortest` counts, the latest one among equals.
    """

    target: Target
    longest: int = 4
    shortest: int = 2
    name: str = "ngram"
    cuts: frozenset[int] = frozenset()
    texts: list[list[int]] = field(default_factory=list)
    places: list[dict[tuple[int, ...], int]] = field(default_factory=list)  # n-gram to the index after it

    def begin(self, prompt: Read) -> None:
        self.texts = [prompt.tokens[row, :count].tolist() for row, count in enumerate(prompt.counts)]
        self.places = [{} for _ in self.texts]
        for text, places in zip(self.texts, self.places, strict=True):
            self._note(text, places, 0)

    def propose(self, last: Tensor, most: int, worth: Worth) -> Proposal:
        return Proposal([self._after(row, token, most) for row, token in _rows(last)])

    def match(self, last: Tensor) -> int:
        """Tokens of the match that at least half of the rows have, or more; 0 if there is none."""
        matches = sorted(self.found(row, [token])[1] for row, token in _rows(last))
        return matches[len(matches) // 2]

    def hopes(self, last: Tensor, most: int) -> list[float]:
        """How likely each token of a draft is to stand, on average over rows."""
        matches = [self.found(row, [token])[1] for row, token in _rows(last)]
        return mean_by_place([_reached(one, most) for one in matches])

    def learn(self, read: Read) -> None:
        for row, count in enumerate(read.counts):
            text = self.texts[row]
            known = len(text)
            text += read.tokens[row, :count].tolist()
            self._note(text, self.places[row], known)

    def select(self, rows: Sequence[int]) -> None:
        self.texts, self.places = [self.texts[row] for row in rows], [self.places[row] for row in rows]

    def _note(self, text: list[int], places: dict[tuple[int, ...], int], start: int) -> None:
        # An n-gram at the very end has nothing after it yet, but by the time it is looked up it has.
        for end in range(max(start, self.shortest - 1) + 1, len(text) + 1):
            for length in range(self.shortest, min(self.longest, end) + 1):
                places[tuple(text[end - length : end])] = end

    def found(self, row: int, ending: Sequence[int]) -> tuple[int, int]:
        """What follows row `row` and `ending`: its index in the two, and the tokens that match; or 0, 0."""
        last = [*self.texts[row][-self.longest :], *ending]
        for length in range(min(self.longest, len(last)), self.shortest - 1, -1):
            at = self.places[row].get(tuple(last[-length:]))
            if at is not None:
                return at, length
        return 0, 0

    def _after(self, row: int, last: int, most: int) -> list[int]:
        at, length = self.found(row, [last])
        if not length:
            return []
        known = [*self.texts[row][at:], last]
        return [known[number % len(known)] for number in range(most)]  # copies of copies, as in LZ77


def _reached(match: int, most: int) -> list[float]:
    """How likely each of `most` tokens after a match is to be reached: each that stands makes the match longer."""
    longest = max(HOPES)
    steps = (HOPES[min(longest, match + number)] for number in range(most if match else 0))
    return list(accumulate(steps, mul))


def _rows(last: Tensor) -> list[tuple[int, int]]:
    """Each row's number and its last token, of `last` (rows, 1)."""
    return list(enumerate(last[:, 0].tolist()))


def mean_by_place(rows: Sequence[Sequence[float]]) -> list[float]:
    """The mean of what the rows have at each place, 0 where one has no more."""
    longest = max(map(len, rows))
    return [sum(row[at] for row in rows if at < len(row)) / len(rows) for at in range(longest)]
