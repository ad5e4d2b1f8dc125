"""What each method's training may be told, with the defaults of the command line; see `config.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from layerwise.training.config import Options, Precision, TrainingConfig, about, choice, layers_of, require

Dropout = Literal["constant", "growing", "decaying"]
Curriculum = Literal["rotational", "gradual"]
Objective = Literal["paper", "budget", "quality", "none"]
Reads = Literal["mean", "last"]
Left = Literal["nothing", "attention", "neurons"]
Form = Literal["per-layer", "menu"]


@dataclass(frozen=True, kw_only=True)
class LayerSkipRecipe:
    """The choices of the method itself (arXiv 2404.16710); the schedules are in `training.schedules`.

    Raises:
        ValueError: a value is out of range.
    """

    p_max: float = field(default=0.1, metadata=about("Rate at which the last layer is dropped."))
    dropout: Dropout = field(default="constant", metadata=about("How the drop rate changes over training."))
    inverse_survival: bool = field(
        default=False, metadata=about("Scale what surviving layers add by 1/(1-p), as the successor paper does.")
    )
    e_scale: float = field(
        default=1.0, metadata=about("How much early exits count in the loss, beside the last layer.")
    )
    curriculum: Curriculum = field(default="rotational", metadata=about("Which exits take part in a step."))
    every: int = field(default=8, metadata=about("Rotational curriculum: every so many layers have an exit in a step."))

    def __post_init__(self) -> None:
        require(0 <= self.p_max < 1, f"p-max must be at least 0 and below 1, not {self.p_max}")
        require(self.e_scale >= 0, f"e-scale must be 0 or more, not {self.e_scale}")
        require(self.every >= 1, f"every must be 1 or more, not {self.every}")
        choice("dropout", self.dropout, Dropout)
        choice("curriculum", self.curriculum, Curriculum)


@dataclass(frozen=True, kw_only=True)
class LayerSkipConfig(LayerSkipRecipe, TrainingConfig):
    """A training by the recipe of the paper.

    Raises:
        ValueError: a value is out of range, or there is no such file of examples.
    """

    rank: int = field(default=8, metadata=about("LoRA rank, alpha is twice as much; 0 trains all the weights."))

    def __post_init__(self) -> None:
        LayerSkipRecipe.__post_init__(self)
        TrainingConfig.__post_init__(self)
        require(self.rank >= 0, f"rank must be 0 (train all weights) or more, not {self.rank}")


@dataclass(frozen=True, kw_only=True)
class FrozenRecipe:
    """The choices of the frozen recipe, see `training.frozen`.

    Raises:
        ValueError: a value is out of range.
    """

    adapter: str | None = field(default=None, metadata=about("Recipe frozen: the adapter whose model is drafted for."))
    exit: int = field(
        default=0, metadata=about("Recipe frozen: layers the current token runs before the head; 0 is its embedding.")
    )
    vocabulary: int = field(default=8192, metadata=about("Recipe frozen: the most tokens that can be drafted."))
    unroll: int = field(default=3, metadata=about("Recipe frozen: drafted tokens in a row that are trained."))
    max_new_tokens: int = field(default=160, metadata=about("Recipe frozen: longest answer the model writes itself."))
    ngrams: int = field(
        default=6, metadata=about("Recipe frozen: longest n-grams of the answers, which draft too; 0 keeps none.")
    )

    def __post_init__(self) -> None:
        require(self.exit >= 0, f"exit must be 0 layers or more, not {self.exit}")
        require(0 <= self.ngrams <= 16, f"ngrams must be 0 to 16 tokens, not {self.ngrams}")
        for name in ("vocabulary", "unroll", "max_new_tokens"):
            value = getattr(self, name)
            require(value > 0, f"{name.replace('_', '-')} must be above 0, not {value}")


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

    objective: Objective = field(default="quality", metadata=about("What makes gates close; none trains no gates."))
    penalty: float = field(
        default=1.0, metadata=about("Paper: price of a soft gate. Quality: the price it starts with.")
    )
    target: float = field(default=0.85, metadata=about("Budget: mean share of layers to run."))
    tolerance: float = field(
        default=0.02, metadata=about("Quality: nats a token that an input may lose against full depth.")
    )
    dual_rate: float = field(
        default=0.05, metadata=about("Budget, quality: how fast the price follows its constraint.")
    )
    candidates: int = field(
        default=0, metadata=about("Only so many layers, those that cost least on examples, may be skipped; 0: all.")
    )
    keep: str = field(default="", metadata=about('Layers that every prompt runs, such as "0-1 28-29".'))
    start_closed: str | None = field(
        default=None, metadata=about("Layers whose gates begin closed; paper: the middle third, else none.")
    )
    hold: float = field(
        default=0.0,
        metadata=about(
            "Share of the steps, at first, in which gates stay as they begin; LoRA learns alone. 1: with fits."
        ),
    )
    hold_full: float = field(
        default=0.0, metadata=about("Share of the rows that run every layer all the same while gates are held.")
    )
    settle: float = field(
        default=1.0, metadata=about("Share of the steps after which gates learn no more; LoRA learns alone again.")
    )
    fits: int = field(
        default=0,
        metadata=about("Quality: how often after the held steps routers are fitted to measured gaps; 0: by gradient."),
    )
    bridge_rank: int = field(
        default=0, metadata=about("With fits: rank of the maps that stand in for layers that may be skipped; 0: none.")
    )
    leave: Left = field(
        default="nothing",
        metadata=about(
            "With fits: what a closed gate leaves of a layer. Attention: skip its MLP; neurons: a part of it."
        ),
    )
    neurons: float = field(
        default=0.3, metadata=about("Leave neurons: share of all the MLPs' neurons that closed gates leave out.")
    )
    mend_rank: int = field(
        default=0, metadata=about("Leave neurons: rank of what mends the MLPs that lost some; 0 for nothing.")
    )
    margin: float = field(
        default=1.0,
        metadata=about("Leave neurons, hold 1: inputs skip that would bear so many times the neurons left out."),
    )
    head_rank: int = field(
        default=0,
        metadata=about("With fits: the LM head has a gate too, closed for one that looks at so many numbers; 0: none."),
    )
    start_bias: float = field(default=1.0, metadata=about("Bias of gates that begin open; closed ones have its minus."))
    reads: Reads | None = field(
        default=None, metadata=about("What a router sees: mean, or last token, of the prompt; paper: mean, else last.")
    )
    router_learning_rate: float | None = field(
        default=None, metadata=about("Highest learning rate of the routers, if not that of the LoRA.")
    )
    weight_decay: float = field(default=0.01, metadata=about("Weight decay of LoRA, bridges and routers."))
    lora_dropout: float = field(default=0.05, metadata=about("Dropout of the LoRA's inputs."))
    rank: int = field(default=8, metadata=about("LoRA rank, alpha is twice as much."))

    def __post_init__(self) -> None:
        choice("objective", self.objective, Objective)
        if self.reads is not None:
            choice("reads", self.reads, Reads)
        choice("leave", self.leave, Left)
        require(0 < self.target <= 1, f"target must be above 0 and at most 1, not {self.target}")
        for name in ("tolerance", "start_bias"):
            value = getattr(self, name)
            require(value > 0, f"{name.replace('_', '-')} must be above 0, not {value}")
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
            require(value >= 0, f"{name.replace('_', '-')} must be 0 or more, not {value}")
        require(
            not self.fits or (self.objective == "quality" and self.reads != "mean" and self.settle == 1),
            "fits are of the objective quality: leave out settle, and reads mean",
        )
        require(
            not self.fits or bool(self.keep.strip()) or self.candidates > 0 or self.leave == "neurons",
            "fits answer without all layers that may be skipped: say by keep which must run, or give candidates",
        )
        require(not self.bridge_rank or self.fits > 0, "bridges are fitted with the routers: give fits too")
        require(self.leave == "nothing" or self.fits > 0, f"leaving {self.leave} is of fitted routers: give fits too")
        require(0 < self.neurons < 1, f"neurons must be a share above 0 and below 1, not {self.neurons}")
        require(
            1 <= self.margin < 1 / self.neurons or self.margin == 1,
            f"margin must be at least 1, and below {1 / self.neurons:.3g} for that many neurons, not {self.margin}",
        )
        require(
            self.margin == 1 or (self.leave == "neurons" and self.hold == 1),
            "a margin is of neurons, fitted when the LoRA has learnt: give leave neurons and hold 1 too",
        )
        require(
            self.leave != "neurons" or not (self.start_closed or self.candidates),
            "neurons are chosen in all layers but those of keep: leave out start-closed and candidates",
        )
        require(not self.mend_rank or self.leave == "neurons", "mends are of thin MLPs: give leave neurons too")
        require(
            self.leave != "neurons" or not self.bridge_rank,
            "bridges stand in for layers or MLPs left out as a whole: leave out bridge-rank, or leave neurons",
        )
        require(
            not self.head_rank or (self.fits > 0 and self.hold == 1 == self.hold_full),
            "a thin head is fitted when the LoRA has learnt: give fits, hold 1 and hold-full 1 too",
        )
        rate = self.router_learning_rate
        require(rate is None or rate > 0, f"router-learning-rate must be above 0, not {rate}")
        require(0 <= self.lora_dropout < 1, f"lora-dropout must be at least 0 and below 1, not {self.lora_dropout}")
        require(0 <= self.hold <= 1, f"hold must be 0 to 1, not {self.hold}")
        require(self.hold < 1 or self.fits > 0, "routers learn nothing if hold is 1: lower it, or let fits fit them")
        require(0 <= self.hold_full <= 1, f"hold-full must be 0 to 1, not {self.hold_full}")
        require(
            self.hold < self.settle <= 1 or self.hold == 1 == self.settle,
            f"settle must be above hold ({self.hold}) and at most 1, not {self.settle}",
        )
        require(self.rank >= 1, f"rank must be 1 or more, not {self.rank}")
        require(
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

    learning_rate: float = field(default=2e-4, metadata=about("Highest learning rate."))
    seed: int = field(default=0, metadata=about("Seed of batches and LoRA."))
    adapter: str | None = field(
        default=None, metadata=about("With hold 1: route the LoRA of this adapter, which is left as it is; no steps.")
    )

    def __post_init__(self) -> None:
        LayerRouteRecipe.__post_init__(self)
        TrainingConfig.__post_init__(self)
        if self.adapter is not None:
            require(self.hold == 1 == self.hold_full, "an adapter's LoRA learns no more: give hold 1 and hold-full 1")
            require(
                (Path(self.adapter) / "adapter_config.json").is_file(),
                f"there is no LoRA in '{self.adapter}': give the folder of an adapter, or leave it out",
            )


@dataclass(frozen=True, kw_only=True)
class RouterRecipe:
    """How routers learn from labelled paths (arXiv 2510.12773); see `training.routers`.

    Raises:
        ValueError: a value is out of range.
    """

    form: Form = field(default="menu", metadata=about("A router for each layer, or one that picks from a menu."))
    units: int = field(default=128, metadata=about("Hidden units of a router."))
    epochs: int = field(default=25, metadata=about("How often to go through the questions."))
    batch: int = field(default=16, metadata=about("Questions of an optimizer step."))
    learning_rate: float = field(default=1e-3, metadata=about("Highest learning rate."))
    warmup: int = field(
        default=500, metadata=about("Steps over which the learning rate rises, at most a tenth of them.")
    )
    weight_decay: float = field(default=0.01, metadata=about("Weight decay."))
    gamma: float = field(default=2.0, metadata=about("Per layer: exponent of the focal loss."))
    beta: float = field(
        default=0.9999, metadata=about("Per layer: of the class weights; 1 is inverse frequency, the paper has 0.999.")
    )
    questions: int = field(
        default=256, metadata=about("Menu: training questions of each built-in task that plans are tried on.")
    )
    screen: int = field(default=24, metadata=about("Menu: the first of these, that choose single edits."))
    candidates: int = field(
        default=28, metadata=about("Menu: single edits that are tried; with bridges every skip is, and half as many.")
    )
    bridge_rank: int = field(
        default=0, metadata=about("Menu: rank of the bridges that cross skipped layers; 0 for none.")
    )
    threshold: float = field(
        default=0.5, metadata=about("Menu: least probability of a plan; what is less sure runs all layers.")
    )
    saved: float = field(
        default=0.1,
        metadata=about(
            "Share of the layers to save. Menu: chooses plans, on training questions; else the threshold, on held-out."
        ),
    )
    held_out: float = field(default=0.15, metadata=about("Share of the questions that choose and do not train."))
    seed: int = field(default=0, metadata=about("Seed of the routers and of their batches."))

    def __post_init__(self) -> None:
        choice("form", self.form, Form)
        for name in ("units", "epochs", "batch", "learning_rate", "screen", "candidates"):
            require(getattr(self, name) > 0, f"{name.replace('_', '-')} must be above 0, not {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "gamma", "questions", "bridge_rank"):
            value = getattr(self, name)
            require(value >= 0, f"{name.replace('_', '-')} must be 0 or more, not {value}")
        require(not self.bridge_rank or self.form == "menu", "bridges are of the form menu: leave out bridge-rank")
        require(0 <= self.threshold <= 1, f"threshold must be between 0 and 1, not {self.threshold}")
        require(0 <= self.beta <= 1, f"beta must be between 0 and 1, not {self.beta}")
        require(0 <= self.saved < 1, f"saved must be at least 0 and below 1, not {self.saved}")
        require(0 < self.held_out < 1, f"held-out must be between 0 and 1, not {self.held_out}")
        require(0 <= self.seed < 2**32, f"seed must be between 0 and 2^32 - 1, not {self.seed}")


@dataclass(frozen=True, kw_only=True)
class DrLLMConfig(RouterRecipe, Options):
    """A training of routers from a file of labels.

    Raises:
        ValueError: a value is out of range, or there is no such file of labels.
    """

    labels: str = field(metadata=about("JSON lines that 'layerwise search' wrote."))
    out: str = field(metadata=about("Folder for the adapter, with the features inside."))
    model: str | None = field(
        default=None, metadata=about("A name from 'layerwise models', a folder, or a Hugging Face id.")
    )
    precision: Precision = field(
        default="auto", metadata=about("Numbers to compute in; auto: bfloat16 where the processor has it.")
    )

    def __post_init__(self) -> None:
        RouterRecipe.__post_init__(self)
        choice("precision", self.precision, Precision)
        require(Path(self.labels).is_file(), f"there is no file '{self.labels}': make one with 'layerwise search'")
        require(not Path(self.out).is_file(), f"'{self.out}' is a file: give a folder to write the adapter to")
