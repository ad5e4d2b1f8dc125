"""Function calls from the Berkeley Function Calling Leaderboard (package `bfcl-eval`, Apache-2.0).

A row has a question, the functions on offer, and a gold answer: for each argument the list of accepted values, where
`""` means that the argument may be left out. From these come three tasks:

    tools        functions and a question -> <tool_call>[{"name": "f", "arguments": {"x": 1}}]</tool_call>
    irrelevance  the same prompts where no function fits -> a sentence that says so
    parsing      a question alone -> a tree in TOP brackets: [IN:GET_AREA [SL:BASE 10 ] [SL:HEIGHT 5 ] ]

The categories repeat each other's questions and functions, so a split by category or by row would leak. Here all rows
of all three tasks, and the plain questions of the `chat` task, are joined by union-find over normalised questions and
the names of called functions: neither is ever in two splits.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from layerwise.data.examples import Example, connected_keys
from layerwise.data.packages import package_file

PACKAGE = "bfcl-eval==2026.3.23"
LONGEST_PROMPT = 2048  # characters, about 512 tokens
SINGLE = ("simple_python", "live_simple")
OTHERS = ("simple_java", "simple_javascript", "multiple", "live_multiple", "parallel")
EXECUTABLE = ("exec_simple", "exec_multiple", "exec_parallel")  # exec_parallel_multiple would chain all of them
IRRELEVANT = ("irrelevance", "live_irrelevance")

SYSTEM = (
    "You can call the functions below. Answer with the calls that the request needs, as a JSON list:\n"
    '<tool_call>[{"name": "function", "arguments": {"argument": "value"}}]</tool_call>\n'
    "If no function fits, say so in one sentence.\n\nFunctions:\n"
)
PARSE = "Parse into a TOP tree.\n\n"
LEFT_OUT = object()
_JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array"}  # BFCL writes Python's names for these


@dataclass(frozen=True)
class Row:
    """A question with its functions; `calls` are (name, arguments) and empty where none is right."""

    category: str
    question: str
    instructions: str  # the row's own system message, usually ""
    functions: tuple[dict[str, Any], ...]
    calls: tuple[tuple[str, dict[str, Any]], ...]
    flat: bool  # no argument accepts a list or an object
    key: str = ""

    @property
    def labels(self) -> list[str]:
        """What must not be in two splits."""
        return [f"question {normalised(self.question)}", *(f"function {name}" for name, _ in self.calls)]


# -- gold values -------------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """Lower case words, one space between them."""
    return " ".join(re.findall(r"\w+", text.lower()))


def stated(value: Any, question: str) -> bool:
    """Whether the question says the value: its words, in order; for a list, every item."""
    if isinstance(value, list):
        return bool(value) and all(stated(one, question) for one in value)
    if isinstance(value, bool | dict) or value is None:
        return False
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    words = normalised(str(value))
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", question)  # 1,000 is 1000
    return bool(words) and any(f" {words} " in f" {normalised(one)} " for one in (question, plain))


def choose(accepted: Any, question: str, required: bool) -> Any:
    """One value of a list of accepted ones, or LEFT_OUT.

    The first that is not `""`. An argument that may be left out is given only if the question states its value: the
    others are defaults that nobody could know.
    """
    values = [value for value in accepted if value != ""]
    if not values:
        return "" if required and accepted else LEFT_OUT
    if "" not in accepted or required:
        return _inner(values[0], question)
    return next((_inner(value, question) for value in values if stated(value, question)), LEFT_OUT)


def _inner(value: Any, question: str) -> Any:
    """Accepted values inside objects, where every field holds a list of them."""
    if isinstance(value, list):
        return [_inner(one, question) for one in value]
    if isinstance(value, dict) and value and all(isinstance(field, list) for field in value.values()):
        chosen = {name: choose(field, question, False) for name, field in value.items()}
        return {name: field for name, field in chosen.items() if field is not LEFT_OUT}
    return value


def gold_call(
    gold: Mapping[str, Mapping[str, list[Any]]], functions: tuple[dict[str, Any], ...], question: str
) -> tuple[str, dict[str, Any]]:
    """The (name, arguments) of a ground truth `{name: {argument: accepted values}}`."""
    ((name, arguments),) = gold.items()
    schema = next((one for one in functions if one["name"] == name), {})
    required = schema.get("parameters", {}).get("required", [])
    chosen = {key: choose(values, question, key in required) for key, values in arguments.items()}
    return name, {key: value for key, value in chosen.items() if value is not LEFT_OUT}


def python_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """The call that Python source such as `f(x=1, y=[2])` writes; None unless all arguments are named literals."""
    node = ast.parse(text.strip(), mode="eval").body
    if not isinstance(node, ast.Call) or node.args:
        return None
    try:
        arguments = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
        return ast.unparse(node.func), json.loads(json.dumps(arguments))
    except (ValueError, TypeError):
        return None


# -- rows --------------------------------------------------------------------------------------------------------


def _json_lines(path: str) -> list[dict[str, Any]]:
    text = package_file(PACKAGE, f"bfcl_eval/data/{path}").decode("utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _category(category: str) -> Iterator[Row]:
    executable = category in EXECUTABLE
    folder = "unused_datasets/" if executable else ""
    questions = _json_lines(f"{folder}{'question/' if executable else ''}BFCL_v4_{category}.json")
    truths: dict[str, Any] = {}
    if category not in IRRELEVANT:
        answers = _json_lines(f"{folder}possible_answer/BFCL_v4_{category}.json")
        truths = {row["id"]: row["ground_truth"] for row in answers}
    for row in questions:
        turns = {message["role"]: message["content"] for message in row["question"][0]}
        functions = tuple(row["function"])
        truth = truths.get(row["id"], [])
        flat = False
        if executable:
            calls = [python_call(text) for text in truth]
        else:
            calls = [gold_call(gold, functions, turns["user"]) for gold in truth]
            flat = not any(
                isinstance(value, list | dict)
                for gold in truth
                for arguments in gold.values()
                for accepted in arguments.values()
                for value in accepted
            )
        known = tuple(call for call in calls if call is not None)
        if len(known) == len(calls):
            yield Row(category, turns["user"].strip(), turns.get("system", "").strip(), functions, known, flat)


@cache
def rows() -> tuple[Row, ...]:
    """All rows, each with its key; see the module's docstring."""
    found = [row for name in (*SINGLE, *OTHERS, *EXECUTABLE, *IRRELEVANT) for row in _category(name)]
    found = [row for row in found if row.category in SINGLE or len(system_message(row)) <= LONGEST_PROMPT]
    keys = connected_keys([row.labels for row in found])
    return tuple(replace(row, key=key) for row, key in zip(found, keys, strict=True))


