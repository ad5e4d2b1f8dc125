"""Dr.LLM's menu: a plan for each kind of prompt, and a router that tells the kinds apart.

What turns one question right is often luck, and no router can know for whom; what helps on a hundred questions of a
task helps on the next ones. So plans are chosen for kinds of prompts: tasks, where those count as one that a router
which reads the first layer takes for each other. They are chosen in rounds, each on other questions than the ones
before, for the best of many is always partly lucky:

1. Single edits that did well in the searched labels are tried on a few questions of each task. A task's gain from an
   edit is drawn towards the mean over all tasks, the more the less its few questions can tell.
2. The best edits of a task are joined, two, three and more of them, at several prices of a layer.
3. The best of these are tried with one edit more.
4. What did best in either round is tried on questions that chose nothing yet; if there are too few, on those of these
   two rounds and all others.

Each task then gets a plan such that together they save enough and gain most; a gain counts less its standard error,
layers count by the tokens that run them. The router learns to recognise the tasks' prompts by what it reads early on.
Where it is unsure, as with prompts of another kind, the full plan runs.

With `bridge_rank` every layer that a plan leaves out is crossed by a bridge (`model.bridges`). The labels know nothing
of bridges, so the first round tries one for every layer, and the labels only say which repeats to try. Bridges are
fitted beforehand to the same questions, all of them; they see hundreds of numbers for each of their weights, so what
that flatters them by is small. In the last round plans that leave out many layers are tried a second time, with bridges
that were fitted along each of them (`plan_bridges`) to yet other questions: the best so far, and the best edits joined
to deeper plans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.plan import Part, Plan, Visit
from layerwise.policies.router import MenuPolicy, classes_of, shared_visits
from layerwise.search.labels import Record
from layerwise.search.tree import Edit, Kind
from layerwise.training.features import kept_features, menu_reads
from layerwise.training.plan_bridges import PlanBridges
from layerwise.training.recipes import DrLLMConfig
from layerwise.training.routers import fit_menu

if TYPE_CHECKING:
    from layerwise.training.drllm import Material

LEAST_TRIED = 50  # paths in the labels that hold an edit: the search's prior passes hopeless ones over
RIDGE = 30.0  # of the edits' effects, in paths: as many without effect are added
JOINED = {0.0: (1, 2, 3), 0.5: (2, 3, 4, 6), 100.0: (2, 4, 6, 8, 10, 14)}  # by price of all layers, how many edits
ROUND = 40  # questions of a kind in the second round and in the third
LAST = 160  # at most, in the last
FINALISTS = 4  # of each round
AT_PRICES = (0.0, 0.2, 0.4, 0.8)  # of all layers: what finalists are best at
START_PRICES = (0.1, 0.5)  # what the plans are best at that the third round goes on from
FURTHER = 14  # edits that are tried there
CONFUSED = 0.2  # mean probability of another task, on questions held out, from which on two tasks are one kind
OWN_FROM = 0.1  # of the layers are left out: a plan is tried with a set of bridges of its own too
OWN_SHARES = (0.2, 0.33, 0.47, 0.6, 0.7)  # of the layers are left out in plans that are only tried so
DOUBT = 1.0  # standard errors that are taken off a gain


@dataclass(frozen=True)
class Tried:
    """Plans of a task, the full one first; what each gains over that, in reward, and its standard error.

    One question has no standard error: nothing is known of how far its gains are luck, so they are infinite.
    """

    plans: list[Plan]
    gains: Tensor
    errors: Tensor

    @classmethod
    def on(cls, given: Material, rows: Sequence[int], plans: Sequence[Plan]) -> Tried:
        """Try plans (the full one is put first) on the questions `rows`, which are of one task."""
        every = list(dict.fromkeys([given.full, *map(given.crossed, plans)]))
        rewards = given.rewards(rows, [every] * len(rows))
        gains = rewards - rewards[:, :1]
        mean = gains.mean(0)
        return cls(every, mean, gains.std(0) / len(rows) ** 0.5 if len(rows) > 1 else torch.full_like(mean, torch.inf))

    def __add__(self, others: Tried) -> Tried:
        """With what `others` tried on the same questions besides."""
        pairs = ((self.gains, others.gains), (self.errors, others.errors))
        return Tried(self.plans + others.plans[1:], *(torch.cat([own, more[1:]]) for own, more in pairs))

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
    return kinds[0][: count - count // 2] + kinds[1][: count // 2]


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


def skipping(edits: Sequence[Edit], gains: Sequence[float], given: Material) -> list[Plan]:
    """Plans of the skips that promise most, OWN_SHARES of the layers."""
    gain = {edit: one for edit, one in zip(edits, gains, strict=True) if edit.kind is Kind.SKIP}
    order = [edit.first for edit in sorted(gain, key=lambda edit: -gain[edit])]
    sizes = [round(share * given.full.depth) for share in OWN_SHARES]
    return [given.full.skip(*order[:size]) for size in sizes if 0 < size <= len(order)]


def deep(plans: Sequence[Plan], given: Material) -> list[Plan]:
    """Those that leave out enough layers for a set of bridges."""
    crossed = dict.fromkeys(map(given.crossed, plans))
    least = OWN_FROM * given.full.depth
    return [plan for plan in crossed if sum(one.part is Part.BRIDGE for one in plan) >= least]


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
    ranks = min(ranks, len(tried.plans))
    return list(dict.fromkeys(tried.plans[order[rank]] for rank in range(ranks) for order in ranked))


def kinds(config: DrLLMConfig, given: Material) -> dict[str, str]:
    """The kind of each task, named after its tasks."""
    tasks = list(given.rows_of_tasks())
    read = _read(given, given.full[:1])
    wanted = torch.tensor([tasks.index(one.task) if one.task in tasks else 0 for one in given.questions])
    routers = fit_menu(read, wanted, given.held_out, config, lambda line: None)
    taken = routers.logits(0, read[given.held_out]).softmax(-1)
    own = wanted[given.held_out]
    found = {task: [task] for task in tasks}
    for number, task in enumerate(tasks):
        means = taken[own == number].mean(0)
        for other, mean in zip(tasks, means.tolist(), strict=True):
            if mean > CONFUSED and found[other] is not found[task]:
                found[task] += found[other]
                found |= dict.fromkeys(found[other], found[task])
    return {task: " + ".join(those) for task, those in found.items()}


def _read(given: Material, shared: Plan) -> Tensor:
    """What a menu reads of every prompt after the visits `shared`."""

    def compute(prompts: list[list[int]], paths: list[str]) -> dict[str, Tensor]:
        return {"read": menu_reads(given.model, prompts, shared)}

    prefixes = [str(shared)] * len(given.prompts)
    return kept_features(given.folder, given.model, given.prompts, prefixes, compute, given.notify)["read"].float()


def race(
    config: DrLLMConfig,
    labels: Sequence[Record],
    given: Material,
    rows: dict[str, list[int]],
    sets: PlanBridges | None = None,
) -> tuple[dict[str, Tried], dict[Edit, float]]:
    """The last round's plans of each kind, with what they gain there; and what each single edit gained in the first
    round, mean over kinds.

    Args:
        rows: the numbers of each kind's questions.
        sets: makes bridges for single plans, where there are any.

    Raises:
        ValueError: there are no edits to try, or a kind has a single question.
    """
    alone = [kind for kind, own in rows.items() if len(own) < 2]
    if alone:
        raise ValueError(f"there is only one training question of {alone[0]}: search more questions")
    edits = best_edits(effects(labels, given.model.depth), config.candidates)
    if bridged := given.model.runtime.backbone.bridged:  # the labels know nothing of them: each is tried
        edits = [Edit(Kind.SKIP, layer) for layer in bridged] + [edit for edit in edits if edit.kind is Kind.REPEAT]
    if not edits:
        raise ValueError("the labels hold no paths to make a menu of: search more questions, or longer")
    given.notify(f"{len(edits)} edits for {len(rows)} kinds of prompts: {', '.join(map(str, edits))}")
    single = [edit.apply(given.full) for edit in edits]
    first = {kind: Tried.on(given, own[: config.screen], single) for kind, own in rows.items()}
    gains, errors = (torch.stack([getattr(one, name) for one in first.values()]) for name in ("gains", "errors"))
    drawn = drawn_to_mean(gains, errors)
    mean = sum(map(given.tokens, rows.values())) / len(rows)
    found = {}
    for (kind, own), promised in zip(rows.items(), drawn[:, 1:].tolist(), strict=True):
        rest = own[config.screen :]
        rest = rest if len(rest) > 1 else own  # too few questions: the same again
        weight = given.tokens(own) / mean
        second = Tried.on(given, rest[:ROUND], joined(edits, promised, given.full))
        starts = finalists(second, weight, START_PRICES, ranks=1)
        one_more = further(starts, edits, promised, weight * sum(START_PRICES) / 2 / given.full.depth)
        third = Tried.on(given, rest[ROUND : 2 * ROUND] or rest, one_more)
        best = [one for those in (second, third) for one in finalists(those, weight)[:FINALISTS]]
        fresh = rest[2 * ROUND :][:LAST]
        last = fresh if len(fresh) >= ROUND else rest
        found[kind] = Tried.on(given, last, best)
        if sets is not None:
            plans = deep([*best, *skipping(edits, promised, given)], given)
            found[kind] += Tried.on(given, last, sets.fitted(kind, own, plans) if plans else [])
            sets.put_away()
        given.notify(f"{kind}: " + "; ".join(_shown(found[kind])))
    return found, dict(zip(edits, gains[:, 1:].mean(0).tolist(), strict=True))


def _shown(tried: Tried) -> list[str]:
    return [f"{plan} {100 * gain:+.1f} ({100 * error:.1f})" for plan, gain, error in _rows(tried)]


def _rows(tried: Tried) -> list[tuple[Plan, float, float]]:
    """Plans but the full one, with gains and errors."""
    return list(zip(tried.plans, tried.gains.tolist(), tried.errors.tolist(), strict=True))[1:]


def served(found: dict[str, Tried], tasks: dict[str, int], tokens: dict[str, float], saved: float) -> dict[str, Plan]:
    """The plan of each kind: of those choices that save enough, the one of most gain, less DOUBT standard errors.

    Args:
        tasks: of each kind, which its gain counts for.
        tokens: the mean length of each kind's prompts; with the number of its tasks, what its layers weigh.
        saved: share of the layers; if no choice saves so much, the one that saves most is taken.
    """
    total = sum(tokens[kind] * tasks[kind] for kind in found)
    choices: list[tuple[float, float, dict[str, Plan]]] = [(0.0, 0.0, {})]  # saved, gained, plans
    for kind, tried in found.items():
        gains = (tasks[kind] * (tried.gains - DOUBT * tried.errors)).tolist()
        weight = tokens[kind] * tasks[kind] / total
        shares = [(1 - plan.depth / tried.plans[0].depth) * weight for plan in tried.plans]
        every = [
            (share + more, gain + own, picked | {kind: plan})
            for share, gain, picked in choices
            for plan, more, own in zip(tried.plans, shares, gains, strict=True)
        ]
        choices, most = [], float("-inf")
        for one in sorted(every, key=lambda one: one[:2], reverse=True):  # those that nothing beats in both
            if one[1] > most:
                choices.append(one)
                most = one[1]
    enough = [one for one in choices if one[0] >= saved]
    return max(enough, key=lambda one: one[1])[2] if enough else choices[0][2]


def static_plans(effect: Mapping[Edit, float], layers: int) -> dict[float, Plan]:
    """Single plans by their layers: the skips of most effect, joined. What any router has to beat."""
    skips = sorted((edit for edit in effect if edit.kind is Kind.SKIP), key=lambda edit: -effect[edit])
    plans = [Plan.full(layers).skip(*(edit.first for edit in skips[:count])) for count in range(len(skips) + 1)]
    return {plan.depth: plan for plan in plans}


def train_menu(
    config: DrLLMConfig, labels: Sequence[Record], given: Material
) -> tuple[MenuPolicy, list[Plan], dict[str, Any], dict[float, Plan]]:
    """The policy, what it decides for the questions held out, what was found out on the way, and the best single plans
    by their layers."""
    kind_of = kinds(config, given)
    rows: dict[str, list[int]] = {kind: [] for kind in kind_of.values()}
    for task, own in given.rows_of_tasks().items():
        rows[kind_of[task]] += own
    rows = {kind: sorted(own) for kind, own in rows.items()}  # tasks in turns
    sets = PlanBridges(given, config.questions) if config.bridge_rank else None
    found, single = race(config, labels, given, rows, sets)
    tokens = {kind: given.tokens(own) for kind, own in rows.items()}
    picked = served(found, Counter(kind_of.values()), tokens, config.saved)
    static = {depth: given.crossed(plan) for depth, plan in static_plans(single, given.model.depth).items()}
    if sets is not None:
        picked, static = _with_sets(sets, picked, static, kind_of)
    plans = tuple(dict.fromkeys([given.full, *picked.values()]))
    if len(plans) == 1:
        raise ValueError("no plan serves any task better than the full one: search more questions")
    given.notify("chosen: " + "; ".join(f"{kind} {plan}" for kind, plan in picked.items()))
    shared = plans[0][: shared_visits(plans)]
    read = _read(given, shared)
    wanted = torch.tensor(
        [plans.index(picked[kind_of[one.task]] if one.task in kind_of else given.full) for one in given.questions]
    )
    routers = fit_menu(read, wanted, given.held_out, config, given.notify)
    policy = MenuPolicy(plans, routers, config.threshold)
    last = {kind: [[str(plan), gain, error] for plan, gain, error in _rows(one)] for kind, one in found.items()}
    record = {"threshold": config.threshold, "menu": [str(plan) for plan in plans]}
    record |= {"chosen": {kind: str(plan) for kind, plan in picked.items()}, "finalists": last}
    return policy, list(policy.pick(read[given.held])), record, static


def _with_sets(
    sets: PlanBridges, picked: dict[str, Plan], static: dict[float, Plan], kind_of: dict[str, str]
) -> tuple[dict[str, Plan], dict[float, Plan]]:
    """The plans with their sets numbered anew. The single plan of as many layers, on average over tasks, is what they
    have to beat: it gets a set as well.
    """
    depth = ceil(sum(picked[kind].depth for kind in kind_of.values()) / len(kind_of))
    if depth not in static or not deep([static[depth]], sets.given):
        return sets.serve(picked), static
    served = sets.serve(picked | {"static": sets.of_all(static[depth])})
    return served, static | {depth: served.pop("static")}
