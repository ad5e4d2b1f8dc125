"""The search against the plain way to evaluate a path, and the tree against random and greedy search.

    speedup       paths per second of a whole search (tree, shared prefixes, batches) / those of evaluating each path
                  alone, by one plain Hugging Face forward pass over a batch of prompt and choice
    same_scores   largest difference of the two ways' margins, in nats, in float32
    algorithms    what each algorithm finds on the same questions with as many evaluations: `oracle`, the share of
                  questions that some path answers; `layers`, the mean length of the shortest right path (the full plan
                  where there is none); `value`, the mean worth of the best path; and by how much the tree's are better,
                  with 95% intervals (paired bootstrap over questions). All use the same measured prior.

In bfloat16 both ways round, each in its own place, so margins of one plan differ by some tenths of a nat whichever way
is asked (`same_scores_dtype`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from layerwise.benchmarks.environment import environment
from layerwise.data.short_answers import IN_DOMAIN, Question
from layerwise.evaluation.intervals import interval
from layerwise.model.causal_lm import attach
from layerwise.plan import Plan
from layerwise.search.objective import Book
from layerwise.search.reference import plain_margin
from layerwise.search.run import chosen_questions, training_prior
from layerwise.search.searcher import Algorithm, Searcher, SearchOptions
from layerwise.sources import load_base, load_tokenizer

CALIBRATION = 8  # questions that the prior is measured on


def bench_search(
    name: str | None = None,
    tasks: Sequence[str] = IN_DOMAIN,
    count: int = 1,
    simulations: int = 48,
    plain_paths: int = 6,
    compared: int = 0,
    dtype: str = "bfloat16",
    seed: int = 0,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time `count` training questions of each task; compare the algorithms on `compared` of each.

    Args:
        plain_paths: how many of a question's paths are evaluated the plain way too; their time stands for all.
    """
    base, tokenizer = load_base(name, dtype), load_tokenizer(name)
    precise = base if dtype == "float32" else load_base(name, "float32")
    options = SearchOptions(simulations=simulations, seed=seed)
    asked = chosen_questions(tasks, "train", count)
    notify("measuring the prior")
    options = replace(options, prior=training_prior(attach(base), tokenizer, asked, options, CALIBRATION))
    searcher, exact = (Searcher(attach(model), tokenizer, options) for model in (base, precise))
    searcher.search(asked[0])  # warms up
    rows = []
    for number, question in enumerate(asked, 1):
        rows.append(_timed(searcher, exact, question, plain_paths))
        notify(f"{number} of {len(asked)}: {question.task}, {rows[-1]['speedup']:.1f}x")
    fast = sum(row["seconds"] for row in rows)
    plain = sum(row["plain_seconds"] for row in rows)
    return {
        "benchmark": "search",
        "speedup": plain / fast,
        "paths_per_second": sum(row["paths"] for row in rows) / fast,
        "plain_paths_per_second": sum(row["paths"] for row in rows) / plain,
        "same_scores": max(row.pop("difference") for row in rows),
        "same_scores_dtype": max(row.pop("difference_dtype") for row in rows),
        "dtype": dtype,
        "simulations": simulations,
        "seed": seed,
        "questions": rows,
        **({"algorithms": compare(searcher, chosen_questions(tasks, "train", compared), notify)} if compared else {}),
        "environment": environment(),
    }


def _timed(searcher: Searcher, exact: Searcher, question: Question, plain_paths: int) -> dict[str, Any]:
    """One question's search, and some of its paths the plain way; seconds are for all of its paths."""
    began = time.perf_counter()
    book = searcher.search(question)
    fast = time.perf_counter() - began
    paths = list(book.margins)
    some = random.Random(question.id).sample(paths, min(plain_paths, len(paths)))

    def plain(one: Searcher) -> list[float]:
        return [plain_margin(one.model.base, one.tokenizer, question, plan) for plan in some]

    began = time.perf_counter()
    found = plain(searcher)
    slow = (time.perf_counter() - began) * len(paths) / len(some)
    return {
        "task": question.task,
        "id": question.id,
        "paths": len(paths),
        "seconds": fast,
        "plain_seconds": slow,
        "speedup": slow / fast,
        "difference": _gap(exact.evaluator(question).margins(some), plain(exact)),
        "difference_dtype": _gap([book.margins[plan] for plan in some], found),
    }


def _gap(left: Sequence[float], right: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(left, right, strict=True))


# -- algorithms --------------------------------------------------------------------------------------------------


def compare(
    searcher: Searcher, asked: Sequence[Question], notify: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """What each algorithm finds on `asked`; see the module's `algorithms`."""
    found: dict[str, list[dict[str, float]]] = {algorithm: [] for algorithm in Algorithm}
    for number, question in enumerate(asked, 1):
        for algorithm in Algorithm:
            found[algorithm].append(_outcome(searcher.search(question, algorithm)))
        notify(f"{number} of {len(asked)} questions compared")
    tree = found[Algorithm.mcts]
    return {
        name: {
            **{key: _mean([row[key] for row in rows]) for key in rows[0]},
            "questions": len(rows),
            **({"tree_minus_this": _differences(tree, rows)} if name != Algorithm.mcts else {}),
        }
        for name, rows in found.items()
    }


def _outcome(book: Book) -> dict[str, float]:
    right = [plan for plan, margin in book.margins.items() if margin > 0]
    return {
        "oracle": float(bool(right)),
        "layers": min((plan.depth for plan in right), default=Plan.full(book.layers).depth),
        "value": max(book.values(list(book.margins))),
        "evaluations": float(len(book.margins)),
    }


def _differences(left: Sequence[dict[str, float]], right: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean differences left - right with their 95% intervals, by paired bootstrap."""
    return {
        key: _interval([one[key] - other[key] for one, other in zip(left, right, strict=True)])
        for key in ("oracle", "layers", "value")
    }


def _interval(differences: Sequence[float]) -> dict[str, Any]:
    return {"mean": _mean(differences), "interval": interval(differences)}


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
