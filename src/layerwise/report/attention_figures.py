"""Figures of routed attention: trainings, routed positions, times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from layerwise.report.drawing import INK, SOFT, STYLES, decorate, draw_line, legend_handles, new_figure, save, styles


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
    figure = new_figure(max(8.2, 1.9 * len(groups) + 0.9), 4.3)  # room for the title
    panels = figure.subplots(2, len(groups), sharex="col", sharey="row", squeeze=False)
    for column, (title, those) in enumerate(groups.items()):
        accuracy, usage = panels[0][column], panels[1][column]
        for run, style in zip(those, styles(len(those) + 1)[1:], strict=True):
            quiet = (style[0], "", "-")
            for panel, name in ((accuracy, "accuracy"), (usage, "usage")):
                points = [(entry["step"], entry[name]) for entry in run["history"] if entry[name] > 0]
                draw_line(panel, points, f"seed {run['seed']}", quiet)
        longer = [(a["step"], b["length"]) for a, b in pairwise(those[0]["history"]) if b["length"] > a["length"]]
        for panel in (accuracy, usage):
            for step, _ in longer:
                panel.axvline(step, color=SOFT, lw=0.7, ls=":")
        decorate(accuracy, title)
        decorate(usage, None)
        accuracy.set_ylim(0, 1.04)
        usage.set_yscale("log")
        usage.set_xlabel("step")
        accuracy.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        usage.yaxis.set_major_formatter(lambda value, _: f"{value:.2%}" if value < 0.01 else f"{value:.0%}")
        usage.xaxis.get_major_locator().set_params(nbins=4)
    panels[0][0].set_ylabel("accuracy")
    panels[1][0].set_ylabel("slots that attend")
    figure.legend(*legend_handles([panels[0][0]]), loc="outside lower center", ncols=3, frameon=False, labelcolor=INK)
    save(figure, path, "Recall learnt, attention spared, lengths grown (dotted: longer sequences, first seed)")


def routing_figure(example: Mapping[str, Any], pairs: int, path: str | Path) -> None:
    """Draw which positions of one sequence attend, a row for each layer, above where pairs stand and questions are.

    Args:
        example: `input_ids`, `asked` (positions), `attends` (positions by layer), as a run's result holds it.
        pairs: how many pairs of key and value the sequence begins with.
        path: a .png, .svg or .pdf file; overwritten.
    """
    layers = len(example["attends"])
    figure = new_figure(8.2, 0.34 * layers + 1.5)
    panel = figure.subplots()
    for layer, positions in enumerate(example["attends"]):
        panel.scatter(positions, [layer + 1] * len(positions), marker="s", s=26, color=STYLES[1][0])
    panel.scatter(range(2 * pairs), [0] * (2 * pairs), marker="|", s=60, color=STYLES[3][0], label="pairs")
    panel.scatter(
        example["asked"], [0] * len(example["asked"]), marker="v", s=36, color=STYLES[2][0], label="questions"
    )
    decorate(panel, None)
    panel.set_xlim(-2, len(example["input_ids"]) + 1)
    panel.set_ylim(-0.6, layers + 0.6)
    panel.set_yticks(range(layers + 1), ["text", *(f"layer {layer}" for layer in range(layers))])
    panel.set_xlabel("position")
    figure.legend(*legend_handles([panel]), loc="outside lower right", ncols=2, frameon=False, labelcolor=INK)
    save(figure, path, "Who attends: squares are positions that pay for attention")


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
    figure = new_figure(8.2, 3.9)
    phases = list(dict.fromkeys(point["phase"] for point in points))
    panels = figure.subplots(1, len(phases), squeeze=False)[0]
    for panel, phase in zip(panels, phases, strict=True):
        those = [point for point in points if point["phase"] == phase]
        lines: dict[str, list[tuple[int, float]]] = {"full attention": []}
        for point in those:
            lines["full attention"].append((point["length"], 1e3 * point["full_seconds"]))
            name = f"{_share(point['asked_usage'])} attend"
            lines.setdefault(name, []).append((point["length"], 1e3 * point["seconds"]))
        for (label, line), style in zip(lines.items(), styles(len(lines)), strict=True):
            draw_line(panel, sorted(set(line)), label, style)
        decorate(panel, "a whole prompt" if phase == "forward" else "a decoded token")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sorted({point["length"] for point in those}))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(lambda value, _: "")
        panel.set_xlabel("tokens of text")
    panels[0].set_ylabel("milliseconds")
    figure.legend(*legend_handles(panels), loc="outside lower center", ncols=4, frameon=False, labelcolor=INK)
    save(figure, path, "One layer's time")


def routed_text_figure(result: Mapping[str, Any], path: str | Path) -> None:
    """Draw the perplexity of a pretrained model with routed layers against their usage, and the controls.

    Args:
        result: of `layerwise train routed-text`.
        path: a .png, .svg or .pdf file; overwritten.
    """
    figure = new_figure(6.4, 3.9)
    panel = figure.subplots()
    curve = [(one["usage"], one["perplexity"]) for one in result["curve"]]
    draw_line(panel, [(0.0, result["convolution_perplexity"]), *curve], "routed", STYLES[1])
    for (name, control), style in zip(result["controls"].items(), STYLES[2:], strict=False):
        label = {"random": "positions by chance", "static": "whole layers"}[name]
        draw_line(panel, [(control["usage"], control["perplexity"])], label, style)
    panel.axhline(result["base_perplexity"], color=STYLES[0][0], ls=STYLES[0][2], lw=1.2, label="the base")
    decorate(panel, None, counted=False)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    panel.set_xlabel(f"positions that attend, of {len(result['layers'])} layers")
    panel.set_ylabel("perplexity")
    panel.legend(frameon=False, labelcolor=INK)
    save(figure, path, "Attention where it is needed, in a pretrained model")


def _share(share: float) -> str:
    return f"{100 * share:g}%"
