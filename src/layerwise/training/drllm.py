"""Dr.LLM (arXiv 2510.12773): routers that imitate the paths a search found. The backbone is left as it is.

Of each question in the labels one path is imitated: of the robust paths that give the right answer, the one with the
fewest layers. Questions without one teach the per-layer form nothing; the menu learns from all questions, for it is
told how good each of its plans is for each of them. Plans come into the menu in two rounds: candidates cover most
questions in the labels, where each was tried on few; then all are scored on all questions, and those are kept that
serve whole tasks best, at several prices of a layer. (Those that serve single questions best are lucky, and no router
can know for whom.)

A share of the questions, picked by their text, trains nothing. On these are chosen the epoch, the threshold of
confidence and, for the menu, the price of a layer: the highest reward among the choices that save enough layers.
The reward of a plan is a soft "right": sigmoid(margin / scale), where scale is a share of the task's usual margin.

Everything that takes long (features, margins) is kept in the output folder, so the same command goes on where a
stopped one was; fitting itself takes seconds.
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
from layerwise.data.short_answers import Question
from layerwise.evaluation.margins import plan_margins
from layerwise.hub import save_adapter
from layerwise.model.causal_lm import LayerwiseForCausalLM, attach
from layerwise.plan import Plan
from layerwise.policies.router import EXECUTE, MenuPolicy, PerLayerPolicy, classes_of, shared_visits
from layerwise.search.labels import Record, read_labels
from layerwise.search.labels import menu as covering
from layerwise.training.config import DrLLMConfig, RouterRecipe
from layerwise.training.features import decided_plans, kept_features, menu_reads, path_windows
from layerwise.training.routers import choose, fit_layers, fit_menu, macro_f1
from layerwise.training.trainer import RECORD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRICES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)  # of all layers, in units of reward
THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SOFTNESS = 0.25  # of the reward, as a share of the median margin of a task at full depth
DOUBT = 20  # questions that a plan's gain is diluted by: a plan that was tried on few is seldom as good as it looks


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

    def rewards(self, rows: Sequence[int], plans: Sequence[Sequence[Plan]]) -> Tensor:
        """The reward of plans[i] for question rows[i], (rows, plans); the first plan must be the full one."""
        questions = [self.questions[row] for row in rows]
        found = plan_margins(self.model, self.tokenizer, questions, plans, self.folder, self.notify)
        return soft_rewards(torch.tensor(found), [one.task for one in questions])


def train(config: DrLLMConfig, notify: Callable[[str], None] = lambda line: None) -> Path:
    """Train routers and save them as an adapter; `from_pretrained(adapter=...)` loads the folder it returns.

    Raises:
        ValueError: the file holds no labels, is of another model, or has too few paths to learn from.
    """
    from layerwise.sources import load_base, load_tokenizer

    model = attach(load_base(config.model, config.precision).eval())
    labels = labels_for(model, config.labels)
    material = gather(config, labels, model, load_tokenizer(config.model), notify)
    policy, record = (per_layer if config.form == "per-layer" else menu)(config, labels, material)
    model.policy = policy  # in the numbers it was judged in
    learnt = [label for label, out in zip(labels, material.held_out, strict=True) if not out]
    record |= {"labels": dict(_counted(material.paths)), "static": static_plans(learnt, model.depth)}
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
    questions = [question_of(label) for label in labels]
    held_out = torch.tensor([is_held_out(one, config.held_out) for one in questions])
    paths = [path_to_imitate(label, model.depth) for label in labels]
    for name, those in (("held-out", held_out), ("training", ~held_out)):
        known = sum(paths[at] is not None for at in those.nonzero().squeeze(1).tolist())
        if not known:
            raise ValueError(f"'{config.labels}' has no {name} question with a right path: search more questions")
        notify(f"{int(those.sum())} {name} questions, {known} with a path to imitate")
    prompts = [list(tokenizer(one.prompt)["input_ids"]) for one in questions]
    return Material(model, tokenizer, questions, prompts, paths, held_out, Path(config.out), notify)


def question_of(label: Record) -> Question:
    """The question that a label is of."""
    return Question(*(label[name] for name in ("task", "id", "prompt", "answer")), tuple(label["choices"]))


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


# -- the two forms -----------------------------------------------------------------------------------------------


def per_layer(config: DrLLMConfig, labels: Sequence[Record], given: Material) -> tuple[PerLayerPolicy, dict[str, Any]]:
    """Routers by teacher forcing along the labelled paths, and the threshold by running them."""
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
    options = [_option(given, rows, rewards[:, at + 1], decided[at]) for at in range(len(policies))]
    best = choose(options, config.saved)
    record = _record(given, rewards[:, 0], options[best], decided[best]) | {"threshold": THRESHOLDS[best]}
    return policies[best], record


def menu(config: DrLLMConfig, labels: Sequence[Record], given: Material) -> tuple[MenuPolicy, dict[str, Any]]:
    """The menu, a router for each price of a layer, and the best pair of price and threshold."""
    learnt = [label for label, out in zip(labels, given.held_out, strict=True) if not out]
    candidates = (given.full, *candidate_plans(learnt, given.full, config))
    given.notify(f"{len(candidates)} candidates for the menu")
    scored = given.rewards(range(len(labels)), [candidates] * len(labels))
    kept = serving(scored, candidates, given, config.menu_size)
    plans, rewards = tuple(candidates[at] for at in kept), scored[:, kept]
    given.notify("menu: " + "; ".join(map(str, plans)))
    shared = plans[0][: shared_visits(plans)]

    def compute(prompts: list[list[int]], paths: list[str]) -> dict[str, Tensor]:
        return {"read": menu_reads(given.model, prompts, shared)}

    prefixes = [str(shared)] * len(labels)
    read = kept_features(given.folder, given.model, given.prompts, prefixes, compute, given.notify)["read"].float()
    rows, options, found = given.held, [], []
    for price in PRICES:
        utility = rewards - price * _shares(plans, given)
        routers = fit_menu(read, utility, given.held_out, config, lambda line: None)
        for threshold in THRESHOLDS:
            policy = MenuPolicy(plans, routers, threshold)
            picked = policy.pick(read[rows])
            taken = torch.tensor([plans.index(plan) for plan in picked])
            reward = rewards[rows].gather(1, taken[:, None]).squeeze(1)
            options.append(_option(given, rows, reward, picked))
            found.append((policy, price, picked))
        reward, saved = options[-len(THRESHOLDS)]
        given.notify(f"price {price:g}: reward {reward:.3f} on questions held out, {saved:.1%} of the layers saved")
    best = choose(options, config.saved)
    policy, price, picked = found[best]
    record = _record(given, rewards[rows, 0], options[best], picked) | {"threshold": policy.threshold, "price": price}
    return policy, record | {"menu": [str(plan) for plan in plans]}


def candidate_plans(labels: Sequence[Record], full: Plan, config: RouterRecipe) -> list[Plan]:
    """Plans that begin with the first layer and cover most labels: one half short enough, the other any.

    Raises:
        ValueError: the labels hold no such plan.
    """
    short = full.depth * (1 - config.saved)
    found: list[Plan] = []
    for size, most in ((config.candidates // 2, short), (config.candidates, float("inf"))):
        others = [_only(label, full, most, found) for label in labels]
        chosen = covering(others, size - len(found))
        found += [Plan.parse(one["plan"], len(full)) for one in chosen]
    if not found:
        raise ValueError("the labels hold no robust path to make a menu of: search more questions, or longer")
    return found


def _only(label: Record, full: Plan, most: float, but: Sequence[Plan]) -> Record:
    """The label with those paths that may come into the menu: of at most so many layers, not `full`, not in `but`."""
    plans = [(Plan.parse(one["plan"], len(full)), one) for one in label["paths"]]
    fits = [plan.depth <= most and plan.common_prefix(full) > 0 and plan not in (full, *but) for plan, _ in plans]
    kept = [one for (_, one), fit in zip(plans, fits, strict=True) if fit]
    return label | {"paths": kept, "base": label["base"] | {"robust": False}}


def serving(rewards: Tensor, plans: Sequence[Plan], given: Material, size: int) -> list[int]:
    """The numbers of the full plan and of up to `size` others that together serve the tasks best, greedily.

    How well a set serves is the sum, over tasks and prices, of its best plan's mean utility on the training questions.
    """
    tasks = list(dict.fromkeys(one.task for one in given.questions))
    own = [[r for r, one in enumerate(given.questions) if one.task == task and not given.held_out[r]] for task in tasks]
    means = torch.stack([rewards[rows].mean(0) for rows in own if rows])
    utility = torch.cat([means - price * _shares(plans, given) for price in PRICES])
    kept, best = [0], utility[:, 0]
    while len(kept) <= size:
        gains = (utility - best[:, None]).clamp(min=0).sum(0)
        if gains.max() <= 0:
            break
        kept.append(int(gains.argmax()))
        best = torch.maximum(best, utility[:, kept[-1]])
    if len(kept) == 1:
        raise ValueError("no candidate serves any task better than the full plan at any price: search more questions")
    return kept


def _shares(plans: Sequence[Plan], given: Material) -> Tensor:
    """Layers run by each plan, as shares of the model's."""
    return torch.tensor([plan.depth for plan in plans]) / given.model.depth


