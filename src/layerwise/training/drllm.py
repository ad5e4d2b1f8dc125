"""Dr.LLM (arXiv 2510.12773): routers that imitate the paths a search found. The backbone is left as it is.

Of each question in the labels one path is imitated: of the robust paths that give the right answer, the one with the
fewest layers. Questions without one teach the per-layer form nothing. The menu form learns from tasks and not from
single questions, see `training.menu`; it also tries plans on questions that were not searched.

A share of the questions, picked by their text, trains nothing. On these are chosen the epoch and, for the per-layer
form, the threshold of confidence: the highest reward among the choices that save enough layers.
The reward of a plan is half what counts, 1 if it is right, and half a soft "right" that tells more of a single
question: sigmoid(margin / scale), where scale is a share of the task's usual margin.

Everything that takes long (bridges, features, margins) is kept in the output folder, so the same command goes on where
a stopped one was; fitting routers takes seconds.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.data import split_of
from layerwise.data.short_answers import IN_DOMAIN, Question, questions
from layerwise.evaluation.margins import Kept, plan_margins
from layerwise.hub import save_adapter
from layerwise.model.causal_lm import LayerwiseForCausalLM, attach
from layerwise.plan import Plan
from layerwise.policies.router import EXECUTE, PerLayerPolicy, classes_of
from layerwise.search.labels import Record, read_labels
from layerwise.training.config import computed_in
from layerwise.training.features import decided_plans, kept_features, path_windows
from layerwise.training.menu import effects, static_plans, train_menu
from layerwise.training.plan_bridges import bridge_every_layer
from layerwise.training.recipes import DrLLMConfig
from layerwise.training.routers import choose, fit_layers, macro_f1
from layerwise.training.runs import RECORD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SOFTNESS = 0.25  # of the reward, as a share of the median margin of a task at full depth


@dataclass(frozen=True)
class Material:
    """What both forms learn from: the model, and questions with labels.

    Attributes:
        prompts: token ids of each question's prompt.
        paths: the classes of the path to imitate of each question; None if there is none.
        held_out: (questions,) booleans.
    """

    model: LayerwiseForCausalLM
    tokenizer: PreTrainedTokenizerBase
    questions: list[Question]
    prompts: list[list[int]]
    paths: list[tuple[int, ...] | None]
    held_out: Tensor
    folder: Path
    notify: Callable[[str], None]

    @property
    def full(self) -> Plan:
        return Plan.full(self.model.depth)

    @property
    def held(self) -> list[int]:
        """The numbers of the questions held out."""
        return self.held_out.nonzero().squeeze(1).tolist()

    def rows_of_tasks(self) -> dict[str, list[int]]:
        """By task, the numbers of the questions that train."""
        found: dict[str, list[int]] = defaultdict(list)
        for row, out in enumerate(self.held_out.tolist()):
            if not out:
                found[self.questions[row].task].append(row)
        return found

    def tokens(self, rows: Sequence[int]) -> float:
        """The mean length of their prompts."""
        return sum(len(self.prompts[row]) for row in rows) / len(rows)

    def crossed(self, plan: Plan) -> Plan:
        """The plan with bridges where it leaves layers out and the model has them, unless it has a set of its own."""
        return plan if any(visit.set for visit in plan) else plan.crossed(self.model.runtime.backbone.bridged)

    def rewards(self, rows: Sequence[int], plans: Sequence[Sequence[Plan]]) -> Tensor:
        """The reward of plans[i] for question rows[i], (rows, plans); the first plan must be the full one."""
        questions = [self.questions[row] for row in rows]
        found = plan_margins(self.model, self.tokenizer, questions, plans, Kept(self.folder), self.notify)
        return soft_rewards(torch.tensor(found), [one.task for one in questions])


def train(
    config: DrLLMConfig, notify: Callable[[str], None] = lambda line: None, device: torch.device | str = "cpu"
) -> Path:
    """Train routers and save them as an adapter; `from_pretrained(adapter=...)` loads the folder it returns.

    The model runs on `device`; routers are fitted on the CPU, in seconds.

    Raises:
        ValueError: the file holds no labels, is of another model, or has too few paths to learn from.
    """
    from layerwise.sources import load_base, load_tokenizer

    model = attach(load_base(config.model, computed_in(config.precision, device), device))
    labels = labels_for(model, config.labels)
    material = gather(config, labels, model, load_tokenizer(config.model), notify)
    learnt = [label for label, out in zip(labels, material.held_out, strict=False) if not out]
    if config.bridge_rank:
        bridge_every_layer(material, config.bridge_rank)
    if config.form == "menu":
        policy, decided, record, static = train_menu(config, learnt, material)
    else:
        policy, decided, record = per_layer(config, material)
        static = static_plans(effects(learnt, model.depth), model.depth)
    record |= judged(material, decided)
    model.policy = policy  # in the numbers it was judged in
    record |= {
        "labels": dict(_counted(material.paths)),
        "static": {f"{depth:g}": str(static[depth]) for depth in static},
    }
    save_adapter(model, config.out)
    names = {name: Path(getattr(config, name)).name for name in ("labels", "out")}  # folders mean nothing elsewhere
    written = {"config": config.to_dict() | names, **record}
    (Path(config.out) / RECORD).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return Path(config.out)


def labels_for(model: LayerwiseForCausalLM, path: str | Path) -> list[Record]:
    """The labels in a file; ValueError if they were searched with other weights than the model's."""
    about, labels = read_labels(path)
    if about.get("fingerprint", model.attached_to) != model.attached_to:
        raise ValueError(
            f"'{path}' was searched with other weights ({about.get('model')}): give that model, or search anew"
        )
    return labels


