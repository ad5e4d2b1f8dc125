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

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from layerwise.data.examples import IGNORED, Tokens, collate, length_sorted_batches, read_jsonl, tokenize
from layerwise.hub import save_adapter
from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.model.exit_head import ExitHead
from layerwise.training.config import TrainingConfig, computed_in
from layerwise.training.interrupt import first_ctrl_c

RECORD = "training.json"
SHORT = 512  # most tokens of an example whose attention is computed by plain matrix products on a CPU
Item = tuple[int, int, bool]  # example, place in the global batch, and whether its labels count


# -- batches -------------------------------------------------------------------------------------------------


class GlobalBatches:
    """The batches of one process, for all steps of a training, as a batch sampler of `Item`s.

    Args:
        lengths: tokens of each example.
        tokens_per_batch: most tokens of a batch, over all processes and with padding.
        steps, accumulation: `accumulation` batches make one of `steps` optimizer steps.
        seed: the order; every pass through the data has another.
        process, processes: which share of every batch is this one's.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        tokens_per_batch: int,
        steps: int,
        accumulation: int = 1,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.batches: list[list[int]] = []
        passes = 0
        while len(self.batches) < steps * accumulation:
            self.batches += length_sorted_batches(lengths, tokens_per_batch, seed + passes)
            passes += 1
        del self.batches[steps * accumulation :]
        self.accumulation = accumulation
        self.process = process
        self.processes = processes

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Item]]:
        before = 0  # rows of the same optimizer step in earlier batches
        for number, batch in enumerate(self.batches):
            before = 0 if number % self.accumulation == 0 else before
            items = [(example, before + row, True) for row, example in enumerate(batch)]
            mine = items[self.process :: self.processes]
            # A process without a row must still take part in the exchange of gradients.
            yield mine or [(batch[0], before, False)]
            before += len(batch)


class _Examples(Dataset):
    def __init__(self, examples: Sequence[Tokens]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, item: Item) -> tuple[Tokens, int]:
        number, place, counts = item
        tokens = self.examples[number]
        return (tokens if counts else Tokens(tokens.input_ids, [IGNORED] * len(tokens.labels))), place


# -- the Trainer -----------------------------------------------------------------------------------------------


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
        super().__init__(model=module, args=args, train_dataset=_Examples(examples), **options)
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


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; the Trainer writes `trainer_state.json` last."""
    complete = [file.parent for file in folder.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


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


# -- a whole run -----------------------------------------------------------------------------------------------


def frozen_base(config: TrainingConfig) -> PreTrainedModel:
    """The base model of `config` as a LoRA is trained on it, with the attention that is fastest backwards.

    In bfloat16 on a CPU that is plain matrix products, which take half the time of scaled_dot_product_attention there;
    they keep the squares of all positions, so only where examples are short.
    """
    from layerwise.sources import load_base

    # Frozen weights are only read: in bfloat16 they need not be converted in every pass. PEFT keeps LoRA in float32.
    dtype = computed_in(config.precision)
    plain = dtype == "bfloat16" and config.max_length <= SHORT and not torch.cuda.is_available()
    return load_base(config.model, dtype, attention="eager" if plain else None)


def training_arguments(config: TrainingConfig, steps: int = 1) -> TrainingArguments:
    """The Trainer's own settings for a run of `steps`."""
    cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(Path(config.out) / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=1,  # not used: batches are made by tokens
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.learning_rate_schedule,
        warmup_steps=config.warmup,
        seed=config.seed,
        bf16=computed_in(config.precision) == "bfloat16",
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and int(os.environ.get("WORLD_SIZE", 1)) > 1 else None,
        ddp_find_unused_parameters=True,  # a layer that all rows of a process skip gets no gradient there
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_steps=config.save_every,
        save_total_limit=2,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to=[],
    )


def read_examples(config: TrainingConfig, notify: Callable[[str], None]) -> tuple[list[Tokens], int]:
    """The examples of `config.data` as tokens, and the token to pad with; says what was left out."""
    from layerwise.sources import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    examples = read_jsonl(config.data)
    limit = min(config.max_length, config.tokens_per_batch)
    kept = [tokens for tokens in (tokenize(example, tokenizer, limit) for example in examples) if tokens is not None]
    if not kept:
        raise ValueError(f"'{config.data}' has no answered example of at most {limit} tokens: raise max-length")
    if len(kept) < len(examples):
        notify(f"{len(examples) - len(kept)} of {len(examples)} examples left out: unanswered, or over {limit} tokens")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return kept, pad or 0


def run_training(
    config: TrainingConfig,
    make: Callable[[int], nn.Module],
    trainer_class: type[RecipeTrainer],
    notify: Callable[[str], None],
    resume: bool,
    data: tuple[list[Tokens], int] | None = None,
    finish: Callable[[LayerwiseForCausalLM, list[Tokens], int], None] | None = None,
) -> Path:
    """From a configuration to a saved adapter; `make(steps)` builds the recipe's module. See `layerskip.train`.

    `data` are examples and padding token, if they are not those of `config.data`; `finish` gets the trained model and
    them before it is saved.
    """
    out = Path(config.out)
    checkpoint = starting_point(config, out, resume)
    args = training_arguments(config)  # first of all: this is what joins the processes
    main = args.process_index == 0
    notify = notify if main else lambda line: None
    examples, pad = data or read_examples(config, notify)
    args.max_steps = steps = config.steps or _steps_of(config, examples)
    module = make(steps)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    where = f" in {args.world_size} processes" if args.world_size > 1 else ""
    notify(f"{len(examples)} examples, {steps} steps, {trained:,} trained weights{where}")
    if main:
        out.mkdir(parents=True, exist_ok=True)
        _record(out, config, [])
    trainer = trainer_class(
        module,
        args=args,
        examples=examples,
        tokens_per_batch=config.tokens_per_batch,
        pad_id=pad,
        notify=notify,
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if main:
        _record(out, config, trainer.state.log_history)
    if trainer.interrupted and trainer.state.global_step < steps:
        notify(f"stopped at step {trainer.state.global_step}: give the same options and --resume to go on")
        raise KeyboardInterrupt
    if main:
        module.eval()
        model = trainer.layerwise
        if config.precision != "float32" and hasattr(model.base, "peft_config"):
            _halve(parameter for parameter in model.base.parameters() if parameter.requires_grad)
        if finish is not None:
            finish(model, examples, pad)
        save_adapter(model, out)
    trainer.accelerator.wait_for_everyone()
    return out


def run_fits(
    config: TrainingConfig,
    make: Callable[[int], nn.Module],
    finish: Callable[[LayerwiseForCausalLM, list[Tokens], int], None],
    notify: Callable[[str], None],
) -> Path:
    """As `run_training`, of a recipe whose module needs no steps, only what `finish` fits; in one process.

    Raises:
        ValueError: the folder holds a training already.
    """
    out = Path(config.out)
    starting_point(config, out, resume=False)
    examples, pad = read_examples(config, notify)
    module = make(1).eval()
    notify(f"{len(examples)} examples, no steps")
    out.mkdir(parents=True, exist_ok=True)
    _record(out, config, [])
    if config.precision != "float32":
        _halve(parameter for name, parameter in module.model.base.named_parameters() if ".lora_" in name)
    finish(module.model, examples, pad)
    save_adapter(module.model, out)
    return out


def _halve(lora: Iterable[nn.Parameter]) -> None:
    """A LoRA is saved at half the size, unless asked for otherwise."""
    for parameter in lora:
        parameter.data = parameter.data.to(torch.bfloat16)


def starting_point(config: TrainingConfig, out: Path, resume: bool) -> Path | None:
    """The checkpoint to resume from, or None to begin.

    Raises:
        ValueError: `out` holds a training and `resume` was not asked for, or the reverse, or one with other options.
    """
    checkpoint = last_checkpoint(out / "checkpoints")
    if not resume:
        if checkpoint is not None:
            raise ValueError(f"'{out}' already holds a training: resume it with --resume, or give another folder")
        return None
    if checkpoint is None:
        raise ValueError(f"'{out}' holds no checkpoint to resume from: leave --resume out")
    config.check_resumable(json.loads((out / RECORD).read_text(encoding="utf-8"))["config"])
    return checkpoint


def _steps_of(config: TrainingConfig, examples: Sequence[Tokens]) -> int:
    lengths = [len(tokens.input_ids) for tokens in examples]
    batches = len(length_sorted_batches(lengths, config.tokens_per_batch, config.seed))
    return max(1, ceil((config.epochs or 1.0) * batches / config.gradient_accumulation))


def _record(out: Path, config: TrainingConfig, history: list[dict[str, float]]) -> None:
    """The options and what was logged, for whoever finds the adapter."""
    text = json.dumps({"config": config.to_dict(), "log": history}, indent=2) + "\n"
    (out / RECORD).write_text(text, encoding="utf-8")
