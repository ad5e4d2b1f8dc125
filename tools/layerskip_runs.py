"""Make the results of LayerSkip's recipe again: python tools/layerskip_runs.py quality|ablation [--work FOLDER].

quality   the suite `exits` for the untouched model and for adapters/layerskip: results/layerskip_quality.json
ablation  three short trainings on semantic parsing, without dropout, without exit loss and with both, and how much
          of what each exit drafts its last layer would accept: results/layerskip_ablation.json. Each training takes
          some ten minutes on one core; stopped with Ctrl-C, it goes on where it was when started again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from layerwise import from_pretrained
from layerwise.benchmarks.environment import environment
from layerwise.data import IGNORED, Tokens, load, prompt_ids, write_jsonl
from layerwise.decoding.text import end_tokens
from layerwise.evaluation.exits import exit_quality
from layerwise.evaluation.quality import batches, exit_suite
from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.sources import load_tokenizer
from layerwise.training import layerskip
from layerwise.training.answers import greedy_answers
from layerwise.training.recipes import LayerSkipConfig
from layerwise.training.runs import last_checkpoint

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = ROOT / "adapters" / "layerskip"
EXITS = (4, 8, 12, 16, 20, 24, 28)
PROMPTS, NEW_TOKENS = 32, 40  # held-out prompts that acceptance is measured on
BUDGET: dict[str, Any] = {  # the recipe of the paper's parsing experiment, but rotational and by LoRA
    "steps": 40,
    "tokens_per_batch": 1024,
    "gradient_accumulation": 1,
    "learning_rate": 4e-4,
    "warmup": 10,
    "max_length": 400,
    "save_every": 20,
    "rank": 12,
    "every": 10,
}
VARIANTS: dict[str, dict[str, float]] = {
    "both": {"p_max": 0.2, "e_scale": 1.0},
    "no dropout": {"p_max": 0.0, "e_scale": 1.0},
    "no exit loss": {"p_max": 0.2, "e_scale": 0.0},
}


def note(line: str) -> None:
    print(line, flush=True)


def quality(_: Path) -> dict[str, Any]:
    """The suite `exits` of both models, in one process one after the other."""
    tokenizer, models = load_tokenizer(), {}
    for label, adapter in {"untouched": None, "LayerSkip": ADAPTER}.items():
        model = from_pretrained(adapter, dtype=torch.bfloat16, engine="eager")
        models[label] = exit_suite(
            model, tokenizer, adapter=adapter, notify=lambda line, of=label: note(f"{of}: {line}")
        )
    return {"models": models}


def ablation(work: Path) -> dict[str, Any]:
    """Acceptance by exit of the untouched model and of every variant, each on its own greedy answers."""
    data = work / "parsing.jsonl"
    write_jsonl(data, load("parsing", "train"))
    variants = {"untouched": measured(from_pretrained(dtype=torch.bfloat16, engine="eager"))}
    for label, recipe in VARIANTS.items():
        out = work / label.replace(" ", "-")
        if not (out / "layerwise.json").is_file():
            begun = last_checkpoint(out / "checkpoints") is not None
            layerskip.train(LayerSkipConfig(data=str(data), out=str(out), **BUDGET, **recipe), note, begun)
        variants[label] = recipe | measured(from_pretrained(out, dtype=torch.bfloat16, engine="eager"))
        note(f"{label}: {variants[label]['acceptance']}")
    return {"task": "parsing", "prompts": PROMPTS, "new_tokens": NEW_TOKENS, "budget": BUDGET, "variants": variants}


def measured(model: LayerwiseForCausalLM) -> dict[str, Any]:
    """Acceptance of one drafted token by exit: how often an exit names the next token of the model's own greedy answer
    to a held-out prompt."""
    tokenizer = load_tokenizer()
    examples = load("parsing", "test")[:PROMPTS]
    prompts = [prompt_ids(one, tokenizer) for one in examples]
    model.eval()
    answers = greedy_answers(model, prompts, NEW_TOKENS, end_tokens(model))
    rows = [
        Tokens(prompt + answer, [IGNORED] * len(prompt) + answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    found = exit_quality(model, batches(rows, tokenizer), EXITS)
    return {"acceptance": {one.exit: round(one.agreement, 4) for one in found}, "tokens": found[0].tokens}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made = {"quality": quality, "ablation": ablation}
    parser.add_argument("what", choices=made)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "layerskip", help="folder for trainings")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    found = made[chosen.what](chosen.work)
    found |= {"command": shlex.join(["python", "tools/layerskip_runs.py", chosen.what]), "environment": environment()}
    kept = ROOT / "results" / f"layerskip_{chosen.what}.json"
    kept.with_suffix(".part").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    os.replace(kept.with_suffix(".part"), kept)
    note(f"wrote {kept}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
