"""Dr.LLM's menu: a plan for each kind of prompt, and a router that tells the kinds apart.

What turns one question right is often luck, and no router can know for whom; what helps on a hundred questions of a
task helps on the next ones. So plans are chosen for tasks, in rounds, each on other questions than the ones before,
for the best of many is always partly lucky:

1. Single edits that did well in the searched labels are tried on a few questions of each task. A task's gain from an
   edit is drawn towards the mean over all tasks, the more the less its few questions can tell.
2. The best edits of a task are joined, two, three and more of them, at several prices of a layer.
3. The best of these are tried with one edit more.
4. What did best in either round is tried on all questions but those of the first.

Each task then gets the plan whose gain, less its standard error, is highest at the price of a layer that saves enough
over all tasks; layers count by the tokens that run them. The router learns to recognise the tasks' prompts by what it
reads early on. Where it is unsure, as with prompts of another kind, the full plan runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.plan import Plan, Visit
from layerwise.policies.router import MenuPolicy, classes_of, shared_visits
from layerwise.search.labels import Record
from layerwise.search.tree import Edit, Kind
from layerwise.training.config import DrLLMConfig
from layerwise.training.features import kept_features, menu_reads
from layerwise.training.routers import fit_menu

if TYPE_CHECKING:
    from layerwise.training.drllm import Material

LEAST_TRIED = 50  # paths in the labels that hold an edit: the search's prior passes hopeless ones over
RIDGE = 30.0  # of the edits' effects, in paths: as many without effect are added
JOINED = {0.0: (1, 2, 3), 0.5: (2, 3, 4, 6), 100.0: (2, 4, 6, 8, 10, 14)}  # by price of all layers, how many edits
ROUND = 40  # questions of a task in the second round and in the third
FINALISTS = 4  # of each round
AT_PRICES = (0.0, 0.2, 0.4, 0.8)  # of all layers: what finalists are best at
START_PRICES = (0.1, 0.5)  # what the plans are best at that the third round goes on from
FURTHER = 14  # edits that are tried there
DOUBT = 1.0  # standard errors that are taken off a gain
PRICES = tuple(0.02 * 1.25**step for step in range(24))  # of all layers, in units of reward


@dataclass(frozen=True)
class Tried:
    """Plans of a task, the full one first; what each gains over that, in reward, and its standard error."""

    plans: list[Plan]
    gains: Tensor
    errors: Tensor

    @classmethod
    def on(cls, given: Material, rows: Sequence[int], plans: Sequence[Plan]) -> Tried:
        """Try plans (the full one is put first) on the questions `rows`, which are of one task."""
        every = list(dict.fromkeys([given.full, *plans]))
        rewards = given.rewards(rows, [every] * len(rows))
        gains = rewards - rewards[:, :1]
        return cls(every, gains.mean(0), gains.std(0) / len(rows) ** 0.5)

    def utility(self, price: float) -> Tensor:
        """Gains less a price of all layers, for those that a plan runs."""
        return self.gains - price * torch.tensor([plan.depth for plan in self.plans]) / self.plans[0].depth


def effects(labels: Sequence[Record], layers: int) -> dict[Edit, float]:
    """What skipping and repeating each layer adds to a path's score, in the labels' questions: ridge regression.

    The score is the sigmoid of the margin, less the full plan's. Edits on fewer than LEAST_TRIED paths are left out.
    """
    inputs, gains = [], []
    for label in labels:
        base = torch.sigmoid(torch.tensor(label["base"]["score"]))
        for path in label["paths"]:
            classes = classes_of(Plan.parse(path["plan"], layers), layers)
            if classes is not None:
                inputs.append([float(one == 0) for one in classes] + [float(one == 2) for one in classes])
                gains.append(torch.sigmoid(torch.tensor(path["score"])) - base)
    if not inputs:
        return {}
    edits, found = torch.tensor(inputs, dtype=torch.float64), torch.stack(gains).double()
    weights = torch.linalg.solve(edits.T @ edits + RIDGE * torch.eye(2 * layers, dtype=torch.float64), edits.T @ found)
    kinds = [Edit(kind, layer) for kind in (Kind.SKIP, Kind.REPEAT) for layer in range(layers)]
    least = min(LEAST_TRIED, len(inputs) / 10)
    tried = edits.sum(0) >= least
    return {kind: float(weights[at]) for at, kind in enumerate(kinds) if tried[at] and kind != Edit(Kind.SKIP, 0)}


def best_edits(known: dict[Edit, float], count: int) -> list[Edit]:
    """The `count` edits of most effect, half of them skips as far as there are so many."""
    ordered = sorted(known, key=lambda edit: -known[edit])
    kinds = [[edit for edit in ordered if edit.kind is kind] for kind in (Kind.SKIP, Kind.REPEAT)]
    return [edit for those in kinds for edit in those[: count // 2]]


def drawn_to_mean(gains: Tensor, errors: Tensor) -> Tensor:
    """Gains (tasks, plans) drawn to their mean over tasks, by how much of their spread the errors explain."""
    mean = gains.mean(0)
    spread = (gains - mean).square().mean(0) if len(gains) > 1 else torch.zeros_like(mean)
    kept = (1 - errors.square() / spread.clamp(min=1e-12)).clamp(min=0)
    return mean + kept * (gains - mean)


def joined(edits: Sequence[Edit], gains: Sequence[float], full: Plan) -> list[Plan]:
    """Plans of the edits that promise most at each price, as if gains of edits added up."""
    found: dict[Plan, None] = {}
    for price, sizes in JOINED.items():
        worth = {edit: gain + _cheaper(edit) * price / full.depth for edit, gain in zip(edits, gains, strict=True)}
        order = [edit for edit in sorted(worth, key=lambda edit: -worth[edit]) if worth[edit] > 0]
        for size in sizes:
            plan = full
            for edit in order[:size]:
                plan = _with(plan, edit)
            if size <= len(order):
                found[plan] = None
    return list(found)


def further(starts: Sequence[Plan], edits: Sequence[Edit], gains: Sequence[float], price: float) -> list[Plan]:
    """`starts` with one edit more, each of those FURTHER that promise most at a price of all layers."""
    worth = [gain + _cheaper(edit) * price for edit, gain in zip(edits, gains, strict=True)]
    order = sorted(range(len(edits)), key=lambda at: -worth[at])[:FURTHER]
    return [plan for start in starts for at in order if (plan := _with(start, edits[at])) != start]


def _cheaper(edit: Edit) -> int:
    """Layers that the edit saves."""
    return 1 if edit.kind is Kind.SKIP else -1


def _with(plan: Plan, edit: Edit) -> Plan:
    """The plan with the edit, or as it is if its layer is skipped or repeated already, or would be the last one."""
    alone = plan.visits.count(Visit(edit.first)) == 1 and (edit.kind is Kind.REPEAT or len(plan) > 1)
    return edit.apply(plan) if alone else plan


def finalists(tried: Tried, weight: float, prices: Sequence[float] = AT_PRICES, ranks: int = 2) -> list[Plan]:
    """The best plans at several prices, then the second best; `weight` is the task's share of tokens, mean 1."""
    ranked = [tried.utility(price * weight).argsort(descending=True).tolist() for price in prices]
    return list(dict.fromkeys(tried.plans[order[rank]] for rank in range(ranks) for order in ranked))


