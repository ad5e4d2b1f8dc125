"""Laws and examples of plans: text, edits, slots, and the schedule of a batch."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest

import layerwise.plan as plan_module
from layerwise.plan import MAX_REPEATS, Part, Plan, Slot, Visit, schedule

DOCUMENTED = {  # every example in the module's docstring, and the visits it stands for: (layer, part)
    "0-29": [(i, "") for i in range(30)],
    "0-5 8-29": [(i, "") for i in [*range(6), *range(8, 30)]],
    "0-6 7*2 8-29": [(i, "") for i in [*range(7), 7, 7, *range(8, 30)]],
    "3-5*2": [(i, "") for i in [3, 4, 5, 3, 4, 5]],
    "0-8 9a 10m 11-29": [*((i, "") for i in range(9)), (9, "a"), (10, "m"), *((i, "") for i in range(11, 30))],
    "0-22 23-29t": [*((i, "") for i in range(23)), *((i, "t") for i in range(23, 30))],
    "0-3 4-6b 7-29": [*((i, "") for i in range(4)), *((i, "b") for i in (4, 5, 6)), *((i, "") for i in range(7, 30))],
    "0-3 4-6b2 7-29": [*((i, "") for i in range(4)), *((i, "b2") for i in (4, 5, 6)), *((i, "") for i in range(7, 30))],
    "0-29 ht": [(i, "") for i in range(30)],
}

MALFORMED = [  # text, model depth, item that the message must name, what it must say about the way out
    ("", None, "", "at least one layer: write layers"),
    (" , ", None, "", "at least one layer: write layers"),
    ("0-40", 30, "'0-40'", "layers are 0-29"),
    ("0-5 30", 30, "'30'", "layers are 0-29"),
    ("0-1 5-2 3", None, "'5-2'", "write '2-5'"),
    ("0 x 1", None, "'x'", "write layers and ranges"),
    ("3*0", None, "'3*0'", "between 1 and 64"),
    ("7*999", None, "'7*999'", "between 1 and 64"),
    ("0-3*65", None, "'0-3*65'", "between 1 and 64"),
    ("0-999999", None, "'0-999999'", "more than any model has"),
    ("-1", None, "'-1'", "write layers and ranges"),
    ("1.5", None, "'1.5'", "write layers and ranges"),
    ("9z", None, "'9z'", "write layers and ranges"),
    ("9am", None, "'9am'", "write layers and ranges"),
    ("9a2", None, "'9a2'", "write layers and ranges"),
    ("9t2", None, "'9t2'", "write layers and ranges"),
    ("9b0", None, "'9b0'", "write layers and ranges"),
    ("7*", None, "'7*'", "write layers and ranges"),
    ("0-5-8", None, "'0-5-8'", "write layers and ranges"),
]


def pairs(plan: Plan) -> list[tuple[int, str]]:
    return [(visit.layer, f"{visit.part.value}{visit.set or ''}") for visit in plan]


def wild_plan(rng: random.Random, layers: int = 30) -> Plan:
    """Runs of layers in whole or in part, long repeats, repeated blocks, and jumps in both directions."""
    visits: list[Visit] = []
    for _ in range(rng.randint(1, 8)):
        first = rng.randrange(layers)
        run = range(first, min(layers, first + rng.choice((1, 1, 2, 3, 10))))
        part = rng.choice((Part.BOTH, Part.BOTH, Part.ATTENTION, Part.MLP, Part.THIN, Part.BRIDGE))
        number = rng.choice((0, 0, 1, 12)) if part is Part.BRIDGE else 0
        block = [Visit(layer, part, number) for layer in run]
        longest = 70 if len(block) == 1 else 4
        visits += block * rng.choice((1, 1, 1, 2, rng.randint(1, longest)))
        if rng.random() < 0.3:
            visits.append(Visit(rng.randrange(layers), rng.choice(list(Part))))
    return Plan(
        tuple(replace(one, set=rng.choice((0, 0, 1, 12))) if one.part is Part.BRIDGE else one for one in visits)
    )


def monotone_plan(rng: random.Random, layers: int = 12) -> Plan:
    """Only skips and repeats: layers in rising order, each whole or in one part."""
    visits: list[Visit] = []
    for layer in range(layers):
        part = rng.choice((Part.BOTH, Part.BOTH, Part.BOTH, Part.ATTENTION, Part.MLP, Part.BRIDGE))
        visits += [Visit(layer, part)] * rng.choice((0, 1, 1, 1, 2, 3))
    return Plan(tuple(visits or [Visit(0)]))


def batch(rng: random.Random, make: Callable[[random.Random], Plan]) -> tuple[Plan, ...]:
    """One to five plans, some of them equal."""
    plans = [make(rng) for _ in range(rng.randint(1, 5))]
    return tuple(rng.choice(plans) for _ in range(rng.randint(1, 5)))


# -- text ----------------------------------------------------------------------------------------------------


def test_text_reads_back_to_the_same_plan() -> None:
    rng = random.Random(0)
    for _ in range(600):
        plan = wild_plan(rng)
        assert Plan.parse(str(plan)) == plan
        assert Plan.parse(str(plan), layers=30) == plan


@pytest.mark.parametrize("times", [1, 2, MAX_REPEATS - 1, MAX_REPEATS, MAX_REPEATS + 1, 70, 2 * MAX_REPEATS, 200])
def test_text_of_long_repeats_reads_back(times: int) -> None:
    for visit in (Visit(7), Visit(0, Part.ATTENTION), Visit(29, Part.MLP)):
        for plan in (Plan((visit,) * times), Plan((Visit(6), *(visit,) * times, Visit(8)))):
            assert Plan.parse(str(plan)) == plan


def test_table_covers_every_documented_example() -> None:
    assert set(re.findall(r"^ {4}(\S.*?) {2,}", plan_module.__doc__ or "", re.MULTILINE)) == set(DOCUMENTED)


@pytest.mark.parametrize("text", DOCUMENTED)
def test_documented_example_means_what_it_says(text: str) -> None:
    assert pairs(Plan.parse(text, layers=30)) == DOCUMENTED[text]


@pytest.mark.parametrize("text", [text for text in DOCUMENTED if text != "3-5*2"])
def test_documented_example_is_the_canonical_text(text: str) -> None:
    assert str(Plan.parse(text)) == text


def test_block_repeats_are_written_out() -> None:
    assert str(Plan.parse("3-5*2")) == "3-5 3-5"


@pytest.mark.parametrize("text", ["0-5,8-29", "0-5, 8-29", " 0-5 ,, 8-29, ", "0-5\n8-29", "0-5\t8-29"])
def test_commas_and_any_white_space_separate(text: str) -> None:
    assert Plan.parse(text) == Plan.parse("0-5 8-29")


def test_part_and_repeat_apply_to_each_layer_of_a_range() -> None:
    assert pairs(Plan.parse("1-2a*2 3m*2")) == [(1, "a"), (2, "a"), (1, "a"), (2, "a"), (3, "m"), (3, "m")]


@pytest.mark.parametrize(("text", "layers", "item", "fix"), MALFORMED)
def test_malformed_text_names_item_and_fix(text: str, layers: int | None, item: str, fix: str) -> None:
    with pytest.raises(ValueError) as raised:
        Plan.parse(text, layers)
    message = str(raised.value)
    assert item in message
    assert fix in message
    assert "\n" not in message
    assert len(message) < 120


def test_depth_of_the_model_admits_its_last_layer() -> None:
    assert Plan.parse("0-29", layers=30) == Plan.full(30)


# -- making and editing --------------------------------------------------------------------------------------


def test_full_and_of_visit_whole_layers_in_order() -> None:
    assert pairs(Plan.full(4)) == [(0, ""), (1, ""), (2, ""), (3, "")]
    assert pairs(Plan.of([3, 1, 1])) == [(3, ""), (1, ""), (1, "")]


def test_a_plan_visits_something() -> None:
    plan = Plan.full(3)
    for make in (lambda: Plan(()), lambda: Plan.full(0), lambda: plan.skip(0, 1, 2), lambda: plan[3:]):
        with pytest.raises(ValueError, match="at least one layer"):
            make()


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda plan: plan.skip(3), "0-2 4-9"),
        (lambda plan: plan.skip(0, 9, 5), "1-4 6-8"),
        (lambda plan: plan.skip(), "0-9"),
        (lambda plan: plan.skip(77), "0-9"),
        (lambda plan: plan.repeat(3), "0-2 3*2 4-9"),
        (lambda plan: plan.repeat(0, times=3), "0*3 1-9"),
        (lambda plan: plan.repeat(9), "0-8 9*2"),
        (lambda plan: plan.repeat(3, times=1), "0-9"),
        (lambda plan: plan.repeat(3, 5), "0-2 3-5*2 6-9"),
        (lambda plan: plan.repeat(0, 9, times=3), "0-9*3"),
        (lambda plan: plan.repeat(3, 4, times=3), "0-2 3-4*3 5-9"),
        (lambda plan: plan.only(Part.ATTENTION, 3, 4), "0-2 3-4a 5-9"),
        (lambda plan: plan.only(Part.MLP, 9), "0-8 9m"),
        (lambda plan: plan.only(Part.MLP), "0-9"),
        (lambda plan: plan.repeat(3).only(Part.MLP, 3), "0-2 3m*2 4-9"),
        (lambda plan: plan.repeat(3).skip(3), "0-2 4-9"),
        (lambda plan: plan[:8], "0-7"),
        (lambda plan: plan[2:5], "2-4"),
        (lambda plan: plan[-2:], "8-9"),
        (lambda plan: plan[::-1], "9 8 7 6 5 4 3 2 1 0"),
        (lambda plan: plan + Plan.of([2, 2]), "0-9 2*2"),
        (lambda plan: plan[:3] + plan[7:], "0-2 7-9"),
    ],
)
def test_edit_does_what_it_says_and_keeps_the_original(edit: Callable[[Plan], Plan], expected: str) -> None:
    plan = Plan.full(10)
    assert edit(plan) == Plan.parse(expected)
    assert plan == Plan.full(10)


def test_skip_leaves_out_every_visit_and_nothing_else() -> None:
    rng = random.Random(1)
    for _ in range(200):
        plan, left_out = wild_plan(rng), set(rng.sample(range(30), 5))
        kept = [visit for visit in plan.visits if visit.layer not in left_out]
        if kept:
            assert list(plan.skip(*left_out)) == kept


def test_repeat_takes_the_first_of_several_blocks() -> None:
    assert Plan.of([1, 2, 5, 1, 2]).repeat(1, 2, times=3) == Plan.of([1, 2, 1, 2, 1, 2, 5, 1, 2])


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("0-5", (7,)),
        ("0-5", (4, 6)),
        ("0-6 8-9", (6, 8)),  # a skipped layer within the block
        ("0-2 3a 4-5", (3,)),  # a partial visit is not a whole one
        ("0-2 3m 4-5", (2, 4)),
        ("5 4 3", (3, 5)),
        ("0-5", (5, 2)),
    ],
)
def test_repeat_of_a_block_not_visited_raises(text: str, block: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"'{text}' does not visit the block {block[0]}-{block[-1]}"):
        Plan.parse(text).repeat(*block)


def test_check_returns_the_plan_or_names_the_layer() -> None:
    plan = Plan.parse("0-5 5 2a 1")
    assert plan.check(6) is plan
    with pytest.raises(ValueError, match="names layer 5, but the model's layers are 0-4"):
        plan.check(5)
    with pytest.raises(ValueError):
        Plan.of([2, -1]).check(6)


# -- values --------------------------------------------------------------------------------------------------


def test_plans_are_frozen() -> None:
    plan = Plan.full(3)
    with pytest.raises(FrozenInstanceError):
        plan.visits = ()  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        plan.visits[0].layer = 1  # type: ignore[misc]


def test_equal_content_is_one_dictionary_key() -> None:
    rng = random.Random(2)
    for _ in range(200):
        plan = wild_plan(rng)
        twin = Plan(tuple(Visit(visit.layer, visit.part, visit.set) for visit in plan))
        assert plan.slots  # a cached property, which must not take part in equality
        assert plan == twin and hash(plan) == hash(twin)
        assert {plan: "found"}[twin] == "found"


def test_other_order_part_or_length_is_another_plan() -> None:
    plans = [Plan.parse(text) for text in ("0-2", "0-1", "0-3", "2 1 0", "0-2a", "0-2m", "0-1 2a", "0-2 2")]
    assert len(set(plans)) == len(plans)


def test_length_and_iteration_are_those_of_the_visits() -> None:
    plan = Plan.parse("0-2 1a 2m*3")
    assert len(plan) == 7
    assert tuple(plan) == plan.visits


@pytest.mark.parametrize(
    ("text", "depth"),
    [("0-29", 30.0), ("0-5 8-29", 28.0), ("7*3", 3.0), ("3-5*2", 6.0), ("9a", 0.5), ("0-8 9a 10m 11-29", 29.0)],
)
def test_depth_counts_partial_visits_half(text: str, depth: float) -> None:
    assert Plan.parse(text).depth == depth


def test_counts_of_each_layer() -> None:
    assert Plan.parse("0 2*3 3a 3m 1 0").counts(6) == (2, 1, 3, 2, 0, 0)
    rng = random.Random(3)
    for _ in range(100):
        plan = wild_plan(rng)
        visited = [visit.layer for visit in plan if visit.part is not Part.BRIDGE]
        assert plan.counts(30) == tuple(visited.count(layer) for layer in range(30))


def test_slots_count_only_visits_that_attend() -> None:
    plan = Plan.parse("0 1 1m 1a 1 0m 0 2m")
    expected = [Slot(0, 0), Slot(1, 0), None, Slot(1, 1), Slot(1, 2), None, Slot(0, 1), None]
    assert list(plan.slots) == expected


def test_each_attending_visit_owns_one_slot() -> None:
    rng = random.Random(4)
    for _ in range(200):
        plan = wild_plan(rng)
        for at, (visit, slot) in enumerate(zip(plan, plan.slots, strict=True)):
            keyless = (Part.MLP, Part.BRIDGE)
            earlier = sum(v.layer == visit.layer and v.part not in keyless for v in plan.visits[:at])
            assert slot == (None if visit.part in keyless else Slot(visit.layer, earlier))
        owned = [slot for slot in plan.slots if slot]
        assert len(set(owned)) == len(owned)


def test_common_prefix_is_that_of_a_plain_loop_and_symmetric() -> None:
    rng = random.Random(5)
    for _ in range(400):
        plan = wild_plan(rng)
        other = Plan(plan.visits[: rng.randint(0, len(plan))] + wild_plan(rng).visits)
        shared = 0
        while shared < min(len(plan), len(other)) and plan.visits[shared] == other.visits[shared]:
            shared += 1
        assert plan.common_prefix(other) == other.common_prefix(plan) == shared
        assert plan.slots[:shared] == other.slots[:shared]
        assert plan.common_prefix(plan) == len(plan)


def test_common_prefix_ends_where_parts_differ() -> None:
    assert Plan.parse("0-3 4a 5").common_prefix(Plan.parse("0-3 4m 5")) == 4
    assert Plan.parse("0").common_prefix(Plan.parse("1")) == 0


# -- schedule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [wild_plan, monotone_plan])
def test_schedule_keeps_the_order_of_every_row(make: Callable[[random.Random], Plan]) -> None:
    rng = random.Random(6)
    for _ in range(200):
        plans = batch(rng, make)
        walked: list[list[tuple[Visit, Slot | None]]] = [[] for _ in plans]
        for step in schedule(plans):
            for row in range(len(plans)) if step.rows is None else step.rows:
                walked[row].append((step.visit, step.slot))
        assert walked == [list(zip(plan.visits, plan.slots, strict=True)) for plan in plans]


def test_schedule_writes_no_rows_if_and_only_if_all_take_part() -> None:
    rng = random.Random(7)
    whole = part = 0
    for _ in range(200):
        plans = batch(rng, monotone_plan)
        for step in schedule(plans):
            if step.rows is None:
                whole += 1
            else:
                part += 1
                assert 0 < len(step.rows) < len(plans)
                assert list(step.rows) == sorted(set(step.rows))
                assert set(step.rows) <= set(range(len(plans)))
    assert whole and part
    # None stands for *all* rows: that it is not written for fewer is what the law on the order of rows shows.


def test_schedule_of_equal_plans_has_one_call_per_visit() -> None:
    rng = random.Random(8)
    for _ in range(200):
        plan = wild_plan(rng)
        steps = schedule((plan,) * rng.randint(1, 6))
        assert len(steps) == len(plan)
        assert all(step.rows is None for step in steps)


def test_schedule_of_skips_and_repeats_calls_each_layer_no_more_than_the_row_that_needs_it_most() -> None:
    rng = random.Random(9)
    for _ in range(400):
        plans = batch(rng, monotone_plan)
        most: Counter[Visit] = Counter()
        for plan in plans:
            most |= Counter(plan.visits)  # the greater count of each layer and part
        assert len(schedule(plans)) == sum(most.values())  # fewer is impossible: the law is <=, the optimum is =


def test_schedule_of_mixed_parts_in_rising_order_is_optimal_per_slot() -> None:
    # "3a 3" and "3" cannot share the whole visit of layer 3: it attends in slot 1 of the one and in slot 0 of the
    # other. So the least number of calls is counted by visit and slot, not by visit alone.
    rng = random.Random(10)
    for _ in range(200):
        plans = batch(rng, lambda r: Plan(tuple(sorted(wild_plan(r, layers=5)[:20]))))
        most: Counter[tuple[Visit, Slot | None]] = Counter()
        for plan in plans:
            most |= Counter(zip(plan.visits, plan.slots, strict=True))
        assert len(schedule(plans)) == sum(most.values())


def test_schedule_shares_calls_around_a_skip_and_a_repeat() -> None:
    steps = schedule((Plan.parse("0-3"), Plan.parse("0 2-3"), Plan.parse("0-1 2*2 3")))
    assert [(str(step.visit), step.slot, step.rows) for step in steps] == [
        ("0", Slot(0, 0), None),
        ("1", Slot(1, 0), (0, 2)),
        ("2", Slot(2, 0), None),
        ("2", Slot(2, 1), (2,)),
        ("3", Slot(3, 0), None),
    ]


def test_schedule_does_not_share_a_layer_across_parts_or_slots() -> None:
    steps = schedule((Plan.parse("0 1a"), Plan.parse("0 1m"), Plan.parse("1a 0")))
    assert [(str(step.visit), step.rows) for step in steps] == [
        ("0", (0, 1)),
        ("1a", (0, 2)),
        ("0", (2,)),
        ("1m", (1,)),
    ]
    first, second = Plan.parse("1a 1"), Plan.parse("1")
    assert [step.slot for step in schedule((first, second))] == [Slot(1, 0), Slot(1, 0), Slot(1, 1)]


def test_schedule_of_no_rows_is_empty() -> None:
    assert schedule(()) == ()
