"""Draft trees: several continuations of a text, verified in one pass.

Where the first drafted token is wrong, a chain is wrong as a whole, while a second guess beside it costs one token more
to verify. What is drafted for nothing, by looking up what followed before, has such guesses: the row's own words name
one token, the model's other answers name another, or a shorter match does. The tree grows best first: of all tokens
that could be added next, the one most likely to be reached comes first (as in EAGLE-2, arXiv 2406.16858). The first n
tokens of it are then the tree of n tokens of which most are expected to stand, namely the sum of their probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

from torch import Tensor

from layerwise.decoding.drafters import Proposal, Worth
from layerwise.decoding.ngram_model import NGramModel
from layerwise.decoding.ngrams import HOPES, LEAST, NGramDrafter, mean_by_place
from layerwise.decoding.target import Read, Target


class Node(NamedTuple):
    """A drafted token, the number of the one it follows (-1: the last token of the text), how likely it is reached."""

    token: int
    parent: int
    trust: float


@dataclass
class TreeDrafter:
    """Proposes what followed before in the row's own text and, if there is a `model`, in other answers.

    A token is followed by at most `branches` others; one branch makes a chain.
    """

    target: Target
    own: NGramDrafter
    model: NGramModel | None
    branches: int = 2
    name: str = "tree"
    cuts: frozenset[int] = frozenset()
    grown: list[list[Node]] = field(default_factory=list)  # of each row in this round, the likeliest first

    def begin(self, prompt: Read) -> None:
        self.own.begin(prompt)

    def grow(self, last: Tensor, most: int, least: float = 0.0) -> list[float]:
        """Grow what `propose` then cuts to length: trees of at most `most` tokens, to follow `last` (rows, 1).

        Where the guesses at the first token are together less likely than `least`, there is no tree.

        Returns how likely each of their tokens is to stand, on average over rows, until no row has more.
        """
        self.grown = [self._grown(row, token, most, least) for row, token in enumerate(last[:, 0].tolist())]
        return mean_by_place([[node.trust for node in tree] for tree in self.grown])

    def propose(self, last: Tensor, most: int, worth: Worth) -> Proposal:
        trees = [in_depth(tree[:most]) for tree in self.grown]
        tokens = [[node.token for node in tree] for tree in trees]
        return Proposal(tokens, parents=[[node.parent for node in tree] for tree in trees])

    def learn(self, read: Read) -> None:
        self.own.learn(read)

    def select(self, rows: Sequence[int]) -> None:
        self.own.select(rows)

    def _grown(self, row: int, last: int, most: int, least: float) -> list[Node]:
        """The first `most` tokens of the tree, the likeliest first."""
        grown: list[Node] = []
        if least > 1.0:
            return grown
        waiting: list[tuple[float, int, int, list[int]]] = []  # -trust, parent, token, the text since `last`

        def open_after(parent: int, ending: list[int], trust: float) -> None:
            for token, sure in self._guesses(row, ending):
                if trust * sure >= LEAST:
                    heappush(waiting, (-trust * sure, parent, token, [*ending, token]))

        open_after(-1, [last], 1.0)
        if -sum(trust for trust, *_ in waiting) < least:
            return grown
        while waiting and len(grown) < most:
            trust, parent, token, ending = heappop(waiting)
            grown.append(Node(token, parent, -trust))
            if len(grown) < most:
                open_after(len(grown) - 1, ending, -trust)
        return grown

    def _guesses(self, row: int, ending: list[int]) -> list[tuple[int, float]]:
        """The likeliest tokens to follow row `row` and `ending`, and how likely each is."""
        text = self.own.texts[row]
        at, length = self.own.found(row, ending)
        sources = [[((text[at] if at < len(text) else ending[at - len(text)]), HOPES[length])]] if length else []
        if self.model is not None:
            sources += self.model.known([*text[-self.model.order :], *ending])
        found: dict[int, float] = {}
        for source in sources:  # each is asked where those before it are wrong
            left = 1.0 - sum(found.values())
            fresh = {token: sure for token, sure in source if token not in found}
            wrong = sum(sure for token, sure in source if token in found)
            rest = max(1.0 - wrong, sum(fresh.values()))  # which rounding can make the greater
            found |= {token: left * sure / rest for token, sure in fresh.items()}
        return sorted(found.items(), key=lambda guess: -guess[1])[: self.branches]


def in_depth(grown: Sequence[Node]) -> list[Node]:
    """The same tree, each branch in one piece and the likeliest first: where that stands, nothing needs to be moved."""
    after: dict[int, list[int]] = {}
    for number, node in enumerate(grown):
        after.setdefault(node.parent, []).append(number)
    order: list[int] = []
    waiting = after.get(-1, [])[::-1]
    while waiting:
        order.append(waiting.pop())
        waiting += after.get(order[-1], [])[::-1]
    place = {number: at for at, number in enumerate(order)} | {-1: -1}
    return [grown[number]._replace(parent=place[grown[number].parent]) for number in order]
