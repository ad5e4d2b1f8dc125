"""One question's labels: search, test the winners again, write it down."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from layerwise.data.short_answers import Question
from layerwise.plan import Plan
from layerwise.search.baselines import greedy_search, random_search
from layerwise.search.evaluator import PathEvaluator
from layerwise.search.labels import Record
from layerwise.search.mcts import mcts
from layerwise.search.objective import Book
from layerwise.search.tree import Edit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerwise.model.causal_lm import LayerwiseForCausalLM


class Algorithm(StrEnum):
    mcts = "mcts"
    random = "random"
    greedy = "greedy"


@dataclass(frozen=True)
class SearchOptions:
    """What a search depends on besides the model and the question.

    Raises:
        ValueError: an option is out of range; says which range.
    """

    algorithm: Algorithm = Algorithm.mcts
    simulations: int = 48  # plans evaluated for each question, besides the full one
    price: float = 0.5  # of running all layers, where a right answer is worth 1
    width: float = 1.0  # a node of the tree with V visits has up to width * sqrt(V) children
    batch: int = 4  # plans evaluated together
    exploration: float = 0.2  # c of the bound, in values
    retest: int = 8  # right paths that are tested again on the variants of the prompt
    margin: float = 0.0  # nats by which a robust path must win everywhere
    seed: int = 0
    prior: Mapping[str, float] = field(default_factory=dict)  # weights of edits; see `prior.measured_prior`

    def __post_init__(self) -> None:
        if self.algorithm not in list(Algorithm):
            raise ValueError(f"there is no algorithm '{self.algorithm}': choose {', '.join(Algorithm)}")
        for name in ("simulations", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.width >= 1:
            raise ValueError(f"width must be at least 1, not {self.width}")
        for name in ("price", "exploration", "retest", "margin"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "algorithm": str(self.algorithm), "prior": dict(self.prior)}

    def weight(self, edit: Edit) -> float:
        return self.prior.get(str(edit), 1.0)


class Searcher:
    """Labels questions with one model; puts it in evaluation mode."""

    def __init__(self, model: LayerwiseForCausalLM, tokenizer: PreTrainedTokenizerBase, options: SearchOptions) -> None:
        self.model, self.tokenizer, self.options = model.eval(), tokenizer, options

    def __call__(self, question: Question) -> Record:
        """The record of `question`; depends on nothing but the model, the options and the question."""
        options, book = self.options, self.search(question)
        worth = dict(zip(book.margins, book.values(list(book.margins)), strict=True))
        right = [plan for plan in sorted(worth, key=worth.__getitem__, reverse=True) if book.margins[plan] > 0]
        again = [plan for plan in right if plan != book.full][: options.retest]
        robust = self._robust(question, [plan for plan in (book.full, *again) if book.margins[plan] > options.margin])
        paths = sorted(
            (plan for plan in worth if plan != book.full),
            key=lambda plan: (plan in robust, book.margins[plan] > 0, worth[plan]),
            reverse=True,
        )
        lines = [_line(plan, book.margins[plan], plan in robust) for plan in (book.full, *paths)]
        return {
            "task": question.task,
            "id": question.id,
            "prompt": question.prompt,
            "answer": question.answer,
            "choices": list(question.choices),
            "base": lines[0],
            "paths": lines[1:],
            "evaluations": len(book.margins),
            "seed": options.seed,
            "algorithm": str(options.algorithm),
        }

    def evaluator(self, question: Question, prompt: str | None = None) -> PathEvaluator:
        return PathEvaluator(self.model, self.tokenizer, question, prompt)

    def search(self, question: Question, algorithm: str | None = None) -> Book:
        """Every plan that a search (by the options' algorithm, or another) evaluates for `question`."""
        options = self.options
        book = Book(self.model.depth, self.evaluator(question).margins, options.simulations, options.price)
        chance = random.Random(f"{options.seed} {question.id}")
        shared = {"batch": options.batch, "prior": options.weight}
        algorithm = algorithm or options.algorithm
        if algorithm == Algorithm.mcts:
            mcts(book, chance, width=options.width, exploration=options.exploration, **shared)
        elif algorithm == Algorithm.greedy:
            greedy_search(book, chance, **shared)
        else:
            random_search(book, chance, **shared)
        return book

    def _robust(self, question: Question, plans: Sequence[Plan]) -> set[Plan]:
        """Those of `plans` that win by the wanted margin on every variant of the prompt."""
        left = list(plans)
        for prompt in question.variants:
            if left:
                found = self.evaluator(question, prompt).margins(left)
                left = [plan for plan, one in zip(left, found, strict=True) if one > self.options.margin]
        return set(left)


def _line(plan: Plan, margin: float, robust: bool) -> dict[str, Any]:
    return {
        "plan": str(plan),
        "score": round(margin, 4),
        "right": margin > 0,
        "robust": robust,
        "layers": plan.depth,
    }
