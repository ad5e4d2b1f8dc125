"""What `layerwise eval` prints of each suite's result."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def exits(result: dict[str, Any]) -> None:
    table = Table(box=None, header_style="bold")
    table.add_column("exit", justify="right")
    for name in result["perplexity"]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in zip(*result["perplexity"].values(), strict=True):
        cells = (f"{_short(one['perplexity'])} {one['agreement']:4.0%}" for one in row)
        table.add_row(str(row[0]["exit"]), *cells)
    Console().print(table)
    print("perplexity, and how often the exit's likeliest token is the last layer's")
    for name, task in result["tasks"].items():
        low, high = task["interval"]
        print(f"{name}: {task['accuracy']:.1%} of {task['n']} questions right (95% interval {low:.1%} to {high:.1%})")


def paths(result: dict[str, Any]) -> None:
    table = Table(box=None, header_style="bold")
    for name in ("task", "n", "all layers", "routed", "95% interval of the gain"):
        table.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    for group in ("in_domain", "out_of_domain"):
        for task, one in result[group].items():
            low, high = (f"{100 * end:+.1f}" for end in one["interval"])
            table.add_row(task, str(one["n"]), f"{one['base']:.1%}", f"{one['routed']:.1%}", f"{low} to {high}")
    Console().print(table)
    for name, gain in (("in domain", "accuracy_gain"), ("out of domain", "out_of_domain_gain")):
        low, high = result[f"{gain}_interval"]
        print(f"{name}: {result[gain]:+.2f} points (95% interval {low:+.2f} to {high:+.2f}), mean over tasks")
    realised = "nothing to save" if result["time_realised"] is None else f"{result['time_realised']:.0%} of it as time"
    print(f"layers saved: {result['layers_saved']:.1%} a token, {realised}")
    for name, one in result["controls"].items():
        low, high = one["interval"]
        print(
            f"{name.replace('_', ' ')}: {one['accuracy']:.1%}, {one['layers_saved']:.1%} of the layers saved; "
            f"the router is {one['routed_ahead']:+.2f} points ahead ({low:+.2f} to {high:+.2f})"
        )
    if kept := result["answers_kept"]:
        print(f"{kept} of {result['answers']} verdicts were kept by an earlier run; --fresh judges again")


def routing(result: dict[str, Any]) -> None:
    """Kinds of prompts, then controls, then what generating showed."""
    named = ("routed", "full_depth", "reference", "base")
    measured = [name for name in named if name in result["kinds"]["tools"]["ppl"]]
    table = Table(box=None, header_style="bold")
    for name in ("kind", "n", "layers", "FLOPs saved", *(f"exp(CE) {name.replace('_', ' ')}" for name in measured)):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind, one in result["kinds"].items():
        perplexities = (f"{one['ppl'][name]:.3f}" for name in measured)
        table.add_row(kind, str(one["n"]), f"{one['layers_run']:.1f}", f"{one['flop_skip']:.1f}%", *perplexities)
    Console().print(table)
    print(f"tool calls save {result['differential']:.1f} points of decode FLOPs more than planning")
    for length, kinds in result["by_length"].items():
        saved = ", ".join(f"{kind} {one['flop_skip']:.1f}% (n={one['n']})" for kind, one in kinds.items())
        print(f"prompts of {length} tokens save: {saved}")
    for name, one in result["controls"].items():
        low, high = one["interval"]
        cost = f"{one['ce_above_routed']:+.3f} nats a token (95% interval {low:+.3f} to {high:+.3f})"
        print(f"control {name}, {one['layers_run']:.1f} layers: {cost}")
    for kind, those in result.get("generated", {}).items():
        shown = (
            f"{name.replace('_', ' ')} {one['right']:.0%}, {one['tokens']:.0f} tokens" for name, one in those.items()
        )
        print(f"right answers, {kind}: {'; '.join(shown)}")
        if beside := those["routed"].get("minus_reference"):
            low, high = beside["interval"]
            print(f"routed minus reference: {beside['mean']:+.1%} (95% interval {low:+.1%} to {high:+.1%})")
    if "time" in result:
        one = result["time"]
        print(
            f"decoding tool calls takes {one['time_saved']:.1f}% less time for {one['flop_skip']:.1f}% fewer FLOPs; "
            f"routing adds {one['router_overhead']:.2%} of it"
        )


def _short(perplexity: float) -> str:
    """At most seven characters."""
    if perplexity >= 99_999.5:
        return f"{perplexity:.1e}"
    return f"{perplexity:,.0f}" if perplexity >= 99.95 else f"{perplexity:.2f}"
