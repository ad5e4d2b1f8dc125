"""Traces: what actually ran, per row and per token.

A plan says what should run; a trace is written by the runtime while it runs and is the only source of the
"layers per token" that reports print. Spans of tokens with the same plan are kept as one entry, so that a trace
of a long generation stays small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from layerwise.plan import Plan


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

    def record(self, row: int, plan: Plan, phase: Phase, tokens: int) -> None:
        """Add `tokens` tokens of `row`; extends the last span if plan and phase are the same."""
        while len(self.rows) <= row:
            self.rows.append([])
        spans = self.rows[row]
        if spans and spans[-1].plan == plan and spans[-1].phase == phase:
            spans[-1].tokens += tokens
        elif tokens:
            spans.append(Span(plan, phase, tokens))

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
