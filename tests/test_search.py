"""Search: the tree branches, conserves visits and finds what was planted; every algorithm keeps to its budget."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from layerwise import Plan
from layerwise.search.baselines import greedy_search, random_search
from layerwise.search.mcts import bound, mcts, select
from layerwise.search.objective import Book, value
from layerwise.search.prior import measured_prior
from layerwise.search.tree import TEMPERATURE, Edit, Kind, Node, Tree, draw, edits, uniform

LAYERS = 12
PLANTED = Plan.full(LAYERS).skip(3, 4, 8).repeat(6)


def distance(plan: Plan, other: Plan) -> int:
    return sum(abs(a - b) for a, b in zip(plan.counts(LAYERS), other.counts(LAYERS), strict=True))


def near_planted(plans: Sequence[Plan]) -> list[float]:
    """Margins that grow towards the planted plan; a little rough, so that no step is a sure one."""
    return [4.0 - 2.0 * distance(plan, PLANTED) + random.Random(str(plan)).uniform(-0.5, 0.5) for plan in plans]


def book(budget: int, measure: Callable[[Sequence[Plan]], list[float]] = near_planted, layers: int = LAYERS) -> Book:
    return Book(layers, measure, budget, price=0.0)


# -- edits -------------------------------------------------------------------------------------------------------


def test_every_edit_changes_the_plan_and_no_two_the_same_way() -> None:
    chance = random.Random(0)
    for _ in range(50):
        plan = Plan.full(LAYERS)
        for _ in range(chance.randrange(6)):
            plan = chance.choice(edits(plan, LAYERS)).apply(plan)
        made = [edit.apply(plan) for edit in edits(plan, LAYERS)]
        assert len(set(made)) == len(made) and plan not in made
        assert all(distance(one, plan) in (1, 2) and 0 < len(one) <= 2 * LAYERS for one in made)


def test_edits_of_a_small_model() -> None:
    assert {str(edit) for edit in edits(Plan.full(2), 2)} == {"skip 0", "skip 1", "repeat 0", "repeat 1"}
    assert edits(Plan.parse("0*2 1*2"), 2) == []
    assert Edit(Kind.SKIP, 1, 2).apply(Plan.full(4)) == Plan.parse("0 3")
    assert Edit(Kind.REPEAT, 0).apply(Plan.full(2)) == Plan.parse("0*2 1")


def test_draws_follow_the_weights() -> None:
    every = edits(Plan.full(3), 3)
    weights = {edit: number for number, edit in enumerate(every)}
    drawn = [draw(every, lambda edit: weights[edit], random.Random(seed)) for seed in range(4000)]
    assert all(len(one) == len(every) - 1 and every[0] not in one for one in drawn)  # weight 0 is left out
    share = sum(one[0] == every[-1] for one in drawn) / len(drawn)
    assert share == pytest.approx(weights[every[-1]] / sum(weights.values()), abs=0.03)


# -- the tree ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
def test_visits_are_conserved_and_the_best_is_passed_up(batch: int) -> None:
    kept = book(150)
    tree = mcts(kept, random.Random(0), batch=batch, exploration=0.5)
    nodes = list(tree.root)
    assert tree.root.visits == len(nodes) == len(kept.margins) == 151
    for node in nodes:
        assert node.visits == 1 + sum(child.visits for child in node.children)
        assert node.best == max(one.value for one in node)
        assert all(child.parent is node for child in node.children)


def test_it_branches_at_every_node_before_it_goes_below() -> None:
    tree = mcts(book(150), random.Random(0), width=2.0, batch=1)
    inner = [node for node in tree.root if node.children]
    assert sum(len(node.children) > 1 for node in inner) > 15
    for node in inner:
        if any(child.children for child in node.children):
            assert len(node.children) >= 5  # where 2 sqrt(V) stops growing faster than V
        assert len(node.children) <= 2 * node.visits**0.5 + 1
    assert max(sum(1 for _ in node.lineage()) for node in tree.root) >= 4


def test_a_plan_has_one_node() -> None:
    plans = [node.plan for node in mcts(book(300), random.Random(1), exploration=1.0).root]
    assert len(set(plans)) == len(plans)


def test_the_bound_is_ucb_with_the_parents_visits() -> None:
    root = Node(Plan.full(3), 0.5, visits=8)
    root.children = [Node(Plan.of([0, 1]), 0.2, root, {Edit(Kind.SKIP, 0): 0.0}, visits=4, best=0.5)]
    root.children.append(Node(Plan.of([1, 2]), 0.4, root, {Edit(Kind.SKIP, 1): 0.0}, visits=3))
    assert bound(root.children[0], 8, 0.3) == pytest.approx(0.5 + 0.3 * (2.0794415 / 4) ** 0.5)
    assert select(root, 1.0, 0.0) is root.children[0]
    assert select(root, 1.0, 2.0) is root.children[1]


def test_below_the_root_the_bound_still_counts_the_parents_visits() -> None:
    root = Node(Plan.full(3), 0.0, visits=10_000)
    inner = Node(Plan.of([0, 1]), 0.0, root, visits=5)
    root.children = [inner]
    for best, visits in ((0.5, 3), (0.3, 1)):
        inner.children.append(Node(Plan.of([0]), best, inner, {Edit(Kind.REPEAT, 0): 0.0}, visits=visits))
    # With 5 visits the better child leads, .5 + .2 * .73 > .3 + .2 * 1.27; with 10,000 the other one would.
    assert select(root, 0.01, 0.2) is inner.children[0]


def test_what_an_edit_changed_tells_where_it_is_tried_next() -> None:
    weights = {"skip 1": 0.5, "skip 2": 0.5}
    tree = Tree(4, 0.5, random.Random(0), lambda edit: weights.get(str(edit), 1.0))
    good, bad, unknown = (Edit(Kind.SKIP, layer) for layer in (1, 2, 3))
    assert tree.promise(good) == tree.promise(bad) == pytest.approx(math.log(0.5)) and tree.promise(unknown) == 0
    tree.expand(tree.root, {edit.apply(tree.root.plan): edit for edit in (good, bad)}, [0.7, 0.1])
    assert tree.promise(good) == pytest.approx((math.log(0.5) + 0.2 / TEMPERATURE) / 2)
    tree.expand(tree.root.children[0], {Plan.of([0, 3]): bad}, [0.5])
    assert tree.promise(bad) == pytest.approx((math.log(0.5) - 0.6 / TEMPERATURE) / 3)
    tree.expand(tree.root, {Plan.of([0, 1, 2]): unknown}, [0.5])
    node = tree.root.children[-1]
    node.untried = dict.fromkeys([bad, good], 0.0)
    assert tree.next_plans(node, 1) == {Plan.of([0, 2]): good} and list(node.untried) == [bad]


def test_a_small_space_is_searched_to_its_end() -> None:
    def measure(plans: Sequence[Plan]) -> list[float]:
        return [float(len(plan)) for plan in plans]

    everything = 3**3 - 1  # each of three layers skipped, run or repeated; one at least is run
    kept = book(1000, measure, layers=3)
    tree = mcts(kept, random.Random(0), width=99)
    assert tree.root.exhausted and len(kept.margins) == everything
    for algorithm in (random_search, greedy_search):
        kept = book(1000, measure, layers=3)
        algorithm(kept, random.Random(0))
        assert len(kept.margins) <= everything


# -- algorithms --------------------------------------------------------------------------------------------------


def evaluations_until_found(algorithm: Callable[..., object], seed: int) -> int:
    kept = book(600)
    algorithm(kept, random.Random(seed))
    return list(kept.margins).index(PLANTED) if PLANTED in kept.margins else 600


def test_the_tree_finds_a_planted_optimum_far_sooner_than_random_search() -> None:
    seeds = range(12)
    tree = [evaluations_until_found(mcts, seed) for seed in seeds]
    blind = [evaluations_until_found(random_search, seed) for seed in seeds]
    assert sum(one < 600 for one in tree) >= 11, tree
    assert sum(tree) < 0.5 * sum(blind), (tree, blind)


@pytest.mark.parametrize("algorithm", [mcts, random_search, greedy_search])
@pytest.mark.parametrize("budget", [1, 7, 50])
def test_algorithms_use_their_budget_and_are_seeded(algorithm: Callable[..., object], budget: int) -> None:
    runs = [book(budget) for _ in range(3)]
    for kept, seed in zip(runs, (0, 0, 1), strict=True):
        algorithm(kept, random.Random(seed))
    assert all(len(kept.margins) == budget + 1 and next(iter(kept.margins)) == kept.full for kept in runs)
    assert list(runs[0].margins) == list(runs[1].margins) != list(runs[2].margins)


def test_greedy_search_climbs() -> None:
    kept = book(200)
    greedy_search(kept, random.Random(0))
    assert distance(max(kept.margins, key=kept.margins.__getitem__), PLANTED) <= 1


# -- values ------------------------------------------------------------------------------------------------------


def test_a_longer_path_is_worth_less_and_a_likelier_answer_more() -> None:
    lengths = [value(1.0, Plan.full(count), 4, 0.5) for count in (2, 3, 4)]
    assert all(short > long for short, long in pairwise(lengths))
    assert lengths[-1] == pytest.approx(0.7310586 - 0.5)
    assert value(-1e6, Plan.full(4), 4, 0.0) == 0.0 and value(1e6, Plan.full(4), 4, 0.0) == 1.0


def test_a_book_evaluates_a_plan_once_and_new_ones_together() -> None:
    asked: list[list[Plan]] = []

    def measure(plans: Sequence[Plan]) -> list[float]:
        asked.append(list(plans))
        return [0.0] * len(plans)

    kept = book(3, measure, layers=4)
    one, other = Plan.of([0]), Plan.of([1])
    kept.values([one, other, one])
    kept.values([other, kept.full])
    assert asked == [[kept.full], [one, other]] and kept.left == 1


def test_the_prior_prefers_edits_that_help() -> None:
    found = measured_prior(LAYERS, [near_planted] * 2, 2, price=0.0)
    assert len(found) == len(edits(Plan.full(LAYERS), LAYERS)) and max(found.values()) == 1.0
    helping = max(found[name] for name in ("skip 3-4", "skip 8", "repeat 6"))
    assert helping == 1.0 > max(found[name] for name in ("skip 0", "repeat 3", "skip 10-11", "skip 6"))
    assert uniform(Edit(Kind.SKIP, 0)) == 1.0 and Tree(3, 0.0, random.Random(0)).root.untried
