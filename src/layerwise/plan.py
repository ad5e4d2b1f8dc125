"""Plans: which layers one forward pass visits, and in which order.

A transformer with L layers usually visits 0, 1, ..., L-1. A plan is any other list of visits: layers left out
(skips), visited again (repeats), visited in part (attention or MLP alone, or with a thin MLP: some of its neurons,
which an adapter names), or crossed by a bridge, a small map that an adapter may bring for a layer that is left out.
Plans are values: frozen, hashable, compared by content, and written as text that reads back to the same plan:

    0-29            every layer of a 30-layer model
    0-5 8-29        layers 6 and 7 skipped
    0-6 7*2 8-29    layer 7 twice
    3-5*2           the block 3 4 5 3 4 5
    0-8 9a 10m 11-29    attention alone in layer 9, MLP alone in layer 10
    0-22 23-29t     with thin MLPs in layers 23 to 29
    0-3 4-6b 7-29   bridges in place of layers 4 to 6
    0-3 4-6b2 7-29  those of set 2: a layer may have several, fitted to different plans
    0-29 ht         with a thin LM head, which finds the likely tokens cheaply and computes the logits of those

Each visit that attends owns one slot of the KV cache, keyed (layer, how often the layer attended before): the
second visit of a layer sees other hidden states than the first, so it must not share its keys.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property, lru_cache
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Part(StrEnum):
    """What of a layer a visit runs; the value is its suffix in a plan's text."""

    BOTH = ""
    ATTENTION = "a"
    MLP = "m"
    THIN = "t"
    BRIDGE = "b"

    __hash__ = str.__hash__  # an enum's own is Python, and visits are keys that every layer call looks up


@dataclass(frozen=True, slots=True, order=True)
class Visit:
    """One run of one layer, of its attention or MLP alone, with a thin MLP, or of the bridge that stands in for it."""

    layer: int
    part: Part = Part.BOTH
    set: int = 0  # of a bridge: which of those that its layer has

    @property
    def attends(self) -> bool:
        """Whether the visit reads and writes a slot of the KV cache."""
        return self.part in (Part.BOTH, Part.ATTENTION, Part.THIN)

    def __str__(self) -> str:
        return f"{self.layer}{self.part}{self.set or ''}"


class Slot(NamedTuple):
    """The key of a visit's place in the KV cache: the `nth` (from 0) attention of `layer` in its plan.

    A named tuple, for the hash of a dataclass is Python, and every layer of every token looks its slot up.
    """

    layer: int
    nth: int


_DEPTHS = {Part.BOTH: 1.0, Part.ATTENTION: 0.5, Part.MLP: 0.5, Part.THIN: 1.0, Part.BRIDGE: 0.0}
_ITEM = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?(?:([amt])|(b)([1-9]\d{0,5})?)?(?:\*(\d{1,6}))?", re.ASCII)
_GRAMMAR = 'write layers and ranges such as "0-5 7*2 8-29"'
MAX_REPEATS = 64  # more in one item is a slip of the keyboard, and would exhaust the cache
MAX_LAYERS = 10_000
THIN_HEAD = "ht"  # the last item of the text of a plan with a thin head


