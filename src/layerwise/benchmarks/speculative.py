"""Speculative decoding against plain decoding, on held-out prompts of a task.

The same float32 weights answer the same prompts greedily, one prompt after another, and on each prompt the contenders
take turns: layerwise plain and with drafts, transformers' `generate`, its own self-speculation
(`assistant_early_exit`), and, where it is installed, the prompt lookup of the library economize; the latter two at the
best of a few settings. What is timed is decoding, from the first token to the last; whole calls, prompt included, are
reported beside it.

    identical                  every prompt's tokens equal plain decoding's, for every draft and for a batch of 8
    speedup                    decoding time, plain / with the draft
    speedup_vs_hf              the same, transformers' generate / with the draft
    speedup_vs_hf_early_exit   the same, transformers' self-speculation / with the draft
    speedup_vs_economize       the same, economize / with the draft; left out where it is not installed
    acceptance                 share of drafted tokens that stood
    auto_vs_best_static        speed of `auto` / speed of the best fixed draft of a sweep, where one was asked for
    hopeless                   speed of `auto` / speed of plain decoding where drafts fail: sampling at temperature 1.5,
                               median over pairs of answers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from layerwise.benchmarks.contenders import Run, other_libraries, timed
from layerwise.benchmarks.environment import environment
from layerwise.benchmarks.timing import Stopwatch, rounds
from layerwise.data import load, prompt_ids
from layerwise.hub import base_name, from_pretrained
from layerwise.model.causal_lm import EngineName, LayerwiseForCausalLM
from layerwise.sources import load_tokenizer
from layerwise.trace import Source, Trace

STATIC = ("ngram,4", "corpus,4", "ngram+corpus,4", "tree,5", "ngram+head,4", "head,4")
MOST_PROMPT = 400  # tokens; longer prompts of the test split are left out
ROWS = 8
PAIRS = 6  # of answers to each prompt at least, where drafts fail
OTHERS = {
    "speedup_vs_hf": "transformers",
    "speedup_vs_hf_early_exit": "transformers early exit",
    "speedup_vs_economize": "economize",
}
_Runs = dict[str, list[list[Run]]]  # by contender, prompt and round


def bench_speculative(
    task: str,
    model: str | None = None,
    adapter: str | Path | None = None,
    draft: str = "auto",
    prompts: int = 8,
    new_tokens: int = 96,
    count: int = 3,
    sweep: bool = False,
    peers: bool = True,
    engine: EngineName = "auto",
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the comparison; returns the fields above, times per prompt, and the environment.

    Args:
        prompts: how many of the task's held-out prompts, the same ones every time; a batch has 8 of them in any case.
        count: rounds of the contenders that are layerwise; transformers runs in the first one.
        sweep: also measure fixed drafts, and where drafts fail.
        peers: also measure transformers.
    """
    tokenizer = load_tokenizer(base_name(model, adapter))
    drawn = held_out(task, tokenizer, max(prompts, ROWS))
    texts = drawn[:prompts]
    ours = from_pretrained(model, adapter=adapter, dtype="float32", engine=engine, notify=notify)
    ours.prepare(None, ours.read_draft("auto"), few=True)
    drafts = [draft] + [one for one in static_drafts(ours) if sweep and one != draft]
    result: dict[str, Any] = {"benchmark": "speculative", "task": task, "draft": draft}
    theirs = ours.runtime.backbone.model
    others = other_libraries(theirs, texts[0], min(new_tokens, 32)) if peers else {}
    runs: _Runs = {}
    _warm_up(ours, drafts, texts[0])
    for number, ids in enumerate(texts):
        contenders: dict[str, Callable[[], Run]] = {"plain": lambda ids=ids: timed(ours, ids, new_tokens, "off")}
        for one in drafts:
            contenders[one] = lambda ids=ids, one=one: timed(ours, ids, new_tokens, one)
        found: dict[str, list[Run]] = {name: [] for name in contenders}
        for name, (call, _) in others.items():
            found[name] = [call(ids, new_tokens)]
        for _, name, run in rounds(contenders, count):
            found[name].append(run)
        for name, those in found.items():
            runs.setdefault(name, []).append(those)
        notify(f"{task}: prompt {number + 1} of {len(texts)}")
    result |= _compared(runs, draft)
    if peers:
        result["settings"] = {name: setting for name, (_, setting) in others.items()}
    if sweep:
        static = {name: result["speedups"][name] for name in drafts if name != draft}
        best = max(static, key=static.__getitem__)
        result |= {"best_static": best, "best_static_speedup": static[best]}
        result["auto_vs_best_static"] = result["speedup"] / static[best]
        result["hopeless"] = hopeless(ours, texts, new_tokens, count)
    result["batch"] = _batch(ours, drawn, new_tokens, draft, count)
    result["identical"] = result["identical"] and result["batch"]["identical"]
    result |= {
        "prompts": len(texts),
        "new_tokens": new_tokens,
        "rounds": count,
        "adapter": None if adapter is None else Path(adapter).name,
        "model": theirs.config.name_or_path,
        "engine": ours.runtime.engine.name,
        "dtype": "float32",
        "environment": environment(),
    }
    return result


