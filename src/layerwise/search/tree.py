"""The tree that a search grows: a node is a plan, an edge one edit of it.

Edits are those of Dr.LLM (arXiv 2510.12773): skip one or two consecutive layers, or run one layer a second time. None
undoes another and none does nothing, so the length of a path tells how far a plan is from the full one. Edits commute:
several paths lead to the same plan. A plan has one node only, under the parent that tried it first; other parents
pass it over (a transposition).

There are some 90 edits of a 30-layer model and often no more simulations than that, so a node does not try them all
before the search goes on: with V visits it has up to `width` sqrt(V) children (progressive widening: Coulom, 2007;
Chaslot et al., 2008). So what looked best is looked at more widely, and no plan is out of reach.

Which edit a node tries next is drawn, by the weights of `prior` and by what the tree has seen: an edit mostly changes
one plan as it changes another, so what it changed wherever it was tried tells what it will change here (the average of
a move's outcomes, as in MAST: Finnsson and Bjoernsson, 2008).
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from layerwise.plan import Plan

LONGEST_SKIP = 2  # layers in one edit
LONGEST_PATH = 2  # visits, in multiples of the model's layers
TEMPERATURE = 0.05  # a weight is the exponential of a change in value over this


class Kind(StrEnum):
    SKIP = "skip"
    REPEAT = "repeat"


@dataclass(frozen=True, slots=True, order=True)
class Edit:
    """Skip the `count` layers from `first` on, or repeat the layer `first`."""

    kind: Kind
    first: int
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kind} {self.first}" + (f"-{self.first + self.count - 1}" if self.count > 1 else "")

    def apply(self, plan: Plan) -> Plan:
        if self.kind is Kind.REPEAT:
            return plan.repeat(self.first)
        return plan.skip(*range(self.first, self.first + self.count))


Prior = Callable[[Edit], float]


def uniform(edit: Edit) -> float:
    """The prior that knows nothing."""
    return 1.0


def edits(plan: Plan, layers: int) -> list[Edit]:
    """Everything that can be done to `plan` of a model with `layers` layers.

    Only layers visited once are skipped or repeated, so no edit undoes an earlier one; something is left to visit, and
    a path has at most 2 `layers` visits.
    """
    counts = plan.counts(layers)
    found = []
    for first in range(layers):
        for count in range(1, LONGEST_SKIP + 1):
            if counts[first : first + count] == (1,) * count and len(plan) > count:
                found.append(Edit(Kind.SKIP, first, count))
        if counts[first] == 1 and len(plan) < LONGEST_PATH * layers:
            found.append(Edit(Kind.REPEAT, first))
    return found


def draw(choices: list[Edit], prior: Prior, chance: random.Random) -> list[Edit]:
    """`choices` in random order: each next one is drawn from the rest with its prior's weight.

    (Sorted by the logarithm of the weight plus Gumbel noise.) Edits of weight 0 are left out.
    """
    keyed = {edit: math.log(weight) + gumbel(chance) for edit in choices if (weight := prior(edit)) > 0}
    return sorted(keyed, key=keyed.__getitem__, reverse=True)


def gumbel(chance: random.Random) -> float:
    """Noise which, added to logarithms of weights, makes each the largest with the probability of its weight."""
    return -math.log(max(chance.expovariate(1.0), 1e-300))


@dataclass(eq=False)
class Node:
    """A plan in the tree.

    `visits` counts the evaluations of the plan itself and of all below it, so it is 1 plus the children's; `best` is
    the highest of their values. `untried` are edits still to try here, each with the noise that it is drawn by.
    """

    plan: Plan
    value: float
    parent: Node | None = None
    untried: dict[Edit, float] = field(default_factory=dict)
    children: list[Node] = field(default_factory=list)
    visits: int = 1
    best: float = -math.inf
    exhausted: bool = False  # nothing is left to try here or below

    def __post_init__(self) -> None:
        self.best = max(self.best, self.value)

    def widens(self, width: float) -> bool:
        """Whether an edit is to be tried here before the search goes below."""
        room = len(self.children) < width * math.sqrt(self.visits)
        return bool(self.untried) and (room or all(child.exhausted for child in self.children))

    def lineage(self) -> Iterator[Node]:
        """The node's parent, its parent, and so on to the root."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent

    def __iter__(self) -> Iterator[Node]:
        """The node and everything below it."""
        yield self
        for child in self.children:
            yield from child


class Tree:
    """Grows by `expand`, one or a few children of a node at a time; the full plan is its root."""

    def __init__(self, layers: int, value: float, chance: random.Random, prior: Prior = uniform) -> None:
        self.layers, self.prior, self.chance = layers, prior, chance
        self.plans: set[Plan] = set()
        # Of each edit: how often it was tried, and what it changed in all.
        self.changes: defaultdict[Edit, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        self.root = self._node(Plan.full(layers), value, None)

    def next_plans(self, node: Node, count: int) -> dict[Plan, Edit]:
        """Up to `count` plans that `node` tries next and that no node of the tree has yet, with the edits to them."""
        found: dict[Plan, Edit] = {}
        for edit in sorted(node.untried, key=lambda one: self.promise(one) + node.untried[one], reverse=True):
            if len(found) == count:
                break
            del node.untried[edit]
            plan = edit.apply(node.plan)
            if plan not in self.plans:
                found[plan] = edit
        return found

    def promise(self, edit: Edit) -> float:
        """The change in value to expect of `edit`, in TEMPERATUREs: the mean of what it made here and the prior's."""
        times, change = self.changes[edit]
        return (math.log(self.prior(edit)) + change / TEMPERATURE) / (1 + times)

    def expand(self, node: Node, plans: dict[Plan, Edit], values: list[float]) -> None:
        """Add children with their values, and count them in `node` and all above."""
        for (plan, edit), value in zip(plans.items(), values, strict=True):
            child = self._node(plan, value, node)
            node.children.append(child)
            times, change = self.changes[edit]
            self.changes[edit] = (times + 1, change + value - node.value)
            for above in child.lineage():
                above.visits += 1
                above.best = max(above.best, value)
            self._close(child)
        self._close(node)

    def _close(self, node: Node) -> None:
        """Mark a node below which nothing is left to try as exhausted; and those above whose last hope it was."""
        for one in (node, *node.lineage()):
            if one.untried or not all(child.exhausted for child in one.children):
                return
            one.exhausted = True

    def _node(self, plan: Plan, value: float, parent: Node | None) -> Node:
        self.plans.add(plan)
        possible = [edit for edit in edits(plan, self.layers) if self.prior(edit) > 0]
        return Node(plan, value, parent, {edit: gumbel(self.chance) for edit in possible})
