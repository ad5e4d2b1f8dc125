"""A whole search, as `layerwise search` runs it: prior, questions, file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.data.short_answers import IN_DOMAIN, Question, questions
from layerwise.search.fanout import Work, label_all
from layerwise.search.labels import LabelFile, Record, read_labels
from layerwise.search.prior import measured_prior
from layerwise.search.searcher import Searcher, SearchOptions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from layerwise.model.causal_lm import LayerwiseForCausalLM


def chosen_questions(tasks: Sequence[str], split: str, limit: int) -> list[Question]:
    """The first `limit` questions of each task (all if 0), in turns, so that a stopped run has some of every task.

    Raises:
        ValueError: as `data.short_answers.questions`.
    """
    found = [questions(task, split)[: limit or None] for task in tasks]
    return [those[at] for at in range(max(map(len, found), default=0)) for those in found if at < len(those)]


def search(
    name: str | None,
    asked: Sequence[Question],
    options: SearchOptions,
    out: str | Path,
    *,
    calibration: int = 8,
    dtype: str = "bfloat16",
    device: torch.device | str = "cpu",
    workers: int = 1,
    backend: str = "local",
    notify: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Record]:
    """Label the questions that are not in the file `out` yet; all records of `asked` in the end, in its order.

    Args:
        name, dtype, device: of the model, as `sources.load_base` takes them.
        calibration: training questions that the prior is measured on; 0 leaves all edits equal. A file that is
            continued brings its prior.
        progress: gets the number of questions done and to do, before the first and after each.

    Raises:
        ValueError: the file was made with another model or other options, or an option is out of range.
    """
    from layerwise.model.causal_lm import attach
    from layerwise.model.fingerprint import fingerprint
    from layerwise.sources import load_base, load_tokenizer

    base, tokenizer = load_base(name, dtype, device), load_tokenizer(name)
    model = attach(base)
    known = read_labels(out)[0] if Path(out).exists() and Path(out).stat().st_size else {}
    if known.get("calibration") == calibration:
        options = replace(options, prior=known.get("options", {}).get("prior") or {})
    elif calibration and not known:
        options = replace(options, prior=training_prior(model, tokenizer, asked, options, calibration, notify))
    about = {
        "model": Path(name).name if name and Path(name).is_dir() else name,
        "fingerprint": fingerprint(base),
        "layers": model.depth,
        "dtype": dtype,
        "calibration": calibration,
        "options": options.to_dict(),
    }
    file = LabelFile(out, about)
    left = [question for question in asked if question.id not in file.done]
    progress(len(asked) - len(left), len(asked))
    make: Callable[[int], Work] = partial(_load, name, dtype, device, options)
    if workers == 1 and backend == "local":
        make = partial(_keep, Searcher(model, tokenizer, options))
    for number, record in enumerate(label_all(left, make, workers, backend), len(asked) - len(left) + 1):
        file.add(record)
        progress(number, len(asked))
    records = {record["id"]: record for record in read_labels(out)[1]}
    return [records[question.id] for question in asked]


def training_prior(
    model: LayerwiseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    options: SearchOptions,
    calibration: int,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """The prior from training questions of the tasks asked about; of their ends, for a search begins at the front."""
    tasks = [task for task in dict.fromkeys(question.task for question in asked) if task in IN_DOMAIN]
    if not tasks:
        return {}
    sources = [questions(task, "train") for task in tasks]
    ends = [those[-1 - at] for at in range(calibration) for those in sources if at < len(those)][:calibration]
    measures = (Searcher(model, tokenizer, options).evaluator(question).margins for question in ends)
    return measured_prior(model.depth, measures, len(ends), options.price, notify=notify)


def _keep(searcher: Work, workers: int) -> Work:
    return searcher


def _load(name: str | None, dtype: str, device: torch.device | str, options: SearchOptions, workers: int) -> Work:
    """A searcher of a worker's own, with its share of the machine's threads."""
    import torch
    from transformers.utils import logging

    from layerwise.model.causal_lm import attach
    from layerwise.sources import load_base, load_tokenizer

    logging.disable_progress_bar()  # workers share the terminal with the search's own bar
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    return Searcher(attach(load_base(name, dtype, device)), load_tokenizer(name), options)


def describe(summary: dict[str, Any]) -> list[str]:
    """A summary of labels (see `labels.summary`) as lines for a terminal."""
    lines = []
    for task, row in [*summary["tasks"].items(), ("all", summary["all"])]:
        classes = row["classes"]
        lines.append(
            f"{task}: {row['n']} questions, {row['base']:.0%} right; a path turns {classes['improved']} more right "
            f"({classes['unconfirmed']} unconfirmed), {row['shorter']} right with fewer layers, {row['layers']:.1f} run"
        )
    return lines