@cache
def _question_keys() -> dict[str, str]:
    return {row.labels[0]: row.key for row in rows()}


def question_key(question: str) -> str:
    """The key of a question, shared with the rows that ask the same."""
    label = f"question {normalised(question)}"
    return _question_keys().get(label, label)


# -- tasks -------------------------------------------------------------------------------------------------------


def schema(function: Mapping[str, Any]) -> str:
    """A function's JSON schema on one line, with JSON's names for types."""

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(one) for one in value]
        if isinstance(value, dict):
            return {
                key: _JSON_TYPES.get(inner, inner) if key == "type" and isinstance(inner, str) else renamed(inner)
                for key, inner in value.items()
            }
        return value

    parts = {key: renamed(function[key]) for key in ("name", "description", "parameters") if key in function}
    return json.dumps(parts, ensure_ascii=False, separators=(",", ":"))


def system_message(row: Row) -> str:
    listed = SYSTEM + "\n".join(schema(function) for function in row.functions)
    return f"{listed}\n\n{row.instructions}" if row.instructions else listed


def tool_call(calls: tuple[tuple[str, dict[str, Any]], ...]) -> str:
    """The answer format: a JSON list of calls between tags, on one line."""
    listed = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return f"<tool_call>{json.dumps(listed, ensure_ascii=False)}</tool_call>"


def top_tree(name: str, arguments: Mapping[str, Any]) -> str | None:
    """TOP brackets of one call; None if a value holds brackets itself, which TOP cannot write."""

    def label(text: str) -> str:
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text)
        return re.sub(r"\W+", "_", snake).strip("_").upper()

    values = {key: " ".join(str(value).split()) for key, value in arguments.items()}
    if any(bracket in value for value in values.values() for bracket in "[]"):
        return None
    return " ".join([f"[IN:{label(name)}", *(f"[SL:{label(key)} {value} ]" for key, value in values.items()), "]"])


def no_call(functions: tuple[dict[str, Any], ...]) -> str:
    """What to answer where no function fits."""
    names = [str(function["name"]) for function in functions]
    if len(names) == 1:
        return f"The function {names[0]} does not fit this request, so I call nothing."
    return f"None of the functions {', '.join(names)} fits this request, so I call nothing."


def _with_functions(wanted: bool) -> list[Example]:
    """Examples with functions on offer, where a call is right, or where none is."""
    examples: dict[tuple[str, str], Example] = {}
    for row in rows():
        system = system_message(row)
        if bool(row.calls) == wanted and len(system) + len(row.question) <= LONGEST_PROMPT and row.functions:
            answer = tool_call(row.calls) if wanted else no_call(row.functions)
            example = Example.of(row.question, answer, row.category, row.key, system)
            examples.setdefault((system, row.question), example)
    return list(examples.values())


def tools() -> list[Example]:
    return _with_functions(True)


def irrelevance() -> list[Example]:
    return _with_functions(False)


def parsing() -> list[Example]:
    """Single calls with plain values only."""
    trees = [(row, top_tree(*row.calls[0])) for row in rows() if row.category in SINGLE and row.flat]
    return [Example.of(PARSE + row.question, tree, "parsing", row.key) for row, tree in trees if tree is not None]


def plain_questions() -> list[Example]:
    """Questions without functions, and without known answers."""
    rows_ = _json_lines("unused_datasets/question/BFCL_v4_chatable.json")
    return [Example.of(row["question"], "", "chatable", question_key(row["question"])) for row in rows_]
