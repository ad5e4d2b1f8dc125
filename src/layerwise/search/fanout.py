"""Many questions at a time: in this process, in processes of this machine, or on a Ray cluster.

Questions do not depend on each other and a question's labels depend on nothing else, so every way gives the same
records, in another order.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from layerwise.data.short_answers import Question
from layerwise.search.labels import Record

Work = Callable[[Question], Record]
_work: Work | None = None  # of a worker process, made once


def label_all(
    questions: Sequence[Question], make: Callable[[int], Work], workers: int = 1, backend: str = "local"
) -> Iterator[Record]:
    """The records of `questions`, as they are done.

    Args:
        make: makes what labels one question, in each worker anew; it must be picklable if there are several. It is told
            how many workers share the machine's threads.
        backend: "local" for processes of this machine; "ray" for the cluster that RAY_ADDRESS names, or a new one here.

    Raises:
        ValueError: there is no such backend, Ray is not installed, or a worker process died.
    """
    if backend not in ("local", "ray"):
        raise ValueError(f"there is no backend '{backend}': choose local or ray")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    if backend == "ray":
        yield from _on_ray(questions, make, workers)
    elif workers == 1:
        yield from map(make(1), questions)
    else:
        yield from _in_processes(questions, make, workers)


def _in_processes(questions: Sequence[Question], make: Callable[[int], Work], workers: int) -> Iterator[Record]:
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(make, workers))
    try:
        for done in as_completed([pool.submit(_run, question) for question in questions]):
            try:
                yield done.result()
            except BrokenProcessPool as error:
                raise _died() from error
    finally:
        # Also if the caller stops half-way: what has not begun is dropped, what is in hand is waited for.
        pool.shutdown(cancel_futures=True)


def _died() -> ValueError:
    return ValueError(
        "a worker process died, perhaps for want of memory: use fewer workers; "
        "what was searched is kept, the same command goes on"
    )


def _start(make: Callable[[int], Work], workers: int) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _work = make(workers)


def _run(question: Question) -> Record:
    assert _work is not None
    return _work(question)


class _Actor:
    """A worker of a Ray cluster."""

    def __init__(self, make: Callable[[int], Work], workers: int) -> None:
        self.work = make(workers)

    def run(self, question: Question) -> Record:
        return self.work(question)


def _on_ray(questions: Sequence[Question], make: Callable[[int], Work], workers: int) -> Iterator[Record]:
    try:
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError
        from ray.util import ActorPool
    except ImportError as error:
        raise ValueError("Ray is not installed: pip install 'layerwise[ray]', or use --backend local") from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(logging_level="ERROR", log_to_driver=False)
    try:
        actor: Any = ray.remote(_Actor)
        pool = ActorPool([actor.remote(make, workers) for _ in range(workers)])
        yield from pool.map_unordered(lambda one, question: one.run.remote(question), list(questions))
    except (RayActorError, OutOfMemoryError) as error:
        raise _died() from error
    finally:
        if ours:
            ray.shutdown()