def best_at(tried: Tried, price: float) -> int:
    """The number of the plan of most utility after a standard error is taken off its gain."""
    return int((tried.utility(price) - DOUBT * tried.errors).argmax())


def race(config: DrLLMConfig, labels: Sequence[Record], given: Material) -> dict[str, Tried]:
    """The last round's plans of each task, with what they gain on the questions of the last two rounds."""
    rows = given.rows_of_tasks()
    edits = best_edits(effects(labels, given.model.depth), config.candidates)
    if not edits:
        raise ValueError("the labels hold no paths to make a menu of: search more questions, or longer")
    given.notify(f"{len(edits)} edits for {len(rows)} tasks: {', '.join(map(str, edits))}")
    single = [edit.apply(given.full) for edit in edits]
    first = {task: Tried.on(given, own[: config.screen], single) for task, own in rows.items()}
    gains, errors = (torch.stack([getattr(one, name) for one in first.values()]) for name in ("gains", "errors"))
    drawn = drawn_to_mean(gains, errors)
    mean = sum(map(given.tokens, rows.values())) / len(rows)
    found = {}
    for (task, own), promised in zip(rows.items(), drawn[:, 1:].tolist(), strict=True):
        rest = own[config.screen :] or own  # too few questions: the same again
        weight = given.tokens(own) / mean
        second = Tried.on(given, rest[:ROUND], joined(edits, promised, given.full))
        starts = finalists(second, weight, START_PRICES, ranks=1)
        one_more = further(starts, edits, promised, weight * sum(START_PRICES) / 2 / given.full.depth)
        third = Tried.on(given, rest[ROUND : 2 * ROUND] or rest, one_more)
        best = [one for those in (second, third) for one in finalists(those, weight)[:FINALISTS]]
        found[task] = Tried.on(given, rest, best)
        given.notify(f"{task}: " + "; ".join(_shown(found[task])))
    return found


