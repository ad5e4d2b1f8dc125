"""What all figures share.

Drawn for a README: light background, letters that stay readable when the picture is shown 800 pixels wide, few colours
(Okabe and Ito's, which differ for colour-blind readers too) and a marker for each, so that grey print will do.
A figure depends on nothing but the numbers; no window system is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
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
DPI = 160


def new_figure(width: float, height: float) -> Figure:
    """An empty figure (inches) that belongs to no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def styles(count: int) -> list[tuple[str, str, str]]:
    return [STYLES[number % len(STYLES)] for number in range(count)]


def draw_line(panel: Axes, points: Sequence[tuple[int, float]], label: str, style: tuple[str, str, str]) -> None:
    color, marker, line = style
    exits, values = [exit for exit, _ in points], [value for _, value in points]
    panel.plot(exits, values, color=color, marker=marker, linestyle=line, label=label, lw=1.6, ms=4.2)


def legend_handles(panels: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Legend entries of all panels, each label once."""
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def decorate(panel: Axes, title: str | None, counted: bool = True) -> None:
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


def plain(value: float) -> str:
    """1, 10, 100, 1k, ..., 1M: easier to read than powers of ten."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:,.0f}{unit}"
    return f"{value:g}"


def save(figure: Figure, path: str | Path, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.savefig(path, dpi=DPI)
