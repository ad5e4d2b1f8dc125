"""Teaches a small model to attend only where recall needs it.

One loop, top to bottom: a batch from the seed and the step, cross entropy at the questions only (noise cannot be
predicted and drowns the signal), plus each layer's penalty on attending with its weight from the `Curriculum`. Every
`eval_every` steps the model is measured as it will be used (the router's argmax, work really skipped), and the
curriculum moves. The optimizer lives for the whole training.

The penalty is, by default, softplus of the router's logit. Its gradient is the probability of attending, so it does not
vanish where the router is sure; that of the sampled gate, the published penalty, does, and leaves whole layers on.

What is reported is one model: the sparsest that had solved the final length in validation, tested once on pairs it
never saw. If none solved it, the last model is reported.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.benchmarks.environment import environment
from layerwise.data.examples import IGNORED
from layerwise.data.recall import VOCABULARY, RecallTask, Split
from layerwise.model.recall_model import RecallModel, RecallModelConfig
from layerwise.model.routed_attention import Mixing
from layerwise.training.curriculum import Curriculum, CurriculumConfig, RoutedAttentionConfig
from layerwise.training.interrupt import first_ctrl_c

RESULT = "result.json"
CHECKPOINT = "checkpoint.pt"
_EVAL_TOKENS = 2**15  # of one evaluation batch
_SPARSE, _LONG = 0.02, 256  # usage below which, and tokens from which, gathering is faster than scoring everything
_FIXED: tuple[Mixing, Mixing] = ("convolution", "attention")  # of even and of odd layers, while routes are fixed
_LET_GO = 1 / 3  # of the learning rate, once routers decide: at the full rate they and accuracy are thrown about
_SURE = 4.0  # logit with which the routers begin that are let go from fixed routes: 1.8% are sampled otherwise


def build(config: RoutedAttentionConfig) -> RecallModel:
    """The untrained model of a training."""
    mixing = config.mode if config.mode in ("attention", "convolution") else "routed"
    model = RecallModel(
        RecallModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            kernel_size=config.kernel_size,
            mixing=mixing,
        )
    )
    for layer in model.layers:
        layer.mix.blend = config.blend
    return model


def train(
    config: RoutedAttentionConfig, notify: Callable[[str], None] = lambda line: None, resume: bool = False
) -> dict[str, Any]:
    """Run a training; writes the model and `result.json` to `config.out` and returns what is in the latter.

    The result holds task, distance, seed, mode; accuracy and usage (share of position-layer slots that attend) on the
    test sequences, usage_per_layer, least_usage (what the task needs); steps, best_step, seconds, history, command,
    environment.

    Raises:
        ValueError: the folder holds a training already, or none to resume, or one with other options.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint of the step under way.
    """
    run = RecallRun(config, notify)
    run.run(resume)
    return run.finish()


def penalty(logits: Tensor, gates: Tensor, weights: Tensor, on: str) -> Tensor:
    """The mean over layers of weight times the layer's mean penalty, on `logits` or the sampled `gates`.

    Both are (layers, rows, width), `weights` (layers,).
    """
    what = F.softplus(logits) if on == "logits" else gates
    return (weights * what.float().mean((1, 2))).mean()


def evaluate(model: RecallModel, task: RecallTask, rows: int, seed: int, split: Split) -> dict[str, Any]:
    """Accuracy over all questions of `rows` sequences, usage, and usage of each layer, with hard routing."""
    was, device = model.training, model.device
    model.eval()
    right = asked = 0
    used = torch.zeros(len(model.layers), dtype=torch.float64)
    size = max(1, _EVAL_TOKENS // task.length)
    for number, first in enumerate(range(0, rows, size)):
        batch = task.batch(min(size, rows - first), seed, number, split)
        with torch.no_grad():
            output = model(batch.input_ids.to(device))
        guesses = output.logits.argmax(-1).cpu()
        right += int((guesses == batch.targets)[batch.asked].sum())
        asked += int(batch.asked.sum())
        used += output.gates.double().sum((1, 2)).cpu()
    model.train(was)
    usage = (used / (rows * task.length)).tolist()
    return {"accuracy": right / asked, "usage": sum(usage) / len(usage), "usage_per_layer": usage}


@torch.no_grad()
def example(model: RecallModel, task: RecallTask, seed: int) -> dict[str, Any]:
    """One test sequence: its tokens, the positions that ask, and in each layer those that attend."""
    batch = task.batch(1, seed, split="test")
    gates = model.eval()(batch.input_ids.to(model.device)).gates[:, 0].cpu()
    return {
        "input_ids": batch.input_ids[0].tolist(),
        "asked": batch.asked[0].nonzero()[:, 0].tolist(),
        "attends": [gate.nonzero()[:, 0].tolist() for gate in gates],
    }


class CurriculumRun:
    """A training under way: how a step goes, what a checkpoint holds. A task says what it learns and measures.

    Args:
        config: the options that trainings by the curriculum share.
        trained: the module whose weights are trained and saved.
        curriculum: begun, not yet told anything.
        notify: gets lines of progress.
    """

    title = ""

    def __init__(
        self, config: CurriculumConfig, trained: nn.Module, curriculum: Curriculum, notify: Callable[[str], None]
    ) -> None:
        self.config, self.trained, self.curriculum, self.notify = config, trained, curriculum, notify
        self.out = Path(config.out)
        self.optimizer = torch.optim.AdamW(trained.parameters(), lr=config.learning_rate)
        self.interrupted = False
        self.number = 0
        self.settled = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None  # step, rank, weights

    # -- what a task says ------------------------------------------------------------------------------------

    def loss(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the batch of step `number`: the loss without penalty; router logits and gates (layers, rows, width)."""
        raise NotImplementedError

    def measure(self) -> dict[str, Any]:
        """`accuracy` (the curriculum's), `usage`, `usage_per_layer` on validation data, and what else to keep."""
        raise NotImplementedError

    def enough(self) -> float:
        """The usage that need not be bettered."""
        raise NotImplementedError

    @property
    def questions(self) -> int:
        """What a sequence asks; the unit of the target of usage."""
        return 1

    def where(self) -> str:
        """The stage, for a line of progress."""
        return f"length {self.curriculum.length}"

    def advance(self, seen: dict[str, Any]) -> None:
        """Move the curriculum by what was measured."""
        self.settled += self.curriculum.done
        held = self.config.solved if self.curriculum.rules.eases else self.config.floor
        if not self.curriculum.done or seen["accuracy"] < held:
            self.curriculum.update(seen["accuracy"], seen["usage_per_layer"], self.questions)

    # -- a step ------------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        return self.number >= self.config.steps or self.settled > self.config.settle

    def run(self, resume: bool) -> None:
        """Train to the end.

        Raises:
            KeyboardInterrupt: after Ctrl-C, with a checkpoint of the step under way.
        """
        with first_ctrl_c(self._interrupt):
            self.begin(resume)  # what it fits is kept, too
            while not self.over and not self.interrupted:
                self.step()
        if self.interrupted:
            self._save()
            self.notify(f"stopped at step {self.number}: give the same options and --resume to go on")
            raise KeyboardInterrupt
        if self.best is not None:
            self.trained.load_state_dict(self.best["weights"])

    def _interrupt(self) -> None:
        self.interrupted = True

    def begin(self, resume: bool) -> None:
        saved = self.out / CHECKPOINT
        if not resume:
            if saved.exists():
                raise ValueError(
                    f"'{self.out}' already holds a training: resume it with --resume, or give another folder"
                )
            self.out.mkdir(parents=True, exist_ok=True)
        elif not saved.exists():
            raise ValueError(f"'{self.out}' holds no checkpoint to resume from: leave --resume out")
        else:
            self._load(saved)
        weights = sum(p.numel() for p in self.trained.parameters())
        self.notify(f"{self.title}: {weights:,} trained weights")

    def rate(self) -> float:
        """The learning rate of the next step."""
        rate = self.config.learning_rate * min(1.0, (self.number + 1) / max(1, self.config.warmup))
        if self.curriculum.done:  # what is kept should be settled: the rate falls over the last evaluations
            rate *= 1 - self.settled / (self.config.settle + 1)
        return rate

    def step(self) -> None:
        """One optimizer step, and what is due after it."""
        config, curriculum, began = self.config, self.curriculum, perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        loss, logits, gates = self.loss()
        self.losses.append(loss.item())
        if any(curriculum.weights):
            loss = loss + penalty(
                logits, gates, torch.tensor(curriculum.weights, device=loss.device), config.penalty_on
            )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()
        self.number += 1
        if self.number % config.eval_every == 0 or self.number == config.steps:
            self._measured()
        self.seconds += perf_counter() - began
        if self.number % config.save_every == 0 or self.over:
            self._save()

    def _measured(self) -> None:
        config, curriculum = self.config, self.curriculum
        seen = self.measure()
        entry = {
            "step": self.number,
            "length": curriculum.length,
            "phase": curriculum.phase,
            "loss": sum(self.losses) / max(1, len(self.losses)),
            **seen,
            "penalty": list(curriculum.weights),
        }
        self.losses = []
        self.history.append(entry)
        # Sparse enough, then right, then sparser still.
        rank = [max(seen["usage"], self.enough()), -seen["accuracy"], seen["usage"]]
        solved = seen["accuracy"] >= config.solved and curriculum.last_stage and not curriculum.fixed
        if solved and (self.best is None or rank <= self.best["rank"]):
            kept = {name: value.clone() for name, value in self.trained.state_dict().items()}
            self.best = {"step": self.number, "rank": rank, "weights": kept}
        self.notify(
            f"step {self.number}/{config.steps}: {self.where()}, {entry['phase']}, loss {entry['loss']:.3f}, "
            f"accuracy {seen['accuracy']:.1%}, usage {seen['usage']:.2%}, "
            f"penalty {max(entry['penalty']):.3f} ({self.seconds / self.number:.2f} s a step)"
        )
        self.advance(seen)

    # -- interruptions -----------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return next(self.trained.parameters()).device

    def _save(self) -> None:
        device = self._device
        state = {
            "config": self.config.to_dict(),
            "model": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curriculum": self.curriculum.state(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "run": {name: getattr(self, name) for name in _STATE},
        }
        unfinished = self.out / (CHECKPOINT + ".part")
        torch.save(state, unfinished)
        unfinished.replace(self.out / CHECKPOINT)  # a checkpoint is whole or not there

    def _load(self, saved: Path) -> None:
        device = self._device
        state = torch.load(saved, map_location=device, weights_only=True)
        self.config.check_resumable(state["config"])
        self.trained.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.curriculum.load(state["curriculum"])
        torch.set_rng_state(state["random"].cpu())
        if device.type == "cuda" and state.get("cuda_random") is not None:  # earlier versions kept none
            torch.cuda.set_rng_state(state["cuda_random"].cpu(), device)
        for name, value in state["run"].items():
            setattr(self, name, value)

    def result(self) -> dict[str, Any]:
        """What every result holds of the training."""
        return {
            "solved": self.best is not None,
            "steps": self.number,
            "best_step": self.best["step"] if self.best is not None else self.number,
            "seconds": self.seconds,
            "command": self.config.command(),
            "config": self.config.to_dict(),
            "environment": environment(),
            "history": self.history,
        }


