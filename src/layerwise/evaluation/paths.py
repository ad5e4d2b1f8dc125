"""The suite `paths`: what routing gains, and whether it is the routing that gains it.

Questions of the test splits, in domain and out, are answered by all layers and by the plans that the adapter's policy
decides. Beside it stand controls that run as many layers (to the whole layer) and know less:

    always_execute   all layers: the base
    static           one plan for every question, the best that the training knows: by its labels, or its first round
    random           the routed plan's numbers of skips and repeats, in layers drawn at random
    shuffled         the routed plans, dealt out to the questions at random

and oracles that know more: the best plan of the menu for each question, and, if labels of test questions are given,
the best path that the search found. An oracle has many tries and is partly luck; it is what could be won at most.

Where the model has bridges, random and static plans cross the layers they leave out by them, as the routed ones do.

Layers are counted per token: a question's prompt and answer run the same plan, and weigh as many tokens as they have. A
bridge is no layer; what it costs is in the times.
Time is taken apart from that, from whole `generate` calls, routing included, and compared with what the plan's share
of the model (operations of the prompt, bytes of the decoding, LM head included) allows.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from layerwise.benchmarks.environment import environment
from layerwise.data.short_answers import IN_DOMAIN, OUT_OF_DOMAIN, Question, questions
from layerwise.evaluation.intervals import bootstrap, ends
from layerwise.evaluation.margins import Kept
from layerwise.evaluation.path_time import timing
from layerwise.evaluation.quality import shown_name
from layerwise.evaluation.verdicts import verdicts
from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.paths import cache_dir
from layerwise.plan import Plan
from layerwise.policies import RoutingPolicy
from layerwise.policies.router import EXECUTE, MenuPolicy, plan_of
from layerwise.search.labels import Record, summary
from layerwise.sources import dtype_text
from layerwise.training.drllm import classes_or_counts, labels_for, path_to_imitate
from layerwise.training.features import decided_plans
from layerwise.training.routers import macro_f1
from layerwise.training.runs import RECORD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answers:
    """Questions of some tasks, their plans by who decided (`routed`, `static`, ...), and which are right."""

    questions: list[Question]
    tokens: list[int]  # of each prompt
    full: Plan
    plans: dict[str, list[Plan]]
    right: list[dict[Plan, bool]]

    def score(self, who: str) -> np.ndarray:
        """1.0 where `who` is right, (questions,)."""
        plans = self.plans.get(who, [self.full] * len(self.questions))
        return np.array([float(right[plan]) for right, plan in zip(self.right, plans, strict=True)])

    def saved(self, who: str) -> float:
        """The share of layer executions that the plans of `who` save, over all tokens."""
        pairs = zip(self.tokens, self.plans[who], strict=True)
        return 1 - sum(count * plan.depth for count, plan in pairs) / (sum(self.tokens) * self.full.depth)

    def of(self, task: str) -> np.ndarray:
        """Which questions are the task's."""
        return np.array([one.task == task for one in self.questions])

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(one.task for one in self.questions))


