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
from torch import Tensor
from torch.nn import functional as F

from layerwise.benchmarks.environment import environment
from layerwise.data.examples import IGNORED
from layerwise.data.recall import VOCABULARY, RecallTask, Split
from layerwise.model.recall_model import RecallModel, RecallModelConfig, RoutedOutput
from layerwise.training.curriculum import Curriculum, RoutedAttentionConfig

RESULT = "result.json"
_CHECKPOINT = "checkpoint.pt"
_EVAL_TOKENS = 2**15  # of one evaluation batch


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
        KeyboardInterrupt: after Ctrl-C; resuming goes on from the last checkpoint.
    """
    run = _Run(config, notify)
    run.begin(resume)
    try:
        while not run.over:
            run.step()
    except KeyboardInterrupt:
        notify(f"stopped at step {run.number}: give the same options and --resume to go on")
        raise
    return run.finish()


def penalty(output: RoutedOutput, weights: Tensor, on: str) -> Tensor:
    """The mean over layers of weight times the layer's mean penalty; `weights` (layers,)."""
    what = F.softplus(output.route_logits) if on == "logits" else output.gates
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


class _Run:
    """A training under way: what a checkpoint holds, and how a step goes."""

    def __init__(self, config: RoutedAttentionConfig, notify: Callable[[str], None]) -> None:
        self.config, self.notify = config, notify
        self.out = Path(config.out)
        self.tasks = {length: self._task(length) for length in config.rules().lengths}  # refused now, not at the end
        torch.manual_seed(config.seed)
        self.model = build(config).to("cuda" if torch.cuda.is_available() else "cpu").train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate)
        self.curriculum = Curriculum(config.rules(), config.layers)
        self.routed = config.mode in ("curriculum", "joint")
        if config.mode == "joint":
            self.curriculum.weights = [config.penalty] * config.layers
        self.number = 0
        self.settled = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None  # step, usage, weights

    def _task(self, length: int) -> RecallTask:
        return RecallTask(self.config.task, length, self.config.pairs, self.config.queries)

    @property
    def over(self) -> bool:
        return self.number >= self.config.steps or self.settled > self.config.settle

    def begin(self, resume: bool) -> None:
        saved = self.out / _CHECKPOINT
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
        weights = sum(p.numel() for p in self.model.parameters())
        stages = ", ".join(str(length) for length in self.tasks)
        self.notify(f"{self.config.task}, {self.config.mode}: {weights:,} weights, lengths {stages}")

    def step(self) -> None:
        """One optimizer step, and what is due after it."""
        config, began = self.config, perf_counter()
        task = self.tasks[self.curriculum.length]
        batch = task.batch(max(1, config.tokens_per_batch // task.length), config.seed, self.number)
        rate = config.learning_rate * min(1.0, (self.number + 1) / max(1, config.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        output = self.model(batch.input_ids.to(self.model.device))
        targets = batch.targets.to(self.model.device).flatten()
        loss = F.cross_entropy(output.logits.flatten(0, 1), targets, ignore_index=IGNORED)
        self.losses.append(loss.item())
        if self.routed and any(self.curriculum.weights):
            weights = torch.tensor(self.curriculum.weights, device=loss.device)
            loss = loss + penalty(output, weights, config.penalty_on)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.number += 1
        if self.number % config.eval_every == 0 or self.number == config.steps:
            self._measure()
        self.seconds += perf_counter() - began
        if self.number % config.save_every == 0 or self.over:
            self._save()

    def _measure(self) -> None:
        config, curriculum = self.config, self.curriculum
        seen = evaluate(self.model, self.tasks[curriculum.length], config.eval_rows, config.seed, "validation")
        entry = {
            "step": self.number,
            "length": curriculum.length,
            "phase": curriculum.phase if self.routed else config.mode,
            "loss": sum(self.losses) / max(1, len(self.losses)),
            **seen,
            "penalty": list(curriculum.weights) if self.routed else [0.0] * config.layers,
        }
        self.losses = []
        self.history.append(entry)
        solved = seen["accuracy"] >= config.solved and curriculum.last_stage
        if solved and (self.best is None or seen["usage"] < self.best["usage"]):
            kept = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.best = {"step": self.number, "usage": seen["usage"], "weights": kept}
        self.notify(
            f"step {self.number}/{config.steps}: length {entry['length']}, {entry['phase']}, loss {entry['loss']:.3f}, "
            f"accuracy {seen['accuracy']:.1%}, usage {seen['usage']:.2%}, "
            f"penalty {max(entry['penalty']):.3f} ({self.seconds / self.number:.2f} s a step)"
        )
        if config.mode == "curriculum":
            self.settled += curriculum.done
            if not curriculum.done or seen["accuracy"] < config.floor:
                curriculum.update(seen["accuracy"], seen["usage_per_layer"])
        elif config.mode != "joint" and seen["accuracy"] >= config.solved:  # a baseline only lengthens
            if curriculum.last_stage:
                self.settled = config.settle + 1
            else:
                curriculum.stage += 1

    # -- ends and interruptions --------------------------------------------------------------------------

    def _save(self) -> None:
        state = {
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curriculum": self.curriculum.state(),
            "random": torch.get_rng_state(),
            "run": {name: getattr(self, name) for name in _STATE},
        }
        unfinished = self.out / (_CHECKPOINT + ".part")
        torch.save(state, unfinished)
        unfinished.replace(self.out / _CHECKPOINT)  # a checkpoint is whole or not there

    def _load(self, saved: Path) -> None:
        state = torch.load(saved, map_location=self.model.device, weights_only=True)
        self.config.check_resumable(state["config"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.curriculum.load(state["curriculum"])
        torch.set_rng_state(state["random"].cpu())
        for name, value in state["run"].items():
            setattr(self, name, value)

    def finish(self) -> dict[str, Any]:
        config = self.config
        if self.best is not None:
            self.model.load_state_dict(self.best["weights"])
        tested = evaluate(self.model, self._task(config.length), config.test_rows, config.seed, "test")
        result = {
            "task": config.task,
            "distance": config.distance,
            "seed": config.seed,
            "mode": config.mode,
            **tested,
            "least_usage": self._task(config.length).least_usage(config.layers),
            "solved": self.best is not None,
            "steps": self.number,
            "best_step": self.best["step"] if self.best is not None else self.number,
            "seconds": self.seconds,
            "command": config.command(),
            "config": config.to_dict(),
            "environment": environment(),
            "history": self.history,
        }
        self.model.eval().save_pretrained(self.out)
        (self.out / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        self.notify(f"test: accuracy {result['accuracy']:.1%}, usage {result['usage']:.3%} of position-layer slots")
        return result


_STATE = ("number", "settled", "seconds", "losses", "history", "best")
