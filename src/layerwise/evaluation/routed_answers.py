"""What a routed model answers, and in what time: the generating half of the suite `tools-vs-planning`.

A tool call is right if its calls are those of the reference answer, name for name and value for value; a word problem
if the number behind the last `####` is. Lengths and reasons to stop are reported too: a model that skips layers and
then talks for longer has saved nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from layerwise.benchmarks.timing import Stopwatch, rounds
from layerwise.cost import decode_cost
from layerwise.data import Example, Tokens
from layerwise.data.routing import side
from layerwise.evaluation.intervals import interval
from layerwise.hub import from_pretrained
from layerwise.plan import Plan
from layerwise.sources import fast_dtype
from layerwise.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerwise.model.causal_lm import LayerwiseForCausalLM


MOST_PROBLEMS = 8  # that are answered: a word problem takes as long as three tool calls


@dataclass(frozen=True)
class Asked:
    """A held-out example: `side` is its kind to this suite."""

    example: Example
    tokens: Tokens
    side: str


def called(text: str) -> Any:
    """The calls between the tags as JSON, or None."""
    start, end = text.find("<tool_call>"), text.rfind("</tool_call>")
    if start < 0 or end < 0:
        return None
    try:
        return json.loads(text[start + len("<tool_call>") : end])
    except ValueError:
        return None


def result(text: str) -> str | None:
    """What stands behind the last `####`, as GSM8K writes results; None if nothing does."""
    _, mark, behind = text.rpartition("####")
    return behind.strip().replace(",", "").split("\n")[0].strip() or None if mark else None


def right(example: Example, text: str) -> bool:
    """Whether an answer is right: the same calls, or the same result; a broken down question has no single answer."""
    if side(example.kind) == "tools":
        return called(text) is not None and called(text) == called(example.answer)
    return result(text) is not None and result(text) == result(example.answer)


def generate(
    model: LayerwiseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    new_tokens: int,
    plans: Sequence[str | Plan] | None = None,
) -> list[dict[str, Any]]:
    """Greedy answers one by one: `right`, `tokens`, and `stopped` (end or limit)."""
    answers = []
    for one in asked:
        ids = torch.tensor([one.tokens.input_ids[: one.tokens.prompt_length]], device=model.device)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, "do_sample": False}
        made = model.generate(ids, **options, plans=plans)[0, ids.shape[1] :]
        text = tokenizer.decode(made, skip_special_tokens=True)
        stopped = "limit" if len(made) == new_tokens else "end"
        answers.append({"right": right(one.example, text), "tokens": len(made), "stopped": stopped})
    return answers


def _summed(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    n = len(answers)
    return {
        "n": n,
        "right": sum(one["right"] for one in answers) / n,
        "tokens": sum(one["tokens"] for one in answers) / n,
        "ended": sum(one["stopped"] == "end" for one in answers) / n,
    }


def same_lora(adapter: str | Path, other: str | Path) -> bool:
    """Whether two adapters change the base model's weights alike."""
    from safetensors.torch import load_file

    weights, scales = [], []
    for folder in map(Path, (adapter, other)):
        if not (folder / "adapter_model.safetensors").is_file():
            return False
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        scales.append([config.get(name) for name in ("r", "lora_alpha", "use_rslora", "use_dora")])
        weights.append(load_file(folder / "adapter_model.safetensors"))
    ours, theirs = weights
    alike = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return alike and scales[0] == scales[1]