def gather(
    config: DrLLMConfig,
    labels: Sequence[Record],
    model: LayerwiseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    notify: Callable[[str], None],
) -> Material:
    """Questions, prompts as tokens, paths to imitate, and who is held out."""
    asked = [question_of(label) for label in labels]
    if config.form == "menu":
        asked += unsearched(asked, config.questions)
    held_out = torch.tensor([is_held_out(one, config.held_out) for one in asked])
    paths = [path_to_imitate(label, model.depth) for label in labels] + [None] * (len(asked) - len(labels))
    for name, those in (("held-out", held_out), ("training", ~held_out)):
        known = sum(paths[at] is not None for at in those.nonzero().squeeze(1).tolist())
        if not known:
            raise ValueError(f"'{config.labels}' has no {name} question with a right path: search more questions")
        notify(f"{int(those.sum())} {name} questions, {known} with a path to imitate")
    prompts = [list(tokenizer(one.prompt)["input_ids"]) for one in asked]
    return Material(model, tokenizer, asked, prompts, paths, held_out, Path(config.out), notify)


def question_of(label: Record) -> Question:
    """The question that a label is of."""
    return Question(*(label[name] for name in ("task", "id", "prompt", "answer")), tuple(label["choices"]))


def unsearched(searched: Sequence[Question], count: int) -> list[Question]:
    """More training questions of the built-in tasks among those searched, so that each has `count` if there are."""
    known = {one.id for one in searched}
    tasks = [task for task in dict.fromkeys(one.task for one in searched) if task in IN_DOMAIN]
    found = [questions(task, "train")[:count] for task in tasks]  # taken in turns, as a search does
    turns = [those[at] for at in range(count) for those in found if at < len(those)]
    return [one for one in turns if one.id not in known]


def is_held_out(question: Question, share: float) -> bool:
    """Whether the question trains nothing; by its text, so that it stays so when labels are added."""
    # With a word before it: built-in questions come in the order of their own hashes, and the first ones are searched.
    return split_of(f"held out {question.prompt}", validation=share, test=0.0) == "validation"


def path_to_imitate(label: Record, layers: int) -> tuple[int, ...] | None:
    """The classes of the shortest robust path that is right, the surest of equals; None if there is none.

    The full plan counts as robust.
    """
    right = [
        (Plan.parse(one["plan"], layers), one["score"]) for one in label["paths"] if one["right"] and one["robust"]
    ]
    right += [(Plan.full(layers), label["base"]["score"])] if label["base"]["right"] else []
    known = [(plan.depth, -score, classes_of(plan, layers)) for plan, score in right]
    return min(((depth, score, classes) for depth, score, classes in known if classes), default=(0, 0, None))[2]


# -- the per-layer form ---------------------------------------------------------------------------------------------


