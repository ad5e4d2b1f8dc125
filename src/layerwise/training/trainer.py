"""transformers' Trainer, for modules whose `forward` is a recipe's loss.

What it adds to the Trainer, for every recipe:

- *Global batches.* Batches are made once for the whole training, by a budget of tokens and of rows of similar length.
  All processes make the same list, and each takes every n-th row of every batch; the loss is the mean over the tokens
  of the global batch. So the number of processes changes the speed and nothing else, unless a recipe draws by chance
  for its own rows or takes means over them, as LayerRoute does.
- *Checkpoints that resume.* A checkpoint of a layerwise model is an adapter folder, in which the Trainer finds no
  weights to go on from. Here they are read back: the PEFT adapter, or the whole base where that is trained.
- *Ctrl-C* ends the training after the step under way, in all processes, with a checkpoint.

A recipe's module has `model` (a `LayerwiseForCausalLM`) and returns `loss`, summed over labelled tokens, and any number
of (numerator, denominator) pairs, which are logged under their names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from layerwise.data.examples import IGNORED, Tokens, collate
from layerwise.hub import save_adapter
from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.model.exit_head import ExitHead
from layerwise.training.global_batches import Examples, GlobalBatches
from layerwise.training.interrupt import first_ctrl_c


class RecipeTrainer(Trainer):
    """Trains `module`, see above.

    Args:
        module: the recipe's loss around a `LayerwiseForCausalLM`.
        args: `training_arguments(...)`.
        examples: what is trained on.
        tokens_per_batch: of a global batch; its seed is the arguments'.
        pad_id: fills rows up.
        notify: gets a line per log entry, in the main process.
    """

    def __init__(
        self,
        module: nn.Module,
        args: TrainingArguments,
        examples: Sequence[Tokens],
        tokens_per_batch: int,
        pad_id: int = 0,
        notify: Callable[[str], None] = lambda line: None,
        **options: Any,
    ) -> None:
        super().__init__(model=module, args=args, train_dataset=Examples(examples), **options)
        if self.args.n_gpu > 1:
            raise ValueError("one process drives one GPU: start with 'accelerate launch', or set CUDA_VISIBLE_DEVICES")
        self.tokens_per_batch = tokens_per_batch
        self.pad_id = pad_id
        self.interrupted = False
        self._tallies: dict[str, Tensor] = {}
        self.remove_callback(PrinterCallback)
        self.add_callback(_StopAfterStep(self))
        if self.is_world_process_zero():
            self.add_callback(_Progress(notify))

    @property
    def layerwise(self) -> LayerwiseForCausalLM:
        return self.model.model

    def get_train_dataloader(self) -> DataLoader:
        # Not through accelerate, which would deal out whole batches: the sampler knows this process's share.
        batches = GlobalBatches(
            [len(tokens.input_ids) for tokens in self.train_dataset.examples],
            self.tokens_per_batch,
            self.args.max_steps,
            self.args.gradient_accumulation_steps,
            self.args.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self._collate)

    def _collate(self, rows: Sequence[tuple[Tokens, int]]) -> dict[str, Tensor]:
        batch = collate([tokens for tokens, _ in rows], self.pad_id)
        batch["places"] = torch.tensor([place for _, place in rows])
        # Only to be counted: the Trainer does not know that this model's loss shifts labels.
        batch["shift_labels"] = batch["labels"][:, 1:]
        return batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The module's loss, divided by the labelled tokens of the global batch (all processes, all accumulation)."""
        counted = inputs["shift_labels"]
        outputs = model(
            **{name: value for name, value in inputs.items() if name != "shift_labels"}, step=self.state.global_step
        )
        total = outputs.pop("loss")
        for name, pair in outputs.items():
            self._tallies[name] = self._tallies.get(name, 0) + pair.detach().double()
        if num_items_in_batch is None:
            loss = total / (counted != IGNORED).sum().clamp(min=1)
        else:
            # Data parallel training takes the mean of the processes' gradients, where their sum is wanted.
            loss = total / torch.as_tensor(num_items_in_batch).clamp(min=1) * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._tallies:
            names = sorted(self._tallies)
            pairs = self.accelerator.reduce(torch.stack([self._tallies[name] for name in names]), "sum")
            logs |= {name: (top / bottom).item() for name, (top, bottom) in zip(names, pairs, strict=True) if bottom}
            self._tallies.clear()
        super().log(logs, start_time)

    # -- checkpoints ---------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The model as an adapter; the Trainer writes optimizer, schedule and random states beside it."""
        if self.args.should_save:
            save_adapter(self.layerwise, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.layerwise, Path(resume_from_checkpoint))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; after Ctrl-C it returns early, with `interrupted` set and a checkpoint written."""
        self.interrupted = False
        with first_ctrl_c(self._interrupt):
            return super().train(*args, **kwargs)

    def _interrupt(self) -> None:
        self.interrupted = True


def load_trained(model: LayerwiseForCausalLM, folder: Path) -> None:
    """Read the trained weights of a checkpoint back into `model`, in place.

    Raises:
        ValueError: the folder holds no weights of such a model.
    """
    if model.exit_head is not None:
        saved_head = ExitHead.load(folder, model.runtime.backbone)
        model.exit_head.load_state_dict(saved_head.state_dict())
        return
    if hasattr(model.base, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        if not (folder / "adapter_model.safetensors").is_file():
            raise ValueError(f"'{folder}' holds no adapter weights to go on from: give a checkpoint of this training")
        missed = set_peft_model_state_dict(model.base, load_peft_weights(str(folder), device="cpu"))
        if missed.unexpected_keys:
            raise ValueError(f"'{folder}' holds weights of another adapter ({missed.unexpected_keys[0]})")
        return
    inner = model.runtime.backbone.model
    if not (folder / "base" / "config.json").is_file():
        raise ValueError(f"'{folder}' holds no trained base model: give a checkpoint of this training")
    saved = type(inner).from_pretrained(str(folder / "base"), dtype=inner.dtype)
    inner.load_state_dict(saved.state_dict())


class _StopAfterStep(TrainerCallback):
    """Carries a Ctrl-C of any process to all of them."""

    def __init__(self, trainer: RecipeTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        if trainer.accelerator.num_processes > 1:
            flag = torch.tensor(float(trainer.interrupted), device=args.device)
            trainer.interrupted = bool(trainer.accelerator.reduce(flag, "sum") > 0)
        if trainer.interrupted:
            control.should_save = control.should_log = control.should_training_stop = True


class _Progress(TrainerCallback):
    """One line per log entry."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self.notify = notify
        self.since = (perf_counter(), 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.since = (perf_counter(), state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        before, step = self.since
        self.since = (perf_counter(), state.global_step)
        seconds = (self.since[0] - before) / max(1, state.global_step - step)
        rest = [f"{name.replace('_', ' ')} {logs[name]:.3f}" for name in sorted(logs) if name in _SHOWN]
        left = seconds * (state.max_steps - state.global_step) / 60
        self.notify(
            f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.3f}, {', '.join(rest)}"
            f" ({seconds:.1f} s a step, {left:.0f} min left)"
        )


_SHOWN = ("last_layer_loss", "exit_loss", "kept_layers", "agreement_1", "agreement_2", "agreement_3")
_SHOWN += ("routed_loss", "layers_run", "quality_gap", "price")