class RecallRun(CurriculumRun):
    """A small model learns to recall."""

    def __init__(self, config: RoutedAttentionConfig, notify: Callable[[str], None]) -> None:
        rules = config.rules()
        self.tasks = [RecallTask(config.task, length, config.pairs, config.queries) for length in rules.lengths]
        self.title = f"{config.task}, {config.mode}, lengths {', '.join(str(task.length) for task in self.tasks)}"
        torch.manual_seed(config.seed)
        self.model = build(config).to("cuda" if torch.cuda.is_available() else "cpu").train()
        self.begins_fixed = config.mode == "curriculum" and config.task == "mqar"
        curriculum = Curriculum(rules, config.layers, fixed=self.begins_fixed)
        if self.begins_fixed:
            for number, layer in enumerate(self.model.layers):
                nn.init.constant_(layer.mix.router.out.bias, _SURE if number % 2 else -_SURE)
        if config.mode == "joint":
            curriculum.weights = [config.penalty] * config.layers
        super().__init__(config, self.model, curriculum, notify)

    @property
    def task(self) -> RecallTask:
        """What is trained on now."""
        return self.tasks[self.curriculum.stage]

    @property
    def questions(self) -> int:
        return self.task.asks

    def enough(self) -> float:
        return (self.curriculum.rules.target or 0.0) * self.tasks[-1].least_usage(self.config.layers)

    def rate(self) -> float:
        return super().rate() * (_LET_GO if self.begins_fixed and not self.curriculum.fixed else 1.0)

    def loss(self) -> tuple[Tensor, Tensor, Tensor]:
        config, task = self.config, self.task
        rows = max(config.least_rows, config.tokens_per_batch // task.length)
        batch = task.batch(rows, config.seed, self.number)
        self._set_mixing(self.curriculum.fixed)
        output = self.model(batch.input_ids.to(self.model.device))
        targets = batch.targets.to(self.model.device).flatten()
        loss = F.cross_entropy(output.logits.flatten(0, 1), targets, ignore_index=IGNORED)
        return loss, output.route_logits, output.gates

    def measure(self) -> dict[str, Any]:
        config = self.config
        self._set_mixing(self.curriculum.fixed)
        return evaluate(self.model, self.task, config.eval_rows, config.seed, "validation")

    def _set_mixing(self, fixed: bool) -> None:
        """Layers mix by `_FIXED` or as their routers say; where few attend in long texts, only these are scored."""
        usage = self.history[-1]["usage"] if self.history else 1.0
        sparse = usage < _SPARSE and self.task.length >= _LONG
        for number, layer in enumerate(self.model.layers):
            layer.mix.mixing = _FIXED[number % 2] if fixed else self.model.config.mixing
            layer.mix.blend = self.config.blend and not sparse

    def advance(self, seen: dict[str, Any]) -> None:
        config, curriculum = self.config, self.curriculum
        if config.mode == "curriculum":
            super().advance(seen)
        elif config.mode != "joint" and seen["accuracy"] >= config.solved:  # a baseline only lengthens
            if curriculum.last_stage:
                self.settled = config.settle + 1
            else:
                curriculum.stage += 1

    def finish(self) -> dict[str, Any]:
        """Test the model, save it and its result; returns the latter."""
        config, final = self.config, self.tasks[-1]
        self._set_mixing(fixed=False)
        tested = evaluate(self.model, final, config.test_rows, config.seed, "test")
        told = {name: getattr(config, name) for name in ("task", "distance", "seed", "mode")}
        result = {**told, **tested, "least_usage": final.least_usage(config.layers), **self.result()}
        result["example"] = example(self.model, final, config.seed)
        self.model.eval().save_pretrained(self.out)
        (self.out / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        self.notify(f"test: accuracy {result['accuracy']:.1%}, usage {result['usage']:.3%} of position-layer slots")
        return result


_STATE = ("number", "settled", "seconds", "losses", "history", "best")
