"""Figures out of results: exits, routes through the layers, routed attention.

Drawn for a README: light background, letters that stay readable when the picture is shown 800 pixels wide, few colours
(Okabe and Ito's, which differ for colour-blind readers too) and a marker for each, so that grey print will do.
A figure depends on nothing but the numbers; no window system is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
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


def layer_use_figure(result: Mapping[str, Any], path: str | Path) -> None:
    """Draw which layers prompts of each kind run: a heat map, layer by kind.

    Args:
        result: of the suite `tools-vs-planning`.
        path: as in `exit_figure`.
    """
    use = result["layer_use"]
    layers = len(next(iter(use.values())))
    figure = _figure(0.26 * layers + 2.2, 0.5 * len(use) + 1.3)
    panel = figure.subplots()
    image = panel.imshow(list(use.values()), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    labels = [f"{name}, {result['kinds'][name]['flop_skip']:.0f}% saved" for name in use]
    panel.set_yticks(range(len(use)), labels, color=INK, fontsize=9)
    panel.set_xticks(range(0, layers, 2), [str(layer) for layer in range(0, layers, 2)], color=SOFT, fontsize=8)
    panel.set_xlabel("layer", color=SOFT, fontsize=9)
    panel.set_xticks([layer - 0.5 for layer in range(1, layers)], minor=True)
    panel.set_yticks([row - 0.5 for row in range(1, len(use))], minor=True)
    panel.grid(which="minor", color="white", linewidth=1.5)
    panel.tick_params(which="both", length=0)
    panel.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=panel, pad=0.02, fraction=0.03, ticks=(0, 0.5, 1))
    bar.outline.set_visible(False)
    bar.ax.set_yticklabels(["0%", "50%", "100%"], color=SOFT, fontsize=8)
    _save(figure, path, "Share of prompts that run each layer")


def _path_points(result: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(label, share of the layers run, accuracy) of all layers, the router and the other controls."""
    tasks = result["in_domain"].values()
    routed = ("routed", 1 - result["layers_saved"], sum(one["routed"] for one in tasks) / len(tasks))
    labels = {"always_execute": "all layers", "static": "best single plan", "random": "random layers"}
    others = [
        (labels.get(name, name), 1 - one["layers_saved"], one["accuracy"]) for name, one in result["controls"].items()
    ]
    return [others[0], routed, *others[1:]]


def recall_figure(runs: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw accuracy and usage over training, a column of two panels for each task and distance, a line for each seed.

    Args:
        runs: of results/routed_attention.json; those by the curriculum are drawn.
        path: a .png, .svg or .pdf file; overwritten.

    Raises:
        ValueError: there is nothing to draw.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["mode"] == "curriculum":
            groups.setdefault(f"{run['task']} {run['distance']}", []).append(run)
    if not groups:
        raise ValueError("there is no run by the curriculum to draw: train one first")
    figure = _figure(1.9 * len(groups) + 0.9, 4.3)
    panels = figure.subplots(2, len(groups), sharex="col", sharey="row", squeeze=False)
    for column, (title, those) in enumerate(groups.items()):
        accuracy, usage = panels[0][column], panels[1][column]
        for run, style in zip(those, _styles(len(those) + 1)[1:], strict=True):
            quiet = (style[0], "", "-")
            for panel, name in ((accuracy, "accuracy"), (usage, "usage")):
                points = [(entry["step"], entry[name]) for entry in run["history"] if entry[name] > 0]
                _line(panel, points, f"seed {run['seed']}", quiet)
        longer = [(a["step"], b["length"]) for a, b in pairwise(those[0]["history"]) if b["length"] > a["length"]]
        for panel in (accuracy, usage):
            for step, _ in longer:
                panel.axvline(step, color=SOFT, lw=0.7, ls=":")
        _decorate(accuracy, title)
        _decorate(usage, None)
        accuracy.set_ylim(0, 1.04)
        usage.set_yscale("log")
        usage.set_xlabel("step")
        accuracy.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        usage.yaxis.set_major_formatter(lambda value, _: f"{value:.2%}" if value < 0.01 else f"{value:.0%}")
        usage.xaxis.get_major_locator().set_params(nbins=4)
    panels[0][0].set_ylabel("accuracy")
    panels[1][0].set_ylabel("slots that attend")
    figure.legend(*_handles([panels[0][0]]), loc="outside lower center", ncols=3, frameon=False, labelcolor=INK)
    _save(figure, path, "Recall learnt, attention spared, lengths grown (dotted: longer sequences, first seed)")


def routing_figure(example: Mapping[str, Any], pairs: int, path: str | Path) -> None:
    """Draw which positions of one sequence attend, a row for each layer, above where pairs stand and questions are.

    Args:
        example: `input_ids`, `asked` (positions), `attends` (positions by layer), as a run's result holds it.
        pairs: how many pairs of key and value the sequence begins with.
        path: a .png, .svg or .pdf file; overwritten.
    """
    layers = len(example["attends"])
    figure = _figure(8.2, 0.34 * layers + 1.5)
    panel = figure.subplots()
    for layer, positions in enumerate(example["attends"]):
        panel.scatter(positions, [layer + 1] * len(positions), marker="s", s=26, color=STYLES[1][0])
    panel.scatter(range(2 * pairs), [0] * (2 * pairs), marker="|", s=60, color=STYLES[3][0], label="pairs")
    panel.scatter(
        example["asked"], [0] * len(example["asked"]), marker="v", s=36, color=STYLES[2][0], label="questions"
    )
    _decorate(panel, None)
    panel.set_xlim(-2, len(example["input_ids"]) + 1)
    panel.set_ylim(-0.6, layers + 0.6)
    panel.set_yticks(range(layers + 1), ["text", *(f"layer {layer}" for layer in range(layers))])
    panel.set_xlabel("position")
    figure.legend(*_handles([panel]), loc="outside lower right", ncols=2, frameon=False, labelcolor=INK)
    _save(figure, path, "Who attends: squares are positions that pay for attention")


def routed_speed_figure(points: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw time against length, a panel for prompts and one for decoding: full attention, and some usages.

    Args:
        points: of `layerwise bench routed-attention`.
        path: a .png, .svg or .pdf file; overwritten.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not points:
        raise ValueError("there are no points to draw: run 'layerwise bench routed-attention' first")
    figure = _figure(8.2, 3.9)
    phases = list(dict.fromkeys(point["phase"] for point in points))
    panels = figure.subplots(1, len(phases), squeeze=False)[0]
    for panel, phase in zip(panels, phases, strict=True):
        those = [point for point in points if point["phase"] == phase]
        lines: dict[str, list[tuple[int, float]]] = {"full attention": []}
        for point in those:
            lines["full attention"].append((point["length"], 1e3 * point["full_seconds"]))
            name = f"{_share(point['asked_usage'])} attend"
            lines.setdefault(name, []).append((point["length"], 1e3 * point["seconds"]))
        for (label, line), style in zip(lines.items(), _styles(len(lines)), strict=True):
            _line(panel, sorted(set(line)), label, style)
        _decorate(panel, "a whole prompt" if phase == "forward" else "a decoded token")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sorted({point["length"] for point in those}))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(lambda value, _: "")
        panel.set_xlabel("tokens of text")
    panels[0].set_ylabel("milliseconds")
    figure.legend(*_handles(panels), loc="outside lower center", ncols=4, frameon=False, labelcolor=INK)
    _save(figure, path, "One layer's time")


def _share(share: float) -> str:
    return f"{100 * share:g}%"


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
