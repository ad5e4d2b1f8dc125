"""Make the adapters in adapters/ again: python tools/adapters.py layerskip-paper | layerskip-frozen [--work FOLDER].

Each is one run of about an hour on two cores; stopped with Ctrl-C it goes on where it was when started again. The data
are the built-in ones (`layerwise data --list`), training splits only.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from layerwise.data import Example, load, prompt_ids, read_jsonl, tokenize, write_jsonl
from layerwise.hub import from_pretrained
from layerwise.sources import load_tokenizer
from layerwise.training import frozen, layerskip
from layerwise.training.answers import write_answers
from layerwise.training.config import FrozenConfig, LayerSkipConfig

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"tools": 1.0, "parsing": 1.0, "summarization": 1.5, "code": 1.0, "chat": 0.8}
GROUPS = {"summarization": "s", "code": "c", "parsing": "p", "chatable": "h", "common_knowledge": "h"}  # else tools


def note(line: str) -> None:
    print(line, flush=True)


def prompts(work: Path, per_task: int = 600) -> list[Example]:
    """Training prompts of all five tasks, at most 384 tokens each."""
    path = work / "prompts.jsonl"
    if not path.exists():
        tokenizer, chosen = load_tokenizer(), []
        for task, share in SHARES.items():
            examples = load(task, "train")
            random.Random(0).shuffle(examples)
            most = int(per_task * share)
            fitting = [one for one in examples[: int(most * 1.3)] if len(prompt_ids(one, tokenizer)) <= 384]
            chosen += fitting[:most]
        random.Random(1).shuffle(chosen)
        write_jsonl(path, chosen)
    return read_jsonl(path)


def answers(work: Path) -> dict[int, list[int]]:
    """The untouched model's own greedy answers to `prompts`, by number."""
    path, examples = work / "answers.jsonl", prompts(work)
    model = from_pretrained(dtype="bfloat16")
    for done in write_answers(model, load_tokenizer(), examples, path):
        note(f"{done} of {len(examples)} answers of the untouched model")
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["id"]: row["answer"] for row in rows}


def mix(work: Path) -> Path:
    """What the paper's recipe is taught: references for tools, parses and code; for summaries and chat, where one
    reference among many would teach a style, the model's own answers."""
    path = work / "mix.jsonl"
    if path.exists():
        return path
    tokenizer, own = load_tokenizer(), answers(work)
    rows = []
    for number, one in enumerate(prompts(work)):
        if one.kind not in ("summarization", "chatable", "common_knowledge"):
            continue
        if own[number][-1] == tokenizer.eos_token_id:  # it came to an end
            text = tokenizer.decode(own[number][:-1])
            rows.append(Example((*one.prompt, {"role": "assistant", "content": text}), one.kind, one.key))
    tools, parsing, code = (load(task, "train") for task in ("tools", "parsing", "code"))
    random.Random(2).shuffle(code)
    rows += tools + parsing + parsing + code[:700]
    random.Random(3).shuffle(rows)
    random.Random(5).shuffle(rows)
    kinds = {"tools": 700, "parsing": len(rows), "summarization": 650, "code": 420, "common_knowledge": 100}
    lengths = {"tools": 400, "summarization": 300, "code": 350}
    chosen: list[Example] = []
    for kind, most in kinds.items():
        own_kind = [one for one in rows if _kind(one) == kind]
        fits = [one for one in own_kind if kind not in lengths or tokenize(one, tokenizer, lengths[kind]) is not None]
        chosen += fits[:most]
    random.Random(6).shuffle(chosen)
    write_jsonl(path, chosen)
    return path


def _kind(one: Example) -> str:
    return one.kind if one.kind in GROUPS else "tools"


def picked(work: Path, name: str, most: dict[str, int]) -> Path:
    """The first prompts of each group, at most 320 tokens each; with the untouched model's answers beside them."""
    path = work / f"{name}.jsonl"
    tokenizer, taken = load_tokenizer(), dict.fromkeys(most, 0)
    chosen: list[tuple[int, Example]] = []
    for number, one in enumerate(prompts(work)):
        group = GROUPS.get(one.kind, "t")
        if taken[group] < most[group] and len(prompt_ids(one, tokenizer)) <= 320:
            chosen.append((number, one))
            taken[group] += 1
    write_jsonl(path, (one for _, one in chosen))
    return path


def paper(work: Path) -> Path:
    """The paper's recipe by LoRA, then an exit head for the result."""
    out = work / "paper"
    if not (out / "layerwise.json").is_file():
        config = LayerSkipConfig(
            data=str(mix(work)),
            out=str(out),
            rank=6,
            steps=105,
            tokens_per_batch=2048,
            gradient_accumulation=1,
            learning_rate=8e-4,
            warmup=15,
            max_length=512,
            p_max=0.1,
            e_scale=1.0,
            every=10,
            save_every=35,
        )
        layerskip.train(config, note, _begun(out))
    return head(work, "paper-head", {"s": 380, "c": 260, "p": 414, "h": 60, "t": 430}, 4, str(out))


def untouched(work: Path) -> Path:
    """An exit head for the model as it is."""
    return head(work, "frozen-head", {"s": 420, "c": 400, "p": 160, "h": 160, "t": 160}, 3, None)


def head(work: Path, name: str, most: dict[str, int], epochs: float, adapter: str | None) -> Path:
    """The frozen recipe on some of the prompts."""
    out = work / name
    config = FrozenConfig(
        data=str(picked(work, f"{name}-prompts", most)),
        out=str(out),
        adapter=adapter,
        epochs=epochs,
        tokens_per_batch=4096,
        gradient_accumulation=1,
        learning_rate=8e-4,
        warmup=20,
        max_length=600,
        save_every=100,
    )
    return frozen.train(config, note, _begun(out))


def _begun(out: Path) -> bool:
    return any(out.glob("checkpoints/checkpoint-*/trainer_state.json"))


def keep(made: Path, name: str, files: Iterable[str]) -> None:
    """Copy what an adapter is made of; the model card there is written by hand and stays."""
    target = ROOT / "adapters" / name
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy2(made / file, target / file)
    note(f"wrote {target}")


FILES = ("layerwise.json", "adapter_config.json", "adapter_model.safetensors", "exit_head.safetensors", "training.json")
MAKERS = {"layerskip-paper": paper, "layerskip-frozen": untouched}


def main() -> int:
    parser = argparse.ArgumentParser(description="Make an adapter in adapters/ again.")
    parser.add_argument("name", choices=MAKERS)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "adapters", help="folder for what comes between")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    keep(MAKERS[chosen.name](chosen.work), chosen.name, FILES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
