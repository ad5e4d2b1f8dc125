"""Figures of early exits: perplexity and acceptance by layer."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from layerwise.report.drawing import INK, decorate, draw_line, legend_handles, new_figure, plain, save, styles

TITLES = {"wikipedia": "Wikipedia text"}
WORST = 1e5  # perplexity; untrained exits reach 1e10, where all is worse than guessing


def exit_figure(results: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draw the perplexity of every exit, a panel for each data set and a line for each model; up to WORST.

    Args:
        results: results of the suite `exits` by the label to show, the untouched model first.
        path: a .png, .svg or .pdf file; overwritten.

    Raises:
        ValueError: there is nothing to draw.
    """
    datasets = list(dict.fromkeys(name for result in results.values() for name in result["perplexity"]))
    if not datasets:
        raise ValueError("there is no result with perplexities to draw: run 'layerwise eval --suite exits' first")
    columns = min(3, len(datasets))
    rows = ceil(len(datasets) / columns)
    measured = [those for result in results.values() for those in result["perplexity"].values()]
    worst = max(one["perplexity"] for those in measured for one in those)
    figure = new_figure(3.0 * columns + 0.3, 2.5 * rows + 0.75)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    cells = [panel for row in panels for panel in row]
    for number, (panel, name) in enumerate(zip(cells, datasets, strict=False)):
        for (label, result), style in zip(results.items(), styles(len(results)), strict=True):
            points = sorted((one["exit"], one["perplexity"]) for one in result["perplexity"].get(name, ()))
            draw_line(panel, points, label, style)
        panel.set_yscale("log")
        if worst > WORST:
            panel.set_ylim(1, WORST)
        decorate(panel, TITLES.get(name, f"{name} answers"))
        panel.yaxis.set_major_formatter(lambda value, _: plain(value))
        panel.yaxis.set_minor_formatter(lambda value, _: "")
        below_is_empty = number + columns >= len(datasets)
        panel.tick_params(labelbottom=below_is_empty)
        if below_is_empty:
            panel.set_xlabel("layers run")
        if number % columns == 0:
            panel.set_ylabel("perplexity")
    for panel in cells[len(datasets) :]:
        panel.axis("off")
    handles, labels = legend_handles(cells[: len(datasets)])
    if len(cells) > len(datasets):
        cells[-1].legend(handles, labels, loc="center", frameon=False, labelcolor=INK)
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    beyond = f"; cut off at {plain(WORST)}" if worst > WORST else ""
    save(figure, path, f"Perplexity at every exit (lower is better{beyond})")


def acceptance_figure(variants: Mapping[str, Mapping[int | str, float]], path: str | Path) -> None:
    """Draw the share of drafted tokens that the last layer accepts, by the layer that drafts; a line for each variant.

    Args:
        variants: by the label to show, acceptance in 0 .. 1 by exit (numbers may be texts, as JSON has them).
        path: a .png, .svg or .pdf file; overwritten.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not any(variants.values()):
        raise ValueError("there is no acceptance to draw: give at least one variant with one exit")
    figure = new_figure(8.2, 3.9)
    panel = figure.subplots()
    for (label, acceptance), style in zip(variants.items(), styles(len(variants)), strict=True):
        draw_line(panel, sorted((int(exit), share) for exit, share in acceptance.items()), label, style)
    decorate(panel, None)
    panel.set_ylim(bottom=0)
    exits = sorted({int(exit) for acceptance in variants.values() for exit in acceptance})
    if len(exits) <= 12:
        panel.set_xticks(exits)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    panel.set_xlabel("layers that draft")
    panel.set_ylabel("drafted tokens accepted")
    figure.legend(*legend_handles([panel]), loc="outside right center", frameon=False, labelcolor=INK)
    save(figure, path, "Acceptance of drafts by exit")
