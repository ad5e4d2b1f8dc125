"""layerwise train: training recipes. The flags are the fields of the recipe's dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from enum import StrEnum
from typing import Annotated, Any, get_type_hints

import typer

from layerwise.cli import options
from layerwise.training.curriculum import RoutedAttentionConfig, RoutedTextConfig
from layerwise.training.recipes import DrLLMConfig, FrozenConfig, FrozenRecipe, LayerRouteConfig, LayerSkipConfig

app = typer.Typer(help="Train a model to spend its layers well.", no_args_is_help=True, rich_markup_mode=None)


class RecipeChoice(StrEnum):
    paper = "paper"
    frozen = "frozen"


# The objectives of LayerRoute that an option is of, if not of all.
ROUTED = ("paper", "budget", "quality")
OBJECTIVES_OF: dict[str, tuple[str, ...]] = {
    "penalty": ("paper", "quality"),
    "target": ("budget",),
    "tolerance": ("quality",),
    "dual_rate": ("budget", "quality"),
    **dict.fromkeys(
        (
            "candidates",
            "keep",
            "start_closed",
            "start_bias",
            "hold",
            "hold_full",
            "settle",
            "bridge_rank",
            "leave",
            "neurons",
            "mend_rank",
            "margin",
            "head_rank",
            "adapter",
        ),
        ROUTED,
    ),
    **dict.fromkeys(("reads", "router_learning_rate"), ROUTED),
}
BY_GRADIENT = ("penalty", "dual_rate", "router_learning_rate")  # not for routers that are fitted
# The same for the forms of Dr.LLM's routers, the modes of the recall model, its tasks, and the methods of routed text.
FORMS_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gamma", "beta"), ("per-layer",)),
    **dict.fromkeys(("questions", "screen", "candidates", "threshold", "bridge_rank"), ("menu",)),
}
MODES_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("rises", "floor", "order"), ("curriculum",)),
    **dict.fromkeys(("penalty", "penalty_on", "blend"), ("curriculum", "joint")),
    "start_length": ("curriculum", "attention"),
}
TASKS_OF = dict.fromkeys(("pairs", "queries"), ("mqar",))
METHODS_OF = {"fit_texts": ("fit",)} | dict.fromkeys(("penalty", "penalty_on", "rises", "floor"), ("curriculum",))


@app.callback()
def _train() -> None:
    """Train a model to spend its layers well."""


def _with_flags(*configs: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes `**chosen` one flag for each field of the dataclasses `configs`.

    `data` is the argument; a field's help is in its metadata. typer reads a function's signature, so that is what is
    made here.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        kinds = {name: kind for config in configs for name, kind in get_type_hints(config).items()}
        flags = []
        for one in [one for config in configs for one in fields(config)]:
            text = one.metadata["help"]
            info = typer.Argument(help=text) if one.name == "data" else typer.Option(help=text)
            default = inspect.Parameter.empty if one.default is MISSING else one.default
            flags.append(
                inspect.Parameter(
                    one.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=Annotated[kinds[one.name], info],
                )
            )
        kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        everything = sorted([*flags, *kept], key=lambda p: p.default is not inspect.Parameter.empty)
        command.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in everything]
        )
        command.__annotations__ = {p.name: p.annotation for p in everything}
        return command

    return decorate


@app.command("layerskip")
@_with_flags(LayerSkipConfig, FrozenRecipe)
def layerskip(
    context: typer.Context,
    *,
    recipe: Annotated[
        RecipeChoice, typer.Option(help="paper: layer dropout and early exits; frozen: exits of an untouched model.")
    ] = RecipeChoice.paper,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    json: options.Json = False,
    **chosen: Any,
) -> None:
    """Teach early layers to predict, as LayerSkip does (arXiv 2404.16710): exits for self-speculative decoding."""
    if recipe is RecipeChoice.frozen:
        options.refuse_given(context, _only(LayerSkipConfig, FrozenConfig), "--recipe paper")
        config: Any = FrozenConfig(**{one.name: chosen[one.name] for one in fields(FrozenConfig)})
    else:
        options.refuse_given(context, _only(FrozenConfig, LayerSkipConfig), "--recipe frozen")
        config = LayerSkipConfig(**{one.name: chosen[one.name] for one in fields(LayerSkipConfig)})
        options.refuse_unchosen(context, "curriculum", config.curriculum, {"every": ("rotational",)})
    options.quiet()
    from layerwise.sources import model_path

    model_path(config.model, options.note)
    if recipe is RecipeChoice.frozen:
        from layerwise.training import frozen as trained
    else:
        from layerwise.training import layerskip as trained
    out = trained.train(config, options.note, resume)
    print(f"wrote {out}")
    if json:
        options.print_json({"adapter": str(out), "config": config.to_dict()})


@app.command("layerroute")
@_with_flags(LayerRouteConfig)
def layerroute(
    context: typer.Context,
    *,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    json: options.Json = False,
    **chosen: Any,
) -> None:
    """Teach routers which layers a prompt needs, as LayerRoute does (arXiv 2606.01838), with a LoRA for the rest."""
    config = LayerRouteConfig(**chosen)
    options.refuse_unchosen(context, "objective", config.objective, OBJECTIVES_OF)
    if config.fits:
        options.refuse_given(context, BY_GRADIENT, "--fits 0")
    options.quiet()
    from layerwise.sources import model_path

    model_path(config.model, options.note)
    from layerwise.training import layerroute as trained

    out = trained.train(config, options.note, resume)
    print(f"wrote {out}")
    if json:
        options.print_json({"adapter": str(out), "config": config.to_dict()})


@app.command("drllm")
@_with_flags(DrLLMConfig)
def drllm(
    context: typer.Context, *, device: options.Device = "auto", json: options.Json = False, **chosen: Any
) -> None:
    """Teach routers the paths that 'layerwise search' found, as Dr.LLM does (arXiv 2510.12773).

    The model is left as it is. A run that was stopped goes on where it was when the same command is given again.
    """
    config = DrLLMConfig(**chosen)
    options.refuse_unchosen(context, "form", config.form, FORMS_OF)
    options.quiet()
    from layerwise.sources import model_path, read_device

    where = read_device(device)
    model_path(config.model, options.note)
    from layerwise.training import drllm as trained

    out = trained.train(config, options.note, where)
    print(f"wrote {out}")
    if json:
        options.print_json({"adapter": str(out), "config": config.to_dict()})


@app.command("routed-attention")
@_with_flags(RoutedAttentionConfig)
def routed_attention(
    context: typer.Context,
    *,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    json: options.Json = False,
    **chosen: Any,
) -> None:
    """Teach a small model to attend only where recall needs it: first the task, then a rising penalty on attention."""
    config = RoutedAttentionConfig(**chosen)
    options.refuse_unchosen(context, "mode", config.mode, MODES_OF)
    options.refuse_unchosen(context, "task", config.task, TASKS_OF)
    options.quiet()
    from layerwise.training import routed_attention as trained

    result = trained.train(config, options.note, resume)
    print(f"wrote {config.out}: accuracy {result['accuracy']:.1%} at {result['usage']:.3%} usage")
    if json:
        options.print_json({name: value for name, value in result.items() if name != "history"})


@app.command("routed-text")
@_with_flags(RoutedTextConfig)
def routed_text(
    context: typer.Context,
    *,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    device: options.Device = "auto",
    json: options.Json = False,
    **chosen: Any,
) -> None:
    """Teach a pretrained model where it needs its attention: routers and short convolutions in its frozen layers."""
    config = RoutedTextConfig(**chosen)
    options.refuse_unchosen(context, "method", config.method, METHODS_OF)
    options.quiet()
    from layerwise.sources import model_path, read_device

    where = read_device(device)
    model_path(config.model, options.note)
    from layerwise.training import routed_text as trained

    result = trained.train(config, options.note, resume, where)
    print(
        f"wrote {config.out}: perplexity {result['perplexity']:.2f} at {result['usage']:.1%} attention, "
        f"{result['base_perplexity']:.2f} with all"
    )
    if json:
        options.print_json({name: value for name, value in result.items() if name != "history"})


def _only(one: type, other: type) -> list[str]:
    """The options of one configuration that the other has not."""
    return [option.name for option in fields(one) if option.name not in {theirs.name for theirs in fields(other)}]
