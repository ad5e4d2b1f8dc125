"""layerwise demo: a real model answers three prompts at two depths."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from layerwise.cli import options

TOOL_SYSTEM = """You are an expert in composing functions. Answer with one function call as JSON and nothing else.
Functions: [{"name": "get_weather", "description": "Current weather of a city", "parameters": {"city": "string", \
"unit": "celsius or fahrenheit"}}]"""
PROMPTS = (
    ("tool call", TOOL_SYSTEM, "What is the weather in Lisbon, in celsius?"),
    ("plan", None, "Write a short plan, in three steps, for learning to bake bread."),
    ("question", None, "What is the capital of France, and on which river does it lie?"),
)


def reduced_plan(layers: int) -> str:
    """A plan that leaves out a tenth of the layers.

    For the embedded model the three of its 30 layers whose loss costs least, by measurement; for others three
    spread over the middle.
    """
    from layerwise.plan import Plan

    skipped = (4, 13, 25) if layers == 30 else (layers // 3, layers // 2, 2 * layers // 3)
    return str(Plan.full(layers).skip(*skipped))


def run(
    model: options.Model = None,
    plan: options.PlanText = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    engine: options.Engine = options.EngineChoice.auto,
    dtype: options.Dtype = options.DtypeChoice.bfloat16,
    json: options.Json = False,
) -> None:
    """Three prompts, each at full depth and with a reduced plan, and what that does to speed."""
    from rich.console import Console
    from rich.table import Table

    loaded, tokenizer = options.load(model, None, plan, engine, dtype)
    from layerwise.decoding.text import answer
    from layerwise.plan import Plan

    plans = [str(Plan.full(loaded.depth)), plan or reduced_plan(loaded.depth)]
    console = Console(highlight=False)
    console.print(
        f"{loaded.runtime.backbone.model.config.name_or_path}, {loaded.depth} layers, {dtype.value}, "
        f"{loaded.runtime.engine.name} engine\n"
    )
    for text in plans:  # the first answer pays for compiling and for cold caches
        loaded.plan = text
        answer(loaded, tokenizer, "Hello", max_new_tokens=8)
    rows: list[dict[str, Any]] = []
    for kind, system, prompt in PROMPTS:
        console.rule(kind, align="left")
        console.print(f"[bold]{prompt}[/bold]")
        for text in plans:
            loaded.plan = text
            console.print(f"\n[dim]layers {text}[/dim]")
            result = answer(
                loaded,
                tokenizer,
                prompt,
                system,
                max_new_tokens,
                on_text=lambda piece: print(piece, end="", flush=True),
            )
            print()
            rows.append({"prompt": kind, **result.to_dict(), "plan": text})
        print()
    table = Table(box=None, header_style="bold")
    for title, side in (
        ("prompt", "left"),
        ("plan", "left"),
        ("layers per token", "right"),
        ("tokens", "right"),
        ("tokens/s", "right"),
    ):
        table.add_column(title, justify=side)
    for row in rows:
        table.add_row(
            row["prompt"],
            row["plan"],
            f"{row['layers_per_token']:.1f}",
            str(row["tokens"]),
            f"{row['tokens_per_second']:.1f}",
        )
    console.print(table)
    console.print(
        "\nSkipped layers are not run, so fewer layers are faster; the reduced plan is untrained, so its answers may "
        "be worse.\nNext: layerwise generate \"YOUR PROMPT\" --plan \"0-5 8-29\" --html answer.html"
    )
    if json:
        options.print_json({"answers": rows, "engine": loaded.runtime.engine.name, "dtype": dtype.value})
