"""The tree that a search grows: a node is a plan, an edge one edit of it.

Edits are those of Dr.LLM (arXiv 2510.12773): skip one or two consecutive layers, or run one layer a second time. None
undoes another and none does nothing, so the length of a path tells how far a plan is from the full one. Edits commute:
several paths lead to the same plan. A plan has one node only, under the parent that tried it first; other parents
pass it over (a transposition).

There are some 90 edits of a 30-layer model and often no more simulations than that, so a node does not try them all
before the search goes on. Its edits stand in an order drawn once, each with the weight that `prior` gives it, and a
node with V visits has up to `width` sqrt(V) children (progressive widening: Coulom, 2007; Chaslot et al., 2008). So
what looked best is looked at more widely, and no plan is out of reach.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from layerwise.plan import Plan

LONGEST_SKIP = 2  # layers in one edit
LONGEST_PATH = 2  # visits, in multiples of the model's layers


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

    (Efraimidis and Spirakis, 2006: sort by the logarithm of a uniform number over the weight.) Edits of weight 0 are
    left out.
    """
    keyed = [(math.log(1.0 - chance.random()) / weight, edit) for edit in choices if (weight := prior(edit)) > 0]
    return [edit for _, edit in sorted(keyed, reverse=True)]


@dataclass(eq=False)
class Node:
    """A plan in the tree.

    `visits` counts the evaluations of the plan itself and of all below it, so it is 1 plus the children's; `total` is
    the sum of their values. `untried` are edits still to try here, the next one last.
    """

    plan: Plan
    value: float
    parent: Node | None = None
    untried: list[Edit] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)
    visits: int = 1
    total: float = 0.0
    exhausted: bool = False  # nothing is left to try here or below

    def __post_init__(self) -> None:
        self.total = self.value

    def widens(self, width: float) -> bool:
        """Whether an edit is to be tried here before the search goes below."""
        room = len(self.children) < width * math.sqrt(self.visits)
        return bool(self.untried) and (room or all(child.exhausted for child in self.children))

    @property
    def mean(self) -> float:
        return self.total / self.visits

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
        self.root = self._node(Plan.full(layers), value, None)

    def next_plans(self, node: Node, count: int) -> list[Plan]:
        """Up to `count` plans that `node` tries next and that no node of the tree has yet."""
        found: list[Plan] = []
        while node.untried and len(found) < count:
            plan = node.untried.pop().apply(node.plan)
            if plan not in self.plans:
                found.append(plan)
        return found

    def expand(self, node: Node, plans: list[Plan], values: list[float]) -> None:
        """Add children with their values, and count them in `node` and all above."""
        for plan, value in zip(plans, values, strict=True):
            child = self._node(plan, value, node)
            node.children.append(child)
            for above in child.lineage():
                above.visits += 1
                above.total += value
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
        drawn = draw(edits(plan, self.layers), self.prior, self.chance)
        return Node(plan, value, parent, drawn[::-1])
