"""Teaches a pretrained model where it needs its attention: routed attention on real text.

The base is frozen. Of each converted layer a router and what stands in for attention are trained
(`model.routed_layers`), to say what the base says: the loss is the Kullback-Leibler divergence from the base's own
next-token distribution, on running text, which wants fewer texts than cross entropy. Teacher and pupil are one model,
its layers set to "attention" or to "routed". There are two methods:

- *fit*: least squares on the base's states first (`routed_fit`), which does most of it; then steps of gradient descent
  for convolutions and corrections, while the threshold, one for all routers, is moved so that usage stays where it was
  aimed at. No penalty.
- *curriculum*: from mean attention, with sampled gates; the penalty comes when the model is as good as the base, within
  tolerance, and rises while it stays so. It wants many more steps.

What is reported is measured as it is used (`routed_text_report`): hard routing, queries of the others really left out,
on articles that neither training nor the curriculum saw.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.data import text
from layerwise.evaluation.routed_text import generate_times, loss_on, report, usages
from layerwise.hub import save_adapter
from layerwise.model.causal_lm import LayerwiseForCausalLM, attach
from layerwise.model.routed_layers import RoutedLayers
from layerwise.sources import load_base, load_tokenizer
from layerwise.training import routed_fit
from layerwise.training.config import computed_in, layers_of
from layerwise.training.curriculum import Curriculum, RoutedTextConfig
from layerwise.training.routed_attention import RESULT, CurriculumRun

COSTS = "costs.json"  # of each layer without attention, as the fit found them
CONTEXTS = (512, 2048)  # tokens of text before what is generated and timed
_MEASURED = 8  # texts from which the taps begin, without a fit
_FOLLOWS = 0.5  # of the way to the aimed usage, that a step moves the threshold
_MARGIN = 0.05  # below the usage aimed at, since articles differ: among ours, from 44% to 55% at one threshold


def train(
    config: RoutedTextConfig,
    notify: Callable[[str], None] = lambda line: None,
    resume: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Run a training; writes an adapter and `result.json` to `config.out` and returns what is in the latter.

    The result holds, on held-out text, what `evaluation.routed_text.report` measures: perplexities, usage over the
    converted layers, controls, a curve; `generate`, its times for two lengths of context; steps, history and so on.

    Raises:
        ValueError: the folder holds a training already, or none to resume, or one with other options; no such model.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint of the step under way.
    """
    base = load_base(config.model, computed_in(config.precision, device))
    tokenizer = load_tokenizer(config.model)
    texts = {
        split: cut([tokenizer(piece)["input_ids"] for piece in text("wikipedia", split)], config.text_length)
        for split in ("train", "validation", "test")
    }
    run = TextRun(config, attach(base), texts, notify, device)
    run.run(resume)
    return run.finish()


def cut(pieces: list[list[int]], length: int) -> Tensor:
    """Texts of exactly `length` tokens (texts, length), from the beginnings of `pieces` that are long enough.

    Raises:
        ValueError: none is.
    """
    rows = [piece[:length] for piece in pieces if len(piece) >= length]
    if not rows:
        raise ValueError(f"no text has {length} tokens: lower text-length")
    return torch.tensor(rows)


def convert(
    model: LayerwiseForCausalLM, layers: tuple[int, ...], taps: int, router_width: int, rank: int = 0
) -> RoutedLayers:
    """Give `model` routed layers (all if none are named), in float32, and freeze everything else."""
    backbone = model.runtime.backbone
    model.requires_grad_(False)
    model.routed_layers = RoutedLayers(backbone, layers or range(backbone.depth), taps, router_width, rank)
    model.routed_layers.attach(backbone)
    return model.routed_layers


