"""Make the adapters in adapters/ again: python tools/adapters.py NAME [--work FOLDER].

layerskip-frozen takes up to an hour on two cores, layerskip, routed-text and layerroute an hour
on one, drllm as long as its search (`layerwise search` tells). routed-text writes results/routed_text.json too. Stopped
with Ctrl-C they go on where they were when started again. The data are the built-in ones, training splits only.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from layerroute_runs import trained

from layerwise import from_pretrained
from layerwise.data import Example, load, prompt_ids, read_jsonl, tokenize, write_jsonl
from layerwise.decoding.ngram_model import NGramModel
from layerwise.sources import load_tokenizer
from layerwise.training import drllm, frozen, layerskip
from layerwise.training import routed_text as text_training
from layerwise.training.answers import write_answers
from layerwise.training.curriculum import RoutedTextConfig
from layerwise.training.recipes import DrLLMConfig, FrozenConfig, LayerSkipConfig
from layerwise.training.runs import last_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CHEAPEST = "6-8 15 17 20 24-26 28-29"  # by what layers lose, in nats, if half of their positions do not attend
SHARES = {"tools": 1.0, "parsing": 1.0, "synopsis": 1.5, "code": 1.0, "chat": 0.8}
EARLY_SHARES = {"tools": 1.0, "parsing": 1.0, "summarization": 1.5, "code": 1.0}
MOST = {"tools": 1250, "parsing": 414, "synopsis": 2400, "code": 2800, "chat": 1021}  # prompts to answer
ANSWERS = 1280  # of the recipe's own model, which says much the same in all of them
OTHERS = 1440  # of those beyond the first, drawn over all tasks
GROUPS = {"synopsis": "s", "code": "c", "parsing": "p", "chatable": "h", "common_knowledge": "h"}  # else tools


def note(line: str) -> None:
    print(line, flush=True)


def prompts(path: Path, shares: dict[str, float], per_task: int = 600) -> list[Example]:
    """Training prompts of tasks, at most 384 tokens each, in these proportions; kept in `path`."""
    if not path.exists():
        tokenizer, chosen = load_tokenizer(), []
        for task, share in shares.items():
            examples = load(task, "train")
            random.Random(0).shuffle(examples)
            most = int(per_task * share)
            fitting = [one for one in examples[: int(most * 1.3)] if len(prompt_ids(one, tokenizer)) <= 384]
            chosen += fitting[:most]
        random.Random(1).shuffle(chosen)
        write_jsonl(path, chosen)
    return read_jsonl(path)


def mixed(work: Path) -> list[Example]:
    """Training prompts of five tasks."""
    return prompts(work / "prompts.jsonl", SHARES)


def picked(work: Path, name: str, most: dict[str, int]) -> Path:
    """The first prompts of each group, at most 250 tokens each."""
    path = work / f"{name}.jsonl"
    tokenizer, taken = load_tokenizer(), dict.fromkeys(most, 0)
    chosen: list[Example] = []
    for one in mixed(work):
        group = GROUPS.get(one.kind, "t")
        if taken[group] < most[group] and len(prompt_ids(one, tokenizer)) <= 250:
            chosen.append(one)
            taken[group] += 1
    write_jsonl(path, chosen)
    return path


def others(work: Path, count: int) -> list[Example]:
    """`count` more training prompts, other ones than `mixed`."""
    tokenizer, known, chosen = load_tokenizer(), {str(one.prompt) for one in mixed(work)}, []
    for task, most in MOST.items():
        examples = load(task, "train")
        random.Random(0).shuffle(examples)
        fitting = [one for one in examples[: int(most * 1.3)] if len(prompt_ids(one, tokenizer)) <= 384]
        chosen += [one for one in fitting[:most] if str(one.prompt) not in known]
    random.Random(1).shuffle(chosen)
    return chosen[:count]


def untouched(work: Path) -> Path:
    """The frozen recipe for the model as it is, and n-grams of more answers than the head was taught."""
    out = work / "frozen-head"
    most = {"s": 500, "c": 600, "p": 414, "h": 480, "t": 250}
    config = FrozenConfig(
        data=str(picked(work, "frozen-head-prompts", most)),
        out=str(out),
        epochs=5,
        tokens_per_batch=4096,
        gradient_accumulation=1,
        learning_rate=1e-3,
        warmup=20,
        max_length=600,
        save_every=100,
        ngrams=0,  # counted below, of more answers
    )
    frozen.train(config, note, _begun(out))
    return count_ngrams(out, work / "corpus-answers.jsonl", mixed(work) + others(work, OTHERS))


def early(work: Path) -> Path:
    """The paper's recipe by LoRA on four tasks, and n-grams of what the trained model answers."""
    data, out = work / "layerskip-examples.jsonl", work / "layerskip"
    if not data.exists():
        write_jsonl(data, fitting_examples())
    config = LayerSkipConfig(
        data=str(data),
        out=str(out),
        steps=280,
        tokens_per_batch=2048,
        gradient_accumulation=1,
        learning_rate=4e-4,
        warmup=15,
        max_length=400,
        save_every=20,
        rank=12,
        p_max=0.1,
        e_scale=0.2,
        every=15,
    )
    if not (out / "layerwise.json").is_file():
        layerskip.train(config, note, _begun(out))
    asked = prompts(work / "layerskip-prompts.jsonl", EARLY_SHARES)[:ANSWERS]
    return count_ngrams(out, work / "layerskip-answers.jsonl", asked)


