"""Ctrl-C that lets the step under way end, so that a checkpoint can be written."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any


@contextmanager
def first_ctrl_c(note: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls `note`; the second one raises, as it always does.

    Python hands Ctrl-C to the main thread alone: in another one this does nothing.
    """
    if current_thread() is not main_thread():
        yield
        return

    def handle(*_: Any) -> None:
        note()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