# -- rewards, choices and what is noted --------------------------------------------------------------------------


def soft_rewards(margins: Tensor, tasks: Sequence[str]) -> Tensor:
    """Margins (questions, plans), the first plan the full one, as rewards in 0 .. 1."""
    of_task: dict[str, list[float]] = defaultdict(list)
    for task, margin in zip(tasks, margins[:, 0].abs().tolist(), strict=True):
        of_task[task].append(margin)
    scale = torch.tensor([max(1e-6, SOFTNESS * median(of_task[task])) for task in tasks])
    return torch.sigmoid(margins / scale[:, None])


def _option(given: Material, rows: Sequence[int], rewards: Tensor, plans: Sequence[Plan]) -> tuple[float, float]:
    """Mean reward over tasks, and share of the layers saved, of questions `rows` by `plans`."""
    saved = 1 - sum(plan.depth for plan in plans) / len(plans) / given.model.depth
    return _over_tasks(given, rows, rewards), saved


def _over_tasks(given: Material, rows: Sequence[int], values: Tensor) -> float:
    """The mean over tasks of the means over questions."""
    of_task: dict[str, list[float]] = defaultdict(list)
    for row, value in zip(rows, values.tolist(), strict=True):
        of_task[given.questions[row].task].append(value)
    return sum(sum(those) / len(those) for those in of_task.values()) / len(of_task)