def path_suite(
    model: LayerwiseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str | Path,
    *,
    limit: int | None = None,
    labels: str | Path | None = None,
    seed: int = 0,
    rounds: int = 9,
    command: str = "",
    folder: Path | None = None,
    fresh: bool = False,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Judge the routing policy of `model`, which is put in evaluation mode.

    Args:
        adapter: the folder it was loaded from; its training's record names the static plans.
        limit: questions of each task; all if None.
        labels: a file of `layerwise search` on test questions, for the search's oracle and the F1.
        seed: of the controls and of the bootstrap.
        rounds: of the timing.
        folder: for verdicts, so that a stopped run goes on; a folder of the cache if None.
        fresh: judge anew what an earlier run kept verdicts of, perhaps another version's.

    Returns:
        `in_domain` and `out_of_domain`: by task `n`, `base` and `routed` (shares right) and `interval` (95%, of
        routed - base, paired bootstrap); `accuracy_gain` and `out_of_domain_gain`: its mean over tasks, in points;
        `layers_saved`, `time_realised`, `controls`, `oracle`, `macro_f1`, `routes`; `answers` judged, and how many
        of the verdicts were kept by an earlier run; command, commit, environment.

    Raises:
        ValueError: the model has no routing policy, or there is no such file of labels, or it is of another model.
    """
    if not isinstance(model.policy, RoutingPolicy):
        raise ValueError(f"'{adapter}' decides nothing at the prompt: give an adapter of 'layerwise train drllm'")
    searched = None if labels is None else labels_for(model, labels)
    record = _record(adapter)
    model.eval()
    kept = Kept(cache_dir("evaluation") if folder is None else folder, fresh)
    found: list[Answers] = []
    # All data are fetched first: what cannot be had is told before hours of answers.
    domains = (IN_DOMAIN, OUT_OF_DOMAIN)
    data = [[one for name in names for one in questions(name, "test")[:limit]] for names in domains]
    for names, asked in zip(domains, data, strict=True):
        notify(f"{len(asked)} questions of {', '.join(names)}")
        controls = _Controls(record, seed, model.runtime.backbone.bridged) if names is IN_DOMAIN else None
        found.append(answer(model, tokenizer, asked, controls, kept, notify))
    inside, outside = found
    chance = np.random.default_rng(seed)
    result: dict[str, Any] = {"suite": "paths"}
    for name, gain, those in (("in_domain", "accuracy_gain", inside), ("out_of_domain", "out_of_domain_gain", outside)):
        result[name], draws = _by_task(those, "routed", chance)
        each = [one["routed"] - one["base"] for one in result[name].values()]
        result[gain] = 100 * sum(each) / len(each)
        result[f"{gain}_interval"] = [100 * end for end in ends(draws)]
    result["layers_saved"] = inside.saved("routed")
    result["layers_saved_out_of_domain"] = outside.saved("routed")
    known = {"always_execute": "base"} | {who: who for who in inside.plans if who != "routed"}
    result["controls"] = {name: _beside_routed(inside, who, chance) for name, who in known.items()}
    if "static" in result["controls"]:
        result["controls"]["static"]["plan"] = str(inside.plans["static"][0])
    result["oracle"] = _oracles(inside, model.policy, searched)
    result["macro_f1"] = _f1(inside, searched, record)
    result["routes"] = _routes(inside)
    times = timing(model, tokenizer, inside.questions, inside.plans["routed"], rounds, seed, notify)
    there = environment()
    return result | {
        "time_realised": times["realised"],
        "time": times,
        "adapter": shown_name(adapter),
        "model": shown_name(model.runtime.backbone.model.config.name_or_path),
        "dtype": dtype_text(model.runtime.backbone.dtype),
        "answers": sum(map(len, inside.right + outside.right)),
        "answers_kept": kept.reused,
        "limit": limit,
        "seed": seed,
        "command": command,
        "commit": there["commit"],
        "environment": there,
    }


# -- answering ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Controls:
    """Plans that know less than the routed ones."""

    record: Mapping[str, Any]
    seed: int
    bridges: Collection[int] = ()  # layers that the model can cross: random plans cross them too

    def plans(self, routed: Sequence[Plan], layers: int) -> dict[str, list[Plan]]:
        chance = random.Random(self.seed)
        made = {"random": [random_plan(plan, layers, chance).crossed(self.bridges) for plan in routed]}
        made["shuffled"] = chance.sample(routed, len(routed))
        budget = ceil(sum(plan.depth for plan in routed) / len(routed))
        fitting = {
            float(depth): plan for depth, plan in self.record.get("static", {}).items() if float(depth) <= budget
        }
        if fitting:
            made["static"] = [Plan.parse(fitting[max(fitting)], layers)] * len(routed)
        return made


def random_plan(plan: Plan, layers: int, chance: random.Random) -> Plan:
    """As many layers skipped and repeated as in `plan`, but others; the first one always runs."""
    counts = Counter(classes_or_counts(plan, layers)[1:])
    rest = list(counts.elements())
    chance.shuffle(rest)
    return plan_of([max(EXECUTE, classes_or_counts(plan, layers)[0]), *rest])


def answer(
    model: LayerwiseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[Question],
    controls: _Controls | None,
    kept: Kept,
    notify: Callable[[str], None],
) -> Answers:
    """Decide the plans of all questions, and judge them; with `controls`, the plans of these and of the menu too."""
    prompts = [cast(Any, tokenizer(one.prompt))["input_ids"] for one in asked]
    full = Plan.full(model.depth)
    plans = {"routed": decided_plans(model, model.policy, prompts)}
    others: tuple[Plan, ...] = ()
    if controls is not None:
        plans |= controls.plans(plans["routed"], model.depth)
        others = model.policy.menu if isinstance(model.policy, MenuPolicy) else ()
    each = [(full, *own, *others) for own in zip(*plans.values(), strict=True)]
    right = verdicts(model, tokenizer, asked, each, kept, notify)
    return Answers(asked, [len(ids) for ids in prompts], full, plans, right)


# -- what is said of the answers ---------------------------------------------------------------------------------


def _by_task(those: Answers, who: str, chance: np.random.Generator) -> tuple[dict[str, Any], np.ndarray]:
    """The table of `who` against the base, and draws of the mean gain over tasks."""
    base, routed = those.score("base"), those.score(who)
    table, draws = {}, []
    for task in those.tasks:
        mine = those.of(task)
        drawn = bootstrap(routed[mine] - base[mine], chance)
        draws.append(drawn)
        table[task] = {
            "n": int(mine.sum()),
            "base": float(base[mine].mean()),
            "routed": float(routed[mine].mean()),
            "interval": ends(drawn),
        }
    return table, np.mean(draws, 0)


def _beside_routed(those: Answers, who: str, chance: np.random.Generator) -> dict[str, Any]:
    """Accuracy of `who`, mean over tasks; layers saved; and what the router is ahead of it, in points."""
    own, routed = those.score(who), those.score("routed")
    ahead = [bootstrap((routed - own)[those.of(task)], chance) for task in those.tasks]
    return {
        "accuracy": float(np.mean([own[those.of(task)].mean() for task in those.tasks])),
        "layers_saved": those.saved(who) if who in those.plans else 0.0,
        "routed_ahead": 100 * float(np.mean([(routed - own)[those.of(task)].mean() for task in those.tasks])),
        "interval": [100 * end for end in ends(np.mean(ahead, 0))],
    }


def _oracles(those: Answers, policy: Any, searched: Sequence[Record] | None) -> dict[str, Any]:
    """What the best choice for each question would have given; None where it is not known."""
    found: dict[str, Any] = {"menu": None, "search": None}
    if isinstance(policy, MenuPolicy):
        best = np.array([float(any(right[plan] for plan in policy.menu)) for right in those.right])
        found["menu"] = {"accuracy": float(np.mean([best[those.of(task)].mean() for task in those.tasks]))}
    if searched:
        counts = summary(searched)["all"]
        found["search"] = {"n": counts["n"], "base": counts["base"], "accuracy": counts["oracle"]}
        found["search"]["robust"] = counts["robust_oracle"]
    return found


def _f1(those: Answers, searched: Sequence[Record] | None, record: Mapping[str, Any]) -> dict[str, Any]:
    """Macro-F1 of the classes against the labelled paths: of test questions if they were searched, else held out."""
    if not searched:
        held_out = record.get("held_out", {})
        return {
            "routed": held_out.get("macro_f1"),
            "always_execute": held_out.get("macro_f1_always_execute"),
            "questions": "held out of the training",
        }
    layers = int(those.full.depth)
    plans = {one.id: plan for one, plan in zip(those.questions, those.plans["routed"], strict=True)}
    pairs = [
        (path, classes_or_counts(plans[one["id"]], layers))
        for one in searched
        if one["id"] in plans and (path := path_to_imitate(one, layers)) is not None
    ]
    if not pairs:
        raise ValueError("the labels are of none of the questions asked: search the test split")
    expected, found = (torch.tensor(side) for side in zip(*pairs, strict=True))
    return {
        "routed": macro_f1(found, expected),
        "always_execute": macro_f1(torch.full_like(expected, EXECUTE), expected),
        "questions": f"{len(pairs)} of the test split",
    }


def _routes(those: Answers) -> dict[str, Any]:
    """How often each layer is skipped and repeated, as shares of the questions; the most frequent plans."""
    plans = those.plans["routed"]
    counts = np.array([plan.counts(int(those.full.depth)) for plan in plans])
    common = Counter(map(str, plans)).most_common(10)
    return {
        "skipped": (counts == 0).mean(0).tolist(),
        "repeated": (counts > 1).mean(0).tolist(),
        "plans": {plan: count / len(plans) for plan, count in common},
        "different_plans": len(set(plans)),
    }


def _record(adapter: str | Path) -> dict[str, Any]:
    """What the training wrote beside the adapter; nothing if it is not there."""
    try:
        return json.loads((Path(adapter) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
