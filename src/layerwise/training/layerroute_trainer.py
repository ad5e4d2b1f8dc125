"""The steps of a LayerRoute training: optimizer, checkpoints, and what is fitted between steps. See
`training.layerroute`."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from layerwise.data.examples import Tokens
from layerwise.model.bridges import Bridges
from layerwise.model.thin import FILE as THIN_FILE
from layerwise.model.thin import ThinMlps
from layerwise.policies.gates import GatedPolicy
from layerwise.training.gate_fits import choose_basis
from layerwise.training.trainer import RecipeTrainer

if TYPE_CHECKING:
    from layerwise.training.layerroute import LayerRoute

STATE = "layerroute.json"  # of a checkpoint: what is neither in the adapter nor in the optimizer
PROMPTS = 64  # in whose states the directions are found that routers see
FITTED = 192  # examples that routers are fitted to while the LoRA learns


def drawn(examples: Sequence[Tokens], seed: int, most: int) -> list[Tokens]:
    """So many of the examples, the same for a seed in all processes."""
    return random.Random(seed).sample(examples, min(most, len(examples)))


class LayerRouteTrainer(RecipeTrainer):
    """transformers' Trainer for `LayerRoute`: its own learning rate for routers, and the dual variable."""

    def __init__(self, module: LayerRoute, **options: Any) -> None:
        super().__init__(module, **options)
        self.add_callback(_BetweenSteps(self))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            recipe, routers = self.model.recipe, [p for p in (self.model.weight, self.model.bias) if p is not None]
            known = {id(p) for p in routers}
            lora = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
            groups = [{"params": lora}]
            if routers:
                rate = recipe.router_learning_rate
                groups.append({"params": routers, "lr": self.args.learning_rate if rate is None else rate})
            decay = recipe.weight_decay
            self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate, weight_decay=decay)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            state = json.dumps({"price": self.model.price, "gap": self.model.gap}) + "\n"
            (Path(output_dir or self.args.output_dir) / STATE).write_text(state, encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        module, folder = self.model, Path(resume_from_checkpoint)
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            module.price, module.gap = float(state["price"]), float(state["gap"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"'{folder}' is no checkpoint of this training: it has no readable {STATE}") from error
        if module.model.bridges is not None:
            bridges = Bridges.load(folder, module.model.runtime.backbone)
            module.model.bridges.load_state_dict(bridges.state_dict())
        if (folder / THIN_FILE).is_file():
            module.thin_by(ThinMlps.load(folder, module.model.runtime.backbone))
        if module.weight is not None:
            saved = GatedPolicy.load(module.model.policy.to_dict(), module.model.depth, folder)
            with torch.no_grad():
                for name, tensor in module.model.policy.tensors().items():
                    tensor.copy_(getattr(saved, name))


class _BetweenSteps(TrainerCallback):
    """Fits bridges, or chooses neurons, before the first step that needs them; chooses what routers see when they begin
    to learn, or fits them; moves the price by what all processes saw in a step."""

    def __init__(self, trainer: LayerRouteTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        module, examples = self.trainer.model, self.trainer.train_dataset.examples
        recipe = module.recipe
        if not isinstance(module.model.policy, GatedPolicy) or module.model.policy.reads != "last":
            return
        if state.global_step == module.crossed_from:
            module.fit_crossings(examples, args.seed)
        times = [recipe.hold + (1 - recipe.hold) * fit / max(1, recipe.fits) for fit in range(max(1, recipe.fits))]
        if state.global_step not in [ceil(time * module.steps) for time in times]:
            return
        # The same examples in all processes.
        if recipe.fits:
            gap, bearing = module.fit_gates(drawn(examples, args.seed, FITTED))
            self.trainer.log({"gap_of_all_skips": gap, "share_that_bears_it": bearing})
        else:
            choose_basis(module.model, drawn(examples, args.seed, PROMPTS))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        module = self.trainer.model
        sums = torch.tensor([module.seen, module.rows_seen], device=args.device)
        seen, rows = self.trainer.accelerator.reduce(sums, "sum").tolist()
        if rows:
            module.adapt(seen / rows)
        module.seen = module.rows_seen = 0.0