@dataclass(frozen=True)
class Plan:
    """The ordered layer visits of one forward pass; `visits` must not be empty. `thin_head`: whether logits are those
    of the model's thin head (`model.thin_head`)."""

    visits: tuple[Visit, ...]
    thin_head: bool = False

    def __post_init__(self) -> None:
        if not self.visits:
            raise ValueError(f"a plan must visit at least one layer: {_GRAMMAR}")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.visits, self.thin_head))

    # -- making plans ------------------------------------------------------------------------------------

    @classmethod
    def full(cls, layers: int) -> Plan:
        """Every layer of a model with `layers` layers, once, in order."""
        return cls.of(range(layers))

    @classmethod
    def of(cls, layers: Iterable[int]) -> Plan:
        """Whole visits of `layers`, in the order given."""
        return cls(tuple(Visit(layer) for layer in layers))

    @classmethod
    def parse(cls, text: str, layers: int | None = None) -> Plan:
        """Read the text form; `layers` is the model's depth, if known.

        Raises:
            ValueError: the text is not a plan, or names a layer that a model of that depth lacks.
        """
        visits: list[Visit] = []
        items = text.replace(",", " ").split()
        thin_head = items[-1:] == [THIN_HEAD]
        for item in items[:-1] if thin_head else items:
            match = _ITEM.fullmatch(item)
            if not match:
                raise ValueError(f"'{item}' is not part of a plan: {_GRAMMAR}")
            first, last, branch, bridge, number, times = match.groups()
            start, stop = int(first), int(last or first)
            if stop < start:
                raise ValueError(f"'{item}' runs backwards: write '{stop}-{start}', or list the layers one by one")
            count = 1 if times is None else int(times)
            if not 1 <= count <= MAX_REPEATS:
                raise ValueError(
                    f"'{item}' must repeat between 1 and {MAX_REPEATS} times; leave a layer out to skip it"
                )
            if layers is not None and stop >= layers:
                raise ValueError(f"'{item}' names layer {stop}, but the model's layers are 0-{layers - 1}")
            if stop - start >= MAX_LAYERS:
                raise ValueError(f"'{item}' names {stop - start + 1} layers, more than any model has: {_GRAMMAR}")
            part = Part(branch or bridge or "")
            visits += [Visit(layer, part, int(number or 0)) for layer in range(start, stop + 1)] * count
        return cls(tuple(visits), thin_head)

    def check(self, layers: int) -> Plan:
        """Return the plan itself if it names layers of a model with `layers` layers only, else raise ValueError.

        Whether the model has the bridges, thin MLPs and thin head that it names is for `Backbone.check` to say.
        """
        for visit in self.visits:
            if not 0 <= visit.layer < layers:
                raise ValueError(f"plan '{self}' names layer {visit.layer}, but the model's layers are 0-{layers - 1}")
        return self

    # -- edits: each returns a new plan ------------------------------------------------------------------

    def skip(self, *layers: int) -> Plan:
        """Without any visit of `layers`."""
        return self._visiting(visit for visit in self.visits if visit.layer not in layers)

    def repeat(self, first: int, last: int | None = None, times: int = 2) -> Plan:
        """With the consecutive whole visits `first`..`last` (one layer if `last` is None) run `times` times."""
        if times < 1:
            raise ValueError(f"a block repeats at least once, not {times} times; use skip() to leave layers out")
        last = first if last is None else last
        block = tuple(Visit(layer) for layer in range(first, last + 1))
        for at in range(len(self.visits) - len(block) + 1):
            if block and self.visits[at : at + len(block)] == block:
                return self._visiting(self.visits[:at] + block * times + self.visits[at + len(block) :])
        raise ValueError(f"plan '{self}' does not visit the block {first}-{last} as a whole")

    def only(self, part: Part, *layers: int) -> Plan:
        """With just the attention, the MLP or the bridge of `layers` run, or with their thin MLPs."""
        return self._visiting(Visit(v.layer, part) if v.layer in layers else v for v in self.visits)

    def crossed(self, layers: Iterable[int]) -> Plan:
        """With bridges in place of those of `layers` that it does not visit.

        Raises:
            ValueError: its layers do not ascend, so that there is no saying where a bridge belongs.
        """
        order = [visit.layer for visit in self.visits]
        bridges = [Visit(layer, Part.BRIDGE) for layer in layers if layer not in order]
        if bridges and order != sorted(order):
            raise ValueError(f"plan '{self}' goes back to earlier layers: it cannot be given bridges")
        return self._visiting(sorted((*self.visits, *bridges), key=lambda visit: visit.layer)) if bridges else self

    def crossed_by(self, number: int) -> Plan:
        """With the bridges of set `number` wherever it crosses a layer."""
        return self._visiting(replace(v, set=number) if v.part is Part.BRIDGE else v for v in self.visits)

    def _visiting(self, visits: Iterable[Visit]) -> Plan:
        """Other visits, and the same head."""
        return Plan(tuple(visits), self.thin_head)

    def __add__(self, other: Plan) -> Plan:
        """The visits of both, and the head of the second."""
        return other._visiting(self.visits + other.visits)

    def __getitem__(self, where: slice) -> Plan:
        """The visits of a slice, as a plan: `plan[:8]` exits after eight visits."""
        if not isinstance(where, slice):
            raise TypeError("a plan is cut by slices, such as plan[:8]; for one visit see plan.visits")
        return self._visiting(self.visits[where])

    # -- what a plan says --------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.visits)

    def __iter__(self) -> Iterator[Visit]:
        return iter(self.visits)

    @property
    def depth(self) -> float:
        """Layers run per token: 1 for a whole visit, also one with a thin MLP (how thin is the model's to say: `cost`),
        1/2 for attention or MLP alone, 0 for a bridge."""
        return sum(_DEPTHS[visit.part] for visit in self.visits)

    @cached_property
    def slots(self) -> tuple[Slot | None, ...]:
        """The KV slot of each visit; None for one that does not attend."""
        seen: Counter[int] = Counter()
        slots: list[Slot | None] = []
        for visit in self.visits:
            slots.append(Slot(visit.layer, seen[visit.layer]) if visit.attends else None)
            seen[visit.layer] += visit.attends
        return tuple(slots)

    def counts(self, layers: int) -> tuple[int, ...]:
        """How often each of `layers` layers is visited, whole or in part; a bridge is no visit of its layer."""
        visited = Counter(visit.layer for visit in self.visits if visit.part is not Part.BRIDGE)
        return tuple(visited[layer] for layer in range(layers))

    def common_prefix(self, other: Plan) -> int:
        """How many first visits both plans share: up to there their hidden states and slots are the same."""
        pairs = zip(self.visits, other.visits, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def __str__(self) -> str:
        items: list[str] = []
        run: list[Visit] = []

        def close() -> None:
            if run:
                first, last = run[0], run[-1]
                items.append(str(first) if len(run) == 1 else f"{first.layer}-{last}")
                run.clear()

        for visit, same in groupby(self.visits):
            times = len(list(same))
            if times > 1:
                close()
                whole, rest = divmod(times, MAX_REPEATS)
                items += [f"{visit}*{MAX_REPEATS}"] * whole + ([f"{visit}*{rest}"] if rest else [])
                continue
            if run and visit != replace(run[-1], layer=run[-1].layer + 1):
                close()
            run.append(visit)
        close()
        return " ".join([*items, THIN_HEAD] if self.thin_head else items)


@dataclass(frozen=True, slots=True)
class Step:
    """One call of one layer in a pass over a batch: `rows` run `visit` together, into `slot`.

    `rows` is None when every row of the batch takes part.
    """

    visit: Visit
    slot: Slot | None
    rows: tuple[int, ...] | None = None


@lru_cache(maxsize=4096)
def schedule(plans: tuple[Plan, ...]) -> tuple[Step, ...]:
    """Merge the plans of a batch's rows into one list of layer calls.

    Each row's visits keep their order; rows whose next visit is the same layer, part and slot share a call.
    Picking the lowest pending layer first is optimal for plans that only skip and repeat; for plans that jump
    back the order is still right, only less shared.
    """
    everyone = len(plans)
    pending = [list(zip(plan.visits, plan.slots, strict=True))[::-1] for plan in plans]
    steps: list[Step] = []
    while any(pending):
        heads = [rest[-1] if rest else None for rest in pending]
        visit, slot = min((h for h in heads if h), key=lambda h: (h[0], h[1].nth if h[1] else 0))
        rows = tuple(row for row, head in enumerate(heads) if head == (visit, slot))
        for row in rows:
            pending[row].pop()
        steps.append(Step(visit, slot, None if len(rows) == everyone else rows))
    return tuple(steps)


class Route(Protocol):
    """The plans of one pass over a prompt, decided while it runs; good for one pass.

    The runtime asks for the next step only after it has shown the states that the last one left, so a layer can be
    decided from the state that enters it.
    """

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plan of each row, once the pass is over."""
        ...

    def steps(self, hidden: Tensor) -> Iterator[Step]:
        """The layer calls, one by one; `hidden` (rows, width, hidden size) are the embeddings, packed to the left."""
        ...

    def observe(self, step: Step, hidden: Tensor) -> None:
        """The states of all rows after `step`."""
        ...
