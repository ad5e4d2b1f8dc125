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
    routing = "tools-vs-planning"
    paths = "paths"


# The suites that an option is of, if not of all.
OPTIONS_OF: dict[str, tuple[Suite, ...]] = {
    "exits": (Suite.exits,),
    "datasets": (Suite.exits,),
    "samples": (Suite.exits, Suite.routing),
    "questions": (Suite.exits,),
    "limit": (Suite.paths,),
    "labels": (Suite.paths,),
    "fresh": (Suite.paths,),
    "reference": (Suite.routing,),
    "answers": (Suite.routing,),
    "timed": (Suite.routing,),
    "dtype": (Suite.exits, Suite.paths),
}


def run(
    context: typer.Context,
    adapter: Annotated[
        str | None, typer.Argument(help="A folder that save_pretrained wrote; without it, the model alone.")
    ] = None,
    suite: Annotated[
        Suite,
        typer.Option(
            help="exits: perplexity of every exit, and two tasks of general ability; "
            "tools-vs-planning: what an adapter that routes skips of each, with controls; "
            "paths: accuracy, layers and time of an adapter that routes, with controls."
        ),
    ] = Suite.exits,
    model: options.Model = None,
    exits: Annotated[str | None, typer.Option(help="Layers to leave after, such as 4,8,30; default: each 2nd.")] = None,
    datasets: Annotated[str, typer.Option(help="Texts and tasks, separated by commas.")] = DATASETS,
    samples: Annotated[int, typer.Option(help="Held-out texts of each data set, or of each kind.")] = 32,
    questions: Annotated[int, typer.Option(help="Questions of each task of general ability; 0 leaves them out.")] = 150,
    limit: Annotated[
        int | None, typer.Option(help="Suite paths: questions of each task; default: the whole test split.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Suite paths: what 'layerwise search' found for test questions, an oracle.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Suite paths: judge again the answers that an earlier run kept verdicts of.")
    ] = False,
    reference: Annotated[
        Path | None, typer.Option(help="Suite tools-vs-planning: an adapter trained alike with --objective none.")
    ] = None,
    answers: Annotated[
        int, typer.Option(help="Suite tools-vs-planning: of how many prompts to generate answers; 0 leaves it out.")
    ] = 24,
    timed: Annotated[
        int, typer.Option(help="Suite tools-vs-planning: on how many prompts to time decoding; 0 leaves it out.")
    ] = 6,
    seed: Annotated[int, typer.Option(help="Decides which texts and questions are drawn.")] = 0,
    dtype: options.Dtype = options.DtypeChoice.auto,
    device: options.Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the result into this .png, .svg or .pdf.")] = None,
    json: options.Json = False,
) -> None:
    """How good every exit of a model is, or what an adapter that routes gains, on held-out text and questions."""
    _check_options(context, suite)
    chosen, names = _numbers(exits), _names(datasets)
    if samples < 1 or questions < 0:
        raise ValueError("samples must be at least 1 and questions at least 0")
    if answers < 0 or timed < 0:
        raise ValueError("answers and timed must be at least 0")
    if suite is not Suite.exits and adapter is None:
        raise ValueError(f"the suite {suite} judges an adapter that routes: give the folder of one")
    if reference is not None and not reference.is_dir():
        raise ValueError(f"there is no folder '{reference}': train one with --objective none")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 question of each task or more, not {limit}")
    if labels is not None and not labels.is_file():
        raise ValueError(f"there is no file '{labels}': make one with 'layerwise search'")
    _check_files(out, figure)
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, not {seed}")
    command = options.command()
    if suite is Suite.exits:
        result = _exits(adapter, model, chosen, names, samples, questions, seed, dtype, device) | {"command": command}
    elif suite is Suite.routing:
        result = _routing(adapter, model, reference, samples, answers, timed, seed, command, device)
    else:
        result = _paths(adapter, model, limit, labels, fresh, seed, command, dtype, device)
    if out is not None:
        out.write_text(json_text.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {out}")
    if figure is not None:
        _draw(suite, result, figure)
        print(f"wrote {figure}")
    if json:
        options.print_json(result)


def _exits(
    adapter: str | None,
    model: str | None,
    exits: list[int] | None,
    datasets: list[str],
    samples: int,
    questions: int,
    seed: int,
    dtype: options.DtypeChoice,
    device: str,
) -> dict[str, Any]:
    from layerwise.cli import eval_tables
    from layerwise.evaluation.quality import exit_suite

    loaded, tokenizer = options.load(model, adapter, None, options.EngineChoice.eager, dtype, device=device)
    result = exit_suite(
        loaded,
        tokenizer,
        exits=exits,
        datasets=datasets,
        samples=samples,
        questions=questions,
        seed=seed,
        adapter=adapter,
        notify=options.note,
    )
    eval_tables.exits(result)
    return result


def _routing(
    adapter: str | None,
    model: str | None,
    reference: Path | None,
    samples: int,
    answers: int,
    timed: int,
    seed: int,
    command: str,
    device: str,
) -> dict[str, Any]:
    from layerwise.cli import eval_tables
    from layerwise.evaluation.routing import routing_suite
    from layerwise.sources import read_device

    assert adapter is not None
    options.quiet()
    where = read_device(device)
    result = routing_suite(
        adapter,
        model,
        reference,
        samples,
        answers,
        timed,
        seed=seed,
        command=command,
        device=where,
        notify=options.note,
    )
    eval_tables.routing(result)
    return result


def _paths(
    adapter: str | None,
    model: str | None,
    limit: int | None,
    labels: Path | None,
    fresh: bool,
    seed: int,
    command: str,
    dtype: options.DtypeChoice,
    device: str,
) -> dict[str, Any]:
    from layerwise.cli import eval_tables
    from layerwise.evaluation.paths import path_suite

    assert adapter is not None
    loaded, tokenizer = options.load(model, adapter, None, options.EngineChoice.auto, dtype, device=device)
    result = path_suite(
        loaded,
        tokenizer,
        adapter,
        limit=limit,
        labels=labels,
        fresh=fresh,
        seed=seed,
        command=command,
        notify=options.note,
    )
    eval_tables.paths(result)
    return result


def _draw(suite: Suite, result: dict[str, Any], figure: Path) -> None:
    from layerwise.report import exit_figures, route_figures

    if suite is Suite.paths:
        route_figures.path_figure(result, figure)
    elif suite is Suite.routing:
        route_figures.layer_use_figure(result, figure)
    else:
        exit_figures.exit_figure({result["adapter"] or result["model"]: result}, figure)


def _check_options(context: typer.Context, suite: Suite) -> None:
    """Refuse what was asked of another suite: it would be ignored."""
    for name, suites in OPTIONS_OF.items():
        if suite not in suites:
            options.refuse_given(context, [name], f"--suite {' and --suite '.join(suites)}")


def _check_files(out: Path | None, figure: Path | None) -> None:
    options.check_writable(out, figure)
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

    return options.names_of(datasets, (*TEXTS, *TASKS), "data set")
