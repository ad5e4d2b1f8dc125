"""Sets of bridges for single plans: what they are fitted to, kept in, and numbered by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tiny import LAYERS

from layerwise import Plan, attach
from layerwise.data.short_answers import Question
from layerwise.model.bridges import Bridges
from layerwise.plan import Part, Visit
from layerwise.training import plan_bridges
from layerwise.training.bridge_fit import fit_bridges
from layerwise.training.plan_bridges import PlanBridges, bridge_every_layer

TEXTS = [tiny.tokens(1, 9, seed)[0].tolist() for seed in range(30)]
DEEP, DEEPER = Plan.parse("0 1-2b 3-5"), Plan.parse("0-1 2-4b 5")


def asked(task: str, numbers: range) -> list[Question]:
    return [Question(task, f"{task} {n}", chr(97 + n % 26) * (3 + n % 5), " b", (" b", " c")) for n in numbers]


def material(folder: Path, lines: Callable[[str], None] = lambda line: None) -> Any:
    """Twelve questions each of a built-in task and of another."""
    given = asked("sums", range(12)) + asked("own", range(12))
    return SimpleNamespace(
        model=attach(tiny.model("llama")),
        tokenizer=lambda text: {"input_ids": [ord(letter) % 90 for letter in text]},
        questions=given,
        held_out=torch.tensor([number % 6 == 5 for number in range(24)]),
        folder=folder,
        notify=lines,
    )


@torch.no_grad()
def test_plans_are_fitted_together_as_alone() -> None:
    def fitted(*groups: tuple[Plan, ...]) -> Bridges:
        model = attach(tiny.model("llama"))
        every = (visit for group in groups for plan in group for visit in plan if visit.part is Part.BRIDGE)
        model.cross_by(Bridges(model.runtime.backbone, every, 12))
        for group in groups:
            fit_bridges(model, TEXTS, *group)
        return model.bridges

    texts = ("0 1-2b1 3-5", "0-1 2-4b2 5", "0 1b3 2-4 4 5b3", "0a 1-2b4 3-5", "0 3b5 4-5", "0-1 4b6 5")
    plans = list(map(Plan.parse, texts))
    together, alone = fitted(tuple(plans)), fitted(*((plan,) for plan in plans))
    for name, tensor in alone.state_dict().items():
        assert torch.equal(together.state_dict()[name], tensor) and tensor.abs().sum() > 0, name
    # One that does for several layers comes nearer to the states after them.
    model = attach(tiny.model("llama"))
    states = model.embed(torch.tensor(TEXTS))
    first, wanted = (model.runtime.forward(states, [Plan.parse(text)] * len(TEXTS)) for text in ("0", "0-3"))
    assert (alone[Visit(3, Part.BRIDGE, 5)](first) - wanted).norm() < 0.8 * (first - wanted).norm()
    # What precedes a bridge tells in what it is fitted to: the second of two mends the first.
    assert not torch.allclose(alone[Visit(2, Part.BRIDGE, 1)].up.bias, alone[Visit(2, Part.BRIDGE, 2)].up.bias)


def test_sets_are_fitted_to_other_questions_kept_and_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[list[int]], list[str]]] = []
    usual = plan_bridges.fit_bridges

    def watched(model: Any, texts: list[list[int]], *plans: Plan) -> None:
        seen.append((texts, list(map(str, plans))))
        usual(model, texts, *plans)

    monkeypatch.setattr(plan_bridges, "fit_bridges", watched)
    monkeypatch.setattr(plan_bridges, "questions", lambda task, split: asked(task, range(40)))
    monkeypatch.setattr(plan_bridges, "FITTED_TO", 98)  # tokens: of 7 to 9 a text
    monkeypatch.setattr(plan_bridges, "FEWEST", 16)
    given = material(tmp_path)
    bridge_every_layer(given, 3)
    assert given.model.runtime.backbone.bridged == tuple(range(1, LAYERS))
    sets = PlanBridges(given, 20)
    first = sets.fitted("sums", range(12), [DEEP, DEEPER])
    assert list(map(str, first)) == ["0 2b1 3-5", "0-1 4b2 5"]
    assert all(given.model.read_plan(plan) == plan for plan in first)
    second = sets.fitted("both", [0, 1, 14, 15], [DEEPER])
    assert list(map(str, second)) == ["0-1 4b3 5"]
    with pytest.raises(ValueError, match="set 1"):
        given.model.read_plan(first[0])

    def texts(questions: list[Question]) -> list[list[int]]:
        return [given.tokenizer(one.prompt + one.answer)["input_ids"] for one in questions]

    # Of a built-in task those after the twenty that are tried; of one that has no more, its own.
    both = texts(asked("sums", range(20, 28)) + [given.questions[at] for at in (14, 15)])
    assert [one for one, _ in seen] == [texts(asked("sums", range(20, 35))), both]
    states = {str(plan): _states(given, sets, plan) for plan in (*first, *second)}
    served = sets.serve({"sums": first[1], "both": second[0], "other": Plan.parse("0 1b 2-5")})
    assert list(map(str, served.values())) == ["0-1 4b1 5", "0-1 4b2 5", "0 1b 2-5"]
    for plan, old in ((served["sums"], first[1]), (served["both"], second[0])):
        assert torch.equal(_states(given, None, plan), states[str(old)])
    assert {visit.set for visit in given.model.bridges.visits} == {0, 1, 2}
    sets.put_away()
    assert {visit.set for visit in given.model.bridges.visits} == {0}
    # Again: nothing is fitted, and the same is found.
    again = material(tmp_path)
    bridge_every_layer(again, 3)
    anew = PlanBridges(again, 20)
    assert anew.fitted("sums", range(12), [DEEP, DEEPER]) == first and len(seen) == 2
    assert torch.equal(_states(again, None, first[0]), states[str(first[0])])


@torch.no_grad()
def _states(given: Any, sets: PlanBridges | None, plan: Plan) -> torch.Tensor:
    if sets is not None:
        given.model.cross_by(sets._together({visit.set: visit.set for visit in plan if visit.set}))
    return given.model.runtime.forward(given.model.embed(torch.tensor(TEXTS)), [plan] * len(TEXTS))
