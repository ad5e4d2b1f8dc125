"""What every training is told; what each method adds is in `recipes.py`.

One dataclass a recipe, from which the command line takes its flags and defaults. Kept apart from the code that trains,
so that `layerwise train --help` need not import torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, ClassVar, Literal

from layerwise.plan import Plan

Precision = Literal["auto", "bfloat16", "float32"]
LearningRateSchedule = Literal["cosine", "linear", "constant_with_warmup"]


def computed_in(precision: Precision, device: Any = None) -> str:
    """The numbers that a precision means on a device; if none is given, on the GPU if there is one, else the CPU."""
    from layerwise.sources import fast_dtype, read_device

    return fast_dtype(read_device("auto") if device is None else device) if precision == "auto" else precision


def about(text: str) -> dict[str, str]:
    """Metadata of a field: what the command line says of it."""
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class Options:
    """A configuration that can be written down."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Resumable(Options):
    """A configuration, with `out` in it, of a training that can be stopped and resumed."""

    out: str
    free_to_change: ClassVar[tuple[str, ...]] = ("out", "save_every", "log_every")  # when it is resumed

    def check_resumable(self, saved: dict[str, Any]) -> None:
        """Refuse to resume a training whose `to_dict` was `saved`, unless it would go on as it began."""
        defaults = {one.name: one.default for one in fields(self)}  # of options that are younger than the training
        for name, value in self.to_dict().items():
            began = saved.get(name, defaults[name])
            if name not in self.free_to_change and began != value:
                raise ValueError(
                    f"the training in '{self.out}' began with {name.replace('_', '-')} {began}, not {value}: "
                    "resume it with the same options, or give another folder"
                )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Resumable):
    """What every training is told.

    One step uses `gradient_accumulation` batches of at most `tokens_per_batch` tokens, padding included, however many
    processes share them: they are the sizes of the *global* batch.

    Raises:
        ValueError: a value is out of range, or there is no such file of examples.
    """

    data: str = field(metadata=about("JSON lines file of examples, each with 'messages'."))
    out: str = field(metadata=about("Folder for the adapter, with checkpoints inside."))
    model: str | None = field(
        default=None, metadata=about("A name from 'layerwise models', a folder, or a Hugging Face id.")
    )
    steps: int | None = field(default=None, metadata=about("How many optimizer steps to train; instead of epochs."))
    epochs: float | None = field(
        default=None, metadata=about("How often to go through the data; 1 if steps are not given.")
    )
    tokens_per_batch: int = field(
        default=2048, metadata=about("Most tokens of a batch, padding included, over all processes.")
    )
    gradient_accumulation: int = field(default=4, metadata=about("Batches of an optimizer step."))
    learning_rate: float = field(default=1e-4, metadata=about("Highest learning rate."))
    learning_rate_schedule: LearningRateSchedule = field(
        default="cosine", metadata=about("How the learning rate falls after the warm-up.")
    )
    warmup: int = field(default=20, metadata=about("Steps over which the learning rate rises."))
    max_length: int = field(default=1024, metadata=about("Examples of more tokens are left out."))
    precision: Precision = field(
        default="auto",
        metadata=about("Numbers to compute in, auto: bfloat16 where the processor has it. What is trained is float32."),
    )
    seed: int = field(default=0, metadata=about("Seed of batches, LoRA and layer dropout."))
    save_every: int = field(default=200, metadata=about("Steps between checkpoints."))
    log_every: int = field(default=10, metadata=about("Steps between lines of progress."))

    def __post_init__(self) -> None:
        require(self.steps is None or self.epochs is None, "give either steps or epochs, not both")
        for name in ("steps", "epochs", "tokens_per_batch", "gradient_accumulation", "save_every", "log_every"):
            value = getattr(self, name)
            require(
                value is None or 0 < value < inf, f"{name.replace('_', '-')} must be above 0, and finite: not {value}"
            )
        require(0 < self.learning_rate < inf, f"learning-rate must be above 0, and finite: not {self.learning_rate}")
        require(self.warmup >= 0, f"warmup must be 0 or more steps, not {self.warmup}")
        require(self.max_length >= 2, f"max-length must be 2 tokens or more, not {self.max_length}")
        require(0 <= self.seed < 2**32, f"seed must be between 0 and 2^32 - 1, not {self.seed}")
        choice("precision", self.precision, Precision)
        choice("learning-rate-schedule", self.learning_rate_schedule, LearningRateSchedule)
        require(Path(self.data).is_file(), f"there is no file '{self.data}': give a file of JSON lines")
        require(not Path(self.out).is_file(), f"'{self.out}' is a file: give a folder to write the adapter to")


def layers_of(text: str, layers: int | None = None) -> tuple[int, ...]:
    """The layers that a text such as "0-1 28-29" names, for a model of `layers` layers if that is known.

    Raises:
        ValueError: it names none, or one that is not there.
    """
    return tuple(sorted({visit.layer for visit in Plan.parse(text, layers)})) if text.strip() else ()


def require(holds: bool, otherwise: str) -> None:
    """ValueError with a line that says what to do, unless this holds."""
    if not holds:
        raise ValueError(otherwise)


def choice(name: str, value: str, kind: Any) -> None:
    """ValueError unless the value is one of the Literal `kind`."""
    require(value in kind.__args__, f"no {name} '{value}': choose {', '.join(kind.__args__)}")
