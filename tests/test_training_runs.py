"""Whole trainings: Ctrl-C and resume, accumulation, processes, the command line; of both recipes of LayerSkip."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import one_line, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from typer.testing import CliRunner

from layerwise import Plan, from_pretrained
from layerwise.cli.train import app
from layerwise.hub import save_adapter
from layerwise.model import causal_lm
from layerwise.training import frozen, layerskip
from layerwise.training.config import TrainingConfig
from layerwise.training.global_batches import GlobalBatches
from layerwise.training.layerskip import LayerSkipConfig, train
from layerwise.training.recipes import FrozenConfig

LAYERS = tiny.LAYERS

# -- whole trainings -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, a tiny model and its tokenizer, and `data.jsonl`."""
    folder = tmp_path_factory.mktemp("layerskip")
    tiny.model("llama").save_pretrained(folder / "base")
    words = ["<pad>", "</s>", "<s>", *(f"w{number}" for number in range(90))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(
        folder / "base"
    )
    with open(folder / "data.jsonl", "w", encoding="utf-8") as out:
        for number in range(40):
            asked = " ".join(f"w{number * place % 90}" for place in range(3 + number % 5))
            answer = " ".join(f"w{number + place}" for place in range(1 + number % 4))
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}) + "\n")
    return folder


def config(files: Path, out: Path, **changes: Any) -> LayerSkipConfig:
    given: dict[str, Any] = {"rank": 2, "steps": 5, "tokens_per_batch": 60, "gradient_accumulation": 2, "p_max": 0.5}
    given |= {"every": 2, "log_every": 1, "save_every": 2, "precision": "float32", "learning_rate": 1e-2, "warmup": 1}
    given |= {"data": str(files / "data.jsonl"), "model": str(files / "base"), "out": str(out), **changes}
    return LayerSkipConfig(**given)


def logged(out: Path) -> list[dict[str, float]]:
    """Loss, gradient norm and the recipe's numbers of every step."""
    history = json.loads((out / "training.json").read_text(encoding="utf-8"))["log"]
    names = ("step", "loss", "grad_norm", "last_layer_loss", "exit_loss", "kept_layers")
    return [{name: entry[name] for name in names if name in entry} for entry in history if "loss" in entry]