def _shown(tried: Tried) -> list[str]:
    return [f"{plan} {100 * gain:+.1f} ({100 * error:.1f})" for plan, gain, error in _rows(tried)]


def _rows(tried: Tried) -> list[tuple[Plan, float, float]]:
    """Plans but the full one, with gains and errors."""
    return list(zip(tried.plans, tried.gains.tolist(), tried.errors.tolist(), strict=True))[1:]


def served(found: dict[str, Tried], tokens: dict[str, float], saved: float) -> tuple[float, dict[str, Plan]]:
    """The lowest price at which the tasks' best plans save that share of the layers; and these plans.

    Args:
        tokens: the mean length of each task's prompts.
    """
    mean, share = sum(tokens.values()) / len(tokens), 0.0
    for price in PRICES:
        picked = {task: one.plans[best_at(one, price * tokens[task] / mean)] for task, one in found.items()}
        depth = next(iter(found.values())).plans[0].depth
        share = 1 - sum(tokens[task] * plan.depth for task, plan in picked.items()) / (sum(tokens.values()) * depth)
        if share >= saved:
            break
    return price, picked


def train_menu(
    config: DrLLMConfig, labels: Sequence[Record], given: Material
) -> tuple[MenuPolicy, list[Plan], dict[str, Any]]:
    """The policy, what it decides for the questions held out, and what was found out on the way."""
    found = race(config, labels, given)
    tokens = {task: given.tokens(rows) for task, rows in given.rows_of_tasks().items()}
    price, picked = served(found, tokens, config.saved)
    plans = tuple(dict.fromkeys([given.full, *picked.values()]))
    if len(plans) == 1:
        raise ValueError("no plan serves any task better than the full one: search more questions")
    given.notify(f"price {price:.3f}: " + "; ".join(f"{task} {plan}" for task, plan in picked.items()))
    shared = plans[0][: shared_visits(plans)]

    def compute(prompts: list[list[int]], paths: list[str]) -> dict[str, Tensor]:
        return {"read": menu_reads(given.model, prompts, shared)}

    prefixes = [str(shared)] * len(given.prompts)
    read = kept_features(given.folder, given.model, given.prompts, prefixes, compute, given.notify)["read"].float()
    wanted = torch.tensor([plans.index(picked.get(one.task, given.full)) for one in given.questions])
    routers = fit_menu(read, wanted, given.held_out, config, given.notify)
    policy = MenuPolicy(plans, routers, config.threshold)
    own = {task: [[str(plan), gain, error] for plan, gain, error in _rows(one)] for task, one in found.items()}
    record = {"threshold": config.threshold, "price": price, "menu": [str(plan) for plan in plans]}
    record |= {"chosen": {task: str(plan) for task, plan in picked.items()}, "finalists": own}
    return policy, list(policy.pick(read[given.held])), record
