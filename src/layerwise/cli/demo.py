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
ROUTES = "layerroute"  # the adapter that decides layers by the prompt
FUNCTION = (
    '{"name":"get_weather","description":"The current temperature in a city.","parameters":{"type":"object",'
    '"properties":{"city":{"type":"string","description":"The city."},"unit":{"type":"string","description":'
    '"celsius or fahrenheit."}},"required":["city","unit"]}}'
)
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
    dtype: options.Dtype = options.DtypeChoice.auto,
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
    from layerwise.sources import dtype_text

    full = str(Plan.full(loaded.depth))
    ways = [(full, "off"), (full, "auto"), (plan or reduced_plan(loaded.depth), "off")]
    console = Console(highlight=False)
    console.print(
        f"{loaded.runtime.backbone.model.config.name_or_path}, {loaded.depth} layers, {dtype_text(loaded.dtype)}, "
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
        "answers may be worse.",
        soft_wrap=True,
    )
    if model is None and plan is None and bundled_adapter(ROUTES):
        rows += _routed(console, engine, dtype, max_new_tokens)
    console.print('\nNext: layerwise generate "Why is the sky blue?" --plan "0-3 5-24 26-29" --html answer.html')
    if json:
        options.print_json({"answers": rows, "engine": loaded.runtime.engine.name, "dtype": dtype_text(loaded.dtype)})


def _routed(
    console: Any, engine: options.EngineChoice, dtype: options.DtypeChoice, max_new_tokens: int
) -> list[dict[str, Any]]:
    """The same model with routers: a tool call and a worked problem, each by the layers its prompt was given."""
    from layerwise.cost import head_run, layers_run
    from layerwise.data.bfcl import SYSTEM
    from layerwise.decoding.text import answer
    from layerwise.paths import bundled_adapter

    console.print(f"\nWith the routers of adapters/{ROUTES}, which read the prompt and decide; lossy:\n")
    loaded, tokenizer = options.load(None, str(bundled_adapter(ROUTES)), None, engine, dtype)
    prompts = (
        ("tool call, routed", SYSTEM + FUNCTION, PROMPTS[0][2]),
        ("problem, routed", None, "Tom has 3 boxes of 12 pencils and gives 10 pencils away. How many are left?"),
    )
    rows = []
    for kind, system, prompt in prompts:
        console.rule(kind, align="left")
        console.print(f"[bold]{prompt}[/bold]\n")
        result = answer(
            loaded,
            tokenizer,
            prompt,
            system,
            max_new_tokens,
            on_text=lambda piece: print(piece, end="", flush=True),
        )
        print()
        shape, plan = loaded.runtime.backbone.shape, result.plans[-1]
        run, head = layers_run(shape, plan), head_run(shape, plan)
        of = f"weights of {run:.1f} of {loaded.depth} layers and {head:.0%} of the LM head"
        console.print(f"\n[dim]{of}: {plan}[/dim]\n")
        rows.append({"prompt": kind, **result.to_dict(), "plan": str(result.plans[-1])})
    return rows