def held_out(task: str, tokenizer: Any, count: int) -> list[torch.Tensor]:
    """Prompts (1, width) of the task's test split, no two with the same key."""
    seen: dict[str, torch.Tensor] = {}
    for example in load(task, "test"):
        ids = prompt_ids(example, tokenizer)
        if len(ids) <= MOST_PROMPT and example.key not in seen:
            seen[example.key] = torch.tensor([ids])
        if len(seen) == count:
            break
    return list(seen.values())


def static_drafts(model: LayerwiseForCausalLM) -> list[str]:
    """The fixed drafts of a sweep: those of STATIC that the model has, and its trained exits."""
    missing = [name for name, part in (("head", model.exit_head), ("corpus", model.ngrams)) if part is None]
    fixed = [one for one in STATIC if not any(name in one for name in missing)]
    return fixed + [f"exit:{exit},{length}" for exit in model.exits for length in (2, 4)]


def _warm_up(model: LayerwiseForCausalLM, drafts: Sequence[str], ids: torch.Tensor) -> None:
    for draft in ("off", *drafts):
        timed(model, ids, 8, draft)


def _seconds(runs: _Runs, name: str, what: str = "decoding") -> float:
    """Total time of the prompts whose answers have more than a token, each prompt's the median of its rounds."""
    pairs = zip(runs[name], runs["plain"], strict=True)
    return sum(median(getattr(run, what) for run in those) for those, plain in pairs if len(plain[0].tokens) > 1)


def _same(runs: _Runs, name: str) -> bool:
    """Whether all its answers are plain decoding's."""
    pairs = zip(runs[name], runs["plain"], strict=True)
    return all(run.tokens == plain[0].tokens for those, plain in pairs for run in those)


