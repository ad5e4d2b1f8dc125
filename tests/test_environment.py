"""What a result says of the code that it came from."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from layerwise.benchmarks import environment


def test_a_commit_is_marked_if_any_file_of_the_package_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(environment.__file__).parents[1]
    copied = tmp_path / "layerwise"
    for file in ("benchmarks/environment.py", "plan.py"):
        (copied / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(package / file, copied / file)

    def git(*words: str) -> str:
        words = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words)
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    monkeypatch.setattr(environment, "__file__", str(copied / "benchmarks" / "environment.py"))
    head = git("rev-parse", "--short", "HEAD")
    assert environment.environment()["commit"] == head
    (copied / "plan.py").write_text("changed = True\n", encoding="utf-8")
    assert environment.environment()["commit"] == head + "+"