def _record(given: Material, base: Tensor, chosen: tuple[float, float], plans: Sequence[Plan]) -> dict[str, Any]:
    """What the questions held out said of the choice, and the F1 of its classes beside always-execute."""
    rows = given.held
    labelled = [(given.paths[row], plan) for row, plan in zip(rows, plans, strict=True) if given.paths[row] is not None]
    expected = torch.tensor([path for path, _ in labelled])
    found = torch.tensor([classes_or_counts(plan, given.model.depth) for _, plan in labelled])
    return {
        "held_out": {
            "n": len(rows),
            "base_reward": _over_tasks(given, rows, base),
            "reward": chosen[0],
            "layers_saved": chosen[1],
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


def static_plans(labels: Sequence[Record], layers: int) -> dict[str, str]:
    """The best single plans, by their layers, each better than all shorter ones: what any router has to beat.

    Best is the mean gain over the full plan on the questions that tried it, diluted by DOUBT questions without gain.
    """
    gains: dict[str, list[int]] = defaultdict(list)
    for label in labels:
        for path in label["paths"]:
            gains[path["plan"]].append(int(path["right"]) - int(label["base"]["right"]))
    gain = {Plan.parse(text, layers): sum(those) / (len(those) + DOUBT) for text, those in gains.items()}
    gain[Plan.full(layers)] = 0.0
    found: dict[str, str] = {}
    best = float("-inf")
    for plan in sorted(gain, key=lambda plan: (plan.depth, -gain[plan])):
        if gain[plan] > best:
            found[f"{plan.depth:g}"], best = str(plan), gain[plan]
    return found
