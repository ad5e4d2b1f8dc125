"""When to lengthen, and when to press: the curriculum of routed attention.

A router that is punished for attention before attention is of any use never finds out what it is good for. So the
task is learnt first, without penalty (phase "learn"); when it is solved, the penalty rises in small steps (phase
"spare"), and only while accuracy holds (M. Bee, Zenodo 10.5281/zenodo.18518956). What differs from the publication:

- *Stages.* A long distance is not learnt from nothing: lengths double from a short one. By default a model is taught to
  spare at the shortest length and lengthened afterwards, since a sparse solution hardly depends on the length.
- *One weight per layer.* A mean over layers lets one stay fully on ("the 25% floor" is one layer of four). Weights
  double until no more slots attend than the task needs: while the price of a slot is small beside a right answer, two
  layers share the work for good.
- *Fixed routes first.* To match keys takes two layers of different kinds: a convolution gives each value its key, and
  attention then finds the key that is asked for. A router that samples at every position breaks that chain before it is
  of use. So several pairs are first learnt with even layers convolving and odd ones attending everywhere (phase
  "fixed"; the hybrid of Zoology, arXiv 2312.04927); then the routers, which begin near these routes, are let go.
- *A floor that acts.* Below `floor` the weights are halved, instead of ending the training.

The state is a handful of numbers, told the measured accuracy and usage, and knows nothing of models. The options of a
training are here too, so that the command line can show them without importing torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from layerwise.training.config import Precision, Resumable, about, choice, layers_of, require

TaskName = Literal["recall", "mqar"]
Mode = Literal["curriculum", "joint", "attention", "convolution"]
PenaltyOn = Literal["logits", "gate"]
Order = Literal["spare-first", "lengthen-first"]
Method = Literal["fit", "curriculum"]


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
        lengths: of the stages.
        spare_from: the first stage at which attention is pressed for.
        solved: accuracy at which a stage counts as learnt, and that is held while the penalty rises.
        floor: accuracy below which the penalty is halved.
        most: the highest weight of a layer's penalty.
        rises: doublings, one an evaluation, by which a weight rises from most / 2^rises to `most`.
        target: slots (positions that attend, summed over layers) a question at which the pressure is no longer
            raised, instead of going on to `most`; None goes on.
        eases: whether penalties are also halved where the target is met and the task is not solved, instead of held.
    """

    lengths: tuple[int, ...]
    spare_from: int = 0
    solved: float = 0.99
    floor: float = 0.9
    most: float = 64.0
    rises: int = 10
    target: float | None = None
    eases: bool = False


