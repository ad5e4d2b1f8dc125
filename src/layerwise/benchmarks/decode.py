"""Batch-1 greedy decoding against transformers' own `generate`.

The same weights, prompts and machine; only who runs the layers differs. Five contenders take turns: layerwise and
transformers in bfloat16 and in float32, and layerwise with half of the layers. From the times come:

    ratio_vs_hf_same_dtype  time of a whole call: transformers / layerwise, both bfloat16
    ratio_vs_hf_best        the same against transformers' faster dtype
    roofline_fraction       time to read the weights once at the measured bandwidth / time of a step
    half_depth_realised     speed-up of the half plan / its ideal, the ratio of the bytes read, LM head included
    identical               float32 tokens equal transformers', on every prompt
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from layerwise.benchmarks.environment import environment
from layerwise.benchmarks.timing import Bandwidth, Stopwatch, rounds
from layerwise.cost import decode_cost, ideal_speedup
from layerwise.decoding.text import encode
from layerwise.model.causal_lm import EngineName, attach
from layerwise.plan import Plan
from layerwise.sources import load_base, load_tokenizer

PROMPTS = (
    "Write a plan for a three day trip to Rome.",
    "Describe the water cycle in detail, with examples.",
    "List the steps to bake a loaf of bread, with times.",
)


def half_plan(layers: int) -> Plan:
    """Half of the layers: the first third, then the end. For timing only: nobody trained it to answer well."""
    keep = layers // 2
    front = keep * 2 // 3
    return Plan.of([*range(front), *range(layers - (keep - front), layers)])


def bench_decode(
    name: str | None = None,
    engine: EngineName = "auto",
    new_tokens: int = 128,
    count: int = 5,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the comparison for `count` rounds; returns the fields above, times and speeds, and the environment."""
    tokenizer = load_tokenizer(name)
    models = {dtype: load_base(name, dtype) for dtype in ("bfloat16", "float32")}
    ours = {dtype: attach(model, engine=engine, notify=notify) for dtype, model in models.items()}
    prompts = [encode(tokenizer, prompt)["input_ids"] for prompt in PROMPTS]
    depth = ours["bfloat16"].depth
    half = half_plan(depth)

    def contender(model: PreTrainedModel, plan: Plan | None = None) -> Callable[[], Stopwatch]:
        return lambda: _timed(model, prompts[0], new_tokens, plan)

    contenders = {
        "layerwise bfloat16": contender(ours["bfloat16"]),
        "transformers bfloat16": contender(models["bfloat16"]),
        "layerwise float32": contender(ours["float32"]),
        "transformers float32": contender(models["float32"]),
        "layerwise half depth": contender(ours["bfloat16"], half),
    }
    notify("warming up, and comparing float32 tokens with transformers'")
    identical = [
        torch.equal(_greedy(ours["float32"], prompt, new_tokens), _greedy(models["float32"], prompt, new_tokens))
        for prompt in prompts
    ]
    for run in contenders.values():
        run()

    bandwidth = Bandwidth()
    speeds: list[float] = []
    watches: dict[str, list[Stopwatch]] = {key: [] for key in contenders}
    for number, key, result in rounds(contenders, count):
        if key == "layerwise bfloat16":
            notify(f"round {number + 1} of {count}")
            speeds.append(bandwidth())
        watches[key].append(result)
    total = {key: median(watch.total for watch in taken) for key, taken in watches.items()}
    step = {key: median(watch.step for watch in taken) for key, taken in watches.items()}

    context = prompts[0].shape[1] + new_tokens // 2
    shape = ours["bfloat16"].runtime.backbone.shape
    weight_bytes = decode_cost(shape, Plan.full(depth), context).weight_bytes
    ideal = ideal_speedup(shape, half, context)
    mine = total["layerwise bfloat16"]
    return {
        "benchmark": "decode",
        "ratio_vs_hf_same_dtype": total["transformers bfloat16"] / mine,
        "ratio_vs_hf_best": min(total["transformers bfloat16"], total["transformers float32"]) / mine,
        "ratio_vs_hf_float32": total["transformers float32"] / total["layerwise float32"],
        "roofline_fraction": weight_bytes / median(speeds) / step["layerwise bfloat16"],
        "half_depth_realised": step["layerwise bfloat16"] / step["layerwise half depth"] / ideal,
        "half_depth_speedup": step["layerwise bfloat16"] / step["layerwise half depth"],
        "half_depth_ideal": ideal,
        "half_depth_plan": str(half),
        "identical": all(identical),
        "prompts_compared": len(identical),
        "tokens_per_second": {key: new_tokens / seconds for key, seconds in total.items()},
        "step_milliseconds": {key: 1e3 * seconds for key, seconds in step.items()},
        "bandwidth_gb_per_second": median(speeds) / 1e9,
        "weight_megabytes": weight_bytes / 1e6,
        "new_tokens": new_tokens,
        "rounds": count,
        "engine": ours["bfloat16"].runtime.engine.name,
        "compile_seconds": sum(getattr(model.runtime.engine, "compile_seconds", 0.0) for model in ours.values()),
        "model": models["bfloat16"].config.name_or_path,
        "environment": environment(),
    }


def _greedy(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    new_tokens: int,
    plan: Plan | None = None,
    streamer: Stopwatch | None = None,
) -> torch.Tensor:
    options: dict[str, Any] = {"plans": [plan]} if plan is not None else {}
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=streamer,
        **options,
    )


def _timed(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, plan: Plan | None) -> Stopwatch:
    """One greedy call of exactly `new_tokens` tokens; the prompt is such that the answer does not end before."""
    watch = Stopwatch()
    made = _greedy(model, prompt, new_tokens, plan, watch).shape[1] - prompt.shape[1]
    if made != new_tokens:
        raise ValueError(f"an answer ended after {made} of {new_tokens} tokens, so times do not compare: ask for fewer")
    return watch
