"""Which draft, and how many tokens: chosen while running, from what was measured so far.

For each way to draft the tuner keeps two numbers, how often a drafted token stands (of a way that says how sure it is,
how much of that comes true) and how long it takes to draft one, and it keeps how long a verification of so many takes.
If a drafted token stands with probability a, then d of them give 1 + a + ... + a^d tokens a round, at the price of
drafting d and verifying d + 1. The best way is the one that gives most tokens a second; drafting nothing at all is one
of the ways. A tree that was looked up beforehand knows of each token how likely it is to stand; it gives 1 + their sum.
Within a round drafting goes on as long as one more token is expected to give more than its time would elsewhere: the
draft's own confidence says how likely it is that those before it stand (Kangaroo, arXiv 2404.18911, stops below a fixed
confidence; DEL, arXiv 2504.05598, chooses exit and length from measured acceptance).

Old rounds are forgotten slowly, so a way that failed is tried again when the text may have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

MEMORY = 0.98  # what a round's counts weigh one round later
HOPE = 0.6  # acceptance of a way that has not been tried, if it says nothing of itself
STARTING_WEIGHT = 1.2  # tokens that were hoped for and stood, before there are any
ONE_MORE = 0.05  # of a plain step, to verify one more token, where nothing is known
REMEASURE = 64  # rounds after which a plain one is timed again
_NONE: Mapping[str, Any] = MappingProxyType({})
Hope = float | Sequence[float]
REST = 100.0  # rounds after which half of a failure is forgotten, if the way was not taken since


@dataclass(slots=True)
class Way:
    """One way to draft: its counts and its time; `price` is a guess at the time, as a share of a plain step.

    A way may say what it hopes for, round by round: a long match more than a short one. It is the probability that a
    drafted token stands if those before do, or of each token that it stands. What is learnt is how much comes true.
    """

    price: float
    stood: float = 0.0
    hoped: float = 0.0  # the hopes for all tokens that stood, or were the first to fall
    seconds: float | None = None  # to draft one token
    idle: int = 0

    def acceptance(self, hope: float = HOPE) -> float:
        """Probability that a drafted token stands, given that those before it do."""
        return min(0.99, hope * self._true())

    def gains(self, hope: Hope, length: int) -> list[float]:
        """How likely each of `length` drafted tokens is to stand; fewer if there are no more."""
        if isinstance(hope, Sequence):
            return [min(0.99, trust * self._true()) for trust in hope[:length]]
        a = self.acceptance(hope)
        return [a ** (number + 1) for number in range(length)]

    def note(self, hope: Hope, drafted: int, stood: float) -> None:
        """`stood` of `drafted` tokens stood."""
        hoped = sum(hope[:drafted]) if isinstance(hope, Sequence) else hope * (stood + (stood < drafted))
        fade = MEMORY * 0.5 ** ((self.idle - 1) / REST)
        self.stood = self.stood * fade + stood
        self.hoped = self.hoped * fade + hoped
        self.idle = 0

    def _true(self) -> float:
        """How much of what was hoped for comes true."""
        fade = 0.5 ** (self.idle / REST)
        return (self.stood * fade + STARTING_WEIGHT) / (self.hoped * fade + STARTING_WEIGHT)


@dataclass
class Tuner:
    """Chooses among ways; the same object serves all of a model's answers, so that it has something to go by."""

    ways: dict[str, Way] = field(default_factory=dict)
    widths: dict[int, tuple[float, float]] = field(default_factory=dict)  # tokens verified: seconds, weight
    since_plain: int = 0  # rounds since one verified a single token
    _smooth: dict[int, float] | None = None  # see `_times`

    @property
    def plain(self) -> float:
        """Seconds of a round without a draft: as measured, else a guess, else 1."""
        times = self._times()
        return times[1] if 1 in times else min(times.values(), default=1.1) / 1.1

    def round_seconds(self, width: int) -> float:
        """A round that verifies `width` tokens, drafting left out: as measured, or read off its neighbours."""
        times, plain = self._times(), self.plain
        if width in times:
            return times[width]
        unit = plain * ONE_MORE
        known = [w for w in times if w > 1]
        below, above = (
            max((w for w in known if w < width), default=None),
            min((w for w in known if w > width), default=None),
        )
        if width == 1 or not known:
            return plain * (1.0 if width == 1 else 1.1) + unit * (width - 1)
        if below is None:
            return max(times[above] - unit * (above - width), plain)
        if above is None:
            return times[below] + unit * (width - below)
        return times[below] + (times[above] - times[below]) * (width - below) / (above - below)

    def _times(self) -> dict[int, float]:
        """Seconds of a round by its width, smoothed: more tokens never take less time (isotonic regression).

        Widths differ by a few percent, single measurements by more: unsmoothed, chance would choose the length.
        """
        if self._smooth is None:
            pools: list[tuple[float, float, list[int]]] = []  # seconds, weight, widths
            for width in sorted(self.widths):
                pool = (*self.widths[width], [width])
                while pools and pools[-1][0] > pool[0]:
                    before = pools.pop()
                    weight = before[1] + pool[1]
                    mean = (before[0] * before[1] + pool[0] * pool[1]) / weight
                    pool = (mean, weight, before[2] + pool[2])
                pools.append(pool)
            self._smooth = {width: seconds for seconds, _, widths in pools for width in widths}
        return self._smooth

    def rate(self, name: str, length: int, hope: Hope = HOPE) -> float:
        """Expected tokens a second of rounds with `length` tokens drafted by `name`."""
        way = self.ways[name]
        tokens = 1.0 + sum(way.gains(hope, length))
        return tokens / (self._draft_seconds(way) * length + self.round_seconds(length + 1))

    def choose(
        self, prices: Mapping[str, float], most: int, rest: bool = True, hopes: Mapping[str, Hope] = _NONE
    ) -> tuple[str, int, Callable[[float], bool]]:
        """The way, how many tokens are best on average, and whether, at this confidence, one more is worth it.

        Args:
            prices: the ways there are now, each with a guess at the time of drafting a token, as a share of a step.
            most: no more tokens than this.
            rest: whether drafting nothing may be chosen; its name is "off".
            hopes: what the ways hope for in this round, where they know, see `Way`.
        """
        for name, price in prices.items():
            self.ways.setdefault(name, Way(price))
        if rest and (1 not in self.widths or self.since_plain >= REMEASURE):
            return "off", 0, lambda trust: False
        options = [
            (self.rate(name, length, hopes.get(name, HOPE)), name, length)
            for name in prices
            for length in range(1, most + 1)
        ]
        plain = 1 / self.round_seconds(1)
        best, name, length = max(options, default=(0.0, "off", 0))
        if not options or (rest and plain >= best):
            return "off", 0, lambda trust: False
        way = self.ways[name]
        more = self.round_seconds(length + 1) - self.round_seconds(max(1, length - 3))
        cost = self._draft_seconds(way) + max(0.0, more / min(4, length))
        threshold = cost * best / max(way.gains(hopes.get(name, HOPE), 1)[0], 1e-3)
        return name, length, lambda trust: trust >= threshold

    def note(
        self,
        name: str,
        drafted: int,
        stood: float,
        draft_seconds: float,
        width: int,
        seconds: float,
        hope: Hope = HOPE,
    ) -> None:
        """Learn from a round: `stood` of `drafted` tokens a row stood, on average over rows."""
        for other in self.ways.values():
            other.idle += 1
        self.since_plain = 0 if width == 1 else self.since_plain + 1
        known, weight = self.widths.get(width, (seconds, 0.0))
        weight = min(weight + 1.0, 10.0)
        self.widths[width] = (known + (seconds - known) / weight, weight)
        self._smooth = None
        if not drafted:
            return
        way = self.ways.setdefault(name, Way(seconds / drafted))
        way.note(hope, drafted, stood)
        each = draft_seconds / drafted
        way.seconds = each if way.seconds is None else way.seconds + 0.1 * (each - way.seconds)

    def _draft_seconds(self, way: Way) -> float:
        return way.price * self.plain if way.seconds is None else way.seconds