def _compared(runs: _Runs, draft: str) -> dict[str, Any]:
    """Ratios of total times, and what the draft did."""
    lengths = [len(those[0].tokens) for those in runs["plain"]]
    if max(lengths) < 2:
        raise ValueError("every answer ended after its first token, so there is no decoding to time: take more prompts")
    plain, drafting = _seconds(runs, "plain"), _seconds(runs, draft)
    ours = [name for name in runs if name not in OTHERS.values()]
    traces = [run.trace for those in runs[draft] for run in those]
    drafted = sum(trace.drafted for trace in traces)
    accepted = sum(trace.accepted for trace in traces)
    passes = sum(sum(trace.drafts.values()) for trace in traces)
    chosen: dict[str, int] = {}
    for trace in traces:
        for name, times in trace.drafts.items():
            chosen[name] = chosen.get(name, 0) + times
    steps = sum(length - 1 for length in lengths if length > 1)
    result: dict[str, Any] = {
        "identical": all(_same(runs, name) for name in ours),
        "speedup": plain / drafting,
        "speedup_whole_call": _seconds(runs, "plain", "whole") / _seconds(runs, draft, "whole"),
        "speedups": {name: plain / _seconds(runs, name) for name in ours if name != "plain"},
        "acceptance": accepted / drafted if drafted else 0.0,
        "exit": max(chosen, key=chosen.__getitem__) if chosen else "off",
        "draft_length": drafted / passes if passes else 0.0,
        "tokens_per_pass": sum(len(trace.sources[0]) - 1 for trace in traces) / passes if passes else 1.0,
        "drafts_chosen": chosen,
        "tokens_per_second": steps / drafting,
        "plain_tokens_per_second": steps / plain,
        "answer_tokens": lengths,
        "drafted_share": _share(traces, Source.DRAFTED),
    }
    for field, name in OTHERS.items():
        if name in runs:
            result[field] = _seconds(runs, name) / drafting
    if "transformers" in runs:
        result["identical_to_hf"] = _same(runs, "transformers")
    return result


def _share(traces: Sequence[Trace], source: Source) -> float:
    made = [one for trace in traces for one in trace.sources[0]]
    return made.count(source) / len(made) if made else 0.0


def _batch(
    model: LayerwiseForCausalLM, texts: Sequence[torch.Tensor], new_tokens: int, draft: str, count: int
) -> dict[str, Any]:
    """The first 8 prompts (repeated, if there are fewer) as one batch, padded on the left: same tokens, speed-up."""
    texts = [texts[at % len(texts)] for at in range(ROWS)]
    width = max(ids.shape[1] for ids in texts)
    ids = torch.zeros(ROWS, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, width - text.shape[1] :], mask[row, width - text.shape[1] :] = text[0], 1

    def run(how: str) -> tuple[torch.Tensor, float]:
        times = [0.0, 0.0]
        for at, tokens in enumerate((1, new_tokens)):  # the prompt's share is taken off
            watch = Stopwatch()
            out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, draft=how)
            watch.put(out)
            times[at] = watch.total
        return out, times[1] - times[0]

    run(draft)
    found: dict[str, list[tuple[torch.Tensor, float]]] = {"off": [], draft: []}
    for _, name, one in rounds({how: (lambda how=how: run(how)) for how in found}, count):
        found[name].append(one)
    plain = found["off"][0][0]
    seconds = {name: median(taken for _, taken in those) for name, those in found.items()}
    return {
        "rows": ROWS,
        "identical": all(torch.equal(out, plain) for out, _ in found[draft]),
        # None where all answers are so short that the prompt takes all of the time.
        "speedup": seconds["off"] / seconds[draft] if min(seconds.values()) > 0 else None,
    }


def hopeless(model: LayerwiseForCausalLM, texts: Sequence[torch.Tensor], new_tokens: int, count: int) -> float:
    """Speed of `auto` over plain decoding when sampling at temperature 1.5, where hardly a draft stands.

    The median over pairs of answers, one after the other: they differ by a few percent, and the machine by more from
    one minute to the next.
    """
    ratios: list[float] = []
    for seed, ids in enumerate(texts[:4]):
        speeds: dict[str, list[float]] = {"off": [], "auto": []}

        def run(how: str, ids: torch.Tensor = ids, seed: int = seed) -> float:
            torch.manual_seed(seed)
            watch = Stopwatch()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=True,
                temperature=1.5,
                top_k=0,
                streamer=watch,
                draft=how,
            )
            return (len(watch.times) - 2) / (watch.times[-1] - watch.times[1])

        for _, name, speed in rounds({how: (lambda how=how: run(how)) for how in speeds}, max(count, PAIRS)):
            speeds[name].append(speed)
        ratios += [auto / off for auto, off in zip(speeds["auto"], speeds["off"], strict=True)]
    return median(ratios)
