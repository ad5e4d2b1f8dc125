"""Figures out of results: perplexity and acceptance by exit, layers and accuracy of routes.

Drawn for a README: light background, letters that stay readable when the picture is shown 800 pixels wide, few colours
(Okabe and Ito's, which differ for colour-blind readers too) and a marker for each, so that grey print will do.
A figure depends on nothing but the numbers; no window system is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour, marker, line of each series, in order; the first is the untouched model: no colour.
STYLES = (
    ("#4d4d4d", "o", "--"),
    ("#0072B2", "s", "-"),
    ("#D55E00", "^", "-"),
    ("#009E73", "D", "-"),
    ("#CC79A7", "v", "-"),
    ("#E69F00", "P", "-"),
    ("#56B4E9", "X", "-"),
    ("#4d4d4d", "*", ":"),
)
INK, SOFT, GRID = "#1b1f27", "#5b6472", "#e3e6eb"
TITLES = {"wikipedia": "Wikipedia text"}
DPI = 160
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
    figure = _figure(3.0 * columns + 0.3, 2.5 * rows + 0.75)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    cells = [panel for row in panels for panel in row]
    for number, (panel, name) in enumerate(zip(cells, datasets, strict=False)):
        for (label, result), style in zip(results.items(), _styles(len(results)), strict=True):
            points = sorted((one["exit"], one["perplexity"]) for one in result["perplexity"].get(name, ()))
            _line(panel, points, label, style)
        panel.set_yscale("log")
        if worst > WORST:
            panel.set_ylim(1, WORST)
        _decorate(panel, TITLES.get(name, f"{name} answers"))
        panel.yaxis.set_major_formatter(lambda value, _: _plain(value))
        panel.yaxis.set_minor_formatter(lambda value, _: "")
        below_is_empty = number + columns >= len(datasets)
        panel.tick_params(labelbottom=below_is_empty)
        if below_is_empty:
            panel.set_xlabel("layers run")
        if number % columns == 0:
            panel.set_ylabel("perplexity")
    for panel in cells[len(datasets) :]:
        panel.axis("off")
    handles, labels = _handles(cells[: len(datasets)])
    if len(cells) > len(datasets):
        cells[-1].legend(handles, labels, loc="center", frameon=False, labelcolor=INK)
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    beyond = f"; cut off at {_plain(WORST)}" if worst > WORST else ""
    _save(figure, path, f"Perplexity at every exit (lower is better{beyond})")


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
    figure = _figure(8.2, 3.9)
    panel = figure.subplots()
    for (label, acceptance), style in zip(variants.items(), _styles(len(variants)), strict=True):
        _line(panel, sorted((int(exit), share) for exit, share in acceptance.items()), label, style)
    _decorate(panel, None)
    panel.set_ylim(bottom=0)
    exits = sorted({int(exit) for acceptance in variants.values() for exit in acceptance})
    if len(exits) <= 12:
        panel.set_xticks(exits)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    panel.set_xlabel("layers that draft")
    panel.set_ylabel("drafted tokens accepted")
    figure.legend(*_handles([panel]), loc="outside right center", frameon=False, labelcolor=INK)
    _save(figure, path, "Acceptance of drafts by exit")


def path_figure(result: Mapping[str, Any], path: str | Path) -> None:
    """Draw how often each layer is skipped and repeated, and accuracy against layers run beside the controls.

    Args:
        result: of the suite `paths`.
        path: a .png, .svg or .pdf file; overwritten.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not result.get("routes") or not result.get("controls"):
        raise ValueError("there is no result with routes to draw: run 'layerwise eval --suite paths' first")
    figure = _figure(9.2, 3.7)
    left, right = figure.subplots(1, 2)
    layers = range(len(result["routes"]["skipped"]))
    for name, style, sign in (("repeated", STYLES[1], 1), ("skipped", STYLES[2], -1)):
        heights = [sign * share for share in result["routes"][name]]
        left.bar(layers, heights, color=style[0], width=0.75, label=name)
    left.axhline(0, color=SOFT, lw=0.8)
    _decorate(left, "What becomes of each layer")
    left.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0%}")
    left.set_xlabel("layer")
    left.set_ylabel("share of the questions")
    left.legend(frameon=False, labelcolor=INK, fontsize=9)
    for (label, layers_run, accuracy), style in zip(who := _path_points(result), _styles(len(who)), strict=True):
        right.plot([layers_run], [accuracy], color=style[0], marker=style[1], linestyle="", ms=7, label=label)
    oracle = result.get("oracle", {}).get("menu")
    if oracle:
        right.axhline(oracle["accuracy"], color=SOFT, lw=1, linestyle=":", label="menu's oracle")
    _decorate(right, "Accuracy, mean over tasks", counted=False)
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    right.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    right.set_xlabel("layers run")
    right.legend(frameon=False, labelcolor=INK, fontsize=9)
    _save(figure, path, "Paths through the layers, chosen by the prompt")


def _path_points(result: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(label, share of the layers run, accuracy) of all layers, the router and the other controls."""
    tasks = result["in_domain"].values()
    routed = ("routed", 1 - result["layers_saved"], sum(one["routed"] for one in tasks) / len(tasks))
    labels = {"always_execute": "all layers", "static": "best single plan", "random": "random layers"}
    others = [
        (labels.get(name, name), 1 - one["layers_saved"], one["accuracy"]) for name, one in result["controls"].items()
    ]
    return [others[0], routed, *others[1:]]


# -- what figures share ------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    """An empty figure (inches) that belongs to no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _styles(count: int) -> list[tuple[str, str, str]]:
    return [STYLES[number % len(STYLES)] for number in range(count)]


def _line(panel: Axes, points: Sequence[tuple[int, float]], label: str, style: tuple[str, str, str]) -> None:
    color, marker, line = style
    exits, values = [exit for exit, _ in points], [value for _, value in points]
    panel.plot(exits, values, color=color, marker=marker, linestyle=line, label=label, lw=1.6, ms=4.2)


def _handles(panels: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Legend entries of all panels, each label once."""
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _decorate(panel: Axes, title: str | None, counted: bool = True) -> None:
    """Title, grid and colours; `counted` if what is on the horizontal axis is whole numbers."""
    from matplotlib.ticker import MaxNLocator

    if title:
        panel.set_title(title, loc="left", fontsize=10.5, color=INK)
    panel.xaxis.set_major_locator(MaxNLocator(7, integer=counted))
    panel.grid(color=GRID, lw=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=SOFT, which="both", labelsize=9.5, length=0)
    for side in panel.spines.values():
        side.set_color(GRID)
    for label in (panel.xaxis.label, panel.yaxis.label):
        label.set(color=SOFT, fontsize=10)


def _plain(value: float) -> str:
    """1, 10, 100, 1k, ..., 1M: easier to read than powers of ten."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:,.0f}{unit}"
    return f"{value:g}"


def _save(figure: Figure, path: str | Path, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.savefig(path, dpi=DPI)