class StopAt(TrainerCallback):
    """Presses Ctrl-C in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("rank", [2, 0], ids=["lora", "all weights"])
def test_ctrl_c_and_resume_equal_uninterrupted_training(
    files: Path, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config(files, tmp_path / "whole", rank=rank)
    assert train(whole) == tmp_path / "whole"
    expected = logged(tmp_path / "whole")
    assert [entry["step"] for entry in expected] == [1, 2, 3, 4, 5] and len({e["loss"] for e in expected}) == 5

    broken = replace(whole, out=str(tmp_path / "broken"))
    usual = layerskip.RecipeTrainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(
            layerskip.RecipeTrainer,
            "__init__",
            lambda self, *args, **options: usual(self, *args, callbacks=[StopAt(2)], **options),
        )
        said: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            train(broken, said.append)
        assert "stopped at step 3" in said[-1] and "--resume" in said[-1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    one_line(lambda: train(broken), "already holds", "--resume")
    one_line(lambda: train(replace(broken, seed=9), resume=True), "seed")
    train(broken, resume=True)
    assert logged(tmp_path / "broken") == expected
    train(broken, resume=True)  # nothing is left to do
    assert logged(tmp_path / "broken") == expected

    one, other = (from_pretrained(adapter=tmp_path / name, engine="eager") for name in ("whole", "broken"))
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)
        assert not torch.allclose(one(input_ids=ids).logits, tiny.model("llama")(input_ids=ids).logits, atol=1e-3)


def test_accumulation_and_log_are_means_over_tokens(files: Path, tmp_path: Path) -> None:
    train(config(files, tmp_path / "run", steps=1, p_max=0.0, e_scale=0.0, gradient_accumulation=3))
    (entry,) = logged(tmp_path / "run")
    from layerwise.data.examples import collate, read_jsonl, tokenize
    from layerwise.sources import load_tokenizer

    tokenizer = load_tokenizer(str(files / "base"))
    examples = [tokenize(one, tokenizer, 60) for one in read_jsonl(files / "data.jsonl")]
    batches = GlobalBatches([len(one.input_ids) for one in examples], 60, 1, 3)
    picked = [examples[number] for batch in batches for number, _, _ in batch]
    batch = collate(picked, 0)
    expected = tiny.model("llama")(**batch).loss.item()  # one batch of all rows
    assert entry["loss"] == pytest.approx(expected, rel=1e-5)
    assert entry["last_layer_loss"] == pytest.approx(expected, rel=1e-5) and entry["kept_layers"] == 1
    assert "exit_loss" not in entry


def test_two_steps_from_the_command_line(files: Path, tmp_path: Path) -> None:
    flags = ["--model", str(files / "base"), "--steps", "2", "--p-max", "0.3", "--rank", "2", "--log-every", "1"]
    flags += ["--tokens-per-batch", "60", "--curriculum", "gradual", "--dropout", "decaying", "--inverse-survival"]
    result = CliRunner().invoke(
        app,
        ["layerskip", str(files / "data.jsonl"), "--out", str(tmp_path / "run"), *flags, "--json"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    written = json.loads(result.stdout.splitlines()[-1])
    assert written["adapter"] == str(tmp_path / "run")
    assert written["config"]["dropout"] == "decaying" and written["config"]["precision"] == "auto"
    model = from_pretrained(adapter=written["adapter"], engine="eager")
    assert len(logged(tmp_path / "run")) == 2 and model.plan == Plan.full(LAYERS)


def test_the_flags_are_the_fields(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[LayerSkipConfig] = []
    monkeypatch.setattr(layerskip, "train", lambda config, *_: chosen.append(config) or Path(config.out))
    needed = {"data": str(files / "data.jsonl"), "out": str(tmp_path / "o"), "model": str(files / "base")}
    given = ["layerskip", needed["data"], "--out", needed["out"], "--model", needed["model"]]
    CliRunner().invoke(app, given, catch_exceptions=False)
    changed = config(files, tmp_path / "o", rank=0, seed=4, inverse_survival=True, learning_rate_schedule="linear")
    flags = []
    for name, value in changed.to_dict().items():
        if name not in needed and value is not None:
            flag = "--" + name.replace("_", "-")
            flags += ([flag] if value else []) if isinstance(value, bool) else [flag, str(value)]
    CliRunner().invoke(app, [*given, *flags], catch_exceptions=False)
    assert chosen == [LayerSkipConfig(**needed), changed]


@pytest.mark.parametrize(
    ("flags", "mention"),
    [
        (["--p-max", "1"], "p-max"),
        (["--steps", "2", "--epochs", "1"], "not both"),
        (["--epochs", "inf"], "epochs must be above 0, and finite"),
        (["--exit", "3"], "--exit belongs to --recipe frozen"),
        (["--recipe", "frozen", "--p-max", "0.2"], "--p-max belongs to --recipe paper"),
        (["--curriculum", "gradual", "--every", "4"], "--every belongs to --curriculum rotational"),
        (["--recipe", "frozen", "--exit", "6"], "0 to 5 layers"),
        (["--max-length", "3"], "max-length"),
        (["--resume"], "no checkpoint"),
    ],
)
def test_mistakes_are_one_line(files: Path, tmp_path: Path, flags: list[str], mention: str) -> None:
    given = ["layerskip", str(files / "data.jsonl"), "--out", str(tmp_path / "o"), "--model", str(files / "base")]
    one_line(lambda: CliRunner().invoke(app, [*given, *flags], catch_exceptions=False), mention)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    one_line(lambda: LayerSkipConfig(data=str(tmp_path / "no.jsonl"), out="x"), "no.jsonl")


def _sockets() -> bool:
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
        return torch.distributed.is_available() and torch.distributed.is_gloo_available()
    except OSError:
        return False


def in_two_processes(config: TrainingConfig, recipe: str, folder: Path) -> str:
    """What a training by `training.<recipe>` prints."""
    script = folder / "run.py"
    script.write_text(
        "import sys, json\n"
        f"from layerwise.training.{recipe} import {type(config).__name__}, train\n"
        "from layerwise.model import causal_lm\n"
        "causal_lm.compiler_available = lambda: False\n"
        f"config = {type(config).__name__}(**json.loads(sys.argv[1]))\n"
        "train(config, lambda line: print(line, flush=True))\n",
        encoding="utf-8",
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    # With --cpu, and without MPI, it starts one process, whatever is asked for; --multi_gpu starts two, and torchrun.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", str(port)]
    done = subprocess.run(
        [*launch, str(script), json.dumps(config.to_dict())],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(not _sockets(), reason="no local sockets")
def test_two_processes_train_as_one_does(files: Path, tmp_path: Path) -> None:
    # A batch of one row now and then leaves the second process without any.
    options = {"rank": 0, "steps": 4, "tokens_per_batch": 18, "p_max": 0.7, "save_every": 100}
    train(config(files, tmp_path / "one", **options))
    said = in_two_processes(config(files, tmp_path / "two", **options), "layerskip", tmp_path)
    assert "in 2 processes" in said and said.count("step 1/4") == 1  # one of them speaks
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == len(two) == 4
    for left, right in zip(one, two, strict=True):
        assert right == pytest.approx(left, rel=2e-4)


def frozen_config(files: Path, out: Path, **changes: Any) -> FrozenConfig:
    given = {"data": str(files / "data.jsonl"), "model": str(files / "base"), "out": str(out), "steps": 2}
    given |= {"vocabulary": 20, "max_new_tokens": 3, "tokens_per_batch": 200, "ngrams": 0, "precision": "float32"}
    return FrozenConfig(**given | changes)


@pytest.mark.skipif(not _sockets(), reason="no local sockets")
def test_two_processes_write_the_answers_once_and_train_as_one_does(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_lm, "compiler_available", lambda: False)
    one, two = (frozen_config(files, tmp_path / name, log_every=1, tokens_per_batch=18) for name in ("one", "two"))
    frozen.train(one)
    said = in_two_processes(two, "frozen", tmp_path)
    assert "in 2 processes" in said and said.count("40 of 40 answers written") == 1
    answers = [(tmp_path / name / "answers.jsonl").read_bytes() for name in ("one", "two")]
    assert answers[0] == answers[1]
    expected, found = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(expected) == 2
    for left, right in zip(expected, found, strict=True):
        assert right == pytest.approx(left, rel=2e-4)


def test_the_frozen_recipe_from_the_command_line(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps; the adapter drafts, the model's own weights and output are what they were."""
    monkeypatch.setattr(causal_lm, "compiler_available", lambda: False)
    words = ["layerskip", str(files / "data.jsonl"), "--model", str(files / "base"), "--out", str(tmp_path / "out")]
    words += ["--recipe", "frozen", "--vocabulary", "20", "--max-new-tokens", "12", "--tokens-per-batch", "200"]
    words += ["--gradient-accumulation", "1", "--precision", "float32", "--save-every", "1"]
    done = CliRunner().invoke(app, [*words, "--steps", "2"], catch_exceptions=False)
    assert done.exit_code == 0 and "wrote" in done.output
    base = from_pretrained(files / "base", engine="eager")
    model = from_pretrained(tmp_path / "out", engine="eager")
    ours, theirs = model.runtime.backbone.model.state_dict(), base.runtime.backbone.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert model.exit_head.exit == 0 and len(model.exit_head.vocabulary) <= 20
    ids = torch.tensor([[5, 9, 12, 7]])
    plain = base.generate(ids, max_new_tokens=20, do_sample=False)
    for draft in ("head", "corpus"):
        assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False, draft=draft), plain)
    answers = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 40
    first = json.loads(answers[0])
    asked = torch.tensor([first["prompt"]])
    said = base.generate(asked, max_new_tokens=12, do_sample=False)[0, asked.shape[1] :].tolist()
    assert said == first["answer"]
    assert model.ngrams.order == 6 and model.ngrams.after([*first["prompt"], said[0]]) is not None


