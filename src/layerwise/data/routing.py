"""Data to route by: tool calls beside plans, mixed so that no shortcut tells them apart.

    planning    word problems with worked solutions (GSM8K), and questions broken down into smaller ones (FanOutQA)
    questions   plain questions about the functions on offer, answered in words
    routing     tool calls, planning, and the two kinds that look like tool calls and are none, as one training mix

A router would learn "a schema is present" or "the prompt is long" if that were enough. So half of the planning
prompts list functions too, which nobody needs; their lengths then overlap with those of tool calls; and the functions
of tool calls also come with requests that none of them fits (`irrelevance`), and with `questions`. Functions are
listed beside a plan only if they are of its split.

Evaluation knows a kind by `side`; training never looks at it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

from layerwise.data import bfcl
from layerwise.data.examples import Example, split_of
from layerwise.data.packages import package_file

FANOUT = "fanoutqa==1.1.1"
BREAK_DOWN = "Break this question down into the smaller questions to look up, one a line.\n\n"
LONGEST_BESIDE = 1000  # characters of the functions listed beside a plan; the plan itself makes the prompt longer
MOST_STEPS = 8  # longer plans repeat one question over a list of names
BESIDE = "+functions"  # ends the kind of a planning prompt that lists functions
SHARES = {"tools": 4, "planning": 4, "irrelevance": 1, "questions": 1}  # of the mix `routing`


def side(kind: str) -> str:
    """What an example's kind is to the suite `tools-vs-planning`: tools, planning, irrelevance or questions."""
    kind = kind.removesuffix(BESIDE)
    if kind in ("gsm8k", "fanout"):
        return "planning"
    if kind in bfcl.IRRELEVANT:
        return "irrelevance"
    return "questions" if kind == "function_questions" else "tools"


def _place(key: str, salt: str) -> float:
    """A number from 0 to 1, the same everywhere; what an example is given by chance is decided with it."""
    return random.Random(f"{salt} {key}").random()


@cache
def _systems(split: str) -> tuple[str, ...]:
    """The system messages with functions of a split's rows, each once, in a fixed order."""
    messages = (bfcl.system_message(row) for row in bfcl.rows() if row.functions and split_of(row.key) == split)
    return tuple(dict.fromkeys(one for one in messages if len(one) <= LONGEST_BESIDE))


def _beside_functions(example: Example) -> Example:
    """The same example with functions of its split in the system message, for every second key."""
    if _place(example.key, "beside") < 0.5:
        return example
    systems = _systems(split_of(example.key))
    system = systems[int(_place(example.key, "which") * len(systems))]
    return Example.of(example.prompt[-1]["content"], example.answer, example.kind + BESIDE, example.key, system)


def fanout() -> list[Example]:
    """Questions with the smaller questions that people broke them down into, numbered; plans of 2 to MOST_STEPS."""
    rows = json.loads(package_file(FANOUT, "fanoutqa/data/fanout-final-dev.json").decode("utf-8"))
    examples: dict[str, Example] = {}
    for row in rows:
        steps = [_step(one) for one in row["decomposition"]]
        if 2 <= len(steps) <= MOST_STEPS:
            answer = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
            key = bfcl.normalised(row["question"])
            examples.setdefault(key, Example.of(BREAK_DOWN + row["question"].strip(), answer, "fanout", key))
    return list(examples.values())


def _step(question: dict[str, Any]) -> str:
    return " ".join(question["question"].split())


def planning(word_problems: Sequence[Example]) -> list[Example]:
    """Word problems with worked solutions and broken down questions, half of them beside functions."""
    return [_beside_functions(one) for one in (*word_problems, *fanout())]


def questions() -> list[Example]:
    """What a function on offer does, or which arguments it needs; one question for each list of functions.

    Nobody is asked about a function of another split, that of the rows which call it or else of the first question.
    """
    examples: dict[str, Example] = {}
    homes = {name: row.key for row in bfcl.rows() for name, _ in row.calls}
    for row in bfcl.rows():
        system = bfcl.system_message(row)
        if not row.functions or len(system) > bfcl.LONGEST_PROMPT:
            continue
        function = row.functions[int(_place(system, "function") * len(row.functions))]
        name, description = str(function["name"]), str(function.get("description", "")).split(". ")[0].strip(" .")
        if split_of(homes.setdefault(name, row.key)) != split_of(row.key):
            continue
        needed = [str(one) for one in function.get("parameters", {}).get("required", [])]
        if _place(system, "question") < 0.5 and description:
            question, answer = f"What does {name} do?", f"{description}."
        elif needed:
            question, answer = f"Which arguments must {name} be given?", f"It must be given {', '.join(needed)}."
        else:
            continue
        examples.setdefault(system, Example.of(question, answer, "function_questions", row.key, system))
    return list(examples.values())


def mixed(sources: dict[str, Sequence[Example]]) -> list[Example]:
    """Examples of each source in the proportions of SHARES, as many as there are for the scarcest, well mixed."""
    rounds = min(len(sources[name]) // share for name, share in SHARES.items())
    chosen = []
    for name, share in SHARES.items():
        chosen += random.Random(f"mix {name}").sample(list(sources[name]), rounds * share)
    random.Random("mix").shuffle(chosen)
    return chosen
