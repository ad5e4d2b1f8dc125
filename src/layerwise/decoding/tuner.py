"""Which draft, and how many tokens: chosen while running, from what was measured so far.

For each way to draft the tuner keeps two numbers, how often a drafted token stands (of a way that says how sure it is,
how much of that comes true) and how long it takes to draft one, and it keeps how long a verification of so many takes.
If a drafted token stands with probability a, then d of them give 1 + a + ... + a^d tokens a round, at the price of
drafting d and verifying d + 1. The best way is the one that gives most tokens a second. Drafting nothing at all is one
of the ways, left only for what promises a tenth more, or was never tried. A tree that was looked up beforehand knows of
each token how likely it is to stand; it gives 1 + their sum. Where a text is copied, its fifth token stands far more
often than five independent ones would: how much comes true is learnt for each of a tree's tokens.
Within a round drafting goes on as long as one more token is expected to give more than its time would elsewhere: the
draft's own confidence says how likely it is that those before it stand (Kangaroo, arXiv 2404.18911, stops below a fixed
confidence; DEL, arXiv 2504.05598, chooses exit and length from measured acceptance).

An answer has a few dozen rounds, too few to find out what each width of a verification takes, which is why passes are
timed beforehand (`pass_times`). Rounds then correct these times, and tell how fast the machine is just now.

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
OWN_WEIGHT = 1.0  # tokens that count for one of a tree as all do, before it has been tried
ONE_MORE = 0.05  # of a plain step, to verify one more token, where nothing is known
TIMED = 10.0  # rounds that a time measured counts for at most, and one measured beforehand does
MARGIN = 1.1  # of plain decoding: what a way that was tried must promise, for promises are kept in part only
LONGEST = 2.0  # times what a round was expected to take: beyond, something else was running
_NONE: Mapping[str, Any] = MappingProxyType({})
Hope = float | Sequence[float]
REST = 100.0  # rounds after which half of a failure is forgotten, if the way was not taken since


@dataclass(slots=True)
class Way:
    """One way to draft: its counts and its time; `price` is a guess at the time, as a share of a plain step.

    A way may say what it hopes for, round by round: a long match more than a short one. It is the probability that a
    drafted token stands if those before do, or of each token that it stands. What is learnt is how much comes true, and
    where hopes are of each token, of each.
    """

    price: float
    stood: float = 0.0
    hoped: float = 0.0  # the hopes for all tokens that stood, or were the first to fall
    seconds: float | None = None  # to draft one token
    idle: int = 0
    each: dict[int, tuple[float, float]] = field(default_factory=dict)  # by a token's number: stood and hoped

    def acceptance(self, hope: float = HOPE) -> float:
        """Probability that a drafted token stands, given that those before it do."""
        return min(0.99, hope * self.true())

    def gains(self, hope: Hope, length: int) -> list[float]:
        """How likely each of `length` drafted tokens is to stand; fewer if there are no more."""
        if isinstance(hope, Sequence):
            true = self.true_of_each(min(length, len(hope)))
            return [min(0.99, trust * factor) for trust, factor in zip(hope, true, strict=False)]
        a = self.acceptance(hope)
        return [a ** (number + 1) for number in range(length)]

    def note(self, hope: Hope, drafted: int, stood: Hope) -> None:
        """`stood` of `drafted` tokens stood; where hopes are of each token, so may `stood` be."""
        fade = MEMORY * 0.5 ** ((self.idle - 1) / REST)
        count = sum(stood) if isinstance(stood, Sequence) else stood
        hoped = sum(hope[:drafted]) if isinstance(hope, Sequence) else hope * (count + (count < drafted))
        if isinstance(hope, Sequence) and isinstance(stood, Sequence):
            for number, (trust, share) in enumerate(zip(hope, stood, strict=False)):
                before = self.each.get(number, (0.0, 0.0))
                self.each[number] = (before[0] * fade + share, before[1] * fade + trust)
        self.stood = self.stood * fade + count
        self.hoped = self.hoped * fade + hoped
        self.idle = 0

    def true(self) -> float:
        """How much of what was hoped for comes true."""
        fade = 0.5 ** (self.idle / REST)
        return (self.stood * fade + STARTING_WEIGHT) / (self.hoped * fade + STARTING_WEIGHT)

    def true_of_each(self, count: int) -> list[float]:
        """The same of each of the first `count` tokens. One that was not tried is like the one before it: where a text
        is copied, ever more comes true, and only a try tells where that ends."""
        fade, before, found = 0.5 ** (self.idle / REST), self.true(), []
        for number in range(count):
            stood, hoped = self.each.get(number, (0.0, 0.0))
            before = (stood * fade + OWN_WEIGHT * before) / (hoped * fade + OWN_WEIGHT)
            found.append(before)
        return found


@dataclass
class Tuner:
    """Chooses among ways; the same object serves all of a model's answers, so that it has something to go by."""

    ways: dict[str, Way] = field(default_factory=dict)
    widths: dict[int, tuple[float, float]] = field(default_factory=dict)  # tokens verified: seconds at pace 1, weight
    pace: float = 1.0  # how much longer all rounds take now than when they were measured
    _read: dict[int, float] = field(default_factory=dict)  # what `round_seconds` found since the last round
    _smoothed: dict[int, float] = field(default_factory=dict)  # and `_smooth`

    @classmethod
    def timed(cls, seconds: Mapping[int, float]) -> Tuner:
        """One that knows how long passes over so many tokens take, and reads off what those between take."""
        made = cls(widths={width: (one, TIMED) for width, one in seconds.items()})
        every = {width: made.round_seconds(width) for width in range(1, max(seconds, default=0) + 1)}
        return cls(widths={width: (one, TIMED) for width, one in every.items()})

    @property
    def plain(self) -> float:
        """Seconds of a round without a draft: as measured, else a guess, else 1."""
        return self.round_seconds(1)

    def round_seconds(self, width: int) -> float:
        """A round that verifies `width` tokens, drafting left out: as measured, or read off its neighbours."""
        if width not in self._read:
            self._smoothed = self._smoothed or self._smooth()
            self._read[width] = self.pace * self._between(self._smoothed, width)
        return self._read[width]

    def _between(self, times: Mapping[int, float], width: int) -> float:
        plain = times[1] if 1 in times else min(times.values(), default=1.1) / 1.1
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

    def _smooth(self) -> dict[int, float]:
        """Seconds of a round by its width, smoothed: more tokens never take less time (isotonic regression).

        Widths differ by a few percent, single measurements by more: unsmoothed, chance would choose the length.
        """
        pools: list[tuple[float, float, list[int]]] = []  # seconds, weight, widths
        for width in sorted(self.widths):
            pool = (*self.widths[width], [width])
            while pools and pools[-1][0] > pool[0]:
                before = pools.pop()
                weight = before[1] + pool[1]
                mean = (before[0] * before[1] + pool[0] * pool[1]) / weight
                pool = (mean, weight, before[2] + pool[2])
            pools.append(pool)
        return {width: seconds for seconds, _, widths in pools for width in widths}

    def rates(self, name: str, most: int, hope: Hope = HOPE) -> list[float]:
        """Expected tokens a second of rounds with 1, 2, .. `most` tokens drafted by `name`; fewer if it has no more."""
        way, tokens, found = self.ways[name], 1.0, []
        each = self._draft_seconds(way)
        for length, gain in enumerate(way.gains(hope, most), 1):
            tokens += gain
            found.append(tokens / (each * length + self.round_seconds(length + 1)))
        return found

    def least(self, name: str, most: int) -> float:
        """How likely the first token must be, all guesses at it together, for a tree of `name` to pay at any length.

        All tokens of one depth are no likelier together than those of the first: n of them give n times that at most.
        """
        way, plain = self.ways.get(name) or Way(0.0), self.plain
        each = self._draft_seconds(way)
        margin = self._margin(name)
        more = (margin * each + (margin * self.round_seconds(n + 1) - plain) / n for n in range(1, most + 1))
        return min(more, default=0.0) / (plain * max([way.true(), *way.true_of_each(most)]))

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
        if rest and 1 not in self.widths:
            return "off", 0, lambda trust: False
        options = [
            (rate, name, length)
            for name in prices
            for length, rate in enumerate(self.rates(name, most, hopes.get(name, HOPE)), 1)
        ]
        plain = 1 / self.round_seconds(1) if rest else 0.0
        options = [one for one in options if one[0] > plain * self._margin(one[1])]
        if not options:
            return "off", 0, lambda trust: False
        best, name, length = max(options)
        way = self.ways[name]
        more = self.round_seconds(length + 1) - self.round_seconds(max(1, length - 3))
        cost = self._draft_seconds(way) + max(0.0, more / min(4, length))
        threshold = cost * best / max(way.gains(hopes.get(name, HOPE), 1)[0], 1e-3)
        return name, length, lambda trust: trust >= threshold

    def note(
        self,
        name: str,
        drafted: int,
        stood: Hope,
        draft_seconds: float,
        width: int,
        seconds: float,
        hope: Hope = HOPE,
    ) -> None:
        """Learn from a round: `stood` of `drafted` tokens a row stood, on average over rows; or of each token, in how
        many of the rows it stood."""
        for other in self.ways.values():
            other.idle += 1
        known, weight = self.widths.get(width, (seconds / self.pace, 0.0))
        seconds = min(seconds, LONGEST * known * self.pace)
        if weight >= TIMED:
            self.pace *= (seconds / (self.pace * known)) ** (1.0 / TIMED)
        weight = min(weight + 1.0, TIMED)
        self.widths[width] = (known + (seconds / self.pace - known) / weight, weight)
        self._read.clear()
        self._smoothed.clear()
        if not drafted:
            return
        way = self.ways.setdefault(name, Way(seconds / drafted))
        way.note(hope, drafted, stood)
        each = draft_seconds / drafted
        way.seconds = each if way.seconds is None else way.seconds + 0.1 * (each - way.seconds)

    def _margin(self, name: str) -> float:
        """What a way must promise, as a multiple of plain decoding; one that was never tried has nothing to make up."""
        way = self.ways.get(name)
        return 1.0 if way is None or way.seconds is None else MARGIN

    def _draft_seconds(self, way: Way) -> float:
        """Seconds to draft one token: as measured, or the guess again when that was long ago; one spike may fade."""
        guess = way.price * self.plain
        return guess if way.seconds is None else guess + (way.seconds - guess) * 0.5 ** (way.idle / REST)
