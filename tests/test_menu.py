"""The menu of plans: effects of edits, the race on planted gains, and what layers cost by the tokens that run them."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_router import FULL, LAYERS
from tiny import one_line

from layerwise import Plan
from layerwise.search.tree import Edit, Kind
from layerwise.training import menu
from layerwise.training.menu import Tried, best_edits, drawn_to_mean, effects, finalists, joined, served, static_plans
from layerwise.training.recipes import RouterRecipe

SKIP = [Edit(Kind.SKIP, layer) for layer in range(LAYERS)]
REPEAT = [Edit(Kind.REPEAT, layer) for layer in range(LAYERS)]


def label(*paths: tuple[str, float], base: float = 0.0) -> dict[str, Any]:
    return {"base": {"score": base}, "paths": [{"plan": plan, "score": score} for plan, score in paths]}


def test_effects_of_edits_are_told_apart() -> None:
    """Skip 1 helps, repeat 4 hurts, and paths hold them together; skip 3 is hardly ever tried; layer 0 always runs."""
    paths = [("0 2-5", 1.0), ("0-3 4*2 5", -1.0), ("0 2-3 4*2 5", 0.0), ("1-5", 3.0)]
    found = effects([label(*paths)] * 100 + [label(("0-2 4-5", 9.0))], LAYERS)
    assert found[SKIP[1]] == pytest.approx(0.2, abs=0.04) and found[REPEAT[4]] == pytest.approx(-0.2, abs=0.04)
    assert set(found) == {SKIP[1], REPEAT[4]}
    assert effects([label()], LAYERS) == {}


def test_half_of_the_edits_are_skips() -> None:
    known = {SKIP[1]: 0.1, SKIP[2]: 0.3, SKIP[3]: 0.2, REPEAT[1]: -0.1, REPEAT[2]: -0.3}
    assert best_edits(known, 4) == [SKIP[2], SKIP[3], REPEAT[1], REPEAT[2]]
    assert best_edits(known, 3) == [SKIP[2], SKIP[3], REPEAT[1]] and best_edits(known, 1) == [SKIP[2]]


def test_gains_that_errors_explain_are_drawn_to_their_mean() -> None:
    gains = torch.tensor([[0.3, 0.1], [-0.1, 0.1]])
    exact, noisy = torch.zeros(2, 2), torch.full((2, 2), 0.3)
    torch.testing.assert_close(drawn_to_mean(gains, exact), gains)
    torch.testing.assert_close(drawn_to_mean(gains, noisy), torch.full((2, 2), 0.1))
    half = drawn_to_mean(gains, torch.full((2, 2), 0.2 / 2**0.5))  # half of the variance
    torch.testing.assert_close(half[:, 0], torch.tensor([0.2, 0.0]))


def test_edits_are_joined_by_what_they_promise_at_a_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(menu, "JOINED", {0.0: (1, 2, 3), 0.5: (1, 2, 3), 100.0: (3,)})
    edits = [SKIP[1], SKIP[2], SKIP[3], REPEAT[3], REPEAT[4]]
    found = list(map(str, joined(edits, [0.05, -0.01, -0.4, 0.1, -0.2], FULL)))
    assert found[:2] == ["0-2 3*2 4-5", "0 2 3*2 4-5"]  # gains alone
    assert found[2:5] == ["0 2-5", "0 3-5", "0 3*2 4-5"]  # at a price of a twelfth a layer, layer 2 goes as well
    assert found[5:] == ["0 4-5"]  # skips alone


def planted(gain: dict[str, dict[int, float]], noise: float, questions: int = 60) -> Any:
    """Two tasks, in each of which edits add to the chance of being right."""
    rows = {task: list(range(at * questions, (at + 1) * questions)) for at, task in enumerate(gain)}
    asked: list[tuple[int, ...]] = []

    def rewards(own: list[int], plans: list[list[Plan]]) -> torch.Tensor:
        asked.append(tuple(own))
        task = list(gain)[own[0] // questions]
        found = []
        for row, those in zip(own, plans, strict=True):
            luck = [random.Random(f"{row} {plan}").gauss(0, noise) for plan in those]
            found.append([0.5 + _sum(gain[task], plan) + one for plan, one in zip(those, luck, strict=True)])
        return torch.tensor(found)

    model = SimpleNamespace(depth=LAYERS, runtime=SimpleNamespace(backbone=SimpleNamespace(bridged=())))
    given = SimpleNamespace(full=FULL, model=model, notify=lambda line: None, asked=asked)
    given.rows, given.rewards, given.tokens, given.crossed = rows, rewards, lambda own: 10.0, lambda plan: plan
    return given


def _sum(gain: dict[int, float], plan: Plan) -> float:
    counts = plan.counts(LAYERS)
    return sum(gain.get(layer, 0.0 if times == 2 else -0.3) for layer, times in enumerate(counts) if times != 1)


def test_the_race_finds_what_serves_each_task_on_questions_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(menu, "ROUND", 15)
    monkeypatch.setattr(menu, "JOINED", {0.0: (1,)})  # so that only the third round can find two edits
    edits = {**{SKIP[layer]: 0.0 for layer in range(1, 6)}, **{REPEAT[layer]: 0.0 for layer in range(6)}}
    monkeypatch.setattr(menu, "effects", lambda labels, layers: edits)
    given = planted({"a": {3: 0.1, 2: 0.05}, "b": {5: 0.1}}, noise=0.05)
    found, single = menu.race(RouterRecipe(screen=10, candidates=12), [], given, given.rows)  # type: ignore[arg-type]
    assert set(single) == set(edits) and single[SKIP[3]] == pytest.approx(0.1 / 2 - 0.3 / 2, abs=0.05)
    best = {task: str(tried.plans[int(tried.utility(0.2).argmax())]) for task, tried in found.items()}
    assert best == {"a": "0-1 4-5", "b": "0-4"}
    assert given.asked == [*[tuple(range(at, at + 10)) for at in (0, 60)]] + [
        tuple(range(at + begin, at + end)) for at in (0, 60) for begin, end in ((10, 25), (25, 40), (40, 60))
    ]
    monkeypatch.setattr(menu, "effects", lambda labels, layers: {})
    one_line(lambda: menu.race(RouterRecipe(), [], given, given.rows), "search more")  # type: ignore[arg-type]


def test_few_edits_that_promise_nothing_and_few_questions_leave_the_full_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(menu, "effects", lambda labels, layers: dict.fromkeys([SKIP[1], REPEAT[2]], 0.0))
    given = planted({"a": {1: -0.3, 2: -0.3}, "b": {1: -0.3, 2: -0.3}}, noise=0.05, questions=2)
    for recipe in (RouterRecipe(candidates=2), RouterRecipe(candidates=2, screen=1), RouterRecipe(candidates=1)):
        found, _ = menu.race(recipe, [], given, given.rows)  # type: ignore[arg-type]
        assert all(tried.gains.isfinite().all() and tried.errors.isfinite().all() for tried in found.values())
        assert set(served(found, dict.fromkeys(found, 1), dict.fromkeys(found, 1.0), 0.0).values()) == {FULL}
    given.rows["b"] = given.rows["b"][:1]
    one_line(lambda: menu.race(recipe, [], given, given.rows), "only one training question of b")  # type: ignore[arg-type]


def test_tasks_that_look_alike_are_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tasks = [("easy", "sums", "hard")[at % 3] for at in range(300)]
    read = torch.randn(300, 6)
    read[1::3] += 4  # sums are asked in another way, easy and hard questions are not
    rows = {task: [at for at in range(60, 300) if tasks[at] == task] for task in ("easy", "sums", "hard")}
    given = SimpleNamespace(full=FULL, questions=[SimpleNamespace(task=task) for task in tasks])
    given.held_out, given.rows_of_tasks = torch.arange(300) < 60, lambda: rows
    monkeypatch.setattr(menu, "_read", lambda given, shared: read)
    found = menu.kinds(RouterRecipe(units=8), given)  # type: ignore[arg-type]
    assert found == {"easy": "easy + hard", "hard": "easy + hard", "sums": "sums"}


def tried(*each: tuple[str, float, float]) -> Tried:
    plans = [FULL, *(Plan.parse(text) for text, _, _ in each)]
    values = torch.tensor([(0.0, 0.0), *((gain, error) for _, gain, error in each)])
    return Tried(plans, values[:, 0], values[:, 1])


def test_finalists_are_best_at_some_price() -> None:
    one = tried(("0-4", 0.05, 0.06), ("0-3", -0.05, 0.0), ("0-3 4*2 5", -0.4, 0.0))
    assert finalists(one, 1.0) == [one.plans[1], one.plans[2], FULL]


def test_layers_are_saved_where_they_cost_least_by_the_tokens_that_run_them() -> None:
    each = (("0-3", -0.02, 0.0), ("0-2", -0.05, 0.0))
    both = {"short": tried(*each), "long": tried(*each, ("0-3 4*2", 0.04, 0.05))}
    tokens = {"short": 10.0, "long": 90.0}
    for saved, expected in (
        (0.0, ["0-5", "0-5"]),  # a gain within its error is none
        (0.2, ["0-5", "0-3"]),
        (0.31, ["0-3", "0-3"]),
        (0.34, ["0-5", "0-2"]),  # less loss than by the next plan of each
        (0.46, ["0-3", "0-2"]),
        (0.9, ["0-2", "0-2"]),
    ):
        assert [str(plan) for plan in served(both, dict.fromkeys(both, 1), tokens, saved).values()] == expected, saved


def test_static_plans_join_the_skips_of_most_effect() -> None:
    found = static_plans({SKIP[1]: -0.1, SKIP[4]: 0.1, REPEAT[2]: 0.5}, LAYERS)
    assert {depth: str(plan) for depth, plan in found.items()} == {6: "0-5", 5: "0-3 5", 4: "0 2-3 5"}


def test_deep_plans_are_the_best_skips_joined_and_what_crosses_enough() -> None:
    given: Any = SimpleNamespace(full=FULL, crossed=lambda plan: plan.crossed(range(1, LAYERS)))
    edits, gains = [SKIP[1], REPEAT[2], SKIP[4], SKIP[5], SKIP[3]], [-0.2, 0.9, 0.3, 0.1, -0.1]
    plans = menu.skipping(edits, gains, given)  # 1.2, 1.98, 2.82, 3.6 and 4.2 of 6 layers
    assert list(map(str, plans)) == ["0-3 5", "0-3", "0-2", "0 2", "0 2"]
    assert list(map(str, menu.deep([FULL, *plans], given))) == ["0-3 4b 5", "0-3 4-5b", "0-2 3-5b", "0 1b 2 3-5b"]


def test_trials_on_the_same_questions_are_joined() -> None:
    first, second = (
        Tried([FULL, FULL.skip(n)], torch.tensor([0.0, n / 10]), torch.tensor([0.0, 0.01])) for n in (1, 2)
    )
    both = first + second
    assert both.plans == [FULL, FULL.skip(1), FULL.skip(2)] and torch.equal(both.gains, torch.tensor([0.0, 0.1, 0.2]))
    assert torch.equal(both.errors, torch.tensor([0.0, 0.01, 0.01]))


def test_the_static_control_gets_a_set_at_the_depth_of_the_plans() -> None:
    static = {
        float(depth): FULL.skip(*range(depth, LAYERS)).crossed(range(1, LAYERS)) for depth in range(1, LAYERS + 1)
    }
    sets: Any = SimpleNamespace(
        given=SimpleNamespace(full=FULL, crossed=lambda plan: plan),
        of_all=lambda plan: plan.crossed_by(7),
        serve=lambda plans: plans,
    )
    picked = {"a + b": Plan.parse("0-2 3-5b2"), "c": FULL}
    served, found = menu._with_sets(sets, picked, static, {"a": "a + b", "b": "a + b", "c": "c"})  # 4 of 6 layers
    assert served == picked and str(found[4]) == "0-3 4-5b7"
    assert {depth: plan for depth, plan in found.items() if depth != 4} == {d: p for d, p in static.items() if d != 4}
    assert menu._with_sets(sets, {"c": FULL}, static, {"c": "c"}) == ({"c": FULL}, static)
