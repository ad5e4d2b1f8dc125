"""Figures of routes through the layers: who skips what, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.report.drawing import INK, SOFT, STYLES, decorate, new_figure, save, styles


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
    figure = new_figure(9.2, 3.7)
    left, right = figure.subplots(1, 2)
    layers = range(len(result["routes"]["skipped"]))
    for name, style, sign in (("repeated", STYLES[1], 1), ("skipped", STYLES[2], -1)):
        heights = [sign * share for share in result["routes"][name]]
        left.bar(layers, heights, color=style[0], width=0.75, label=name)
    left.axhline(0, color=SOFT, lw=0.8)
    decorate(left, "What becomes of each layer")
    left.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0%}")
    left.set_xlabel("layer")
    left.set_ylabel("share of the questions")
    left.legend(frameon=False, labelcolor=INK, fontsize=9)
    for (label, layers_run, accuracy), style in zip(who := _path_points(result), styles(len(who)), strict=True):
        right.plot([layers_run], [accuracy], color=style[0], marker=style[1], linestyle="", ms=7, label=label)
    oracle = result.get("oracle", {}).get("menu")
    if oracle:
        right.axhline(oracle["accuracy"], color=SOFT, lw=1, linestyle=":", label="menu's oracle")
    decorate(right, "Accuracy, mean over tasks", counted=False)
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    right.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    right.set_xlabel("layers run")
    right.legend(frameon=False, labelcolor=INK, fontsize=9)
    save(figure, path, "Paths through the layers, chosen by the prompt")


def layer_use_figure(result: Mapping[str, Any], path: str | Path) -> None:
    """Draw which layers prompts of each kind run, and how much of the LM head: a heat map, layer by kind.

    Args:
        result: of the suite `tools-vs-planning`.
        path: as in `exit_figure`.
    """
    use, head = result["layer_use"], result.get("head_use", {})
    layers = len(next(iter(use.values())))
    rows = [[*shares, head[name]] if head else shares for name, shares in use.items()]
    figure = new_figure(0.26 * layers + 2.2, 0.5 * len(use) + 1.3)
    panel = figure.subplots()
    image = panel.imshow(rows, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    labels = [f"{name}, {result['kinds'][name]['flop_skip']:.0f}% saved" for name in use]
    panel.set_yticks(range(len(use)), labels, color=INK, fontsize=9)
    places = [*range(0, layers, 2), *([layers] if head else [])]
    names = [str(place) if place < layers else "LM head" for place in places]
    panel.set_xticks(places, names, color=SOFT, fontsize=8)
    panel.set_xlabel("layer", color=SOFT, fontsize=9)
    panel.set_xticks([place - 0.5 for place in range(1, len(rows[0]))], minor=True)
    panel.set_yticks([row - 0.5 for row in range(1, len(use))], minor=True)
    panel.grid(which="minor", color="white", linewidth=1.5)
    panel.tick_params(which="both", length=0)
    panel.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=panel, pad=0.02, fraction=0.03, ticks=(0, 0.5, 1))
    bar.outline.set_visible(False)
    bar.ax.set_yticklabels(["0%", "50%", "100%"], color=SOFT, fontsize=8)
    save(figure, path, "Share of each layer that prompts run, by weights")


def _path_points(result: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(label, share of the layers run, accuracy) of all layers, the router and the other controls."""
    tasks = result["in_domain"].values()
    routed = ("routed", 1 - result["layers_saved"], sum(one["routed"] for one in tasks) / len(tasks))
    labels = {"always_execute": "all layers", "static": "best single plan", "random": "random layers"}
    others = [
        (labels.get(name, name), 1 - one["layers_saved"], one["accuracy"]) for name, one in result["controls"].items()
    ]
    return [others[0], routed, *others[1:]]