def fitting_examples() -> list[Example]:
    """Training examples of tool calls, parses (few, so twice), summaries and code, at most 400 tokens each."""
    tokenizer, chosen = load_tokenizer(), []
    for task, most in {"tools": 700, "parsing": 414, "summarization": 500, "code": 420}.items():
        examples = load(task, "train")
        random.Random(0).shuffle(examples)
        fitting = [one for one in examples[: 3 * most] if tokenize(one, tokenizer, 400) is not None]
        chosen += fitting[:most] * (2 if task == "parsing" else 1)
    random.Random(1).shuffle(chosen)
    return chosen


def count_ngrams(out: Path, answers: Path, asked: list[Example]) -> Path:
    """Have the model in `out` answer, and save the n-grams of its answers with it."""
    tokenizer, model = load_tokenizer(), from_pretrained(out)
    for done in write_answers(model, tokenizer, asked, answers):
        note(f"{done} answers written")
    lines = answers.read_text(encoding="utf-8").splitlines()
    model.ngrams = NGramModel.fit((one["prompt"], one["answer"]) for one in map(json.loads, lines))
    model.save_pretrained(str(out))
    return out


def gated(work: Path) -> Path:
    """Gates for neurons and the head of a LoRA trained without: the run of results/layerroute.json with seed 0."""
    data = work / "routing.jsonl"
    write_jsonl(data, load("routing", "train"))
    return trained("head", 0, work, data)


def routed(work: Path) -> Path:
    """A router that picks from a menu of plans with bridges, after a short search of 21 training questions a task."""
    labels = work / "drllm-labels.jsonl"
    search = ["search", "--out", str(labels), "--simulations", "32", "--width", "2", "--limit", "21"]
    subprocess.run([sys.executable, "-m", "layerwise", *search], check=True)
    config = DrLLMConfig(labels=str(labels), out=str(work / "drllm"), form="menu", saved=0.16, bridge_rank=64)
    return drllm.train(config, note)


def routed_text(work: Path) -> Path:
    """Routed attention in the eleven layers that cost least without attention."""
    out = work / "routed-text"
    config = RoutedTextConfig(out=str(out), convert=CHEAPEST, steps=160, test_rows=64)
    result = text_training.train(config, note, (out / "checkpoint.pt").is_file())
    given = str(out)
    result["config"]["out"] = out.name
    result["command"] = result["command"].replace(given, out.name)
    kept = ROOT / "results" / "routed_text.json"
    kept.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    note(f"wrote {kept}")
    return out


def _begun(out: Path) -> bool:
    return last_checkpoint(out / "checkpoints") is not None


def keep(made: Path, name: str, files: Iterable[str]) -> None:
    """Copy what an adapter is made of, as far as it has it; the model card there is written by hand and stays."""
    target = ROOT / "adapters" / name
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        if (made / file).is_file():
            shutil.copy2(made / file, target / file)
    base = json.loads((target / "layerwise.json").read_text(encoding="utf-8"))["base_model"]
    _without_folders(target / "training.json", "config", {"data": None, "out": None, "labels": None, "adapter": None})
    _without_folders(target / "adapter_config.json", None, {"base_model_name_or_path": base})
    note(f"wrote {target}")


def _without_folders(file: Path, part: str | None, names: dict[str, str | None]) -> None:
    """Replace paths of this machine: by the value given, or by their last part."""
    if not file.is_file():
        return
    whole = json.loads(file.read_text(encoding="utf-8"))
    values = whole if part is None else whole[part]
    for name, value in names.items():
        if values.get(name):
            values[name] = value or Path(values[name]).name
    file.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


FILES = ("layerwise.json", "adapter_config.json", "adapter_model.safetensors", "training.json")
FILES += ("exit_head.safetensors", "ngrams.safetensors", "routers.safetensors", "bridges.safetensors")
FILES += ("routed_layers.safetensors", "thin.safetensors")
MAKERS = {
    "layerskip-frozen": untouched,
    "layerskip": early,
    "layerroute": gated,
    "drllm": routed,
    "routed-text": routed_text,
}


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
