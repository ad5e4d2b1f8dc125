"""layerwise eval: how good a model, or an adapter, is."""

from __future__ import annotations

import json as json_text
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from layerwise.cli import options

DATASETS = "wikipedia,summarization,code,parsing,tools"


class Suite(StrEnum):
    exits = "exits"


def run(
    adapter: Annotated[
        str | None, typer.Argument(help="A folder that save_pretrained wrote; without it, the model alone.")
    ] = None,
    suite: Annotated[
        Suite, typer.Option(help="exits: perplexity of every exit, and two tasks of general ability.")
    ] = Suite.exits,
    model: options.Model = None,
    exits: Annotated[str | None, typer.Option(help="Layers to leave after, such as 4,8,30; default: each 2nd.")] = None,
    datasets: Annotated[str, typer.Option(help="Texts and tasks, separated by commas.")] = DATASETS,
    samples: Annotated[int, typer.Option(help="Held-out texts of each data set.")] = 32,
    questions: Annotated[int, typer.Option(help="Questions of each task of general ability; 0 leaves them out.")] = 150,
    seed: Annotated[int, typer.Option(help="Decides which texts and questions are drawn.")] = 0,
    dtype: options.Dtype = options.DtypeChoice.bfloat16,
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the exits into this .png, .svg or .pdf.")] = None,
    json: options.Json = False,
) -> None:
    """Perplexity of every exit on held-out text and answers, and accuracy on tasks of general ability."""
    chosen, names = _numbers(exits), _names(datasets)
    if samples < 1 or questions < 0:
        raise ValueError("samples must be at least 1 and questions at least 0")
    for file in (out, figure):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"cannot write '{file}': the folder '{file.parent}' does not exist")
    if figure is not None and figure.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"cannot draw '{figure}': give it a name that ends in .png, .svg or .pdf")
    loaded, tokenizer = options.load(model, adapter, None, options.EngineChoice.eager, dtype)
    from layerwise.evaluation.quality import exit_suite

    result = exit_suite(
        loaded,
        tokenizer,
        exits=chosen,
        datasets=names,
        samples=samples,
        questions=questions,
        seed=seed,
        adapter=adapter,
        notify=options.note,
    )
    _print(result)
    if out is not None:
        out.write_text(json_text.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {out}")
    if figure is not None:
        from layerwise.report.figures import exit_figure

        exit_figure({result["adapter"] or result["model"]: result}, figure)
        print(f"wrote {figure}")
    if json:
        options.print_json(result)


def _numbers(exits: str | None) -> list[int] | None:
    if exits is None:
        return None
    parts = [part.strip() for part in exits.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"'{exits}' is no list of exits: give numbers of layers, such as 4,8,30")
    return [int(part) for part in parts]


def _names(datasets: str) -> list[str]:
    from layerwise.data import TASKS, TEXTS

    names = [name.strip() for name in datasets.split(",")]
    unknown = [name for name in names if name not in (*TEXTS, *TASKS)]
    if unknown:
        raise ValueError(f"there is no data set '{unknown[0]}': choose from {', '.join((*TEXTS, *TASKS))}")
    return list(dict.fromkeys(names))


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("exit", justify="right")
    for name in result["perplexity"]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in zip(*result["perplexity"].values(), strict=True):
        cells = (f"{_short(one['perplexity'])} {one['agreement']:4.0%}" for one in row)
        table.add_row(str(row[0]["exit"]), *cells)
    Console().print(table)
    print("perplexity, and how often the exit's likeliest token is the last layer's")
    for name, task in result["tasks"].items():
        low, high = task["interval"]
        print(f"{name}: {task['accuracy']:.1%} of {task['n']} questions right (95% interval {low:.1%} to {high:.1%})")


def _short(perplexity: float) -> str:
    """At most seven characters."""
    if perplexity >= 99_999.5:
        return f"{perplexity:.1e}"
    return f"{perplexity:,.0f}" if perplexity >= 99.95 else f"{perplexity:.2f}"
