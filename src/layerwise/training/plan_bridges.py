"""The bridges of a menu: one for each layer, and sets of their own for plans that leave many layers out.

A bridge fitted to its layer alone does for any plan that leaves out little. Along a plan that leaves out half of the
layers it sees states that it was not fitted to, and what each of them lacks adds up. So such a plan also gets a set of
its own, fitted along it (`bridge_fit.fit_bridges`) to texts of the one kind of prompts that it is for. One bridge then
does for all layers in a row that are left out: it is as good as one for each, and costs less time.

All are kept in the output folder as soon as they are fitted: margins are named after every bit of them, and another
machine would not find the same ones.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from layerwise.data.short_answers import IN_DOMAIN, Question, questions
from layerwise.evaluation.margins import short_digest
from layerwise.model.bridges import Bridges
from layerwise.model.fingerprint import fingerprint
from layerwise.plan import Part, Plan, Visit
from layerwise.training.bridge_fit import fit_bridges, fit_every_bridge

if TYPE_CHECKING:
    from layerwise.training.drllm import Material

FIRST = 128  # questions of each task that set 0 is fitted to, less those held out
FITTED_TO = 12_000  # tokens of a kind of prompts
FITTED_TO_ALL = 40_000  # of all tasks
FEWEST = 32  # other questions of a task; if there are fewer, its bridges are fitted to those that train


def bridge_every_layer(given: Material, rank: int) -> None:
    """Give every layer but the first a bridge, fitted to questions that train, with their answers."""
    seen: Counter[str] = Counter()
    texts = []
    for one, out in zip(given.questions, given.held_out.tolist(), strict=True):
        seen[one.task] += 1
        if seen[one.task] <= FIRST and not out:
            texts.append(_text(given, one))

    def fit() -> None:
        given.notify(f"fitting bridges of rank {rank} to {len(texts)} questions")
        fit_every_bridge(given.model, texts)

    given.model.cross_by(_kept(given, [Visit(n, Part.BRIDGE) for n in range(1, given.model.depth)], rank, texts, fit))


class PlanBridges:
    """Sets of bridges for single plans, on top of those of set 0 that the model has.

    Args:
        tried: training questions of each built-in task that plans are tried on: the next ones fit the sets, so that
            what a plan gains is not measured on what its bridges were fitted to. Of tasks that have no more questions,
            those that train.
    """

    def __init__(self, given: Material, tried: int) -> None:
        self.given, self.tried = given, tried
        self.every = given.model.bridges
        self._sets: dict[int, Bridges] = {}

    def fitted(self, kind: str, rows: Sequence[int], plans: Sequence[Plan]) -> list[Plan]:
        """These plans, each with a set of its own and one bridge for all layers that it leaves out in a row.

        The sets are fitted to prompts like those of the questions `rows`. The model has the new sets
        afterwards, and set 0, but no other.
        """
        return self._fitted(kind, self._texts(rows, FITTED_TO), plans)

    def of_all(self, plan: Plan) -> Plan:
        """The same of one plan, for prompts of every task."""
        rows = [row for own in self.given.rows_of_tasks().values() for row in own]
        return self._fitted("all tasks", self._texts(rows, FITTED_TO_ALL), [plan])[0]

    def _fitted(self, what: str, texts: list[list[int]], plans: Sequence[Plan]) -> list[Plan]:
        first = len(self._sets) + 1
        numbered = [_in_one(plan).crossed_by(number) for number, plan in enumerate(plans, first)]
        visits = [visit for plan in numbered for visit in plan if visit.part is Part.BRIDGE]

        def fit() -> None:
            self.given.notify(f"{what}: fitting bridges along {len(numbered)} plans to {len(texts)} questions")
            fit_bridges(self.given.model, texts, *numbered)

        fitted = _kept(self.given, visits, self.every.ranks[0], [list(map(str, numbered)), texts], fit)
        numbers = range(first, first + len(numbered))
        self._sets |= dict.fromkeys(numbers, fitted)
        self.given.model.cross_by(self._together({number: number for number in numbers}))
        return numbered

    def put_away(self) -> None:
        """Leave the model set 0 alone."""
        self.given.model.cross_by(self.every)

    def serve(self, plans: dict[str, Plan]) -> dict[str, Plan]:
        """Leave the model set 0 and the sets of these plans, numbered from 1; the plans with the new numbers."""
        numbers = {}
        for plan in plans.values():
            for visit in plan:
                if visit.set and visit.set not in numbers:
                    numbers[visit.set] = len(numbers) + 1
        self.given.model.cross_by(self._together(numbers))
        return {kind: _renumbered(plan, numbers) for kind, plan in plans.items()}

    def _texts(self, rows: Sequence[int], tokens: int) -> list[list[int]]:
        """Prompts with their answers, about so many tokens, as many of each task."""
        own: dict[str, list[Question]] = defaultdict(list)
        for row in rows:
            own[self.given.questions[row].task].append(self.given.questions[row])
        known = {one.id for one in self.given.questions}
        texts = []
        for task, those in own.items():
            more = questions(task, "train")[self.tried :] if task in IN_DOMAIN else []
            others = [one for one in more if one.id not in known]
            left = tokens / len(own)
            for one in others if len(others) > FEWEST else those:
                if left > 0:
                    texts.append(_text(self.given, one))
                    left -= len(texts[-1])
        return texts

    def _together(self, numbers: dict[int, int]) -> Bridges:
        """Set 0 and some of the others, under other numbers."""
        taken = {visit: self.every[visit] for visit in self.every.visits}
        for old, new in numbers.items():
            own = self._sets[old]
            taken |= {replace(visit, set=new): own[visit] for visit in own.visits if visit.set == old}
        ranks = self.every.ranks | {new: self._sets[old].ranks[old] for old, new in numbers.items()}
        whole = Bridges(self.given.model.runtime.backbone, taken, ranks)
        for visit, bridge in taken.items():
            whole[visit].load_state_dict(bridge.state_dict())
        return whole.to(self.given.model.dtype).requires_grad_(False).eval()


def _text(given: Material, question: Question) -> list[int]:
    """The tokens of its prompt with its answer."""
    return list(given.tokenizer(question.prompt + question.answer)["input_ids"])


def _in_one(plan: Plan) -> Plan:
    """The plan with the last bridge only of those in a row."""
    last = [after is None or after.part is not Part.BRIDGE for after in (*plan.visits[1:], None)]
    return Plan(tuple(visit for visit, ends in zip(plan, last, strict=True) if visit.part is not Part.BRIDGE or ends))


def _renumbered(plan: Plan, numbers: dict[int, int]) -> Plan:
    return Plan(tuple(replace(one, set=numbers.get(one.set, 0)) for one in plan))


def _kept(given: Material, visits: Sequence[Visit], rank: int, about: object, fit: Callable[[], None]) -> Bridges:
    """Bridges from the output folder; if they are not there, new ones that the model has while they are fitted."""
    model, backbone = given.model, given.model.runtime.backbone
    wanted = [fingerprint(backbone.model, adapted=True), str(model.dtype), rank, about]
    folder = given.folder / f"bridges-{short_digest(wanted)}"
    if not folder.is_dir():
        made = Bridges(backbone, visits, rank).requires_grad_(False).eval()
        model.cross_by(made)
        fit()
        part = folder.with_suffix(".part")
        part.mkdir(parents=True, exist_ok=True)
        made.to(model.dtype).save(part)  # what they are judged in, and saved in with the adapter
        part.rename(folder)  # complete or not there
    return Bridges.load(folder, backbone).to(model.dtype)
