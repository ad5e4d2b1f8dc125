"""Laws of traces: spans merge, plans expand per token, the mean is exact."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import combinations, pairwise

from layerwise.plan import Part, Plan
from layerwise.trace import Phase, Span, Trace

FULL = Plan.full(6)
SHORT = Plan.parse("0-1 5")
HALF = Plan.parse("0-4 5a")


def test_tokens_of_one_plan_and_phase_are_one_span() -> None:
    trace = Trace()
    for tokens in (5, 1, 1):
        trace.record(0, Plan.full(6), Phase.DECODE, tokens)  # a new, equal plan each time
    assert trace.rows == [[Span(FULL, Phase.DECODE, 7)]]


def test_another_plan_or_phase_opens_a_span() -> None:
    trace = Trace()
    trace.record(0, FULL, Phase.PREFILL, 4)
    trace.record(0, FULL, Phase.DECODE, 1)
    trace.record(0, SHORT, Phase.DECODE, 2)
    trace.record(0, FULL, Phase.DECODE, 1)
    assert trace.rows == [
        [
            Span(FULL, Phase.PREFILL, 4),
            Span(FULL, Phase.DECODE, 1),
            Span(SHORT, Phase.DECODE, 2),
            Span(FULL, Phase.DECODE, 1),
        ]
    ]


def test_rows_do_not_merge() -> None:
    trace = Trace()
    trace.record(2, FULL, Phase.DECODE, 1)
    trace.record(0, FULL, Phase.DECODE, 1)
    trace.record(2, FULL, Phase.DECODE, 1)
    assert trace.rows == [[Span(FULL, Phase.DECODE, 1)], [], [Span(FULL, Phase.DECODE, 2)]]


def test_no_tokens_leave_no_span() -> None:
    trace = Trace()
    trace.record(0, FULL, Phase.DECODE, 0)
    assert trace.rows == [[]]
    trace.record(0, FULL, Phase.DECODE, 3)
    trace.record(0, SHORT, Phase.DECODE, 0)
    trace.record(0, FULL, Phase.DECODE, 1)
    assert trace.rows == [[Span(FULL, Phase.DECODE, 4)]]


def test_plans_expand_per_token() -> None:
    trace = Trace()
    trace.record(0, FULL, Phase.PREFILL, 3)
    trace.record(0, SHORT, Phase.DRAFT, 2)
    trace.record(0, FULL, Phase.VERIFY, 1)
    assert list(trace.plans(0)) == [FULL, FULL, FULL, SHORT, SHORT, FULL]
    assert list(trace.plans(0, Phase.DRAFT)) == [SHORT, SHORT]
    assert list(trace.plans(0, Phase.VERIFY, Phase.DRAFT)) == [SHORT, SHORT, FULL]
    assert list(trace.plans(0, Phase.DECODE)) == []
    assert list(trace.plans(1)) == []


def test_mean_depth_of_an_example() -> None:
    trace = Trace()
    trace.record(0, FULL, Phase.PREFILL, 9)
    trace.record(0, SHORT, Phase.DECODE, 3)
    trace.record(1, HALF, Phase.DECODE, 1)
    assert trace.layers_per_token(Phase.PREFILL) == 6.0
    assert trace.layers_per_token(Phase.DECODE) == (3 * 3 + 5.5) / 4
    assert trace.layers_per_token() == (9 * 6 + 3 * 3 + 5.5) / 13


def test_empty_trace_is_zero() -> None:
    trace = Trace()
    assert trace.layers_per_token() == 0.0
    assert trace.layers_per_token(Phase.DECODE) == 0.0
    assert trace.tokens() == 0
    assert trace.calls == 0
    assert list(trace.plans(0)) == []
    trace.record(0, FULL, Phase.PREFILL, 2)
    assert trace.layers_per_token(Phase.DECODE) == 0.0


def test_traces_share_nothing() -> None:
    Trace().record(0, FULL, Phase.DECODE, 1)
    assert Trace().rows == []


def test_any_trace_equals_a_plain_list_of_tokens() -> None:
    rng = random.Random(0)
    plans = [FULL, SHORT, HALF, FULL.only(Part.MLP, 2, 3), FULL.repeat(1, 2)]
    selections = [phases for n in range(len(Phase) + 1) for phases in combinations(Phase, n)]
    for _ in range(100):
        trace, ran = Trace(), []
        for _ in range(rng.randint(1, 30)):
            row, plan, phase, tokens = rng.randrange(3), rng.choice(plans), rng.choice(list(Phase)), rng.randrange(4)
            trace.record(row, plan, phase, tokens)
            ran += [(row, plan, phase)] * tokens
        for phases in selections:
            chosen = [entry for entry in ran if not phases or entry[2] in phases]
            for row in range(3):
                assert list(trace.plans(row, *phases)) == [plan for r, plan, _ in chosen if r == row]
            assert trace.tokens(*phases) == len(chosen)
            depths = [Fraction(plan.depth) for _, plan, _ in chosen]
            assert trace.layers_per_token(*phases) == (float(sum(depths) / len(depths)) if depths else 0.0)
        for spans in trace.rows:
            assert all(span.tokens > 0 for span in spans)
            assert all((a.plan, a.phase) != (b.plan, b.phase) for a, b in pairwise(spans))
