"""Make results/layerroute.json again: python tools/layerroute_runs.py [--work FOLDER] [--seeds 0,1] [--recipes ...].

Trains an adapter for each recipe and seed on the mix `routing` (up to 40 minutes each on two cores), then judges it
by `layerwise eval --suite tools-vs-planning`, beside the same LoRA trained without routing, of seed 0. What is
in the work folder already is not made again, and a stopped training goes on where it was. Run it twice at once with
other seeds, one thread each, to use two cores well: each run only adds to the results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

from layerwise.benchmarks.environment import environment
from layerwise.cli import options
from layerwise.data import load, write_jsonl
from layerwise.evaluation.routed_answers import answer_quality, timed
from layerwise.evaluation.routing import held_out, routing_suite
from layerwise.sources import load_tokenizer
from layerwise.training import layerroute
from layerwise.training.recipes import LayerRouteConfig
from layerwise.training.runs import RECORD, last_checkpoint

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "layerroute.json"
PROCESSES = 12  # that decoding is timed in
MOST_TOKENS = 384  # of a held-out example, as in training
BUDGET: dict[str, Any] = {  # the same for every objective
    "steps": 480,
    "tokens_per_batch": 1024,
    "gradient_accumulation": 1,
    "warmup": 5,
    "rank": 16,
    "max_length": MOST_TOKENS,
    "save_every": 25,
}
FREE = "4-7 14 17 25"  # by greedy search those that the inputs which bear it best miss least; others always run
KEPT = "0-3 8-13 15-16 18-24 26-29"
BY_FITS: dict[str, Any] = {
    "objective": "quality",
    "tolerance": 0.08,
    "hold": 0.15,
    "hold_full": 0.5,
    "fits": 2,
    "start_bias": 0.2,
    "learning_rate": 1e-3,
    "lora_dropout": 0.0,
}
RECIPES: dict[str, dict[str, Any]] = {
    "quality": BY_FITS | {"start_closed": FREE, "keep": KEPT},
    "bridges": BY_FITS | {"start_closed": "4-7 17 25 27", "keep": "0-3 8-16 18-24 26 28-29", "bridge_rank": 64},
    "mlps": BY_FITS
    | {"start_closed": "1 3-5 7 9 12-15", "keep": "0 2 6 8 10-11 16-29", "leave": "attention", "bridge_rank": 192}
    | {"hold": 1.0, "hold_full": 1.0},
    "neurons": BY_FITS
    | {
        "leave": "neurons",
        "neurons": 0.29,
        "keep": "0-3",
        "mend_rank": 96,
        "hold": 1.0,
        "hold_full": 1.0,
        "adapter": "none",
    },
    "head": BY_FITS
    | {
        "leave": "neurons",
        "neurons": 0.04,
        "margin": 2.0,
        "keep": "0-3",
        "mend_rank": 96,
        "head_rank": 128,
        "tolerance": 0.02,
        "hold": 1.0,
        "hold_full": 1.0,
        "adapter": "none",
    },
    "none": {"objective": "none", "learning_rate": 1e-3, "lora_dropout": 0.0},
    "paper": {"objective": "paper", "penalty": 1.0, "learning_rate": 2e-4},  # all as published, but for the steps
}


def configured(name: str, seed: int, work: Path, data: Path) -> LayerRouteConfig:
    chosen = BUDGET | RECIPES[name]
    if "adapter" in chosen:
        chosen |= {"adapter": str(work / f"{chosen['adapter']}-{seed}")}
    return LayerRouteConfig(data=str(data), out=str(work / f"{name}-{seed}"), seed=seed, **chosen)


def referred(name: str, seed: int) -> int:
    """The seed of the LoRA without routing that a run is compared with: what it routes itself, if it is that."""
    return seed if "adapter" in RECIPES[name] else 0


def trained(name: str, seed: int, work: Path, data: Path) -> Path:
    """The adapter's folder; trained if it is not there.

    Raises:
        ValueError: the folder holds one of another recipe.
    """
    if "adapter" in RECIPES[name]:
        trained(RECIPES[name]["adapter"], seed, work, data)
    config = configured(name, seed, work, data)
    out = Path(config.out)
    if (out / "layerwise.json").is_file():
        config.check_resumable(json.loads((out / RECORD).read_text(encoding="utf-8"))["config"])
    else:
        begun = last_checkpoint(out / "checkpoints") is not None
        layerroute.train(config, options.note, resume=begun)
    return out


def kept(run: dict[str, Any], work: Path) -> dict[str, Any]:
    """A run's entry, written to the work folder: whole or not at all."""
    file = work / f"{run['adapter']}.json"
    file.with_suffix(".tmp").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    os.replace(file.with_suffix(".tmp"), file)
    return run