class TextRun(CurriculumRun):
    """Routers and taps learn on `texts`, (texts, length) by split: fitted on the CPU, then trained on `device`."""

    def __init__(
        self,
        config: RoutedTextConfig,
        model: LayerwiseForCausalLM,
        texts: dict[str, Tensor],
        notify: Callable[[str], None],
        device: torch.device | str = "cpu",
    ) -> None:
        torch.manual_seed(config.seed)
        chosen = layers_of(config.convert, model.depth)
        self.model, self.texts, self.device = model.eval(), texts, device
        self.routed = convert(model, chosen, config.taps, config.router_width, config.rank)
        layers = len(self.routed.numbers)
        self.title = f"{layers} of {model.depth} layers, {len(texts['train'])} texts of {config.text_length} tokens"
        self.fitted = config.method == "fit"
        if self.fitted:  # what routers learn from so few steps is worse than what they were fitted to
            for layer in self.routed:
                layer.sampled = False
                layer.router.requires_grad_(False)
        super().__init__(config, self.routed, Curriculum(config.rules(), layers), notify)
        with self.routed.eval().mixing("attention"):
            self.base_loss = mean(loss_on(model, texts["validation"][: config.eval_rows]))

        self.routed.train()

    def begin(self, resume: bool) -> None:
        if resume:
            self.model.to(self.device)
        super().begin(resume)
        if resume:
            return
        texts = self.texts["train"]
        if self.fitted:
            step = max(1, len(texts) // self.config.fit_texts)
            texts = texts[::step][: self.config.fit_texts]
            self.notify("Ctrl-C now waits until all layers are fitted; a second one loses the fit")
            costs = routed_fit.fit(
                self.model, self.routed, texts, self.config.usage_target, self.config.seed, self.notify
            )
            (self.out / COSTS).write_text(json.dumps(costs) + "\n", encoding="utf-8")
            self._save()  # what was fitted need not be fitted again
            seen = self.measure()
            self.notify(f"fitted: accuracy {seen['accuracy']:.1%}, usage {seen['usage']:.1%}")
            self.history.append({"step": 0, "phase": "fit", **seen})
        else:
            with torch.no_grad(), self.routed.measure():
                for row in texts[:_MEASURED]:
                    self.model(row[None])
        self.model.to(self.device)

    def rate(self) -> float:
        return super().rate() * (1 - self.number / self.config.steps if self.fitted else 1.0)

    def advance(self, seen: dict[str, Any]) -> None:
        if not self.fitted:
            super().advance(seen)

    @property
    def questions(self) -> int:
        return self.texts["train"].shape[1] * len(self.routed.numbers)

    def enough(self) -> float:
        return 1.0 if self.fitted else self.config.usage_target  # a fit's is set in the end: accuracy alone ranks

    def loss(self) -> tuple[Tensor, Tensor, Tensor]:
        rows = random.Random(self.config.seed * 2**31 + self.number).sample(
            range(len(self.texts["train"])), min(self.config.rows, len(self.texts["train"]))
        )
        ids = self.texts["train"][rows]
        with torch.no_grad(), self.routed.mixing("attention"):
            wanted = self.model(ids).logits.float().log_softmax(-1)
        found = self.model(ids).logits.float().log_softmax(-1)
        loss = F.kl_div(found, wanted, log_target=True, reduction="sum") / ids.numel()
        said = self.routed.routing()
        if self.fitted:
            self.routed.level(said.logits, self.config.usage_target, _FOLLOWS)
        return loss, said.logits, said.gate

    def measure(self) -> dict[str, Any]:
        texts = self.texts["validation"][: self.config.eval_rows]
        used: list[Tensor] = []
        self.routed.eval()
        loss = mean(loss_on(self.model, texts, lambda: used.append(usages(self.routed))))
        self.routed.train()
        usage = torch.stack(used).mean(0).tolist()
        return {
            "accuracy": min(1.0, math.exp(self.base_loss - loss)),
            "perplexity": math.exp(loss),
            "base_perplexity": math.exp(self.base_loss),
            "usage": mean(usage),
            "usage_per_layer": usage,
        }

    def level(self, usage: float, texts: int = 8, times: int = 1) -> None:
        """Set the threshold so that about `usage` of all positions attend, by so many validation texts."""
        held = self.texts["validation"]
        spread = held[:: max(1, len(held) // texts)][:texts]
        routed_fit.settle(self.model, self.routed, spread, usage, times)

    def finish(self) -> dict[str, Any]:
        """Test on held-out articles, save the adapter and its result; returns the latter."""
        config, file = self.config, self.out / COSTS
        self.routed.eval()
        if self.fitted:
            self.level(max(config.usage_target - _MARGIN, config.usage_target / 2), texts=16, times=2)
        save_adapter(self.model, self.out)
        costs = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        texts = self.texts["test"]
        self.notify(f"testing on {len(texts[: config.test_rows])} texts")
        tested = report(self.model, self.routed, texts[: config.test_rows], self.level, costs, config.seed)
        times = []
        for length in dict.fromkeys(min(wanted, texts.numel()) for wanted in CONTEXTS):
            times.append(generate_times(self.model, self.routed, texts.flatten()[None, :length].to(self.model.device)))
        told = {"task": "text", "seed": config.seed, "layers": list(self.routed.numbers)}
        result = {**told, **tested, "generate": times, **self.result()}
        (self.out / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        self.notify(
            f"test: perplexity {tested['perplexity']:.2f} at {tested['usage']:.1%} attention, "
            f"{tested['base_perplexity']:.2f} with all, {tested['convolution_perplexity']:.2f} without any"
        )
        return result
