"""The target of a speculation: the plan whose output is wanted, walked in pieces.

While a draft is made, the first visits of the target run token by token in the target's own cache; the verification
then runs the rest over the states they left, for all positions in one pass. `Target` holds the cache, the plan of each
row and the states kept, and knows how to walk from one visit to another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.model.cache import Cache
from layerwise.plan import Plan, Route, Step
from layerwise.trace import Phase, RowsOfTrace

if TYPE_CHECKING:
    from layerwise.model.causal_lm import LayerwiseForCausalLM


@dataclass(slots=True)
class Read:
    """Tokens that the target has read for good: the prompt, or the last token and the drafted ones it accepted.

    Attributes:
        tokens: (rows, width) token ids, of which counts[r] count.
        states: hidden states (rows, width, hidden size) after so many visits of the target, at the cuts asked for;
            those at 0 are the embeddings.
        deep: the last hidden states (rows, width, hidden size), before the final norm.
    """

    tokens: Tensor
    counts: list[int]
    states: dict[int, Tensor]
    deep: Tensor

    def along(self, columns: Sequence[Sequence[int]]) -> Read:
        """Of row r the tokens in columns[r] only, in that order."""
        counts = [len(row) for row in columns]
        index = torch.tensor([[*row, *[0] * (max(counts) - len(row))] for row in columns], device=self.tokens.device)

        def of(state: Tensor) -> Tensor:
            return state.gather(1, index[..., None].expand(-1, -1, state.shape[-1]))

        return Read(self.tokens.gather(1, index), counts, {cut: of(s) for cut, s in self.states.items()}, of(self.deep))


class Watched:
    """A route whose states are kept: those that all rows reach after the same visits."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self._states: list[Tensor] = []

    @property
    def plans(self) -> tuple[Plan, ...]:
        return self.route.plans

    def steps(self, hidden: Tensor) -> Iterator[Step]:
        self._states = [hidden]
        return self.route.steps(hidden)

    def observe(self, step: Step, hidden: Tensor) -> None:
        self._states.append(hidden)
        self.route.observe(step, hidden)

    @property
    def states(self) -> dict[int, Tensor]:
        """As `Read.states`, at every cut if all rows have one plan, else at 0."""
        return dict(enumerate(self._states if len(set(self.plans)) == 1 else self._states[:1]))


@dataclass
class Target:
    """The rows under way. `cuts` are the numbers of visits after which some drafter wants to see the states.

    With `keep`, what the cache holds of rows that leave is put aside, and `gather` puts it back.
    """

    model: LayerwiseForCausalLM
    plans: list[Plan]
    cache: Cache
    cuts: set[int]
    trace: RowsOfTrace | None = None
    ahead: list[Tensor] = field(default_factory=list)  # (rows, 1, hidden size) each, after `walked` visits
    walked: int = 0
    seen: dict[int, list[Tensor]] = field(default_factory=dict)  # the same at cuts before `walked`
    keep: bool = False
    numbers: list[int] = field(default_factory=list)  # of the rows that are in the cache
    gone: list[tuple[list[int], Cache]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.numbers = list(range(len(self.plans)))

    @property
    def rows(self) -> int:
        return len(self.plans)

    @property
    def uniform(self) -> bool:
        """Whether all rows have one plan, so that it can be walked in pieces."""
        return len(set(self.plans)) == 1

    def read(self, tokens: Tensor, counts: Sequence[int], embedded: Tensor | None = None) -> Read:
        """Walk all visits over tokens (rows, width) that need no verification: the prompt."""
        embedded = self.model.embed(tokens) if embedded is None else embedded
        deep, states = self._walk(embedded, counts, 0, None, Phase.PREFILL)
        return Read(tokens, list(counts), states, deep)

    def prefix(self, tokens: Tensor, visits: int) -> Tensor:
        """Walk the first `visits` visits over one more token a row, (rows, 1); keeps the states for `verify`."""
        hidden = self.model.embed(tokens)
        if not visits:
            return hidden
        assert not self.ahead or self.walked == visits, "one draft, one prefix"
        hidden, states = self._walk(hidden, [1] * self.rows, 0, visits, Phase.DRAFT)
        self.walked = visits
        self.ahead.append(hidden)
        for cut, state in states.items():
            self.seen.setdefault(cut, []).append(state)
        return hidden

    def verify(self, tokens: Tensor, counts: Sequence[int], parents: Sequence[Sequence[int]] | None = None) -> Read:
        """Walk what is left of the target over tokens (rows, width): the last one and those drafted after it.

        With `parents` they are a tree, see `Runtime.forward`. The cache then holds them all; the caller has it retain
        what it accepts.
        """
        width = tokens.shape[1]
        phase = Phase.VERIFY if width > 1 else Phase.DECODE
        if not self.ahead:
            deep, states = self._walk(self.model.embed(tokens), counts, 0, None, phase, parents)
            return Read(tokens, list(counts), states, deep)
        assert parents is None, "what was walked token by token is a chain"
        for column in range(len(self.ahead), width):  # the last drafted token has not been walked at all
            self.prefix(tokens[:, column : column + 1], self.walked)
        kept = torch.cat(self.ahead[:width], 1)
        self.cache.lengths = [length - len(self.ahead) for length in self.cache.lengths]
        states = {cut: torch.cat(parts[:width], 1) for cut, parts in self.seen.items()}
        start = self.walked
        self.forget()
        deep, later = self._walk(kept, counts, start, None, phase)
        return Read(tokens, list(counts), states | later, deep)

    def forget(self) -> None:
        """Drop the states kept for a verification; their tokens must leave the cache too."""
        self.ahead, self.seen, self.walked = [], {}, 0

    def select(self, rows: Sequence[int]) -> None:
        """Keep the rows named."""
        left = [row for row in range(self.rows) if row not in rows]
        if self.keep and left:
            self.gone.append(([self.numbers[row] for row in left], self.cache.part(left)))
        self.numbers = [self.numbers[row] for row in rows]
        self.plans = [self.plans[row] for row in rows]
        self.cache.select(rows)
        if self.trace is not None:
            self.trace.numbers = [self.trace.numbers[row] for row in rows]

    def gather(self) -> None:
        """Put the rows that left back into the cache, each in its old place; decoding is over."""
        if self.gone:
            numbers = [*self.numbers, *(number for rows, _ in self.gone for number in rows)]
            order = sorted(range(len(numbers)), key=numbers.__getitem__)
            self.cache.join([cache for _, cache in self.gone], order)
            self.gone = []

    def _walk(
        self,
        hidden: Tensor,
        counts: Sequence[int],
        start: int,
        stop: int | None,
        phase: Phase,
        parents: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Visits start..stop over (rows, width, hidden size); the states at the cuts within, that at `start` too."""
        states = {start: hidden}
        forward = self.model.runtime.forward
        if not self.uniform:
            return forward(hidden, self.plans, counts, self.cache, self.trace, phase, parents=parents), states
        before = list(self.cache.lengths)
        points = sorted(cut for cut in self.cuts if start < cut < (len(self.plans[0]) if stop is None else stop))
        try:
            for begin, end in zip([start, *points], [*points, stop], strict=True):
                self.cache.lengths = list(before)
                part = slice(begin, end)
                hidden = forward(hidden, self.plans, counts, self.cache, self.trace, phase, part, parents)
                if end is not None:
                    states[end] = hidden
        except BaseException:
            self.cache.rollback(before)
            raise
        return hidden, states
