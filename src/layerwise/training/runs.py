"""From a configuration to a saved adapter: what every training begins and ends with.

A run reads its examples, makes the recipe's module, trains it (`training.trainer`) or only fits it, and saves an
adapter with a record of its options beside it. A training that a folder holds already is never overwritten.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from math import ceil
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from layerwise.data.examples import Tokens, length_sorted_batches, read_jsonl, tokenize
from layerwise.hub import save_adapter
from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.training.config import TrainingConfig, computed_in
from layerwise.training.trainer import RecipeTrainer

RECORD = "training.json"
SHORT = 512  # most tokens of an example whose attention is computed by plain matrix products on a CPU


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


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; the Trainer writes `trainer_state.json` last."""
    complete = [file.parent for file in folder.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


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
