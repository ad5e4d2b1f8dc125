"""Teaches a pretrained model where it needs its attention: routed attention on real text, by the same curriculum.

The base is frozen. Of each converted layer a router and the taps of a convolution are trained (`model.routed_layers`),
to say what the base says: the loss is the Kullback-Leibler divergence from the base's own next-token distribution, on
running text, which wants fewer texts than cross entropy. Teacher and pupil are one model, its layers set to "attention"
or to "routed". The penalty comes when the model is as good as the base, within tolerance, and rises while it stays so.

What is reported is measured as it is used: hard routing, queries of the others really left out, on articles that
neither training nor the curriculum saw.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.benchmarks.timing import rounds
from layerwise.data import text
from layerwise.hub import save_adapter
from layerwise.model.causal_lm import LayerwiseForCausalLM, attach
from layerwise.model.routed_attention import Mixing
from layerwise.model.routed_layers import RoutedLayers
from layerwise.sources import load_base, load_tokenizer
from layerwise.training.config import layers_of
from layerwise.training.curriculum import Curriculum, RoutedTextConfig
from layerwise.training.routed_attention import RESULT, CurriculumRun

_MEASURED = 8  # texts from which the taps begin


def train(
    config: RoutedTextConfig, notify: Callable[[str], None] = lambda line: None, resume: bool = False
) -> dict[str, Any]:
    """Run a training; writes an adapter and `result.json` to `config.out` and returns what is in the latter.

    The result holds, on held-out text: `perplexity`, `base_perplexity` and their ratio `accuracy`; `usage` over the
    converted layers and `usage_per_layer`; `convolution_perplexity`, of attention nowhere; `generate`, its times;
    steps, history and so on.

    Raises:
        ValueError: the folder holds a training already, or none to resume, or one with other options; no such model.
        KeyboardInterrupt: after Ctrl-C; resuming goes on from the last checkpoint.
    """
    base = load_base(config.model, config.precision)
    tokenizer = load_tokenizer(config.model)
    texts = {
        split: cut([tokenizer(piece)["input_ids"] for piece in text("wikipedia", split)], config.text_length)
        for split in ("train", "validation", "test")
    }
    run = TextRun(config, attach(base), texts, notify)
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


def convert(model: LayerwiseForCausalLM, layers: tuple[int, ...], taps: int, router_width: int) -> RoutedLayers:
    """Give `model` routed layers (all if none are named), in float32, and freeze everything else."""
    backbone = model.runtime.backbone
    model.requires_grad_(False)
    model.routed_layers = RoutedLayers(backbone, layers or range(backbone.depth), taps, router_width)
    model.routed_layers.attach(backbone)
    return model.routed_layers


class TextRun(CurriculumRun):
    """Routers and taps learn on `texts`, (texts, length) by split."""

    def __init__(
        self,
        config: RoutedTextConfig,
        model: LayerwiseForCausalLM,
        texts: dict[str, Tensor],
        notify: Callable[[str], None],
    ) -> None:
        torch.manual_seed(config.seed)
        chosen = layers_of(config.convert, model.depth)
        self.model, self.texts = model.eval(), texts
        self.routed = convert(model, chosen, config.taps, config.router_width)
        layers = len(self.routed.numbers)
        self.title = f"{layers} of {model.depth} layers, {len(texts['train'])} texts of {config.text_length} tokens"
        with torch.no_grad(), self.routed.measure():
            for row in texts["train"][:_MEASURED]:
                model(row[None])
        super().__init__(config, self.routed.train(), Curriculum(config.rules(), layers), notify)
        validation = texts["validation"][: config.eval_rows]
        with self.routed.mixing("attention"):
            self.base_loss = self._loss_on(validation)

    @property
    def questions(self) -> int:
        return self.texts["train"].shape[1] * len(self.routed.numbers)

    def enough(self) -> float:
        return self.config.usage_target

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
        return loss, said.logits, said.gate

    def measure(self) -> dict[str, Any]:
        return self._quality(self.texts["validation"][: self.config.eval_rows], self.base_loss)

    def _quality(self, texts: Tensor, base_loss: float) -> dict[str, Any]:
        used = torch.zeros(len(self.routed.numbers))
        loss = self._loss_on(texts, used)
        usage = (used / len(texts)).tolist()
        return {
            "accuracy": min(1.0, math.exp(base_loss - loss)),
            "perplexity": math.exp(loss),
            "base_perplexity": math.exp(base_loss),
            "usage": sum(usage) / len(usage),
            "usage_per_layer": usage,
        }

    def _loss_on(self, texts: Tensor, used: Tensor | None = None) -> float:
        """Mean cross entropy of texts (texts, length); adds each text's usage per layer to `used`."""
        was, total = self.routed.training, 0.0
        self.routed.eval()
        with torch.no_grad():
            for row in texts:
                logits = self.model(row[None]).logits[0, :-1].float()
                total += F.cross_entropy(logits, row[1:].to(logits.device)).item()
                if used is not None:
                    used += self.routed.routing().gate.float().mean((1, 2)).cpu()
        self.routed.train(was)
        return total / len(texts)

    def _generate_times(self, prompt: Tensor, new_tokens: int = 32, count: int = 3) -> dict[str, float]:
        """Median seconds of `generate` with attention where it is routed and with it everywhere, by these modules."""
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

        def timed(mixing: Mixing) -> float:
            began = perf_counter()
            with self.routed.mixing(mixing):
                self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            return perf_counter() - began

        seconds: dict[str, list[float]] = {"routed": [], "attention": []}
        for _, mixing, taken in rounds({mixing: partial(timed, mixing) for mixing in seconds}, count):
            seconds[mixing].append(taken)
        medians = {f"{mixing}_seconds": median(taken) for mixing, taken in seconds.items()}
        return {"prompt_tokens": prompt.shape[1], "new_tokens": new_tokens, **medians}

    def finish(self) -> dict[str, Any]:
        """Test on held-out articles, save the adapter and its result; returns the latter."""
        config, texts = self.config, self.texts["test"][: self.config.test_rows]
        losses = {}
        for mixing in ("attention", "convolution"):
            with self.routed.mixing(mixing):
                losses[mixing] = self._loss_on(texts)
        tested = self._quality(texts, losses["attention"])
        told = {"task": "text", "seed": config.seed, "layers": list(self.routed.numbers)}
        tested["convolution_perplexity"] = math.exp(losses["convolution"])
        self.routed.eval()
        result = {**told, **tested, "generate": self._generate_times(texts[:1]), **self.result()}
        save_adapter(self.model, self.out)
        (self.out / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        self.notify(
            f"test: perplexity {tested['perplexity']:.2f} at {tested['usage']:.1%} attention, "
            f"{tested['base_perplexity']:.2f} with all, {tested['convolution_perplexity']:.2f} without any"
        )
        return result
