"""LayerSkip training (arXiv 2404.16710): a model whose early layers can speak.

Two things are changed in an ordinary fine-tuning.

*Layer dropout.* Each row of a batch skips each layer by chance, later layers more often. The skipped rows are taken out
of the batch, so the time goes too: the walk is the package's one loop, told which rows take part in each layer.

*Early-exit loss.* The final norm and head are also applied to the hidden states after earlier layers:

    J = sum_l w(l,t) CE(head(norm(h_l)), y)

No module is added, so the trained model is an ordinary one, and every exit of it is a plan: `0-7` is the exit after
eight layers.

What a row drops depends on the seed, the step and the row's place in the global batch alone, not on how many processes
share that batch. So a run on two processes computes what a run on one does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.data.examples import IGNORED, Tokens, collate
from layerwise.model.backbone import Backbone
from layerwise.model.causal_lm import LayerwiseForCausalLM, attach
from layerwise.model.frame import Frame
from layerwise.model.packing import Packing
from layerwise.model.runtime import EagerEngine, Runtime
from layerwise.plan import Slot, Step, Visit
from layerwise.training.exit_loss import LOGITS_AT_ONCE, exit_losses, labelled
from layerwise.training.recipes import LayerSkipConfig, LayerSkipRecipe
from layerwise.training.runs import frozen_base, run_training
from layerwise.training.schedules import drop_rates, exit_weights, gradual, rotational
from layerwise.training.trainer import RecipeTrainer

SAMPLE = 24  # examples to judge exits by
AGREEMENT = 0.4  # below, drafting by an exit cannot pay

__all__ = ["LayerSkip", "LayerSkipConfig", "LayerSkipRecipe", "survivors", "train"]


class LayerSkip(nn.Module):
    """The loss of LayerSkip as a module around `model`, so that data parallel wrappers see one `forward`.

    Args:
        model: what is trained: its base's weights, or the PEFT adapter in it.
        recipe: dropout and exits.
        steps: T, the length of the training.
        seed: of the layer dropout.
    """

    accepts_loss_kwargs = True

    def __init__(self, model: LayerwiseForCausalLM, recipe: LayerSkipRecipe, steps: int, seed: int = 0) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.steps = steps
        self.seed = seed

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        places: Tensor | None = None,
        step: int = 0,
    ) -> dict[str, Tensor]:
        """The loss of a part of a batch; in evaluation mode without dropout, of the last layer alone.

        Args:
            input_ids, labels, attention_mask: (rows, width) as in `LayerwiseForCausalLM.forward`.
            places: (rows,) each row's number in the global batch; 0, 1, ... if None.
            step: t, counted from 0.

        Returns:
            `loss`, J summed over labelled positions; and, each as (numerator, denominator) summed over the same,
            `last_layer_loss`, `exit_loss` (mean over the early exits trained in this step) and `kept_layers`.
        """
        rows, width = input_ids.shape
        layers = self.model.depth
        packing = Packing.of(rows, width, attention_mask)
        at, targets = labelled(packing.pack(labels), packing.counts)
        rates, weights = self._decide(step)
        numbers = range(rows) if places is None else places.tolist()
        kept = survivors(rates, numbers, step, self.seed)
        exits = [layer for layer, weight in enumerate(weights) if weight > 0]
        hidden = packing.pack(self.model.embed(input_ids))
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.float()  # the residual stream, which autocast would leave in the weights' dtype
        found = self._walk(hidden, packing.counts, kept, exits, rates)
        loss, sums = self._loss(torch.stack([h.flatten(0, 1)[at] for h in found]), targets, [weights[e] for e in exits])
        early = len(exits) - 1
        real = (labels != IGNORED).any(1).tolist()  # not the row that only keeps a process company
        return {
            "loss": loss,
            "last_layer_loss": torch.stack([sums[-1], sums.new_tensor(len(targets))]),
            "exit_loss": torch.stack([sums[:-1].sum(), sums.new_tensor(len(targets) * early)]),
            "kept_layers": sums.new_tensor([sum(real[row] for one in kept for row in one), sum(real) * layers]),
        }

    def _decide(self, step: int) -> tuple[Sequence[float], Sequence[float]]:
        """Drop rate and loss weight of each layer."""
        recipe, layers = self.recipe, self.model.depth
        if not self.training:
            return [0.0] * layers, [0.0] * (layers - 1) + [1.0]
        if recipe.curriculum == "rotational":
            enabled = rotational(layers, recipe.every, step)
        else:
            enabled = gradual(layers, step, self.steps)
        rates = drop_rates(layers, recipe.p_max, step, self.steps, recipe.dropout)
        return rates, exit_weights(layers, recipe.e_scale, enabled)

    def _walk(
        self,
        hidden: Tensor,
        counts: Sequence[int],
        kept: Sequence[tuple[int, ...]],
        exits: Sequence[int],
        rates: Sequence[float],
    ) -> list[Tensor]:
        """Hidden states (rows, width, hidden size) after each of the layers `exits`."""
        rows, width, _ = hidden.shape
        backbone = self.model.runtime.backbone
        found: list[Tensor] = []
        latest = hidden

        def steps() -> Iterator[Step]:
            for layer, members in enumerate(kept):
                if members:
                    yield Step(Visit(layer), Slot(layer, 0), None if len(members) == rows else members)
                if layer in exits:
                    found.append(latest)  # after the layer, or, if every row skipped it, before

        def observe(_: Step, after: Tensor) -> None:
            nonlocal latest
            latest = after

        engine = EagerEngine(backbone)
        if self.training and self.recipe.inverse_survival:
            engine = _Scaled(backbone, [1 / (1 - rate) for rate in rates])
        frame = Frame(backbone, counts, width, hidden.device, hidden.dtype)
        Runtime(backbone, engine).run(hidden, steps(), frame, observe=observe)
        return found

    def _loss(self, hidden: Tensor, targets: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        backbone = self.model.runtime.backbone
        chunk = max(1, LOGITS_AT_ONCE // backbone.head.weight.shape[0])
        head = {id(p): p for part in (backbone.norm, backbone.head) for p in part.parameters() if p.requires_grad}
        return exit_losses(backbone.logits, list(head.values()), hidden, targets, weights, chunk)


class _Scaled(EagerEngine):
    """Multiplies what each layer adds to the residual stream (arXiv 2609.05275: inverse survival)."""

    def __init__(self, backbone: Backbone, scales: Sequence[float]) -> None:
        super().__init__(backbone)
        self.scales = scales

    def visit(self, step: Step, hidden: Tensor, frame: Frame) -> Tensor:
        after = super().visit(step, hidden, frame)
        return hidden + (after - hidden) * self.scales[step.visit.layer]


def survivors(rates: Sequence[float], places: Sequence[int], step: int, seed: int) -> list[tuple[int, ...]]:
    """The rows that run each layer; row r is number `places[r]` of the global batch.

    The draws of a row come from a generator of its own, so they do not depend on which rows are beside it.
    """
    if not any(rates):
        return [tuple(range(len(places)))] * len(rates)
    draws = []
    for place in places:
        digest = hashlib.blake2b(f"{seed} {step} {place}".encode(), digest_size=4).digest()
        draws.append(torch.rand(len(rates), generator=torch.Generator().manual_seed(int.from_bytes(digest))).tolist())
    return [tuple(row for row, draw in enumerate(draws) if draw[layer] >= rate) for layer, rate in enumerate(rates)]


def train(config: LayerSkipConfig, notify: Callable[[str], None] = lambda line: None, resume: bool = False) -> Path:
    """Train and save an adapter; `from_pretrained(adapter=...)` loads the folder it returns.

    Under `torchrun` or `accelerate launch` the processes share each batch. `torchrun --nproc_per_node 2` starts two;
    `accelerate launch --multi_gpu --num_processes 2` does so on CPUs too; with --cpu, without MPI, it starts one.

    Args:
        notify: gets lines of progress, from the main process only.
        resume: go on from the last checkpoint in `config.out`.

    Raises:
        ValueError: no usable data or model; the folder holds a training and `resume` was not asked for, or the reverse.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written and `notify` was told how to go on.
    """

    def make(steps: int) -> LayerSkip:
        return LayerSkip(load_for_training(config), config, steps, config.seed)

    return run_training(config, make, RecipeTrainer, notify, resume, finish=note_exits)


def note_exits(model: LayerwiseForCausalLM, examples: Sequence[Tokens], pad: int) -> None:
    """Set `model.exits`, which `--draft auto` tries: those that agree often enough with the last layer.

    Candidates are the exits after 1/8, 1/4 and 2/5 of the layers; deeper ones cost too much to draft with.
    """
    from layerwise.evaluation.exits import exit_quality

    candidates = sorted({max(1, round(model.depth * share)) for share in (0.125, 0.25, 0.4)} - {model.depth})
    with torch.no_grad():
        found = exit_quality(model, [collate([one], pad) for one in examples[:SAMPLE]], candidates)
    model.exits = tuple(one.exit for one in found if one.agreement >= AGREEMENT)


def load_for_training(config: LayerSkipConfig) -> LayerwiseForCausalLM:
    """The base model, attached, with a new LoRA on all linear projections (or, with rank 0, ready to train itself)."""
    if config.rank == 0:
        from layerwise.sources import load_base

        model = attach(load_base(config.model, torch.float32))
        model.attached_to = ""  # its weights are the result: they are saved, however little they changed
        return model
    from peft import LoraConfig, get_peft_model

    base = frozen_base(config)
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.config.name_or_path,
    )
    return attach(get_peft_model(base, lora))