def per_layer(config: DrLLMConfig, given: Material) -> tuple[PerLayerPolicy, list[Plan], dict[str, Any]]:
    """Routers by teacher forcing along the labelled paths, the threshold by running them; what it then decides."""
    known = [at for at, path in enumerate(given.paths) if path is not None]
    classes = [list(given.paths[at]) for at in known]

    def compute(prompts: list[list[int]], paths: list[list[int]]) -> dict[str, Tensor]:
        means, share = path_windows(given.model, prompts, paths)
        return {"means": means, "share": share}

    kept = kept_features(given.folder, given.model, [given.prompts[at] for at in known], classes, compute, given.notify)
    held_out = given.held_out[known]
    routers = fit_layers(kept["means"], kept["share"].float(), torch.tensor(classes), held_out, config, given.notify)
    policies = [PerLayerPolicy(routers, threshold) for threshold in THRESHOLDS]
    rows = given.held
    decided = [decided_plans(given.model, policy, [given.prompts[row] for row in rows]) for policy in policies]
    plans = list(zip([given.full] * len(rows), *decided, strict=True))
    rewards = given.rewards(rows, plans)
    means = [_over_tasks(given, rows, rewards[:, at + 1]) for at in range(len(decided))]
    options = [(mean, _saved(own, given.full)) for mean, own in zip(means, decided, strict=True)]
    best = choose(options, config.saved)
    return policies[best], decided[best], {"threshold": THRESHOLDS[best]}


# -- rewards, choices and what is noted --------------------------------------------------------------------------


def soft_rewards(margins: Tensor, tasks: Sequence[str]) -> Tensor:
    """Margins (questions, plans), the first plan the full one, as rewards in 0 .. 1."""
    of_task: dict[str, list[float]] = defaultdict(list)
    for task, margin in zip(tasks, margins[:, 0].abs().tolist(), strict=True):
        of_task[task].append(margin)
    scale = torch.tensor([max(1e-6, SOFTNESS * median(of_task[task])) for task in tasks])
    return (torch.sigmoid(margins / scale[:, None]) + (margins > 0)) / 2


def _saved(plans: Sequence[Plan], full: Plan) -> float:
    """The share of the layers that they save."""
    return 1 - sum(plan.depth for plan in plans) / len(plans) / full.depth


def _over_tasks(given: Material, rows: Sequence[int], values: Tensor) -> float:
    """The mean over tasks of the means over questions."""
    of_task: dict[str, list[float]] = defaultdict(list)
    for row, value in zip(rows, values.tolist(), strict=True):
        of_task[given.questions[row].task].append(value)
    return sum(sum(those) / len(those) for those in of_task.values()) / len(of_task)


def judged(given: Material, plans: Sequence[Plan]) -> dict[str, Any]:
    """What the questions held out say of the plans decided for them; the F1 of the classes beside always-execute.

    They chose already, so this is no test: that is `evaluation.paths`, on questions of the test split.
    """
    rows = given.held
    rewards = given.rewards(rows, [(given.full, plan) for plan in plans])
    labelled = [(given.paths[row], plan) for row, plan in zip(rows, plans, strict=True) if given.paths[row] is not None]
    expected = torch.tensor([path for path, _ in labelled])
    found = torch.tensor([classes_or_counts(plan, given.model.depth) for _, plan in labelled])
    return {
        "held_out": {
            "n": len(rows),
            "note": "these questions chose the epoch of the routers and, by the form, the threshold or kinds: no test",
            "base_reward": _over_tasks(given, rows, rewards[:, 0]),
            "reward": _over_tasks(given, rows, rewards[:, 1]),
            "layers_saved": _saved(plans, given.full),
            "macro_f1": macro_f1(found, expected),
            "macro_f1_always_execute": macro_f1(torch.full_like(found, EXECUTE), expected),
        }
    }


def classes_or_counts(plan: Plan, layers: int) -> tuple[int, ...]:
    """How often the plan runs each layer, at most twice: its classes, if it is a choice of classes."""
    return tuple(min(count, 2) for count in plan.counts(layers))


def _counted(paths: Sequence[tuple[int, ...] | None]) -> Counter[str]:
    names = ("skip", "execute", "repeat")
    return Counter(names[one] for path in paths if path is not None for one in path)
