"""layerwise bench: measurements against other libraries on this machine."""

from __future__ import annotations

import json as json_text
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from layerwise.cli import options

SPECULATIVE_TASKS = ("summarization", "code", "parsing", "tools", "chat")

app = typer.Typer(help="Measure speed side by side with other libraries.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _bench() -> None:
    """Measure speed side by side with other libraries."""


@app.command("decode")
def decode(
    model: options.Model = None,
    engine: options.Engine = options.EngineChoice.auto,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each timed answer.")] = 128,
    rounds: Annotated[int, typer.Option(help="How often each contender runs; medians are compared.")] = 5,
    memory: Annotated[bool, typer.Option(help="Also measure the memory held at 2,000 tokens of context.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    json: options.Json = False,
) -> None:
    """Greedy decoding of one prompt, against transformers' own generate."""
    if new_tokens < 4 or rounds < 1:
        raise ValueError("new-tokens must be at least 4 and rounds at least 1")
    options.check_writable(out)
    options.quiet()
    from layerwise.benchmarks.decode import bench_decode
    from layerwise.sources import model_path

    model_path(model, options.note)
    result = bench_decode(model, engine.value, new_tokens, rounds, options.note)
    if memory:
        from layerwise.benchmarks.memory import bench_memory

        options.note("measuring memory, each library in a process of its own")
        result["memory"] = bench_memory(model, engine.value)
    _print_decode(result)
    _finish(result, out, json)


@app.command("speculative")
def speculative(
    task: Annotated[str, typer.Option(help="summarization, code, parsing, tools, chat, or all.")] = "all",
    model: options.Model = None,
    adapter: options.Adapter = None,
    draft: Annotated[str, typer.Option(help="What drafts; see 'layerwise generate --help'.")] = "auto",
    prompts: Annotated[int, typer.Option(help="Held-out prompts of each task.")] = 8,
    new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 96,
    rounds: Annotated[int, typer.Option(help="How often each contender answers a prompt; medians are compared.")] = 3,
    sweep: Annotated[bool, typer.Option(help="Also measure fixed drafts, and where drafts fail.")] = False,
    peers: Annotated[bool, typer.Option(help="Also measure transformers, and economize if installed.")] = True,
    engine: options.Engine = options.EngineChoice.auto,
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    json: options.Json = False,
) -> None:
    """Decoding with drafts against plain decoding and transformers, on held-out prompts; the tokens are compared."""
    from layerwise.decoding.drafts import Draft

    tasks = SPECULATIVE_TASKS if task == "all" else (task,)
    if task not in ("all", *SPECULATIVE_TASKS):
        raise ValueError(f"no task '{task}': choose all, {', '.join(SPECULATIVE_TASKS)}")
    if prompts < 1 or rounds < 1 or new_tokens < 8:
        raise ValueError("prompts and rounds must be at least 1, new-tokens at least 8")
    options.check_writable(out)
    from layerwise.sources import DEFAULT

    label = str(model or DEFAULT) if adapter is None else Path(adapter).name
    _check_same(out, label, tasks, draft=draft, new_tokens=new_tokens)
    if sweep and str(Draft.parse(draft)) != "auto":
        raise ValueError(f"a sweep compares auto with fixed drafts: leave out --draft {draft}, or --sweep")
    options.quiet()
    from layerwise.benchmarks.speculative import bench_speculative
    from layerwise.sources import model_path

    model_path(model, options.note)
    results = []
    for one in tasks:
        results.append(
            bench_speculative(
                one, model, adapter, draft, prompts, new_tokens, rounds, sweep, peers, engine.value, options.note
            )
        )
        if out is not None:  # after each task, so that nothing is lost if the next one is stopped
            _keep(out, results[-1] | {"command": options.command()})
        _print_speculative(results[-1])
    if out is not None:
        print(f"wrote {out}")
    if json:
        options.print_json(results[0] if len(results) == 1 else {"tasks": results})


@app.command("routed-attention")
def routed_attention(
    lengths: Annotated[str, typer.Option(help="Lengths of text, separated by commas.")] = "512,2048,4096,8192,16384",
    usages: Annotated[
        str, typer.Option(help="Shares of positions that attend, separated by commas; 0.003 is 0.3%.")
    ] = "0.003,0.01,0.05,0.25,0.5,1",
    rounds: Annotated[int, typer.Option(help="How often each contender runs; medians are compared.")] = 5,
    hidden_size: Annotated[int, typer.Option(help="Hidden size of the layer.")] = 512,
    heads: Annotated[int, typer.Option(help="Heads of the layer.")] = 8,
    dtype: options.Dtype = options.DtypeChoice.float32,
    kernels: Annotated[bool, typer.Option(help="Also time every kernel, in forward passes up to 4,096.")] = True,
    memory: Annotated[bool, typer.Option(help="Also measure the peak memory of a forward pass.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    json: options.Json = False,
) -> None:
    """A routed layer against full attention in the same layer: prompts and decoding, by length and usage."""
    texts, shares = _list_of(lengths, int, "lengths"), _list_of(usages, float, "usages")
    options.check_writable(out)
    options.quiet()
    from layerwise.benchmarks.routed_attention import bench_routed_attention

    result = bench_routed_attention(
        texts,
        shares,
        rounds,
        hidden_size=hidden_size,
        heads=heads,
        dtype=options.dtype_name(dtype),
        kernels=kernels,
        memory=memory,
        notify=options.note,
    )
    _print_routed_attention(result)
    _finish(result, out, json)


@app.command("search")
def search(
    model: options.Model = None,
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas; default: all in domain.")] = "all",
    questions: Annotated[int, typer.Option(help="Questions of each task that are timed.")] = 1,
    simulations: Annotated[int, typer.Option(help="Plans evaluated for each question.")] = 48,
    compare: Annotated[int, typer.Option(help="Questions of each task to compare the algorithms on.")] = 0,
    dtype: options.Dtype = options.DtypeChoice.auto,
    seed: Annotated[int, typer.Option(help="Decides what the search draws.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    json: options.Json = False,
) -> None:
    """Searching for paths, against evaluating each path alone; and the tree against random and greedy search."""
    from layerwise.data.short_answers import IN_DOMAIN

    names = list(IN_DOMAIN) if tasks == "all" else options.names_of(tasks, IN_DOMAIN)
    if questions < 1 or simulations < 1 or compare < 0:
        raise ValueError("questions and simulations must be at least 1, compare at least 0")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, not {seed}")
    options.check_writable(out)
    options.quiet()
    from layerwise.benchmarks.search import bench_search
    from layerwise.sources import model_path

    model_path(model, options.note)
    result = bench_search(
        model,
        names,
        questions,
        simulations,
        compared=compare,
        dtype=options.dtype_name(dtype),
        seed=seed,
        notify=options.note,
    )
    print(
        f"{result['speedup']:.1f}x: {result['paths_per_second']:.1f} paths/s, "
        f"{result['plain_paths_per_second']:.1f} one at a time; margins differ by at most "
        f"{result['same_scores']:.1g} nats in float32"
    )
    for name, row in result.get("algorithms", {}).items():
        print(
            f"{name}: {row['oracle']:.1%} answered by some path, {row['layers']:.1f} layers, value {row['value']:.3f}"
        )
    _finish(result, out, json)


def _finish(result: dict[str, Any], out: Path | None, json: bool) -> None:
    result = result | {"command": options.command()}
    if out is not None:
        out.write_text(json_text.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {out}")
    if json:
        options.print_json(result)


def _list_of(text: str, kind: type[int] | type[float], name: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"'{text}' is no list of {name}: give numbers with commas between them") from error


def _print_routed_attention(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("phase", "length", "usage", "full attention", "routed", "speed-up", "of the ideal"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for point in result["points"]:
        table.add_row(
            point["phase"],
            f"{point['length']:,}",
            f"{point['usage']:.1%}",
            f"{1e3 * point['full_seconds']:.2f} ms",
            f"{1e3 * point['seconds']:.2f} ms",
            f"{point['measured']:.2f}x",
            f"{point['realised']:.0%}",
        )
    Console().print(table)
    for one in result.get("memory", ()):
        who = "full attention" if one["full"] else f"usage {one['usage']:.1%}"
        print(f"{who}: {one['peak_mib']:.0f} MiB peak in a pass over {one['length']:,} positions")


def _kept(out: Path | None) -> list[dict[str, Any]]:
    """The runs that the file holds; none if there is no such file."""
    try:
        runs = json_text.loads(out.read_text(encoding="utf-8"))["runs"] if out is not None and out.exists() else []
        _ = [(run["label"], run["tasks"]) for run in runs]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{out}' holds something else than results of this benchmark: give another file") from error
    return runs


def _keep(out: Path, result: dict[str, Any]) -> None:
    """Put a task's result into the file, in place of an earlier one of the same weights and task."""
    runs, label = _kept(out), result["adapter"] or result["model"]
    run = next((run for run in runs if run["label"] == label), None)
    if run is None:
        runs.append(run := {"label": label, "tasks": []})
    run["tasks"] = [task for task in run["tasks"] if task["task"] != result["task"]] + [result]
    run["tasks"].sort(key=lambda task: SPECULATIVE_TASKS.index(task["task"]))
    out.write_text(json_text.dumps({"runs": runs}, indent=2) + "\n", encoding="utf-8")


def _check_same(out: Path | None, label: str, tasks: Sequence[str], **asked: Any) -> None:
    """Refuse a file whose results of these weights and tasks, which would be replaced, were asked for otherwise."""
    for earlier in (task for run in _kept(out) if run["label"] == label for task in run["tasks"]):
        for name, value in asked.items():
            if earlier["task"] in tasks and earlier.get(name, value) != value:
                flag = name.replace("_", "-")
                raise ValueError(f"'{out}' holds {earlier['task']} with {flag} {earlier[name]}: give another file")


def _print_speculative(result: dict[str, Any]) -> None:
    line = (
        f"{result['task']}: {result['speedup']:.2f}x plain decoding with {result['draft']} "
        f"({result['tokens_per_second']:.0f} tokens/s, {result['acceptance']:.0%} of drafted tokens accepted, "
        f"{result['tokens_per_pass']:.1f} tokens a pass), tokens identical: {'yes' if result['identical'] else 'NO'}; "
        f"batch of {result['batch']['rows']}: "
        + ("too short to time" if result["batch"]["speedup"] is None else f"{result['batch']['speedup']:.2f}x")
    )
    if "speedup_vs_hf" in result:
        line += f"; {result['speedup_vs_hf']:.1f}x transformers"
    if "speedup_vs_hf_early_exit" in result:  # a model of few layers has none
        exit = result["settings"]["transformers early exit"]
        line += f", {result['speedup_vs_hf_early_exit']:.1f}x its early exit (best of a few, {exit})"
    if "speedup_vs_economize" in result:
        line += f"; {result['speedup_vs_economize']:.1f}x economize's lookup"
    if "best_static" in result:
        line += (
            f"; best fixed draft {result['best_static']}: {result['best_static_speedup']:.2f}x; "
            f"where drafts fail: {result['hopeless']:.2f}x"
        )
    print(line)


def _print_decode(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("contender")
    table.add_column("tokens/s", justify="right")
    table.add_column("ms per step", justify="right")
    for name, speed in result["tokens_per_second"].items():
        table.add_row(name, f"{speed:.1f}", f"{result['step_milliseconds'][name]:.2f}")
    Console().print(table)
    print(
        f"\n{result['ratio_vs_hf_same_dtype']:.2f}x transformers in bfloat16, "
        f"{result['ratio_vs_hf_best']:.2f}x its faster dtype, {result['ratio_vs_hf_float32']:.2f}x in float32\n"
        f"{result['roofline_fraction']:.0%} of the memory bandwidth ({result['bandwidth_gb_per_second']:.1f} GB/s); "
        f"half of the layers: {result['half_depth_speedup']:.2f}x, "
        f"{result['half_depth_realised']:.0%} of the ideal {result['half_depth_ideal']:.2f}x\n"
        f"float32 tokens identical to transformers': {'yes' if result['identical'] else 'NO'}"
    )
    if "memory" in result:
        for who in ("layerwise", "transformers"):
            used = result["memory"][who]
            print(
                f"{who}: {used['peak_mib']:.0f} MiB peak at {result['memory']['context']} tokens of context "
                f"(weights {used['weights_mib']:.0f}, cache {used['cache_mib']:.0f}, "
                f"{used['before_load_mib']:.0f} before loading)"
            )
