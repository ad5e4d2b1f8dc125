"""The tables of LayerRoute's runs, for `tables.py`: what is skipped and lost, and what answers and time come to."""

from __future__ import annotations

from typing import Any


def layerroute_table(result: dict[str, Any]) -> str:
    """One row a run of tools/layerroute_runs.py."""
    runs = sorted(result["runs"], key=_route_order)
    lines = [
        "| objective, seed | tool calls save | planning saves | differential | exp(CE) tools, vs same LoRA | planning |"
        " static skip costs | random | shuffled |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        controls = (
            f"{one['ce_above_routed']:+.3f} ({one['interval'][0]:+.3f} to {one['interval'][1]:+.3f})"
            for one in run["controls"].values()
        )
        tools, planning = (run["kinds"][kind]["ppl"]["routed"] for kind in ("tools", "planning"))
        lines.append(
            f"| {_route_name(run)} | **{run['tool_skip']:.1f}%** | {run['planning_skip']:.1f}% "
            f"| {run['differential']:.1f} | {tools:.2f}, x{run['tool_ppl_ratio']:.3f} "
            f"| {planning:.2f}, x{run['planning_ppl_ratio']:.3f} | {' | '.join(controls)} |"
        )
    prompts = sorted({run["kinds"]["tools"]["n"] for run in runs})
    counted = {count: [_route_name(run) for run in runs if run["kinds"]["tools"]["n"] == count] for count in prompts}
    commits = ", ".join(dict.fromkeys(run["environment"]["commit"] for run in runs))
    answered = [run for run in runs if run.get("generated") and run.get("time")]
    threads = "; ".join(sorted({f"{run['time']['environment']['threads']} threads" for run in answered}))
    lines += [
        "",
        "Shares are of all decode FLOPs, LM head and attention counted; controls leave out as much, by bridges, thin "
        "MLPs and the thin head where the routes do, their cost is in nats a token above the routes', with 95% "
        "intervals. "
        f"Held-out prompts of each kind: {_of_each(counted)}; commits {commits}.",
        "",
        *_route_answers(answered),
        "",
        "What comes of it when text is generated: tool calls that are exactly right, of so many; the time of a token "
        "saved, and of the share of FLOPs skipped on these prompts (medians of whole processes, where several were "
        f"timed, which differ from the least to the most in brackets); the time of the routers. {threads}. Again: "
        "`python tools/layerroute_runs.py --recipes head --samples 100 --answers 159 --timed 4`, of the others "
        "`python tools/layerroute_runs.py --recipes neurons,quality,bridges,paper`.",
    ]
    return "\n".join(lines)


def _of_each(counted: dict[int, list[str]]) -> str:
    """How many prompts runs were judged on, the commonest number last and without their names."""
    *rest, common = sorted(counted, key=lambda count: len(counted[count]))
    return ", ".join([f"{count} ({'; '.join(counted[count])})" for count in rest] + [str(common)])


def _route_order(run: dict[str, Any]) -> tuple[Any, ...]:
    headless, rank = not run.get("head_rank"), run.get("bridge_rank") or 0
    return run["objective"] != "quality", run["objective"], headless, _leaves(run), rank, run["seed"]


def _route_name(run: dict[str, Any]) -> str:
    neurons = ", neurons and head" if run.get("head_rank") else ", neurons alone"
    what = {"attention": ", MLPs alone", "neurons": neurons}.get(_leaves(run), "")
    return f"{run['objective']}{what}{', with bridges' if run.get('bridge_rank') else ''}, {run['seed']}"


def _leaves(run: dict[str, Any]) -> str:
    """What closed gates left of their layers, as the recipe has it: nothing, unless it says so."""
    return run.get("leave") or "nothing"


def _route_answers(runs: list[dict[str, Any]]) -> list[str]:
    """One row a run whose adapter answered."""
    lines = [
        "| objective, seed | calls right, routed | every layer run | without routing | routed minus that | time saved "
        "| of the FLOPs saved | routers | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        calls, time = run["generated"]["tools"], run["time"]
        right = {name: round(one["right"] * one["n"]) for name, one in calls.items()}
        lines.append(
            f"| {_route_name(run)} | {right['routed']} of {calls['routed']['n']} | {right['full_depth']} "
            f"| {right['reference']} | {_beside(calls['routed'])} | {time['time_saved']:.1f}% | {_realised(time)} "
            f"| {time['router_overhead']:.1%} | {time['environment']['commit']} |"
        )
    return lines


def _realised(time: dict[str, Any]) -> str:
    """The share of the FLOPs saved that came back as time, and from where to where processes put it."""
    found = time.get("processes", [])
    return f"{time['realised']:.0%}" + (f" ({found[0]:.0%} to {found[-1]:.0%})" if found else "")


def _beside(routed: dict[str, Any]) -> str:
    """How many more calls are right than without routing, where that was noted."""
    if "minus_reference" not in routed:
        return ""
    low, high = routed["minus_reference"]["interval"]
    return f"{routed['minus_reference']['mean']:+.1%} ({low:+.1%} to {high:+.1%})"
