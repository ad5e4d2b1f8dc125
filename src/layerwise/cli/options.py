"""Options that several commands share, and what becomes of them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from layerwise.model.causal_lm import LayerwiseForCausalLM


class EngineChoice(StrEnum):
    auto = "auto"
    eager = "eager"
    compiled = "compiled"


class DtypeChoice(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


Model = Annotated[str | None, typer.Option(help="A name from 'layerwise models', a folder, or a Hugging Face id.")]
Adapter = Annotated[str | None, typer.Option(help="A folder that save_pretrained wrote.")]
PlanText = Annotated[str | None, typer.Option("--plan", help='Layers to run, such as "0-5 7*2 8-29"; default: all.')]
DraftText = Annotated[
    str | None,
    typer.Option(
        "--draft",
        help='Who drafts: auto, off, ngram, corpus, tree, head, policy, "exit:8", "exit:8,6" or "plan:0-5 20-29".',
    ),
]
Engine = Annotated[EngineChoice, typer.Option(help="How layers are run; auto is compiled where there is a compiler.")]
Dtype = Annotated[
    DtypeChoice, typer.Option(help="Numbers to compute in; auto is bfloat16 where the processor has it, else float32.")
]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, or any other device of torch.")]
Json = Annotated[bool, typer.Option("--json", help="End the output with one JSON object on the last line.")]


def note(line: str) -> None:
    """A line for the person who waits; on stderr, so that it never mixes with results."""
    print(line, file=sys.stderr, flush=True)


def load(
    model: str | None,
    adapter: str | None,
    plan: str | None,
    engine: EngineChoice,
    dtype: DtypeChoice,
    draft: str | None = None,
    device: str = "cpu",
) -> tuple[LayerwiseForCausalLM, PreTrainedTokenizerBase]:
    """The model and tokenizer that the options name; says on stderr what takes long."""
    from layerwise.plan import Plan

    # A slip in a text is told before seconds are spent on loading.
    if plan is not None:
        Plan.parse(plan)
    if draft is not None:
        from layerwise.decoding.drafts import Draft

        Draft.parse(draft)
    quiet()
    from layerwise.hub import base_name, from_pretrained
    from layerwise.sources import load_tokenizer, model_path, read_device

    where = read_device(device)
    name = base_name(model, adapter)
    model_path(name, note)
    loaded = from_pretrained(
        model,
        adapter=adapter,
        plan=plan,
        dtype=dtype_name(dtype, where),
        engine=engine.value,
        device=where,
        notify=note,
    )
    if draft is not None:
        loaded.draft = draft
    return loaded, load_tokenizer(name)


def dtype_name(dtype: DtypeChoice, device: torch.device | str = "cpu") -> str:
    """The numbers that a choice means on a device."""
    from layerwise.sources import fast_dtype

    return fast_dtype(device) if dtype is DtypeChoice.auto else dtype.value


def refuse_given(context: typer.Context, names: Iterable[str], owner: str) -> None:
    """Refuse these options if they were typed: they belong to `owner`, another choice, and would be ignored."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} belongs to {owner}: leave it out")


def refuse_unchosen(context: typer.Context, choice: str, chosen: str, owners: Mapping[str, Iterable[str]]) -> None:
    """Refuse options that were typed though `chosen` is not among the values of --`choice` that `owners` gives them."""
    for name, values in owners.items():
        if chosen not in values:
            refuse_given(context, [name], " and ".join(f"--{choice} {value}" for value in values))


def names_of(text: str, known: Collection[str], what: str = "task") -> list[str]:
    """The names in `text`, separated by commas, each once.

    Raises:
        ValueError: one is not among those `known`.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"there is no {what} '{unknown[0]}': choose from {', '.join(known)}")
    return names


def command() -> str:
    """What was typed, for the result that came of it."""
    return shlex.join(["layerwise", *sys.argv[1:]])


def check_writable(*files: Path | None) -> None:
    """Refuse a file to write whose folder is not there, or that is a folder itself; None is no file."""
    for file in files:
        if file is not None and file.is_dir():
            raise ValueError(f"cannot write '{file}': it is a folder, name a file in it")
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"cannot write '{file}': the folder '{file.parent}' does not exist")


def quiet() -> None:
    """Keep progress bars and advice of the libraries below us out of the output."""
    import warnings

    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils.logging import set_verbosity_error
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    set_verbosity_error()
    for advice in (".*is_gradient_checkpointing.*", ".*base_model_name_or_path.*was renamed.*"):
        warnings.filterwarnings("ignore", message=advice)


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)
