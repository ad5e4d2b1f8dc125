"""layerwise eval: how good a model, or an adapter, is."""

from __future__ import annotations

import json as json_text
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from layerwise.cli import options

DATASETS = "wikipedia,summarization,code,parsing,tools"


class Suite(StrEnum):
    exits = "exits"
    paths = "paths"


def run(
    adapter: Annotated[
        str | None, typer.Argument(help="A folder that save_pretrained wrote; without it, the model alone.")
    ] = None,
    suite: Annotated[
        Suite,
        typer.Option(
            help="exits: perplexity of every exit, and two tasks of general ability; "
            "paths: accuracy, layers and time of an adapter that routes, with controls."
        ),
    ] = Suite.exits,
    model: options.Model = None,
    exits: Annotated[str | None, typer.Option(help="Layers to leave after, such as 4,8,30; default: each 2nd.")] = None,
    datasets: Annotated[str, typer.Option(help="Texts and tasks, separated by commas.")] = DATASETS,
    samples: Annotated[int, typer.Option(help="Held-out texts of each data set.")] = 32,
    questions: Annotated[int, typer.Option(help="Questions of each task of general ability; 0 leaves them out.")] = 150,
    limit: Annotated[
        int | None, typer.Option(help="Suite paths: questions of each task; default: the whole test split.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Suite paths: what 'layerwise search' found for test questions, an oracle.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which texts and questions are drawn.")] = 0,
    dtype: options.Dtype = options.DtypeChoice.bfloat16,
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the result into this .png, .svg or .pdf.")] = None,
    json: options.Json = False,
) -> None:
    """How good every exit of a model is, or what an adapter that routes gains, on held-out text and questions."""
    chosen, names = _numbers(exits), _names(datasets)
    if samples < 1 or questions < 0:
        raise ValueError("samples must be at least 1 and questions at least 0")
    _check_paths(suite, adapter, limit, labels)
    _check_files(out, figure)
    engine = options.EngineChoice.auto if suite is Suite.paths else options.EngineChoice.eager
    loaded, tokenizer = options.load(model, adapter, None, engine, dtype)
    if suite is Suite.paths:
        from layerwise.evaluation.paths import path_suite

        command = shlex.join(["layerwise", *sys.argv[1:]])
        result = path_suite(
            loaded, tokenizer, adapter, limit=limit, labels=labels, seed=seed, command=command, notify=options.note
        )
        _print_paths(result)
    else:
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
        from layerwise.report import figures

        if suite is Suite.paths:
            figures.path_figure(result, figure)
        else:
            figures.exit_figure({result["adapter"] or result["model"]: result}, figure)
        print(f"wrote {figure}")
    if json:
        options.print_json(result)


def _check_paths(suite: Suite, adapter: str | None, limit: int | None, labels: Path | None) -> None:
    if suite is Suite.paths and adapter is None:
        raise ValueError("the suite paths judges an adapter that routes: give the folder of one")
    if suite is not Suite.paths and (limit is not None or labels is not None):
        raise ValueError("--limit and --labels belong to --suite paths: leave them out")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 question of each task or more, not {limit}")
    if labels is not None and not labels.is_file():
        raise ValueError(f"there is no file '{labels}': make one with 'layerwise search'")


def _check_files(out: Path | None, figure: Path | None) -> None:
    for file in (out, figure):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"cannot write '{file}': the folder '{file.parent}' does not exist")
    if figure is not None and figure.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"cannot draw '{figure}': give it a name that ends in .png, .svg or .pdf")


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


def _print_paths(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("task", "n", "all layers", "routed", "95% interval of the gain"):
        table.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    for group in ("in_domain", "out_of_domain"):
        for task, one in result[group].items():
            low, high = (f"{100 * end:+.1f}" for end in one["interval"])
            table.add_row(task, str(one["n"]), f"{one['base']:.1%}", f"{one['routed']:.1%}", f"{low} to {high}")
    Console().print(table)
    for name, gain in (("in domain", "accuracy_gain"), ("out of domain", "out_of_domain_gain")):
        low, high = result[f"{gain}_interval"]
        print(f"{name}: {result[gain]:+.2f} points (95% interval {low:+.2f} to {high:+.2f}), mean over tasks")
    realised = "nothing to save" if result["time_realised"] is None else f"{result['time_realised']:.0%} of it as time"
    print(f"layers saved: {result['layers_saved']:.1%} a token, {realised}")
    for name, one in result["controls"].items():
        low, high = one["interval"]
        print(
            f"{name.replace('_', ' ')}: {one['accuracy']:.1%}, {one['layers_saved']:.1%} of the layers saved; "
            f"the router is {one['routed_ahead']:+.2f} points ahead ({low:+.2f} to {high:+.2f})"
        )


def _short(perplexity: float) -> str:
    """At most seven characters."""
    if perplexity >= 99_999.5:
        return f"{perplexity:.1e}"
    return f"{perplexity:,.0f}" if perplexity >= 99.95 else f"{perplexity:.2f}"
