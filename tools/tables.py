"""Write the tables of the README from the JSON in results/. With --check, only say whether they are up to date."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from layerroute_tables import layerroute_table

ROOT = Path(__file__).resolve().parents[1]


def decode_table(result: dict[str, Any]) -> str:
    """The table of `layerwise bench decode`."""
    speed, step = result["tokens_per_second"], result["step_milliseconds"]
    lines = ["| batch-1 greedy decoding, SmolLM2-135M | tokens/s | ms per step |", "|---|---|---|"]
    names = {
        "transformers float32": "transformers, float32",
        "transformers bfloat16": "transformers, bfloat16",
        "layerwise float32": "layerwise, float32",
        "layerwise bfloat16": "**layerwise, bfloat16**",
        "layerwise half depth": "layerwise, bfloat16, 15 of 30 layers (speed only)",
    }
    lines += [f"| {shown} | {speed[name]:.1f} | {step[name]:.1f} |" for name, shown in names.items()]
    where, memory = result["environment"], result["memory"]
    lines += [
        "",
        f"**{result['ratio_vs_hf_same_dtype']:.1f}x** `generate` of transformers in bfloat16, "
        f"{result['ratio_vs_hf_float32']:.1f}x in float32 with "
        f"{'identical' if result['identical'] else 'DIFFERENT'} tokens; "
        f"a step is {result['roofline_fraction']:.0%} reading of the weights at the bandwidth measured beside it; "
        f"half of the layers give {result['half_depth_realised']:.0%} of their ideal speed-up (LM head included). "
        f"Peak memory at {memory['context']:,} tokens of context: {memory['layerwise']['peak_mib']:.0f} MiB, "
        f"transformers {memory['transformers']['peak_mib']:.0f}.",
        "",
        f"Medians of {result['rounds']} interleaved rounds, {result['new_tokens']} new tokens; {where['cpu']}, "
        f"{where['threads']} threads, torch {where['torch']}, transformers {where['transformers']}, commit "
        f"{where['commit']}. Again: `layerwise bench decode --rounds {result['rounds']} --out results/decode.json`, "
        "then `python tools/tables.py`.",
    ]
    return "\n".join(lines)


def speculative_table(result: dict[str, Any]) -> str:
    """The table of `layerwise bench speculative`, one group of rows an adapter."""
    tasks = [task for run in result["runs"] for task in run["tasks"]]
    economize = all("speedup_vs_economize" in task for task in tasks)
    lines = [
        "| held-out prompts | weights | speed-up | with the prompt | tokens/s | accepted | tokens a pass |"
        " vs transformers | vs its early exit |" + " vs economize |" * economize,
        "|---|---|---|---|---|---|---|---|---|" + "---|" * economize,
    ]
    for run in result["runs"]:
        for task in run["tasks"]:
            lines.append(
                f"| {task['task']} | {run['label']} | **{task['speedup']:.2f}x** "
                f"| {task['speedup_whole_call']:.2f}x | {task['tokens_per_second']:.0f} "
                f"| {task['acceptance']:.0%} | {task['tokens_per_pass']:.2f} | {task['speedup_vs_hf']:.1f}x "
                f"| {task['speedup_vs_hf_early_exit']:.1f}x |"
                + (f" {task['speedup_vs_economize']:.1f}x |" if economize else "")
            )
    one, where = tasks[0], tasks[0]["environment"]
    commits = ", ".join(dict.fromkeys(task["environment"]["commit"] for task in tasks))
    same = sum(task["identical"] for task in tasks)
    prompts = " to ".join(map(str, sorted({task["prompts"] for task in tasks})))
    lines += [
        "",
        f"Greedy float32 tokens were identical to plain decoding's in {same} of {len(tasks)} rows, batches of 8 "
        "included. "
        "Speed-up is over layerwise's own plain decoding of the same weights, `--draft auto`, from the first token to "
        "the last; in the third column from the call to its end, which reading the prompt of a short answer makes up "
        f"much of. The first {prompts} held-out prompts of a task, up to {one['new_tokens']} new tokens, "
        f"{one['rounds']} interleaved rounds, one of the other libraries. Eight rows at once: "
        f"{_range([task['batch']['speedup'] for task in tasks], '.2f')} times plain batches. {_swept(tasks)}"
        f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, transformers {where['transformers']}, "
        f"commits {commits}. Again: `layerwise bench speculative --task TASK --adapter ADAPTER "
        f"--prompts {one['prompts']} --new-tokens {one['new_tokens']} --rounds {one['rounds']} --sweep --out FILE`.",
    ]
    return "\n".join(lines)


def _swept(tasks: list[dict[str, Any]]) -> str:
    """What was measured beside the tasks that have a sweep."""
    swept = [task for task in tasks if "hopeless" in task]
    if not swept:
        return ""
    best, hopeless = (_range([task[name] for task in swept], ".2f") for name in ("auto_vs_best_static", "hopeless"))
    return (
        f"`auto` is {best} times as fast as the best fixed draft and, where drafts fail (temperature 1.5), {hopeless} "
        f"times as fast as plain decoding; {len(swept)} rows were swept. "
    )


def sweep_table(result: dict[str, Any]) -> str:
    """`layerwise bench speculative --sweep --no-peers`: what `auto` makes of it, beside fixed drafts."""
    tasks = [task for run in result["runs"] for task in run["tasks"]]
    one, where, label = tasks[0], tasks[0]["environment"], result["runs"][0]["label"]
    lines = [
        "| `auto` beside fixed drafts | speed-up | best fixed draft | of its speed | where drafts fail, of plain |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {task['task']} | **{task['speedup']:.2f}x** | `{task['best_static']}`, {task['best_static_speedup']:.2f}x "
        f"| {task['auto_vs_best_static']:.2f} | {task['hopeless']:.2f} |"
        for task in tasks
    ]
    lines += [
        "",
        f"Weights {label}, {one['prompts']} held-out prompts of a task, {one['rounds']} interleaved rounds; drafts "
        f"fail when sampling at temperature 1.5. Commit {where['commit']}. Again: `layerwise bench speculative "
        f"--adapter adapters/{label} --prompts {one['prompts']} --new-tokens {one['new_tokens']} "
        f"--rounds {one['rounds']} --sweep --no-peers --out results/speculative_sweep.json`.",
    ]
    return "\n".join(lines)


def layerskip_quality_table(result: dict[str, Any]) -> str:
    """One row a model of tools/layerskip_runs.py quality."""
    models = result["models"]
    first = next(iter(models.values()))
    texts, tasks = list(first["last_layer"]), list(first["tasks"])
    lines = [
        "| last layer | " + " | ".join([f"{name}, perplexity" for name in texts] + tasks) + " |",
        "|---|" + "---|" * (len(texts) + len(tasks)),
    ]
    for label, one in models.items():
        shares = [
            f"{task['accuracy']:.1%} ({task['interval'][0]:.0%} to {task['interval'][1]:.0%})"
            for task in one["tasks"].values()
        ]
        lines.append(f"| {label} | " + " | ".join([f"{one['last_layer'][name]:.2f}" for name in texts] + shares) + " |")
    questions = next(iter(first["tasks"].values()))["n"]
    lines += [
        "",
        f"{first['samples']} held-out texts, or answers, of each; {questions} questions a task at most, 95% intervals; "
        f"commit {result['environment']['commit']}. Again: `{result['command']}`.",
    ]
    return "\n".join(lines)


def search_table(result: dict[str, Any]) -> str:
    """One row an algorithm of `layerwise bench search --compare`."""
    algorithms, where = result["algorithms"], result["environment"]
    lines = [
        "| search | questions answered by some path | layers of the shortest | value of the best | tree minus this |",
        "|---|---|---|---|---|",
    ]
    for name, one in algorithms.items():
        above = one.get("tree_minus_this", {}).get("value")
        ahead = f"{above['mean']:+.3f} ({above['interval'][0]:+.3f} to {above['interval'][1]:+.3f})" if above else ""
        lines.append(f"| {name} | {one['oracle']:.1%} | {one['layers']:.1f} | {one['value']:.3f} | {ahead} |")
    first = next(iter(algorithms.values()))
    lines += [
        "",
        f"{first['questions']} training questions, {first['evaluations']:.0f} paths of each, the same measured prior "
        f"for all; value: probability of the right answer, less half of the share of layers run; 95% intervals. "
        f"A question's paths are evaluated {result['speedup']:.0f} times as fast as one by one "
        f"by plain forward passes, margins within {result['same_scores']:.0e} nats in float32. Threads: "
        f"{where['threads']}, commit {where['commit']}. Again: `{result['command']}`.",
    ]
    return "\n".join(lines)


def drllm_table(result: dict[str, Any]) -> str:
    """The table of `layerwise eval --suite paths`."""
    lines = [
        "| tasks | questions of each | all layers | routed | gain, points | 95% interval |",
        "|---|---|---|---|---|---|",
    ]
    for group, gain in (("in_domain", "accuracy_gain"), ("out_of_domain", "out_of_domain_gain")):
        those = result[group].values()
        base, routed = (sum(one[name] for one in those) / len(those) for name in ("base", "routed"))
        low, high = result[f"{gain}_interval"]
        lines.append(
            f"| {group.replace('_', ' ')}: {', '.join(result[group])} | {max(one['n'] for one in those)} | {base:.1%} "
            f"| {routed:.1%} | {result[gain]:+.1f} | {low:+.1f} to {high:+.1f} |"
        )
    controls = ", ".join(
        f"{name.replace('_', ' ')} {one['accuracy']:.1%} ({one['layers_saved']:.1%} saved)"
        for name, one in result["controls"].items()
    )
    time = result["time"]
    busy = f" (on a busy machine, load {time['load']:.1f})" if time["load"] > time["cpus"] else ""
    realised = "not measured"
    if time["realised"] is not None:
        realised = (
            f"{time['prompts']} of the prompts, which save {time['layers_saved']:.1%} of the layers, take "
            f"{time['time_saved']:.1%} less time, {time['realised']:.0%} of what they could{busy}"
        )
    where, kept = result["environment"], ""
    timed_at = time.get("environment", where)["commit"]
    timed = "" if timed_at == where["commit"] else f", times of {timed_at}"
    if result.get("answers_kept"):
        kept = f", with {result['answers_kept']} verdicts kept from before it (`--fresh` asks again)"
    lines += [
        "",
        f"{result['layers_saved']:.1%} of layer executions per token saved in domain. Time: {realised}. "
        f"Controls, in domain: {controls}.{_oracles(result['oracle'])} "
        f"Commit {where['commit']}{timed}{kept}. Again: `{result['command']}`.",
    ]
    return "\n".join(lines)


def _oracles(oracle: dict[str, Any]) -> str:
    """What the best choice for each question would have given, as far as it was asked."""
    known = [f"of the menu {oracle['menu']['accuracy']:.1%}"] if oracle["menu"] else []
    if found := oracle["search"]:
        known.append(
            f"of a search of {found['n']} of the questions {found['accuracy']:.1%} where all layers have "
            f"{found['base']:.1%}"
        )
    return f" Oracles: {', '.join(known)}." if known else ""


def routed_attention_table(result: dict[str, Any]) -> str:
    """One row a task, distance and mode of tools/routed_attention_runs.py, over its seeds."""
    groups: dict[tuple[bool, int, str], list[dict[str, Any]]] = {}
    for run in result["runs"]:
        groups.setdefault((run["task"] != "recall", run["distance"], run["mode"]), []).append(run)
    lines = [
        "| task, distance | taught by | seeds | accuracy | positions that attend | least possible | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, runs in sorted(groups.items()):
        first = runs[0]
        pairs = f", {first['pairs']} pairs" if first["task"] == "mqar" else ""
        lines.append(
            f"| {first['task']} {first['distance']}{pairs} | {first['mode']} | {len(runs)} "
            f"| {_range([run['accuracy'] for run in runs], '.1%')} | {_range([run['usage'] for run in runs], '.3%')} "
            f"| {first['least_usage']:.3%} | {_range([run['steps'] for run in runs], ',')} |"
        )
    lines += [
        "",
        "Lowest to highest over seeds. Accuracy on held-out pairs of key and value; a question needs one position of "
        "one layer. Joint: the penalty at its full weight from the first step. Convolution, joint and, of mqar, "
        "attention end with their steps, not with all they might learn. Again: "
        "`python tools/routed_attention_runs.py`.",
    ]
    return "\n".join(lines)


def _range(values: list[float], form: str) -> str:
    """The lowest and the highest, or the one they are when written."""
    lowest, highest = format(min(values), form), format(max(values), form)
    return lowest if lowest == highest else f"{lowest} to {highest}"


def routed_attention_speed_table(result: dict[str, Any]) -> str:
    """The table of `layerwise bench routed-attention`: times as fast as full attention, and as the usage allows."""
    points = result["points"]
    shares = (0.01, 0.05, 0.25, 0.5, 1.0)
    lines = [
        "| tokens | phase | " + " | ".join(f"{share:.0%} attend" for share in shares) + " |",
        "|---|---|" + "---|" * len(shares),
    ]
    for length in sorted({point["length"] for point in points}):
        for phase in ("forward", "decode"):
            those = [point for point in points if (point["length"], point["phase"]) == (length, phase)]
            by_usage = {point["asked_usage"]: f"{point['measured']:.2f}x ({point['ideal']:.2f})" for point in those}
            lines.append(f"| {length:,} | {phase} | {' | '.join(by_usage.get(share, '') for share in shares)} |")
    where, most = result["environment"], result["rounds"]
    fewer = [point for point in points if point.get("rounds", most) < most]
    long = f" ({fewer[0]['rounds']} from {min(point['length'] for point in fewer):,} tokens on)" if fewer else ""
    lines += [
        "",
        "Times as fast as the same layer with torch's fused attention everywhere; in brackets what counting allows. "
        f"{_own(points)}Medians of {most} interleaved rounds{long}, float32, {where['threads']} threads, commit "
        f"{where['commit']}. Again: `layerwise bench routed-attention --rounds {most} "
        "--out results/routed_attention_speed.json`.",
    ]
    return "\n".join(lines)


def _own(points: list[dict[str, Any]]) -> str:
    """How much of it in decoding is the operator's merit, and not routing's."""
    shares = [point["full_seconds"] / point["full_own_seconds"] for point in points if "full_own_seconds" in point]
    if not shares:
        return ""
    return (
        "In decoding single queries are scored by an operator of ours, by which full attention itself is "
        f"{_range(shares, '.2f')} times as fast as by torch's. "
    )


def routed_text_table(result: dict[str, Any]) -> str:
    """The table of `layerwise train routed-text`."""
    count, base = len(result["layers"]), result["base_perplexity"]
    lines = [
        f"| attention in {count} layers of SmolLM2-135M | usage | perplexity | of the base's |",
        "|---|---|---|---|",
    ]

    def row(who: str, usage: float, perplexity: float) -> None:
        lines.append(f"| {who} | {usage:.1%} | {perplexity:.2f} | {perplexity / base:.3f} |")

    row("everywhere (the base)", 1.0, base)
    for point in reversed(result["curve"]):
        meant = point["usage"] == result["usage"]
        row("**routed**" if meant else "routed, another threshold", point["usage"], point["perplexity"])
    names = {"random": "positions by chance, as many in each layer", "static": "whole layers, the dearest"}
    for name, one in result["controls"].items():
        row(names[name], one["usage"], one["perplexity"])
    row("nowhere", 0.0, result["convolution_perplexity"])
    low, high = result["interval"]
    times = "; ".join(
        f"{1e3 * one['routed_step_seconds']:.0f} ms after {one['prompt_tokens']:,} tokens "
        f"({1e3 * one['attention_step_seconds']:.0f} with attention everywhere by the same modules"
        + (f", {1e3 * one['base_step_seconds']:.0f} without them)" if "base_step_seconds" in one else ")")
        for one in result["generate"]
    )
    where, timed_at = result["environment"], result["generate"][0].get("environment", result["environment"])
    note = f" {result['note']}" if "note" in result else ""
    lines += [
        "",
        f"{result['texts']} held-out Wikipedia texts of {result['config']['text_length']} tokens; routed, perplexity "
        f"is {result['ratio']:.3f} of the base's (95% interval {low:.3f} to {high:.3f}). A token of `generate`: "
        f"{times}; {timed_at['threads']} threads, commit {timed_at['commit']}. Perplexities: commit {where['commit']}. "
        f"Again: `python tools/adapters.py routed-text`, times `python tools/routed_text_times.py`.{note}",
    ]
    return "\n".join(lines)


TABLES = {
    "decode": decode_table,
    "speculative": speculative_table,
    "speculative_sweep": sweep_table,
    "layerskip_quality": layerskip_quality_table,
    "layerroute": layerroute_table,
    "search": search_table,
    "drllm": drllm_table,
    "routed_attention": routed_attention_table,
    "routed_attention_speed": routed_attention_speed_table,
    "routed_text": routed_text_table,
}


def _between(table: str, marks: re.Match[str]) -> str:
    return f"{marks[1]}{table}\n{marks[2]}"


def filled(text: str) -> str:
    """`text` with every marked table made anew."""
    for name, make in TABLES.items():
        file = ROOT / "results" / f"{name}.json"
        if f"<!-- table: {name} -->" not in text:
            continue
        result = json.loads(file.read_text(encoding="utf-8"))
        marked = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = marked.sub(partial(_between, make(result)), text)
    return text


def main() -> int:
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv:
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