def test_the_frozen_recipe_leaves_out_what_is_too_long_before_it_is_answered(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_lm, "compiler_available", lambda: False)
    said: list[str] = []
    frozen.train(
        frozen_config(files, tmp_path / "limit", max_length=6), said.append
    )  # prompts have 3 to 7 tokens, 8 each
    assert any("16 of 40 prompts left out: over 5 tokens" in line for line in said)
    answered = [json.loads(line) for line in (tmp_path / "limit" / "answers.jsonl").read_text().splitlines()]
    assert len(answered) == 24 and max(len(one["prompt"]) for one in answered) == 5
    over = sum(len(one["prompt"] + one["answer"]) > 6 for one in answered)
    assert over and any(f"{over} of 24 answers left out" in line for line in said)
    said.clear()
    frozen.train(
        frozen_config(files, tmp_path / "context", max_new_tokens=252, tokens_per_batch=300), said.append
    )  # of 256
    assert any("24 of 40 prompts left out: over 4 tokens" in line for line in said)


def test_the_frozen_recipe_refuses_an_adapter_that_does_not_run_every_layer(files: Path, tmp_path: Path) -> None:
    model = from_pretrained(files / "base", engine="eager")
    model.plan = "0-2 4-5"
    save_adapter(model, tmp_path / "adapter")
    config = frozen_config(files, tmp_path / "out", adapter=str(tmp_path / "adapter"))
    one_line(lambda: frozen.train(config), str(tmp_path / "adapter"), "every layer once")


def test_the_frozen_recipe_refuses_before_it_writes(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_lm, "compiler_available", lambda: False)
    config = frozen_config(files, tmp_path)
    frozen.train(config)
    longer = tmp_path / "longer.jsonl"
    lines = (files / "data.jsonl").read_text(encoding="utf-8")
    longer.write_text(lines + lines.splitlines()[0], encoding="utf-8")
    before = (tmp_path / "answers.jsonl").read_bytes()
    one_line(lambda: frozen.train(replace(config, data=str(longer))), "already holds a training")
    one_line(lambda: frozen.train(replace(config, data=str(longer)), resume=True), "with data")
    assert (tmp_path / "answers.jsonl").read_bytes() == before
