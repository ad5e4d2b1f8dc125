"""layerwise demo: a real model answers three prompts: at full depth, with drafts, and with fewer layers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from layerwise.cli import options

TOOL_SYSTEM = """Answer with one JSON function call, nothing else.
Function: get_weather(city, unit)
Example question: How warm is it in Oslo, in fahrenheit?
Example answer: {"name": "get_weather", "arguments": {"city": "Oslo", "unit": "fahrenheit"}}"""
HEAD = "layerskip-frozen"  # the adapter that drafts for the untouched model
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
    """Three prompts, each at full depth, with drafts that the full depth verifies, and with a reduced plan."""
    from rich.console import Console
    from rich.table import Table

    from layerwise.paths import bundled_adapter

    head = bundled_adapter(HEAD) if model is None else None
    loaded, tokenizer = options.load(model, head and str(head), plan, engine, dtype)
    from layerwise.decoding.text import answer
    from layerwise.plan import Plan

    full = str(Plan.full(loaded.depth))
    ways = [(full, "off"), (full, "auto"), (plan or reduced_plan(loaded.depth), "off")]
    console = Console(highlight=False)
    console.print(
        f"{loaded.runtime.backbone.model.config.name_or_path}, {loaded.depth} layers, {dtype.value}, "
        f"{loaded.runtime.engine.name} engine\n"
    )
    for text, draft in ways:  # the first answer pays for compiling and for cold caches
        loaded.plan = text
        answer(loaded, tokenizer, "Hello", max_new_tokens=8, draft=draft)
    rows: list[dict[str, Any]] = []
    for kind, system, prompt in PROMPTS:
        console.rule(kind, align="left")
        console.print(f"[bold]{prompt}[/bold]")
        for text, draft in ways:
            loaded.plan = text
            console.print(f"\n[dim]layers {text}{', drafted and verified' if draft != 'off' else ''}[/dim]")
            result = answer(
                loaded,
                tokenizer,
                prompt,
                system,
                max_new_tokens,
                on_text=lambda piece: print(piece, end="", flush=True),
                draft=draft,
            )
            print()
            rows.append({"prompt": kind, **result.to_dict(), "plan": text})
        print()
    table = Table(box=None, header_style="bold")
    for title, side in (
        ("prompt", "left"),
        ("plan", "left"),
        ("draft", "left"),
        ("layers per token", "right"),
        ("tokens", "right"),
        ("tokens/s", "right"),
    ):
        table.add_column(title, justify=side)
    for row in rows:
        table.add_row(
            row["prompt"],
            row["plan"],
            row["draft"],
            f"{row['layers_per_token']:.1f}",
            str(row["tokens"]),
            f"{row['tokens_per_second']:.1f}",
        )
    console.print(table)
    console.print(
        "\nA draft proposes tokens and the full depth verifies several in one pass: more layers are run in all, fewer\n"
        "passes are made, and the answer is that of the full depth (to rounding; exactly so with --dtype float32).\n"
        "Skipped layers are not run, so fewer layers take less time. Nothing was trained for the reduced plan: its\n"
        "answers may be worse.\n\n"
        'Next: layerwise generate "Why is the sky blue?" --plan "0-3 5-24 26-29" --html answer.html',
        soft_wrap=True,
    )
    if json:
        options.print_json({"answers": rows, "engine": loaded.runtime.engine.name, "dtype": dtype.value})
