"""layerwise demo: a real model answers three prompts at two depths."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from layerwise.cli import options

TOOL_SYSTEM = """Answer with one JSON function call, nothing else.
Function: get_weather(city, unit)
Example question: How warm is it in Oslo, in fahrenheit?
Example answer: {"name": "get_weather", "arguments": {"city": "Oslo", "unit": "fahrenheit"}}"""
PROMPTS = (
    ("tool call", TOOL_SYSTEM, "How warm is it in Lisbon, in celsius?"),
    ("plan", None, "Write a short plan, in three steps, for learning to bake bread."),
    ("question", None, "What is the capital of France?"),
)


def reduced_plan(layers: int) -> str:
    """A plan with fewer layers: for the embedded model two less, found by trying; for others every eighth less.

    Nothing was trained here. Which layers an input can spare is what the routers of this library learn.
    """
    from layerwise.plan import Plan

    skipped = (4, 25) if layers == 30 else tuple(range(layers // 8, layers - 2, 8)) or (layers // 2,)
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
        "\nSkipped layers are not run, so fewer layers take less time. Nothing was trained for the reduced plan: its\n"
        "answers may be worse.\n\n"
        'Next: layerwise generate "Why is the sky blue?" --plan "0-3 5-24 26-29" --html answer.html',
        soft_wrap=True,
    )
    if json:
        options.print_json({"answers": rows, "engine": loaded.runtime.engine.name, "dtype": dtype.value})
