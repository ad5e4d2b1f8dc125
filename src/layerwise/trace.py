"""Traces: what actually ran, per row and per token.

A plan says what should run; a trace is written by the runtime while it runs and is the only source of the
"layers per token" that reports print. Spans of tokens with the same plan are kept as one entry, so that a trace
of a long generation stays small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from layerwise.plan import Plan


class Source(StrEnum):
    """Who made a token."""

    DECODED = "decoded"  # one pass, one token
    DRAFTED = "drafted"  # proposed by a draft and accepted by the verification
    VERIFIED = "verified"  # chosen by the verification itself, after the last draft it accepted


class Phase(StrEnum):
    """What a forward pass was for."""

    PREFILL = "prefill"
    DECODE = "decode"
    DRAFT = "draft"
    VERIFY = "verify"


@dataclass(slots=True)
class Span:
    """`tokens` consecutive tokens of one row that went through `plan` in `phase`."""

    plan: Plan
    phase: Phase
    tokens: int


@dataclass
class Trace:
    """Spans of each row of a batch, in the order they ran, and the number of layer calls made."""

    rows: list[list[Span]] = field(default_factory=list)
    calls: int = 0
    sources: list[list[Source]] = field(default_factory=list)  # of each token generated, per row
    drafted: int = 0  # tokens proposed, over all rows
    accepted: int = 0
    drafts: Counter[str] = field(default_factory=Counter)  # how often each draft was chosen, by its text form
    targets: list[Plan] = field(default_factory=list)  # the plan whose output `generate` gave, per row

    def record(self, row: int, plan: Plan, phase: Phase, tokens: int) -> None:
        """Add `tokens` tokens of `row`; extends the last span if plan and phase are the same."""
        while len(self.rows) <= row:
            self.rows.append([])
        spans = self.rows[row]
        if spans and spans[-1].plan == plan and spans[-1].phase == phase:
            spans[-1].tokens += tokens
        elif tokens:
            spans.append(Span(plan, phase, tokens))

    def made(self, row: int, source: Source) -> None:
        """Note who made the next token of `row`."""
        while len(self.sources) <= row:
            self.sources.append([])
        self.sources[row].append(source)

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were accepted; 0.0 if none was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def of(self, rows: Sequence[int]) -> RowsOfTrace:
        """The same trace for a batch whose row i is row `rows[i]` here."""
        return RowsOfTrace(self, rows)

    def plans(self, row: int, *phases: Phase) -> Iterator[Plan]:
        """The plan of each token of `row`, one by one; only those of `phases`, if any are named."""
        for span in self.rows[row] if row < len(self.rows) else ():
            if not phases or span.phase in phases:
                yield from (span.plan for _ in range(span.tokens))

    def tokens(self, *phases: Phase) -> int:
        """Tokens run in `phases` (all if none is named), over all rows."""
        return sum(span.tokens for spans in self.rows for span in spans if not phases or span.phase in phases)

    def layers_per_token(self, *phases: Phase) -> float:
        """Mean layers run per token over all rows, in `phases` (all if none is named); 0.0 if nothing ran."""
        spans = [span for row in self.rows for span in row if not phases or span.phase in phases]
        tokens = sum(span.tokens for span in spans)
        return sum(span.plan.depth * span.tokens for span in spans) / tokens if tokens else 0.0


@dataclass(slots=True)
class RowsOfTrace:
    """A trace seen from a batch that holds only some of its rows."""

    trace: Trace
    numbers: Sequence[int]

    @property
    def calls(self) -> int:
        return self.trace.calls

    @calls.setter
    def calls(self, calls: int) -> None:
        self.trace.calls = calls

    def record(self, row: int, plan: Plan, phase: Phase, tokens: int) -> None:
        self.trace.record(self.numbers[row], plan, phase, tokens)