def answer_quality(
    depth: int,
    model: str | None,
    adapter: str | Path,
    reference: str | Path | None,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    count: int,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Answers of the routed model, of the same at full depth, and of the reference, by the fastest engine.

    `minus_reference` is how many more of the routed model's answers are right, as a share, with a 95% interval.
    """
    problems = min(max(1, count // 3), MOST_PROBLEMS)
    chosen = {
        "tools": ([one for one in asked if one.side == "tools"][:count], 160),
        "planning": ([one for one in asked if one.example.kind.startswith("gsm8k")][:problems], 200),
    }
    chosen = {name: those for name, those in chosen.items() if those[0]}
    found: dict[str, Any] = {name: {} for name in chosen}
    correct: dict[tuple[str, str], list[bool]] = {}
    contenders: list[tuple[str, str | Path, list[str] | None]] = [("routed", adapter, None)]
    if reference is None or not same_lora(adapter, reference):  # else the reference is what runs at full depth
        contenders.append(("full_depth", adapter, [str(Plan.full(depth))]))
    if reference is not None:
        contenders.append(("reference", reference, None))
    for contender, folder, plans in contenders:
        loaded = from_pretrained(model, adapter=folder, dtype=fast_dtype(device), device=device).eval()
        for name, (those, new_tokens) in chosen.items():
            answers = generate(loaded, tokenizer, those, new_tokens, plans)
            found[name][contender] = _summed(answers)
            correct[name, contender] = [one["right"] for one in answers]
    for name in chosen if reference is not None else ():
        pairs = zip(correct[name, "routed"], correct[name, "reference"], strict=True)
        differences = [float(ours) - float(theirs) for ours, theirs in pairs]
        found[name].setdefault("full_depth", found[name]["reference"])
        found[name]["routed"]["minus_reference"] = {
            "mean": sum(differences) / len(differences),
            "interval": interval(differences),
        }
    return found


def deciding_seconds(model: LayerwiseForCausalLM, ids: torch.Tensor) -> float:
    """The time that the model's policy takes to decide about a prompt (1, width), without running any layer.

    Timed on its own: as the difference of two prefills of 150 ms it would drown in their noise.
    """
    hidden = model.embed(ids)  # in place of the states that enter each layer: of their size, which is what matters
    route = model.policy.route([ids.shape[1]])
    began = perf_counter()
    for step in route.steps(hidden):
        route.observe(step, hidden)
    return perf_counter() - began


def timed(
    adapter: str | Path,
    model: str | None,
    asked: Sequence[Asked],
    prompts: int,
    new_tokens: int = 48,
    count: int = 5,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Decoding and prefill of tool calls, routed and at full depth, in turns; greedy, in `fast_dtype`, medians.

    `realised` is the share of decode time saved over the share of decode FLOPs skipped. `router_overhead` is the time
    of deciding over that of decoding `new_tokens` tokens.
    """
    dtype = fast_dtype(device)
    loaded = from_pretrained(model, adapter=adapter, dtype=dtype, device=device).eval()
    shape, full = loaded.runtime.backbone.shape, Plan.full(loaded.depth)
    loaded.prepare()
    steps: dict[str, float] = {"routed": 0.0, "full": 0.0}
    reads: dict[str, float] = {"routed": 0.0, "full": 0.0}
    deciding = 0.0
    flops = {"routed": 0, "full": 0}
    chosen = [one for one in asked if one.side == "tools"][:prompts]
    for one in chosen:
        ids = torch.tensor([one.tokens.input_ids[: one.tokens.prompt_length]], device=loaded.device)

        def run(plan: Plan | None, ids: torch.Tensor = ids) -> tuple[float, float, Plan]:
            watch, trace = Stopwatch(), Trace()
            loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),  # else the ends of turns inside, which are padding too, are hidden
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=loaded.config.vocab_size,  # no token: a step is timed, however early the answer ends
                streamer=watch,
                trace=trace,
                plans=None if plan is None else [plan],
            )
            return watch.step, watch.times[1] - watch.began, trace.targets[0]

        plan = run(None)[2]
        deciding += median(deciding_seconds(loaded, ids) for _ in range(4 * count))
        contenders = {"routed": lambda: run(None), "full": lambda: run(full)}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for _, name, (step, read, _) in rounds(contenders, count):
            taken[name].append((step, read))
        for name in reads:
            reads[name] += median(read for _, read in taken[name])
        for name in steps:
            steps[name] += median(step for step, _ in taken[name])
        for name, which in (("routed", plan), ("full", full)):
            flops[name] += decode_cost(shape, which, ids.shape[1], new_tokens).flops
    skipped = 1 - flops["routed"] / flops["full"]
    saved = 1 - steps["routed"] / steps["full"]
    return {
        "prompts": len(chosen),
        "flop_skip": 100 * skipped,
        "time_saved": 100 * saved,
        "realised": saved / skipped if skipped else None,
        "step_ms": {name: 1000 * value / len(chosen) for name, value in steps.items()},
        "prefill_ms": {name: 1000 * value / len(chosen) for name, value in reads.items()},
        "router_overhead": deciding / (new_tokens * steps["routed"]),
        "dtype": dtype,
        "engine": loaded.runtime.engine.name,
    }
