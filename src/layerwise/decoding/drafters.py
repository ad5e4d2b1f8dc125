"""Drafters: what proposes tokens for the target plan to verify.

All of them work on a batch whose rows have moved on by different numbers of tokens, and keep what they cache in step
with what was accepted:

    begin     the prompt has been read
    propose   a few tokens for each row, to follow its last one
    learn     the target has read some of them for good
    select    only these rows go on

`PlanDrafter` runs a plan. What it has in common with the target, its first visits, is walked once, in the target's
own cache, and the states there are handed to the verification (LayerSkip, arXiv 2404.16710, section 4.3); the rest of
the plan has a cache of its own. `HeadDrafter` runs an exit head. Those of `ngrams` and `trees` look up what followed
before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from layerwise.decoding.judge import Pick
from layerwise.decoding.target import Read, Target
from layerwise.model.cache import Cache
from layerwise.model.exit_head import ExitHead
from layerwise.model.packing import last_of
from layerwise.model.runtime import Runtime
from layerwise.plan import Plan
from layerwise.policies import Policy, decide
from layerwise.trace import Phase

Choose = Callable[[Tensor, Tensor | None, Sequence[int], Sequence[Tensor]], Pick]  # `Judge.pick`
Worth = Callable[[float], bool]  # is one more token worth drafting, if those before stand with this probability?


@dataclass(slots=True)
class Proposal:
    """Drafted tokens of each row; `q[k]` is (rows, vocabulary), what the k-th was drawn from, None for no draw.

    `parents[r][k]` is the number of the token that the k-th of row r follows, an earlier one; -1 for the last token of
    the row. Without it, each follows the one before.
    """

    tokens: list[list[int]]
    q: list[Tensor] | None = None
    parents: list[list[int]] | None = None

    def parents_of(self, row: int) -> Sequence[int]:
        count = len(self.tokens[row])
        return range(-1, count - 1) if self.parents is None else self.parents[row]

    def within(self, most: Sequence[int]) -> Proposal:
        """Of row r the first most[r] tokens."""
        cut = [row[:count] for row, count in zip(self.tokens, most, strict=True)]
        after = self.parents and [row[:count] for row, count in zip(self.parents, most, strict=True)]
        return Proposal(cut, self.q, after)

    @property
    def branching(self) -> bool:
        """Whether any row has more than one continuation."""
        return any(any(after != at - 1 for at, after in enumerate(row)) for row in self.parents or ())


class Drafter(Protocol):
    """What can draft; `cuts` are the states of the target it wants to see, see `Target`."""

    name: str
    cuts: frozenset[int]

    def begin(self, prompt: Read) -> None: ...

    def propose(self, last: Tensor, most: int, worth: Worth) -> Proposal:
        """At most `most` tokens a row to follow `last` (rows, 1)."""
        ...

    def learn(self, read: Read) -> None:
        """The target has read `read` for good; its cache ends there."""
        ...

    def select(self, rows: Sequence[int]) -> None: ...


def _drafted(
    last: Tensor,
    most: int,
    worth: Worth,
    choose: Choose,
    step: Callable[[Tensor, int], tuple[Tensor, Tensor | None]],
    rows: Sequence[int],
    floor: float = 0.0,
) -> Proposal:
    """Draft one token after another for `rows`, their numbers; `step` gives the logits that follow a token (rows, 1).

    A row's draft ends before its first token of less probability than `floor`. It then goes on for nothing while others
    are sure, so that rows stay in step.
    """
    columns: list[Tensor] = []
    q, token = [], last
    trust, going, counts = [1.0] * len(last), [True] * len(last), [0] * len(last)
    for number in range(most):
        pick = choose(*step(token, number), rows, columns)
        going = [before and sure >= floor for before, sure in zip(going, pick.sure, strict=True)]
        if not any(going):
            break
        counts = [count + goes for count, goes in zip(counts, going, strict=True)]
        token = pick.tokens
        columns.append(token)
        if pick.q is not None:
            q.append(pick.q)
        trust = [before * sure for before, sure in zip(trust, pick.sure, strict=True)]
        if number + 1 < most and not worth(sum(trust) / len(trust)):
            break
    return Proposal(torch.cat(columns, 1).tolist() if columns else [[] for _ in last], q or None).within(counts)


def _beside(cache: Cache, prompt: Read) -> Cache:
    """A drafter's own cache, which begins where the prompt began in the target's."""
    starts = [length - count for length, count in zip(cache.lengths, prompt.counts, strict=True)]
    return Cache(cache.rows, cache.capacity, starts)


@dataclass
class PlanDrafter:
    """Drafts by `plans`, one a row; logits by `logits`, of the tokens `vocabulary` if that is given.

    If all rows have one plan, what it shares with the target is walked once.
    """

    name: str
    target: Target
    plans: list[Plan]
    choose: Choose
    logits: Callable[[Tensor, Sequence[Plan]], Tensor]
    vocabulary: Tensor | None = None
    share: bool = True  # whether what is common with the target is to be walked once
    floor: float = 0.0  # propose nothing less probable
    cuts: frozenset[int] = frozenset()
    shared: int = 0
    cache: Cache | None = None
    behind: list[Tensor] = field(default_factory=list)  # per row, (tokens, hidden size) not in `cache` yet

    def __post_init__(self) -> None:
        self._part()

    def _part(self) -> None:
        """Tell what of the plans is walked with the target, and what is their own."""
        if self.share and self.target.uniform and len(set(self.plans)) == 1:
            self.shared = self.target.plans[0].common_prefix(self.plans[0])
        self.own = slice(self.shared, None) if self.shared < len(self.plans[0]) else None
        self.cuts = frozenset({self.shared} if self.own else ())

    def begin(self, prompt: Read) -> None:
        if self.own is None:
            return
        self.cache = _beside(self.target.cache, prompt)
        self._walk(prompt.states[self.shared], prompt.counts, Phase.PREFILL)
        self.behind = [prompt.deep.new_empty(0, prompt.deep.shape[-1])] * self.target.rows

    def propose(self, last: Tensor, most: int, worth: Worth) -> Proposal:
        def step(token: Tensor, number: int) -> tuple[Tensor, Tensor | None]:
            hidden = self.target.prefix(token, self.shared)
            if self.own is not None:
                hidden = self._catch_up(hidden) if number == 0 else self._walk(hidden, [1] * len(token))
            return self.logits(hidden, self.plans)[:, -1].float(), self.vocabulary

        return _drafted(last, most, worth, self.choose, step, self.target.numbers, self.floor)

    def learn(self, read: Read) -> None:
        if self.own is None:
            return
        # Drafted tokens that stood are in the cache already, those that fell are forgotten, the rest is to be read.
        starts = [length - count for length, count in zip(self.target.cache.lengths, read.counts, strict=True)]
        ends = [min(own, length) for own, length in zip(self.cache.lengths, self.target.cache.lengths, strict=True)]
        states = read.states[self.shared]
        for row, (end, start, count) in enumerate(zip(ends, starts, read.counts, strict=True)):
            fresh = states[row, max(0, end - start) : count]
            self.behind[row] = torch.cat([self.behind[row], fresh]) if end <= start else fresh
        self.cache.rollback(ends)

    def select(self, rows: Sequence[int]) -> None:
        if self.cache is not None:
            self.cache.select(rows)
            self.behind = [self.behind[row] for row in rows]
        self.plans = [self.plans[row] for row in rows]

    def _catch_up(self, hidden: Tensor) -> Tensor:
        """Walk the tokens behind and the last one, whose states are (rows, 1, hidden size)."""
        rows = [torch.cat([behind, own]) for behind, own in zip(self.behind, hidden, strict=True)]
        counts = [len(row) for row in rows]
        hidden = self._walk(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), counts)
        self.behind = [row[:0] for row in rows]
        return last_of(hidden, counts)

    def _walk(self, hidden: Tensor, counts: Sequence[int], phase: Phase = Phase.DRAFT) -> Tensor:
        forward, visits = self.target.model.runtime.forward, self.own if self.shared else None
        return forward(hidden, self.plans, counts, self.cache, self.target.trace, phase, visits)


class PolicyDrafter(PlanDrafter):
    """Drafts by the plans that `policy` decides from the prompt, each row by its own: known once the prompt is read."""

    def __init__(self, name: str, target: Target, policy: Policy, *options: Any) -> None:
        super().__init__(name, target, list(target.plans), *options)
        self.policy = policy
        self.shared, self.own, self.cuts = 0, slice(0, None), frozenset()

    def begin(self, prompt: Read) -> None:
        target = self.target
        self.cache = _beside(target.cache, prompt)
        found = decide(self.policy, prompt.counts)
        target.model.runtime.forward(prompt.states[0], found, prompt.counts, self.cache, target.trace, Phase.PREFILL)
        self.plans = list(found if isinstance(found, Sequence) else found.plans)
        self._part()
        target.cuts |= self.cuts
        self.behind = [prompt.deep.new_empty(0, prompt.deep.shape[-1])] * target.rows


@dataclass
class HeadDrafter:
    """Drafts by an exit head, which `runtime` runs as a model of one layer.

    The head's cache holds the first `settled` tokens of a row as they were read with their true deep states. Those
    after them wait: of each the state that enters the head, and of each, and the one before, the deep state.
    """

    name: str
    target: Target
    head: ExitHead
    runtime: Runtime
    choose: Choose
    cuts: frozenset[int] = frozenset()
    cache: Cache | None = None
    settled: list[int] = field(default_factory=list)
    early: list[Tensor] = field(default_factory=list)  # per row (tokens waiting, hidden size)
    deep: list[Tensor] = field(default_factory=list)  # per row (tokens waiting + 1, hidden size)

    def __post_init__(self) -> None:
        self.cuts = frozenset({self.head.exit})

    def begin(self, prompt: Read) -> None:
        self.cache = _beside(self.target.cache, prompt)
        before = torch.cat([torch.zeros_like(prompt.deep[:, :1]), prompt.deep[:, :-1]], 1)
        self._walk(self.head.join(prompt.states[self.head.exit], before), prompt.counts, Phase.PREFILL)
        self._settle(prompt.deep)
        self.deep = [prompt.deep[row, count - 1 : count] for row, count in enumerate(prompt.counts)]

    def propose(self, last: Tensor, most: int, worth: Worth) -> Proposal:
        state = last  # of the token before, once there is one

        def step(token: Tensor, number: int) -> tuple[Tensor, Tensor | None]:
            nonlocal state
            early = self.target.prefix(token, self.head.exit)
            state = self._walk(self.head.join(early, state)) if number else self._catch_up(early)
            return self.runtime.engine.logits(state)[:, -1].float(), self.head.vocabulary

        return _drafted(last, most, worth, self.choose, step, self.target.numbers)

    def learn(self, read: Read) -> None:
        self.cache.rollback(self.settled)  # what was drafted fed on the head's own states: it is read again
        early, lengths = read.states[self.head.exit], self.target.cache.lengths
        for row, count in enumerate(read.counts):
            # The first token of `read` is in the cache if this drafter drafted from it.
            known = self.settled[row] + len(self.early[row]) - (lengths[row] - count)
            self.early[row] = torch.cat([self.early[row], early[row, known:count]])
            self.deep[row] = torch.cat([self.deep[row], read.deep[row, :count]])

    def select(self, rows: Sequence[int]) -> None:
        self.cache.select(rows)
        self.settled = [self.settled[row] for row in rows]
        self.early, self.deep = [self.early[row] for row in rows], [self.deep[row] for row in rows]

    def _catch_up(self, last: Tensor) -> Tensor:
        """Read the tokens that wait and the last one, whose states are (rows, 1, hidden size)."""
        early = [torch.cat([waiting, own]) for waiting, own in zip(self.early, last, strict=True)]
        counts = [len(row) for row in early]
        joined = self.head.join(*(torch.nn.utils.rnn.pad_sequence(rows, True) for rows in (early, self.deep)))
        state = last_of(self._walk(joined, counts), counts)
        self._settle(last)
        return state

    def _settle(self, like: Tensor) -> None:
        self.settled = list(self.cache.lengths)
        self.early = [like.new_empty(0, like.shape[-1])] * self.target.rows
        self.deep = list(self.early)

    def _walk(self, joined: Tensor, counts: Sequence[int] | None = None, phase: Phase = Phase.DRAFT) -> Tensor:
        target = self.target
        return self.runtime.forward(joined, [_ONE_LAYER] * target.rows, counts, self.cache, target.trace, phase)


_ONE_LAYER = Plan.full(1)