@dataclass
class Curriculum:
    """The state: `stage`, whether routes are `fixed` or attention is pressed for (`sparing`), the `weights` of each
    layer's penalty, and whether it is `done`."""

    rules: Rules
    layers: int
    stage: int = 0
    fixed: bool = False
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
        return "done" if self.done else "spare" if self.sparing else "fixed" if self.fixed else "learn"

    def update(self, accuracy: float, usage: Sequence[float], questions: int = 1) -> None:
        """Take what was measured at this stage: accuracy, and the share of positions that attend per layer.

        `questions` are those of a sequence.
        """
        rules = self.rules
        pressed_enough = rules.eases and accuracy < rules.solved and self._on_target(usage, questions)
        if (accuracy < rules.floor or pressed_enough) and any(self.weights):
            self.weights = [weight / 2 for weight in self.weights]
            self.backed_off += 1
        if accuracy < rules.solved:
            return
        if self.fixed and self.stage >= rules.spare_from:
            self.fixed = False
            return
        if not self.sparing and self.stage >= rules.spare_from:
            self.sparing = True  # and the first step up is taken at once
        if self.sparing and not self._spared(usage, questions):
            least = rules.most / 2**rules.rises
            self.weights = [min(rules.most, max(least, 2 * weight)) for weight in self.weights]
        else:
            self.weights = [weight / 4 for weight in self.weights]  # what is open now need not be fought any longer
            self.done = self.last_stage
            self.stage += not self.done

    def _spared(self, usage: Sequence[float], questions: int) -> bool:
        return self._on_target(usage, questions) or all(weight >= self.rules.most for weight in self.weights)

    def _on_target(self, usage: Sequence[float], questions: int) -> bool:
        return self.rules.target is not None and sum(usage) * self.length <= self.rules.target * questions

    def state(self) -> dict[str, Any]:
        """What `load` needs."""
        state = asdict(self)
        del state["rules"]
        return {**state, "weights": list(self.weights)}

    def load(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


# -- options of a training -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig(Resumable):
    """What trainings by the curriculum share.

    Raises:
        ValueError: a value is out of range.
    """

    name = "routed-attention"  # of the command
    free_to_change = ("out", "steps", "save_every")

    out: str = field(metadata=about("Folder for what is trained, its result and a checkpoint."))
    seed: int = field(default=0, metadata=about("Seed of weights, data and the router's sampling."))
    steps: int = field(default=20_000, metadata=about("Most steps; training ends before if the curriculum does."))
    learning_rate: float = field(default=2e-3, metadata=about("Learning rate of AdamW, after the warm-up."))
    warmup: int = field(default=30, metadata=about("Steps over which the learning rate rises."))
    penalty: float = field(default=64.0, metadata=about("Highest weight of the penalty on usage."))
    rises: int = field(default=10, metadata=about("Evaluations over which the penalty doubles up to its highest."))
    penalty_on: PenaltyOn = field(
        default="logits", metadata=about("Punish the router's logits, which never saturates, or its sampled gate.")
    )
    usage_target: float | None = field(
        default=None,
        metadata=about("Raise the penalty until this share of slots attends; default: 1.25 times what the task needs."),
    )
    solved: float = field(default=0.99, metadata=about("Accuracy at which a stage is learnt."))
    floor: float = field(default=0.9, metadata=about("Accuracy below which the penalty is halved."))
    settle: int = field(default=6, metadata=about("Evaluations after the end of the curriculum."))
    eval_every: int = field(default=25, metadata=about("Steps between evaluations, at which the curriculum moves."))
    eval_rows: int = field(default=256, metadata=about("Sequences of an evaluation."))
    save_every: int = field(default=500, metadata=about("Steps between checkpoints."))

    def __post_init__(self) -> None:
        choice("penalty-on", self.penalty_on, PenaltyOn)
        kept = ("seed", "settle", "warmup", "rank")
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and one.name not in kept:
                require(value > 0, f"{one.name.replace('_', '-')} must be above 0, not {value}")
        for name in kept:
            require(0 <= getattr(self, name, 0) < 2**24, f"{name} must be 0 or more, and below 2^24")
        require(self.floor <= self.solved <= 1, "floor must be at most solved, and solved at most 1")
        require(self.usage_target is None or self.usage_target < 1, "usage-target is a share: give one below 1")
        require(not Path(self.out).is_file(), f"'{self.out}' is a file: give a folder to write to")

    def command(self) -> str:
        """What to type for the same training."""
        words = ["layerwise", "train", self.name]
        for one in fields(self):
            value = getattr(self, one.name)
            flag = one.name.replace("_", "-")
            if value == one.default and one.name not in ("task", "distance", "seed", "mode"):
                continue
            given = [f"--{flag if value else 'no-' + flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
            words += given
        return shlex.join(words)


@dataclass(frozen=True, kw_only=True)
class RoutedAttentionConfig(CurriculumConfig):
    """A training of a recall model; see `training.routed_attention`.

    Raises:
        ValueError: a value is out of range.
    """

    task: TaskName = field(default="recall", metadata=about("One pair at a distance, or several pairs and queries."))
    distance: int = field(default=126, metadata=about("recall: tokens from key to key; mqar: length of a sequence."))
    mode: Mode = field(
        default="curriculum",
        metadata=about("curriculum: penalty once solved; joint: from the start; or one mixing everywhere."),
    )
    pairs: int = field(default=8, metadata=about("mqar: pairs of key and value."))
    queries: int | None = field(default=None, metadata=about("mqar: keys asked for; each once if not given."))
    tokens_per_batch: int = field(default=2048, metadata=about("Tokens of a batch, as far as least-rows allows."))
    least_rows: int = field(default=8, metadata=about("Fewest sequences of a batch: each asks a question or a few."))
    start_length: int = field(
        default=64, metadata=about("Length of the first stage, or more if convolutions reach so far; lengths double.")
    )
    order: Order = field(default="spare-first", metadata=about("Learn to spare before, or after, lengthening."))
    blend: bool = field(
        default=True, metadata=about("Compute both mixings everywhere in training, until few positions attend.")
    )
    test_rows: int = field(default=1000, metadata=about("Sequences of the test at the end."))
    layers: int = field(default=4, metadata=about("Layers of the model."))
    hidden_size: int = field(default=64, metadata=about("Hidden size of the model."))
    heads: int = field(default=2, metadata=about("Heads of attention and convolution."))
    kernel_size: int = field(default=16, metadata=about("Taps of the convolution."))

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("task", self.task, TaskName)
        choice("mode", self.mode, Mode)
        choice("order", self.order, Order)

    @property
    def length(self) -> int:
        """Tokens of the final sequences."""
        return self.distance + 2 if self.task == "recall" else self.distance

    def rules(self) -> Rules:
        """The curriculum; joint training and the convolution, which cannot grow, see the final length only.

        No stage is so short that convolutions alone could solve it: the model would learn to attend nowhere. Several
        pairs are pressed for sparing where at most a quarter of the text is pairs: a question is the same token as its
        key in front, and only the surroundings tell the router which of the two it sees.
        """
        reach = self.layers * (self.kernel_size - 1)
        first = max(self.start_length, reach + 3, 4 * self.pairs if self.task == "mqar" else 3)
        questions = 1 if self.task == "recall" else self.queries or self.pairs
        grows = self.mode in ("curriculum", "attention")
        lengths = stage_lengths(first, self.length) if grows else [self.length]
        several = self.task == "mqar"
        sparable = [stage for stage, length in enumerate(lengths) if not several or length >= 8 * self.pairs]
        return Rules(
            lengths=tuple(lengths),
            spare_from=sparable[0] if sparable and self.order == "spare-first" else len(lengths) - 1,
            solved=self.solved,
            floor=self.floor,
            most=self.penalty,
            rises=self.rises,
            target=1.25 if self.usage_target is None else self.usage_target * self.length * self.layers / questions,
            eases=several,
        )


@dataclass(frozen=True, kw_only=True)
class RoutedTextConfig(CurriculumConfig):
    """A training of routers and convolutions in a pretrained model; see `training.routed_text`.

    "Accuracy" is here the base's perplexity divided by the model's.

    Raises:
        ValueError: a value is out of range.
    """

    name = "routed-text"

    model: str | None = field(
        default=None, metadata=about("A name from 'layerwise models', a folder, or a Hugging Face id.")
    )
    convert: str = field(
        default="", metadata=about('Layers to convert, such as "4-29"; default: all. The first layers cost most.')
    )
    method: Method = field(
        default="fit",
        metadata=about("fit: least squares first, then steps at the usage aimed at; curriculum: penalty once solved."),
    )
    fit_texts: int = field(default=64, metadata=about("fit: texts of the least squares."))
    rank: int = field(default=32, metadata=about("Rank of the correction beside the convolution; 0: none."))
    taps: int = field(default=16, metadata=about("Taps of the convolution."))
    router_width: int = field(default=64, metadata=about("Inner width of a router."))
    text_length: int = field(default=512, metadata=about("Tokens of a text."))
    rows: int = field(default=1, metadata=about("Texts of a batch."))
    precision: Precision = field(
        default="auto",
        metadata=about("Numbers of the base; auto: bfloat16 where the processor has it. What is trained is float32."),
    )
    learning_rate: float = field(default=2e-4, metadata=about("Learning rate of AdamW, after the warm-up."))
    warmup: int = field(default=10, metadata=about("Steps over which the learning rate rises."))
    steps: int = field(default=60, metadata=about("Most steps; a curriculum may end before."))
    penalty: float = field(default=4.0, metadata=about("curriculum: highest weight of the penalty on usage."))
    rises: int = field(default=8, metadata=about("curriculum: evaluations over which the penalty doubles."))
    usage_target: float = field(
        default=0.49, metadata=about("Share of the slots of the converted layers that shall attend.")
    )
    solved: float = field(
        default=0.97, metadata=about("Quality (base's perplexity / perplexity) at which the penalty rises.")
    )
    floor: float = field(default=0.95, metadata=about("Quality below which the penalty is halved."))
    eval_every: int = field(default=20, metadata=about("Steps between evaluations, at which the curriculum moves."))
    eval_rows: int = field(default=8, metadata=about("Texts of an evaluation."))
    test_rows: int = field(default=24, metadata=about("Texts of the test at the end."))
    save_every: int = field(default=20, metadata=about("Steps between checkpoints."))

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("precision", self.precision, Precision)
        choice("method", self.method, Method)
        layers_of(self.convert)

    def rules(self) -> Rules:
        """One stage, whose unit of usage is a position of a layer."""
        return Rules(
            lengths=(self.text_length,),
            solved=self.solved,
            floor=self.floor,
            most=self.penalty,
            rises=self.rises,
            target=self.usage_target,
        )