def judged(name: str, seed: int, work: Path, data: Path, samples: int) -> dict[str, Any]:
    """The run's entry in the results; measured if the work folder has none.

    Raises:
        ValueError: the folder holds one of another recipe or number of samples.
    """
    file = work / f"{name}-{seed}.json"
    if not file.is_file():
        adapter = trained(name, seed, work, data)
        reference = trained("none", referred(name, seed), work, data)
        command = f"python tools/layerroute_runs.py --recipes {name} --seeds {seed} --samples {samples}"
        kept(routing_suite(adapter, None, reference, samples, command=command, notify=options.note), work)
    entry = json.loads(file.read_text(encoding="utf-8"))
    if entry["samples"] != samples:
        raise ValueError(f"'{file}' is of {entry['samples']} samples, not {samples}: delete it, or give another --work")
    record = work / f"{name}-{seed}" / RECORD
    if record.is_file():
        saved = json.loads(record.read_text(encoding="utf-8"))["config"]
        configured(name, seed, work, data).check_resumable(saved)
    return entry


def answered(run: dict[str, Any], work: Path, answers: int) -> dict[str, Any]:
    """A run's entry with what its answers are worth."""
    tokenizer, adapter, reference = load_tokenizer(), work / run["adapter"], work / run["reference"]
    asked = held_out(tokenizer, max(run["samples"], answers), MOST_TOKENS, run["sample_seed"])
    options.note(f"{run['adapter']}: answers")
    layers = len(run["layer_use"]["tools"])
    return kept(run | {"generated": answer_quality(layers, None, adapter, reference, tokenizer, asked, answers)}, work)


def clocked(runs: Sequence[dict[str, Any]], work: Path, prompts: int) -> list[dict[str, Any]]:
    """Entries of runs with times, by the median of PROCESSES and of those that the entry has already; for a machine on
    which nothing else runs.

    Where a process finds its memory moves all its times, however many prompts it answers; and machines have better and
    worse minutes. So there are several processes for each run, and runs take turns.
    """
    tokenizer, times = load_tokenizer(), [[] for _ in runs]
    asked = [held_out(tokenizer, run["samples"], MOST_TOKENS, run["sample_seed"]) for run in runs]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as one_by_one:
        for turn in range(1, PROCESSES + 1):
            for run, those, found in zip(runs, asked, times, strict=True):
                options.note(f"{run['adapter']}: times, process {turn} of {PROCESSES}")
                found.append(one_by_one.submit(timed, work / run["adapter"], None, those, prompts).result())
    return [kept(_with_times(run, found), work) for run, found in zip(runs, times, strict=True)]


def _with_times(run: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """An entry with the times of these processes added; what is no share of the FLOPs is of the middle one of them."""
    middle = sorted(found, key=itemgetter("realised"))[len(found) // 2]
    processes = sorted([*(run.get("time") or {}).get("processes", []), *map(itemgetter("realised"), found)])
    realised = median(processes)
    shares = {"processes": processes, "realised": realised, "time_saved": realised * middle["flop_skip"]}
    return run | {"time": middle | shares | {"environment": environment()}, "time_realised": realised}


def recipe(run: dict[str, Any]) -> tuple[Any, ...]:
    """What a run is of: a run in the results is replaced by one of the same."""
    return (
        run["objective"],
        run["seed"],
        run.get("bridge_rank") or 0,
        run.get("leave") or "nothing",
        run.get("head_rank") or 0,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Make results/layerroute.json again.")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "layerroute", help="folder for adapters")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="seeds, separated by commas")
    parser.add_argument("--recipes", default="head,neurons,quality,bridges,paper", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--samples", type=int, default=60, help="held-out examples of each kind")
    parser.add_argument("--answers", type=int, default=0, help="also answer so many tool calls")
    parser.add_argument("--timed", type=int, default=0, help="also time decoding, on so many prompts a process")
    chosen = parser.parse_args()
    options.quiet()
    chosen.work.mkdir(parents=True, exist_ok=True)
    data = chosen.work / "routing.jsonl"
    if not data.is_file():
        write_jsonl(data, load("routing", "train"))
    asked = [(name, seed) for name in chosen.recipes.split(",") for seed in map(int, chosen.seeds.split(","))]
    for name, seed in asked:
        if name == "none":
            trained(name, seed, chosen.work, data)
        else:
            judged(name, seed, chosen.work, data, chosen.samples)
    names = [f"{name}-{seed}" for name, seed in asked if name != "none"]
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(chosen.work.glob("*-*.json"))]
    for at, run in enumerate(runs):
        if run["adapter"] in names and chosen.answers and not run.get("generated"):
            runs[at] = run = answered(run, chosen.work, chosen.answers)
    if chosen.timed:
        asked_for = [run for run in runs if run["adapter"] in names]
        runs = [run for run in runs if run not in asked_for] + clocked(asked_for, chosen.work, chosen.timed)
    if runs:
        before = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"] if RESULTS.is_file() else []
        runs = sorted(runs + [run for run in before if recipe(run) not in map(recipe, runs)], key=recipe)
        RESULTS.write_text(json.dumps({"runs": runs}, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
