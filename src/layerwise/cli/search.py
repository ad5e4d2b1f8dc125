"""layerwise search: better paths through the layers, found question by question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli import options


def run(
    out: Annotated[Path, typer.Option(help="JSON lines file of labels; a run goes on where the last one stopped.")],
    model: options.Model = None,
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas; default: all in domain.")] = "all",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    limit: Annotated[int, typer.Option(help="Questions of each task; 0 is all.")] = 100,
    algorithm: Annotated[str, typer.Option(help="mcts, random or greedy; each evaluates as many plans.")] = "mcts",
    simulations: Annotated[int, typer.Option(help="Plans evaluated for each question, besides the full one.")] = 48,
    price: Annotated[float, typer.Option(help="Of running all layers, where a right answer is worth 1.")] = 0.5,
    width: Annotated[float, typer.Option(help="A node with V visits has up to width sqrt(V) children.")] = 1.0,
    exploration: Annotated[float, typer.Option(help="c of the tree's upper confidence bound.")] = 0.2,
    retest: Annotated[int, typer.Option(help="Right paths tested again, on the variants of the prompt.")] = 8,
    margin: Annotated[float, typer.Option(help="Nats by which a robust path must win everywhere.")] = 0.0,
    calibration: Annotated[int, typer.Option(help="Questions to measure the prior of edits on; 0: no prior.")] = 8,
    menu: Annotated[int, typer.Option(help="Size of the menu of paths shown in the end.")] = 8,
    seed: Annotated[int, typer.Option(help="Decides what the search draws.")] = 0,
    workers: Annotated[int, typer.Option(help="Questions at a time, each in a process of its own.")] = 1,
    backend: Annotated[str, typer.Option(help="local, or ray for a cluster.")] = "local",
    dtype: options.Dtype = options.DtypeChoice.auto,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Search for paths through the layers that answer better, or as well with fewer layers (labels for routers)."""
    from layerwise.data.short_answers import IN_DOMAIN, TASKS
    from layerwise.search.labels import menu as menu_of
    from layerwise.search.labels import summary
    from layerwise.search.run import chosen_questions, describe, search
    from layerwise.search.searcher import SearchOptions

    names = list(IN_DOMAIN) if tasks == "all" else options.names_of(tasks, TASKS)
    at_least = {"limit": (limit, 0), "calibration": (calibration, 0), "menu": (menu, 0), "seed": (seed, 0)}
    for name, (value, least) in {**at_least, "workers": (workers, 1)}.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if backend not in ("local", "ray"):
        raise ValueError(f"there is no backend '{backend}': choose local or ray")
    options.check_writable(out)
    chosen = SearchOptions(
        algorithm=algorithm,
        simulations=simulations,
        price=price,
        width=width,
        exploration=exploration,
        retest=retest,
        margin=margin,
        seed=seed,
    )
    asked = chosen_questions(names, split, limit)
    options.quiet()
    from layerwise.sources import model_path, read_device

    where = read_device(device)
    model_path(model, options.note)
    with _Bar() as bar:
        records = search(
            model,
            asked,
            chosen,
            out,
            calibration=calibration,
            dtype=options.dtype_name(dtype, where),
            device=where,
            workers=workers,
            backend=backend,
            notify=bar.say,
            progress=bar.show,
        )
    found, shown = summary(records), menu_of(records, menu)
    print("\n".join(describe(found)))
    for one in shown:
        print(f"menu: {one['plan']} ({one['layers']:g} layers) covers {one['covers']} more, {one['alone']} alone")
    print(f"wrote {out}")
    if json:
        options.print_json({"labels": str(out), "summary": found, "menu": shown})


class _Bar:
    """A progress bar with an estimate of what is left, on stderr."""

    def __enter__(self) -> _Bar:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # The estimate looks back over some minutes: questions differ in length by a factor of ten.
        self._progress = Progress(*columns, console=Console(stderr=True), speed_estimate_period=300)
        self._progress.start()
        self._task = self._progress.add_task("loading", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        self._progress.update(self._task, description=line)

    def show(self, done: int, of: int) -> None:
        self._progress.update(self._task, description="questions", completed=done, total=of)
