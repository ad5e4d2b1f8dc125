"""Make results/routed_attention.json: python tools/routed_attention_runs.py [--only recall-126-curriculum-0 ...].

Every run is a training of a few minutes on one core, in the order of `RUNS`. A run that is in the file already is
passed over; one that was stopped (Ctrl-C, a crash) goes on from its last checkpoint. `--list` shows what is left.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "results" / "routed_attention.json"
WORK = Path("build/routed-attention")
SEEDS = (0, 1, 2)
# Of what is never solved. One pair is learnt in 200 steps of the curriculum; several pairs take up to 1,375 in all.
BASELINE_STEPS = {"recall": 1000, "mqar": 1500}


@dataclass(frozen=True)
class Run:
    """One training; mqar's distance is the length of its sequences, with a pair for each 32 of it."""

    task: str
    distance: int
    mode: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.distance}-{self.mode}-{self.seed}"

    def options(self) -> dict[str, Any]:
        """What `RoutedAttentionConfig` is given."""
        given: dict[str, Any] = {"task": self.task, "distance": self.distance, "mode": self.mode, "seed": self.seed}
        if self.task == "mqar":
            given["pairs"] = self.distance // 32
        if self.mode in ("joint", "convolution") or (self.task, self.mode) == ("mqar", "attention"):
            # Never solved: they end with their steps.
            given["steps"] = BASELINE_STEPS[self.task]
        return given


def planned() -> list[Run]:
    """All runs: the curriculum first, then what it is compared with."""
    tasks = [("recall", distance) for distance in (126, 254, 510, 1022, 2046)] + [("mqar", 256), ("mqar", 512)]
    runs = [Run(*task, "curriculum", seed) for task in tasks for seed in SEEDS]
    return runs + [Run(*task, mode, seed) for mode in ("attention", "convolution", "joint") for task in tasks
                   for seed in SEEDS]  # fmt: skip


def kept() -> list[dict[str, Any]]:
    return json.loads(RESULT.read_text(encoding="utf-8"))["runs"] if RESULT.is_file() else []


def add(result: dict[str, Any]) -> None:
    """Put a run into the file, in place of an earlier one, without what its command says already."""
    run = {name: value for name, value in result.items() if name != "config"}
    run["history"] = [
        {name: entry[name] for name in ("step", "length", "phase", "accuracy", "usage")} for entry in result["history"]
    ]
    if run["mode"] != "curriculum":  # where attention is everywhere, or nowhere, there is nothing to see
        run.pop("example", None)
    run["pairs"] = result["config"]["pairs"] if result["task"] == "mqar" else 1
    # Wherever it was trained, it is repeated in the usual folder.
    run["command"] = re.sub(r"--out \S+/", f"--out {WORK}/", run["command"])
    order = [one.name for one in planned()]
    named = {Run(one["task"], one["distance"], one["mode"], one["seed"]).name: one for one in (*kept(), run)}
    runs = [named[name] for name in sorted(named, key=order.index)]
    unfinished = RESULT.with_suffix(".part")
    unfinished.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(RESULT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="runs whose names begin with one of these")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for checkpoints")
    parser.add_argument("--list", action="store_true", help="only say which runs are left")
    given = parser.parse_args()
    there = {Run(one["task"], one["distance"], one["mode"], one["seed"]) for one in kept()}
    left = [run for run in planned() if run not in there and run.name.startswith(tuple(given.only))]
    if given.list:
        print("\n".join(run.name for run in left))
        return 0

    from layerwise.training.curriculum import RoutedAttentionConfig
    from layerwise.training.routed_attention import CHECKPOINT, train

    for number, run in enumerate(left):
        print(f"run {number + 1} of {len(left)}: {run.name}", flush=True)
        folder = given.work / run.name
        config = RoutedAttentionConfig(out=str(folder), **run.options())
        try:
            add(train(config, lambda line: print(line, flush=True), resume=(folder / CHECKPOINT).exists()))
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
