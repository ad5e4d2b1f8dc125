"""Labels: what the search found, one question a line.

    {"about": {...}}                     what the labels were made with: model, options
    {"task", "id", "prompt", "answer", "choices",
     "base": {"plan", "score", "right", "robust", "layers"},
     "paths": [{"plan", "score", "right", "robust", "layers"}, ...],
     "evaluations", "seed", "algorithm"}

`score` is the margin of the right answer in nats, `right` whether it is positive, `layers` how many are run per token.
`paths` are all plans evaluated but the full one, best first: robust ones, then other right ones, each by value (see
`objective`). One try in fifty turns right by luck, so the best right paths are tested again: `robust` are those that
are right on every variant of the prompt as well, by the wanted margin. Paths that were not tested again are not robust.

The file grows line by line and a run goes on where the last one stopped, provided it asks for the same things.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
VERSION = 1


class LabelFile:
    """A file of labels, opened to be continued.

    Attributes:
        done: ids of the questions that are in it.

    Raises:
        ValueError: the file is none of labels, or was made with another model or other options; names them.
    """

    def __init__(self, path: str | Path, about: dict[str, Any]) -> None:
        self.path, self.about = Path(path), {"version": VERSION, **about}
        self.done: set[str] = set()
        if self.path.exists() and self.path.stat().st_size:
            self._continue()
        else:
            self._append({"about": self.about})

    def add(self, record: Record) -> None:
        """Append a question's labels, at once on disk."""
        self._append(record)
        self.done.add(record["id"])

    def _append(self, value: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(value, ensure_ascii=False) + "\n")

    def _continue(self) -> None:
        text = self.path.read_bytes()
        whole = text.rfind(b"\n") + 1
        about, records = _parsed(text[:whole].decode("utf-8"), self.path)
        before, now = _flat(about), _flat(self.about)
        for name in sorted({*before, *now}):
            theirs, ours = before.get(name), now.get(name)
            if theirs != ours:
                raise ValueError(
                    f"'{self.path}' was made with {name} {_short(theirs)}, not {_short(ours)}: "
                    "use the same, or give another file"
                )
        if whole < len(text):  # a run was killed in the middle of a line
            with self.path.open("r+b") as file:
                file.truncate(whole)
        self.done = {record["id"] for record in records}


def _flat(about: dict[str, Any]) -> dict[str, Any]:
    """`options` among the rest, each by its own name."""
    options = about.get("options", {})
    return {**about, "options": None, **{f"options.{name}": value for name, value in options.items()}}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def read_labels(path: str | Path) -> tuple[dict[str, Any], list[Record]]:
    """What the labels were made with, and the questions' records; a line cut off at the end is passed over.

    Raises:
        ValueError: there is no such file, or it is none of labels.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"there is no file '{path}': make it with 'layerwise search --out {path}'") from error
    return _parsed(text[: text.rfind(b"\n") + 1].decode("utf-8", errors="replace"), path)


def _parsed(text: str, path: str | Path) -> tuple[dict[str, Any], list[Record]]:
    try:
        # Not splitlines, which splits at U+2028 and others that a prompt may hold.
        first, *rest = [json.loads(line) for line in text.split("\n")[:-1]]
        about = {**first["about"]}
        if not isinstance(about.get("options", {}), dict):
            raise TypeError("options are no object")
        records = [{**record, "id": record["id"], "paths": record["paths"]} for record in rest]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is no file of labels: make one with 'layerwise search'") from error
    return about, records


# -- what the labels say -----------------------------------------------------------------------------------------


def kind(record: Record) -> str:
    """The class of a question.

    right: without help. improved: wrong, but a robust path is right. unconfirmed: wrong, and only paths that failed
    the second test are right. hopeless: no path is right.
    """
    if record["base"]["right"]:
        return "right"
    if any(path["robust"] for path in record["paths"]):
        return "improved"
    return "unconfirmed" if any(path["right"] for path in record["paths"]) else "hopeless"


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Counts by class, accuracy of the full plan and of the best path (the search's oracle), by task and in all.

    `shorter` counts questions right without help that a robust path answers with fewer layers; `layers` is the mean
    length of the shortest robust path (the full plan where there is none).
    """
    tasks = {record["task"]: None for record in records}
    rows = {task: _counts([record for record in records if record["task"] == task]) for task in tasks}
    return {"tasks": rows, "all": _counts(records)}


def _counts(records: Sequence[Record]) -> dict[str, Any]:
    kinds = Counter(kind(record) for record in records)
    lengths = [_shortest(record) for record in records]
    questions = max(1, len(records))
    return {
        "n": len(records),
        "classes": {name: kinds[name] for name in ("right", "improved", "unconfirmed", "hopeless")},
        "base": kinds["right"] / questions,
        "oracle": (len(records) - kinds["hopeless"]) / questions,
        "robust_oracle": (kinds["right"] + kinds["improved"]) / questions,
        "shorter": sum(r["base"]["right"] and _shortest(r) < r["base"]["layers"] for r in records),
        "layers": sum(lengths) / questions,
    }


def _shortest(record: Record) -> float:
    return min([path["layers"] for path in record["paths"] if path["robust"]] + [record["base"]["layers"]])


def menu(records: Sequence[Record], size: int, robust: bool = True) -> list[dict[str, Any]]:
    """Up to `size` plans that together cover most questions, greedily: each next one covers most that are left.

    A plan covers a question if it is right there, robustly so if `robust`; the full plan is one to choose from. Of
    plans that cover as many, the one with fewest layers. `covers` counts what a plan adds, `alone` all it covers.
    """
    mark = "robust" if robust else "right"
    covered: dict[str, set[str]] = {}
    lengths: dict[str, float] = {}
    for record in records:
        for path in (record["base"], *record["paths"]):
            lengths[path["plan"]] = path["layers"]
            covered.setdefault(path["plan"], set()).update([record["id"]] if path[mark] else [])
    left = {record["id"] for record in records}
    chosen: list[dict[str, Any]] = []
    while len(chosen) < size:
        best = min(covered, key=lambda plan: (-len(covered[plan] & left), lengths[plan], plan), default=None)
        if best is None or not covered[best] & left:
            break
        found = covered.pop(best)
        chosen.append({"plan": best, "layers": lengths[best], "covers": len(found & left), "alone": len(found)})
        left -= found
    return chosen
