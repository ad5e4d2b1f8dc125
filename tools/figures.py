"""Draw the figures of the docs from the JSON in results/; a figure whose result is not there is passed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layerwise.report.attention_figures import (
    recall_figure,
    routed_speed_figure,
    routed_text_figure,
    routing_figure,
)
from layerwise.report.exit_figures import acceptance_figure, exit_figure
from layerwise.report.route_figures import layer_use_figure, path_figure

ROOT = Path(__file__).resolve().parents[1]


def exits(result: dict[str, Any], path: Path) -> None:
    """`{"models": {label: result of layerwise eval --suite exits}}`, the untouched model first."""
    exit_figure(result["models"], path)


def ablation(result: dict[str, Any], path: Path) -> None:
    """`{"variants": {label: {"acceptance": {exit: share}, ...}}}`."""
    acceptance_figure({label: one["acceptance"] for label, one in result["variants"].items()}, path)


def heat(result: dict[str, Any], path: Path) -> None:
    """`{"runs": [...]}` of tools/layerroute_runs.py; the first with a thin head, as the adapter."""
    layer_use_figure(next(run for run in result["runs"] if run.get("head_rank")), path)


def recall(result: dict[str, Any], path: Path) -> None:
    """`{"runs": [...]}` of tools/routed_attention_runs.py."""
    recall_figure(result["runs"], path)


def routing(result: dict[str, Any], path: Path) -> None:
    """The same; the first run of several pairs, or of one."""
    runs = [run for run in result["runs"] if run["mode"] == "curriculum" and run["solved"]]
    run = next((run for run in runs if run["task"] == "mqar"), runs[0])
    routing_figure(run["example"], run["pairs"], path)


def routed_speed(result: dict[str, Any], path: Path) -> None:
    """What `layerwise bench routed-attention` writes."""
    routed_speed_figure(result["points"], path)


FIGURES: dict[str, tuple[str, Callable[[dict[str, Any], Path], None]]] = {
    "exits.png": ("layerskip_quality.json", exits),
    "ablation.png": ("layerskip_ablation.json", ablation),
    "layer_use.png": ("layerroute.json", heat),
    "paths.png": ("drllm.json", path_figure),
    "recall.png": ("routed_attention.json", recall),
    "routing.png": ("routed_attention.json", routing),
    "routed_text.png": ("routed_text.json", routed_text_figure),
    "routed_speed.png": ("routed_attention_speed.json", routed_speed),
}


def main(root: Path = ROOT) -> None:
    for name, (source, draw) in FIGURES.items():
        file = root / "results" / source
        if not file.is_file():
            print(f"no results/{source}: docs/{name} is left as it is")
            continue
        draw(json.loads(file.read_text(encoding="utf-8")), root / "docs" / name)
        print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
