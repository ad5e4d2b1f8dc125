"""What a training is told; one dataclass a recipe, from which the command line takes its flags and defaults.

Kept apart from the code that trains, so that `layerwise train --help` need not import torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, ClassVar, Literal

from layerwise.plan import Plan

Dropout = Literal["constant", "growing", "decaying"]
Curriculum = Literal["rotational", "gradual"]
Objective = Literal["paper", "budget", "quality", "none"]
Reads = Literal["mean", "last"]
Left = Literal["nothing", "attention", "neurons"]
Precision = Literal["auto", "bfloat16", "float32"]
Form = Literal["per-layer", "menu"]
LearningRateSchedule = Literal["cosine", "linear", "constant_with_warmup"]


def computed_in(precision: Precision, device: Any = None) -> str:
    """The numbers that a precision means on a device; if none is given, on the GPU if there is one, else the CPU."""
    from layerwise.sources import fast_dtype, read_device

    return fast_dtype(read_device("auto") if device is None else device) if precision == "auto" else precision


def _help(text: str) -> dict[str, str]:
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
class LayerSkipRecipe:
    """The choices of the method itself (arXiv 2404.16710); the schedules are in `training.schedules`.

    Raises:
        ValueError: a value is out of range.
    """

    p_max: float = field(default=0.1, metadata=_help("Rate at which the last layer is dropped."))
    dropout: Dropout = field(default="constant", metadata=_help("How the drop rate changes over training."))
    inverse_survival: bool = field(
        default=False, metadata=_help("Scale what surviving layers add by 1/(1-p), as the successor paper does.")
    )
    e_scale: float = field(
        default=1.0, metadata=_help("How much early exits count in the loss, beside the last layer.")
    )
    curriculum: Curriculum = field(default="rotational", metadata=_help("Which exits take part in a step."))
    every: int = field(default=8, metadata=_help("Rotational curriculum: every so many layers have an exit in a step."))

    def __post_init__(self) -> None:
        _require(0 <= self.p_max < 1, f"p-max must be at least 0 and below 1, not {self.p_max}")
        _require(self.e_scale >= 0, f"e-scale must be 0 or more, not {self.e_scale}")
        _require(self.every >= 1, f"every must be 1 or more, not {self.every}")
        _choice("dropout", self.dropout, Dropout)
        _choice("curriculum", self.curriculum, Curriculum)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Resumable):
    """What every training is told.

    One step uses `gradient_accumulation` batches of at most `tokens_per_batch` tokens, padding included, however many
    processes share them: they are the sizes of the *global* batch.

    Raises:
        ValueError: a value is out of range, or there is no such file of examples.
    """

    data: str = field(metadata=_help("JSON lines file of examples, each with 'messages'."))
    out: str = field(metadata=_help("Folder for the adapter, with checkpoints inside."))
    model: str | None = field(
        default=None, metadata=_help("A name from 'layerwise models', a folder, or a Hugging Face id.")
    )
    steps: int | None = field(default=None, metadata=_help("How many optimizer steps to train; instead of epochs."))
    epochs: float | None = field(
        default=None, metadata=_help("How often to go through the data; 1 if steps are not given.")
    )
    tokens_per_batch: int = field(
        default=2048, metadata=_help("Most tokens of a batch, padding included, over all processes.")
    )
    gradient_accumulation: int = field(default=4, metadata=_help("Batches of an optimizer step."))
    learning_rate: float = field(default=1e-4, metadata=_help("Highest learning rate."))
    learning_rate_schedule: LearningRateSchedule = field(
        default="cosine", metadata=_help("How the learning rate falls after the warm-up.")
    )
    warmup: int = field(default=20, metadata=_help("Steps over which the learning rate rises."))
    max_length: int = field(default=1024, metadata=_help("Examples of more tokens are left out."))
    precision: Precision = field(
        default="auto",
        metadata=_help("Numbers to compute in, auto: bfloat16 where the processor has it. What is trained is float32."),
    )
    seed: int = field(default=0, metadata=_help("Seed of batches, LoRA and layer dropout."))
    save_every: int = field(default=200, metadata=_help("Steps between checkpoints."))
    log_every: int = field(default=10, metadata=_help("Steps between lines of progress."))

    def __post_init__(self) -> None:
        _require(self.steps is None or self.epochs is None, "give either steps or epochs, not both")
        for name in ("steps", "epochs", "tokens_per_batch", "gradient_accumulation", "save_every", "log_every"):
            value = getattr(self, name)
            _require(
                value is None or 0 < value < inf, f"{name.replace('_', '-')} must be above 0, and finite: not {value}"
            )
        _require(0 < self.learning_rate < inf, f"learning-rate must be above 0, and finite: not {self.learning_rate}")
        _require(self.warmup >= 0, f"warmup must be 0 or more steps, not {self.warmup}")
        _require(self.max_length >= 2, f"max-length must be 2 tokens or more, not {self.max_length}")
        _require(0 <= self.seed < 2**32, f"seed must be between 0 and 2^32 - 1, not {self.seed}")
        _choice("precision", self.precision, Precision)
        _choice("learning-rate-schedule", self.learning_rate_schedule, LearningRateSchedule)
        _require(Path(self.data).is_file(), f"there is no file '{self.data}': give a file of JSON lines")
        _require(not Path(self.out).is_file(), f"'{self.out}' is a file: give a folder to write the adapter to")


@dataclass(frozen=True, kw_only=True)
class LayerSkipConfig(LayerSkipRecipe, TrainingConfig):
    """A training by the recipe of the paper.

    Raises:
        ValueError: a value is out of range, or there is no such file of examples.
    """

    rank: int = field(default=8, metadata=_help("LoRA rank, alpha is twice as much; 0 trains all the weights."))

    def __post_init__(self) -> None:
        LayerSkipRecipe.__post_init__(self)
        TrainingConfig.__post_init__(self)
        _require(self.rank >= 0, f"rank must be 0 (train all weights) or more, not {self.rank}")


@dataclass(frozen=True, kw_only=True)
class FrozenRecipe:
    """The choices of the frozen recipe, see `training.frozen`.

    Raises:
        ValueError: a value is out of range.
    """

    adapter: str | None = field(default=None, metadata=_help("Recipe frozen: the adapter whose model is drafted for."))
    exit: int = field(
        default=0, metadata=_help("Recipe frozen: layers the current token runs before the head; 0 is its embedding.")
    )
    vocabulary: int = field(default=8192, metadata=_help("Recipe frozen: the most tokens that can be drafted."))
    unroll: int = field(default=3, metadata=_help("Recipe frozen: drafted tokens in a row that are trained."))
    max_new_tokens: int = field(default=160, metadata=_help("Recipe frozen: longest answer the model writes itself."))
    ngrams: int = field(
        default=6, metadata=_help("Recipe frozen: longest n-grams of the answers, which draft too; 0 keeps none.")
    )

    def __post_init__(self) -> None:
        _require(self.exit >= 0, f"exit must be 0 layers or more, not {self.exit}")
        _require(0 <= self.ngrams <= 16, f"ngrams must be 0 to 16 tokens, not {self.ngrams}")
        for name in ("vocabulary", "unroll", "max_new_tokens"):
            value = getattr(self, name)
            _require(value > 0, f"{name.replace('_', '-')} must be above 0, not {value}")


@dataclass(frozen=True, kw_only=True)
class FrozenConfig(FrozenRecipe, TrainingConfig):
    """A training of an exit head for a model that is left as it is.

    Raises:
        ValueError: a value is out of range, or there is no such file of prompts.
    """

    def __post_init__(self) -> None:
        FrozenRecipe.__post_init__(self)
        TrainingConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class LayerRouteRecipe:
    """The choices of the method itself (arXiv 2606.01838); objectives are told apart in `training.layerroute`.

    Raises:
        ValueError: a value is out of range.
    """

    objective: Objective = field(default="quality", metadata=_help("What makes gates close; none trains no gates."))
    penalty: float = field(
        default=1.0, metadata=_help("Paper: price of a soft gate. Quality: the price it starts with.")
    )
    target: float = field(default=0.85, metadata=_help("Budget: mean share of layers to run."))
    tolerance: float = field(
        default=0.02, metadata=_help("Quality: nats a token that an input may lose against full depth.")
    )
    dual_rate: float = field(
        default=0.05, metadata=_help("Budget, quality: how fast the price follows its constraint.")
    )
    candidates: int = field(
        default=0, metadata=_help("Only so many layers, those that cost least on examples, may be skipped; 0: all.")
    )
    keep: str = field(default="", metadata=_help('Layers that every prompt runs, such as "0-1 28-29".'))
    start_closed: str | None = field(
        default=None, metadata=_help("Layers whose gates begin closed; paper: the middle third, else none.")
    )
    hold: float = field(
        default=0.0,
        metadata=_help(
            "Share of the steps, at first, in which gates stay as they begin; LoRA learns alone. 1: with fits."
        ),
    )
    hold_full: float = field(
        default=0.0, metadata=_help("Share of the rows that run every layer all the same while gates are held.")
    )
    settle: float = field(
        default=1.0, metadata=_help("Share of the steps after which gates learn no more; LoRA learns alone again.")
    )
    fits: int = field(
        default=0,
        metadata=_help("Quality: how often after the held steps routers are fitted to measured gaps; 0: by gradient."),
    )
    bridge_rank: int = field(
        default=0, metadata=_help("With fits: rank of the maps that stand in for layers that may be skipped; 0: none.")
    )
    leave: Left = field(
        default="nothing",
        metadata=_help(
            "With fits: what a closed gate leaves of a layer. Attention: skip its MLP; neurons: a part of it."
        ),
    )
    neurons: float = field(
        default=0.3, metadata=_help("Leave neurons: share of all the MLPs' neurons that closed gates leave out.")
    )
    mend_rank: int = field(
        default=0, metadata=_help("Leave neurons: rank of what mends the MLPs that lost some; 0 for nothing.")
    )
    margin: float = field(
        default=1.0,
        metadata=_help("Leave neurons, hold 1: inputs skip that would bear so many times the neurons left out."),
    )
    head_rank: int = field(
        default=0,
        metadata=_help("With fits: the LM head has a gate too, closed for one that looks at so many numbers; 0: none."),
    )
    start_bias: float = field(default=1.0, metadata=_help("Bias of gates that begin open; closed ones have its minus."))
    reads: Reads | None = field(
        default=None, metadata=_help("What a router sees: mean, or last token, of the prompt; paper: mean, else last.")
    )
    router_learning_rate: float | None = field(
        default=None, metadata=_help("Highest learning rate of the routers, if not that of the LoRA.")
    )
    weight_decay: float = field(default=0.01, metadata=_help("Weight decay of LoRA, bridges and routers."))
    lora_dropout: float = field(default=0.05, metadata=_help("Dropout of the LoRA's inputs."))
    rank: int = field(default=8, metadata=_help("LoRA rank, alpha is twice as much."))

    def __post_init__(self) -> None:
        _choice("objective", self.objective, Objective)
        if self.reads is not None:
            _choice("reads", self.reads, Reads)
        _choice("leave", self.leave, Left)
        _require(0 < self.target <= 1, f"target must be above 0 and at most 1, not {self.target}")
        for name in ("tolerance", "start_bias"):
            value = getattr(self, name)
            _require(value > 0, f"{name.replace('_', '-')} must be above 0, not {value}")
        for name in (
            "penalty",
            "dual_rate",
            "weight_decay",
            "candidates",
            "fits",
            "bridge_rank",
            "mend_rank",
            "head_rank",
        ):
            value = getattr(self, name)
            _require(value >= 0, f"{name.replace('_', '-')} must be 0 or more, not {value}")
        _require(
            not self.fits or (self.objective == "quality" and self.reads != "mean" and self.settle == 1),
            "fits are of the objective quality: leave out settle, and reads mean",
        )
        _require(
            not self.fits or bool(self.keep.strip()) or self.candidates > 0 or self.leave == "neurons",
            "fits answer without all layers that may be skipped: say by keep which must run, or give candidates",
        )
        _require(not self.bridge_rank or self.fits > 0, "bridges are fitted with the routers: give fits too")
        _require(self.leave == "nothing" or self.fits > 0, f"leaving {self.leave} is of fitted routers: give fits too")
        _require(0 < self.neurons < 1, f"neurons must be a share above 0 and below 1, not {self.neurons}")
        _require(
            1 <= self.margin < 1 / self.neurons or self.margin == 1,
            f"margin must be at least 1, and below {1 / self.neurons:.3g} for that many neurons, not {self.margin}",
        )
        _require(
            self.margin == 1 or (self.leave == "neurons" and self.hold == 1),
            "a margin is of neurons, fitted when the LoRA has learnt: give leave neurons and hold 1 too",
        )
        _require(
            self.leave != "neurons" or not (self.start_closed or self.candidates),
            "neurons are chosen in all layers but those of keep: leave out start-closed and candidates",
        )
        _require(not self.mend_rank or self.leave == "neurons", "mends are of thin MLPs: give leave neurons too")
        _require(
            self.leave != "neurons" or not self.bridge_rank,
            "bridges stand in for layers or MLPs left out as a whole: leave out bridge-rank, or leave neurons",
        )
        _require(
            not self.head_rank or (self.fits > 0 and self.hold == 1 == self.hold_full),
            "a thin head is fitted when the LoRA has learnt: give fits, hold 1 and hold-full 1 too",
        )
        rate = self.router_learning_rate
        _require(rate is None or rate > 0, f"router-learning-rate must be above 0, not {rate}")
        _require(0 <= self.lora_dropout < 1, f"lora-dropout must be at least 0 and below 1, not {self.lora_dropout}")
        _require(0 <= self.hold <= 1, f"hold must be 0 to 1, not {self.hold}")
        _require(self.hold < 1 or self.fits > 0, "routers learn nothing if hold is 1: lower it, or let fits fit them")
        _require(0 <= self.hold_full <= 1, f"hold-full must be 0 to 1, not {self.hold_full}")
        _require(
            self.hold < self.settle <= 1 or self.hold == 1 == self.settle,
            f"settle must be above hold ({self.hold}) and at most 1, not {self.settle}",
        )
        _require(self.rank >= 1, f"rank must be 1 or more, not {self.rank}")
        _require(
            not self.candidates or (self.objective != "none" and self.start_closed is None),
            "candidates choose the layers whose gates may close: leave out start-closed, and objective none",
        )
        layers_of(self.keep)
        layers_of(self.start_closed or "")


@dataclass(frozen=True, kw_only=True)
class LayerRouteConfig(LayerRouteRecipe, TrainingConfig):
    """A training of routers and LoRA.

    Raises:
        ValueError: a value is out of range, or there is no such file of examples.
    """

    learning_rate: float = field(default=2e-4, metadata=_help("Highest learning rate."))
    seed: int = field(default=0, metadata=_help("Seed of batches and LoRA."))
    adapter: str | None = field(
        default=None, metadata=_help("With hold 1: route the LoRA of this adapter, which is left as it is; no steps.")
    )

    def __post_init__(self) -> None:
        LayerRouteRecipe.__post_init__(self)
        TrainingConfig.__post_init__(self)
        if self.adapter is not None:
            _require(self.hold == 1 == self.hold_full, "an adapter's LoRA learns no more: give hold 1 and hold-full 1")
            _require(
                (Path(self.adapter) / "adapter_config.json").is_file(),
                f"there is no LoRA in '{self.adapter}': give the folder of an adapter, or leave it out",
            )


@dataclass(frozen=True, kw_only=True)
class RouterRecipe:
    """How routers learn from labelled paths (arXiv 2510.12773); see `training.routers`.

    Raises:
        ValueError: a value is out of range.
    """

    form: Form = field(default="menu", metadata=_help("A router for each layer, or one that picks from a menu."))
    units: int = field(default=128, metadata=_help("Hidden units of a router."))
    epochs: int = field(default=25, metadata=_help("How often to go through the questions."))
    batch: int = field(default=16, metadata=_help("Questions of an optimizer step."))
    learning_rate: float = field(default=1e-3, metadata=_help("Highest learning rate."))
    warmup: int = field(
        default=500, metadata=_help("Steps over which the learning rate rises, at most a tenth of them.")
    )
    weight_decay: float = field(default=0.01, metadata=_help("Weight decay."))
    gamma: float = field(default=2.0, metadata=_help("Per layer: exponent of the focal loss."))
    beta: float = field(
        default=0.9999, metadata=_help("Per layer: of the class weights; 1 is inverse frequency, the paper has 0.999.")
    )
    questions: int = field(
        default=256, metadata=_help("Menu: training questions of each built-in task that plans are tried on.")
    )
    screen: int = field(default=24, metadata=_help("Menu: the first of these, that choose single edits."))
    candidates: int = field(
        default=28, metadata=_help("Menu: single edits that are tried; with bridges every skip is, and half as many.")
    )
    bridge_rank: int = field(
        default=0, metadata=_help("Menu: rank of the bridges that cross skipped layers; 0 for none.")
    )
    threshold: float = field(
        default=0.5, metadata=_help("Menu: least probability of a plan; what is less sure runs all layers.")
    )
    saved: float = field(
        default=0.1,
        metadata=_help(
            "Share of the layers to save. Menu: chooses plans, on training questions; else the threshold, on held-out."
        ),
    )
    held_out: float = field(default=0.15, metadata=_help("Share of the questions that choose and do not train."))
    seed: int = field(default=0, metadata=_help("Seed of the routers and of their batches."))

    def __post_init__(self) -> None:
        _choice("form", self.form, Form)
        for name in ("units", "epochs", "batch", "learning_rate", "screen", "candidates"):
            _require(getattr(self, name) > 0, f"{name.replace('_', '-')} must be above 0, not {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "gamma", "questions", "bridge_rank"):
            value = getattr(self, name)
            _require(value >= 0, f"{name.replace('_', '-')} must be 0 or more, not {value}")
        _require(not self.bridge_rank or self.form == "menu", "bridges are of the form menu: leave out bridge-rank")
        _require(0 <= self.threshold <= 1, f"threshold must be between 0 and 1, not {self.threshold}")
        _require(0 <= self.beta <= 1, f"beta must be between 0 and 1, not {self.beta}")
        _require(0 <= self.saved < 1, f"saved must be at least 0 and below 1, not {self.saved}")
        _require(0 < self.held_out < 1, f"held-out must be between 0 and 1, not {self.held_out}")
        _require(0 <= self.seed < 2**32, f"seed must be between 0 and 2^32 - 1, not {self.seed}")


@dataclass(frozen=True, kw_only=True)
class DrLLMConfig(RouterRecipe, Options):
    """A training of routers from a file of labels.

    Raises:
        ValueError: a value is out of range, or there is no such file of labels.
    """

    labels: str = field(metadata=_help("JSON lines that 'layerwise search' wrote."))
    out: str = field(metadata=_help("Folder for the adapter, with the features inside."))
    model: str | None = field(
        default=None, metadata=_help("A name from 'layerwise models', a folder, or a Hugging Face id.")
    )
    precision: Precision = field(
        default="auto", metadata=_help("Numbers to compute in; auto: bfloat16 where the processor has it.")
    )

    def __post_init__(self) -> None:
        RouterRecipe.__post_init__(self)
        _choice("precision", self.precision, Precision)
        _require(Path(self.labels).is_file(), f"there is no file '{self.labels}': make one with 'layerwise search'")
        _require(not Path(self.out).is_file(), f"'{self.out}' is a file: give a folder to write the adapter to")


def layers_of(text: str, layers: int | None = None) -> tuple[int, ...]:
    """The layers that a text such as "0-1 28-29" names, for a model of `layers` layers if that is known.

    Raises:
        ValueError: it names none, or one that is not there.
    """
    return tuple(sorted({visit.layer for visit in Plan.parse(text, layers)})) if text.strip() else ()


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _choice(name: str, value: str, kind: Any) -> None:
    _require(value in kind.__args__, f"no {name} '{value}': choose {', '.join(kind.__args__)}")
