"""When to lengthen, and when to press: the curriculum of routed attention.

A router that is punished for attention before attention is of any use never finds out what it is good for. So the
task is learnt first, without penalty (phase "learn"); when it is solved, the penalty rises in small steps (phase
"spare"), and only while accuracy holds (M. Bee, Zenodo 10.5281/zenodo.18518956). What differs from the publication:

- *Stages.* A long distance is not learnt from nothing; lengths double from a short one. By default a model is taught to
  spare at the shortest length and lengthened afterwards, since a sparse solution hardly depends on the length.
- *One weight per layer.* A mean over layers lets one stay fully on ("the 25% floor" is one layer of four). A layer's
  weight rises until its own usage is below its share of the target, so no layer is forgotten.
- *A floor that acts.* Below `floor` the weights are halved, instead of ending the training.

The state is a handful of numbers, told the measured accuracy and usage, and knows nothing of models. The options of a
training are here too, so that the command line can show them without importing torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from layerwise.training.config import _choice, _help, _require

TaskName = Literal["recall", "mqar"]
Mode = Literal["curriculum", "joint", "attention", "convolution"]
PenaltyOn = Literal["logits", "gate"]
_FREE_TO_CHANGE = ("out", "steps", "save_every")  # a resumed training may differ in these
Order = Literal["spare-first", "lengthen-first"]


def stage_lengths(first: int, last: int) -> list[int]:
    """Lengths that double from `first` to `last`, which ends the list in any case: 130, 258 -> [130, 258]."""
    lengths = []
    while first < last:
        lengths.append(first)
        first *= 2
    return [*lengths, last]


@dataclass(frozen=True)
class Rules:
    """What the curriculum goes by.

    Args:
        lengths: of the stages, rising.
        order: "spare-first" presses from the first stage on; "lengthen-first" only at the last length.
        solved: accuracy at which a stage counts as learnt, and that is held while the penalty rises.
        floor: accuracy below which the penalty is halved.
        most: the highest weight of a layer's penalty.
        rises: evaluations over which a weight rises from 0 to `most`.
        target: mean usage at which the pressure is no longer raised, instead of going on to `most`; None goes on.
    """

    lengths: tuple[int, ...]
    order: Order = "spare-first"
    solved: float = 0.99
    floor: float = 0.9
    most: float = 0.5
    rises: int = 20
    target: float | None = None


@dataclass
class Curriculum:
    """The state: `stage`, whether this stage is `sparing`, a penalty `weights` per layer, and whether it is `done`."""

    rules: Rules
    layers: int
    stage: int = 0
    sparing: bool = False
    done: bool = False
    backed_off: int = 0

    def __post_init__(self) -> None:
        self.weights = [0.0] * self.layers

    @property
    def length(self) -> int:
        """Tokens of the sequences to train on now."""
        return self.rules.lengths[self.stage]

    @property
    def last_stage(self) -> bool:
        return self.stage == len(self.rules.lengths) - 1

    @property
    def phase(self) -> str:
        return "done" if self.done else "spare" if self.sparing else "learn"

    def update(self, accuracy: float, usage: Sequence[float]) -> None:
        """Take what was measured at the present length: accuracy, and the share of positions that attend per layer."""
        rules = self.rules
        if accuracy < rules.floor and any(self.weights):
            self.weights = [weight / 2 for weight in self.weights]
            self.backed_off += 1
        if accuracy < rules.solved:
            return
        may_spare = rules.order == "spare-first" or self.last_stage
        if not self.sparing and may_spare:
            self.sparing = True  # and the first step up is taken at once
        if self.sparing and not self._spared(usage):
            step = rules.most / rules.rises
            self.weights = [
                weight if self._layer_spared(layer, usage) else min(rules.most, weight + step)
                for layer, weight in enumerate(self.weights)
            ]
        elif self.last_stage:
            self.done = True
        else:
            self.stage += 1

    def _layer_spared(self, layer: int, usage: Sequence[float]) -> bool:
        """Whether this layer's usage is within the target, of which one layer may take all."""
        target = self.rules.target
        return target is not None and usage[layer] <= target * self.layers and sum(usage) <= target * self.layers

    def _spared(self, usage: Sequence[float]) -> bool:
        if self.rules.target is not None and sum(usage) / self.layers <= self.rules.target:
            return True
        return all(weight >= self.rules.most for weight in self.weights)

    def state(self) -> dict[str, Any]:
        """What `load` needs."""
        state = asdict(self)
        del state["rules"]
        return {**state, "weights": list(self.weights)}

    def load(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


# -- options of a training -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RoutedAttentionConfig:
    """A training of a recall model; see `training.routed_attention`.

    Raises:
        ValueError: a value is out of range.
    """

    out: str = field(metadata=_help("Folder for the model, its result and a checkpoint."))
    task: TaskName = field(default="recall", metadata=_help("One pair at a distance, or several pairs and queries."))
    distance: int = field(default=126, metadata=_help("recall: tokens from key to key; mqar: length of a sequence."))
    seed: int = field(default=0, metadata=_help("Seed of weights, sequences and the router's sampling."))
    mode: Mode = field(
        default="curriculum",
        metadata=_help("curriculum: penalty once solved; joint: from the start; or one mixing everywhere."),
    )
    pairs: int = field(default=8, metadata=_help("mqar: pairs of key and value."))
    queries: int | None = field(default=None, metadata=_help("mqar: keys asked for; all of them if not given."))
    steps: int = field(default=20_000, metadata=_help("Most steps; training ends before if the curriculum does."))
    tokens_per_batch: int = field(default=4096, metadata=_help("Tokens of a batch."))
    learning_rate: float = field(default=1e-3, metadata=_help("Learning rate of AdamW, after the warm-up."))
    warmup: int = field(default=100, metadata=_help("Steps over which the learning rate rises."))
    start_length: int = field(default=32, metadata=_help("Length of the first stage; lengths double from there."))
    order: Order = field(default="spare-first", metadata=_help("Learn to spare before, or after, lengthening."))
    penalty: float = field(default=0.5, metadata=_help("Highest weight of the penalty on usage."))
    rises: int = field(default=20, metadata=_help("Evaluations over which the penalty rises to its highest weight."))
    penalty_on: PenaltyOn = field(
        default="logits", metadata=_help("Punish the router's logits, which never saturates, or its sampled gate.")
    )
    usage_target: float | None = field(
        default=None, metadata=_help("Raise the penalty only until this share of slots attends; 0.003 is 0.3%.")
    )
    solved: float = field(default=0.99, metadata=_help("Accuracy at which a stage is learnt."))
    floor: float = field(default=0.9, metadata=_help("Accuracy below which the penalty is halved."))
    settle: int = field(default=5, metadata=_help("Evaluations after the end of the curriculum."))
    blend: bool = field(
        default=True, metadata=_help("Compute both mixings everywhere in training, for exact gradients of choices.")
    )
    eval_every: int = field(default=100, metadata=_help("Steps between evaluations, at which the curriculum moves."))
    eval_rows: int = field(default=256, metadata=_help("Sequences of an evaluation."))
    test_rows: int = field(default=1000, metadata=_help("Sequences of the test at the end."))
    save_every: int = field(default=500, metadata=_help("Steps between checkpoints."))
    layers: int = field(default=4, metadata=_help("Layers of the model."))
    hidden_size: int = field(default=128, metadata=_help("Hidden size of the model."))
    heads: int = field(default=4, metadata=_help("Heads of attention and convolution."))
    kernel_size: int = field(default=64, metadata=_help("Taps of the convolution."))

    def __post_init__(self) -> None:
        _choice("task", self.task, TaskName)
        _choice("mode", self.mode, Mode)
        _choice("order", self.order, Order)
        _choice("penalty-on", self.penalty_on, PenaltyOn)
        kept = ("seed", "settle", "warmup")
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and one.name not in kept:
                _require(value > 0, f"{one.name.replace('_', '-')} must be above 0, not {value}")
        for name in kept:
            _require(0 <= getattr(self, name) < 2**24, f"{name} must be 0 or more, and below 2^24")
        _require(self.floor <= self.solved <= 1, "floor must be at most solved, and solved at most 1")
        _require(self.usage_target is None or self.usage_target < 1, "usage-target is a share: give one below 1")
        _require(not Path(self.out).is_file(), f"'{self.out}' is a file: give a folder to write the model to")

    @property
    def length(self) -> int:
        """Tokens of the final sequences."""
        return self.distance + 2 if self.task == "recall" else self.distance

    def rules(self) -> Rules:
        """The curriculum; joint training and the convolution, which cannot grow, see the final length only."""
        first = max(self.start_length, 4 * self.pairs if self.task == "mqar" else 3)
        grows = self.mode in ("curriculum", "attention")
        return Rules(
            lengths=tuple(stage_lengths(first, self.length)) if grows else (self.length,),
            order=self.order,
            solved=self.solved,
            floor=self.floor,
            most=self.penalty,
            rises=self.rises,
            target=self.usage_target,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def command(self) -> str:
        """What to type for the same training."""
        words = ["layerwise train routed-attention"]
        for one in fields(self):
            value = getattr(self, one.name)
            flag = one.name.replace("_", "-")
            if value == one.default and one.name not in ("task", "distance", "seed", "mode"):
                continue
            words.append(f"--{flag if value else 'no-' + flag}" if isinstance(value, bool) else f"--{flag} {value}")
        return " ".join(words)

    def check_resumable(self, saved: dict[str, Any]) -> None:
        """Refuse to resume a training whose `to_dict` was `saved`, unless it would go on as it began."""
        for name, value in self.to_dict().items():
            if name not in _FREE_TO_CHANGE and saved.get(name) != value:
                raise ValueError(
                    f"the training in '{self.out}' began with {name.replace('_', '-')} {saved.get(name)}, not {value}: "
                    "resume it with the same options, or give another folder"
                )
