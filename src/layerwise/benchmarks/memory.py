"""How much memory decoding holds, layerwise beside transformers.

Each runs in a process of its own: load the model in bfloat16, read a prompt of 2,000 tokens, decode some more. The
peak is reset after loading, so that the figure is what prefill and decoding hold: one copy of the weights, the
cache, and the activations of the prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

CONTEXT = 2000


def bench_memory(name: str | None = None, engine: str = "auto", context: int = CONTEXT) -> dict[str, Any]:
    """Measure both in subprocesses; returns mebibytes, `layerwise` and `transformers` side by side."""
    return {
        "context": context,
        **{who: _measure_apart(who, name, engine, context) for who in ("layerwise", "transformers")},
    }


def _measure_apart(who: str, name: str | None, engine: str, context: int) -> dict[str, float]:
    words = [sys.executable, "-m", "layerwise.benchmarks.memory", who, "--engine", engine, "--context", str(context)]
    done = subprocess.run(words + (["--model", name] if name else []), capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the memory measurement of {who} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(who: str, name: str | None, engine: str, context: int) -> dict[str, float]:
    """Load, prefill `context` tokens and decode 32 more in this process."""
    import torch

    from layerwise.model.causal_lm import attach
    from layerwise.sources import load_base

    before = resident()
    model = load_base(name, "bfloat16")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if who == "layerwise":
        model = attach(model, engine=engine)
        # Kernels are made ahead of time and checked on first use; that is not decoding.
        model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    reset_peak()
    prompt = torch.arange(context)[None] % 1000 + 100
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=32,
        min_new_tokens=32,
        do_sample=False,
        return_dict_in_generate=True,
    )
    cache = output.past_key_values
    layers = cache.slots.values() if who == "layerwise" else cache.layers
    mebi = 2**20
    return {
        "peak_mib": peak() / mebi,
        "resident_mib": resident() / mebi,
        "before_load_mib": before / mebi,
        "weights_mib": weights / mebi,
        "cache_mib": sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) / mebi,
    }


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return None


def resident() -> int:
    return _status("VmRSS:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak() -> int:
    return _status("VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    with contextlib.suppress(OSError):  # not Linux: the peak then includes loading, for both contenders
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=("layerwise", "transformers"))
    parser.add_argument("--model")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--context", type=int, default=CONTEXT)
    given = parser.parse_args()
    print(json.dumps(measure(given.who, given.model, given.engine, given.context)))
