"""layerwise generate: answer one prompt with a chosen plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli import options


def run(
    prompt: Annotated[str, typer.Argument(help="What to answer; put into the model's chat format.")],
    model: options.Model = None,
    adapter: options.Adapter = None,
    plan: options.PlanText = None,
    draft: options.DraftText = None,
    early_exit: Annotated[
        str | None,
        typer.Option(help="Leave after so many layers where they are that sure, such as 8@0.9; not lossless."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is more varied.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens that hold this much probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    engine: options.Engine = options.EngineChoice.auto,
    dtype: options.Dtype = options.DtypeChoice.auto,
    device: options.Device = "auto",
    html: Annotated[Path | None, typer.Option(help="Also write a page that shows the depth of each token.")] = None,
    json: options.Json = False,
) -> None:
    """Answer a prompt; the text appears as it is made, then a line with speed and depth."""
    if not prompt.strip():
        raise ValueError("the prompt is empty: give some text in quotes")
    options.check_writable(html)
    if early_exit is not None:
        from layerwise.decoding.drafts import Draft

        if draft is not None:
            raise ValueError("give either --draft, which is verified, or --early-exit, which is not")
        Draft.early_exit(early_exit)
    from layerwise.decoding.text import Sampling, answer
    from layerwise.sources import dtype_text

    sampling = Sampling(temperature, top_p, seed)
    loaded, tokenizer = options.load(model, adapter, plan, engine, dtype, draft, device)
    if early_exit is not None:
        loaded.draft = Draft.early_exit(early_exit, loaded.depth)

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    result = answer(loaded, tokenizer, prompt, system, max_new_tokens, sampling, show)
    print(f"\n\n{result.summary()} ({loaded.runtime.engine.name} engine)")
    if html is not None:
        from layerwise.report.html import Page, Token, render

        page = Page(
            model=loaded.runtime.backbone.model.config.name_or_path,
            layers=loaded.depth,
            prompt=prompt,
            tokens=tuple(map(Token, result.pieces, result.plans, result.sources)),
            tokens_per_second=result.tokens_per_second,
            stop_reason=result.stop_reason,
        )
        html.write_text(render(page), encoding="utf-8")
        print(f"wrote {html}")
    if json:
        options.print_json(result.to_dict() | {"engine": loaded.runtime.engine.name, "dtype": dtype_text(loaded.dtype)})
