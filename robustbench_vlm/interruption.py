"""SIGINT, SIGTERM and SIGHUP stop a command, all three alike: at once, or where its state is saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Ctrl-C; the end of a job's time; a closed terminal. Windows has no SIGHUP."""

NOTICE = b"\nstopping after this step, to save it; press Ctrl-C again to stop at once\n"

IMPORTING = b"error: stopped while libraries were loaded; nothing was saved\n"
EXIT_CODE = 75  # of `errors.Incomplete`

Handler = Callable[[int, FrameType | None], None]


def _install(handler: Handler) -> Callable[[], None]:
    """Set the handler of every signal that is not ignored (`nohup` ignores SIGHUP); returns what undoes it.

    Only the main thread may set handlers; elsewhere nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    before = {
        number: signal.signal(number, handler)
        for number in SIGNALS
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }

    def restore() -> None:
        for number, earlier in before.items():
            signal.signal(number, earlier)

    return restore


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported where the signal came."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def raised() -> Iterator[Callable[[], bool]]:
    """Inside, each of the signals raises KeyboardInterrupt; yields whether one came.

    A library may turn the KeyboardInterrupt into another error, above all while it is imported. So who
    catches an error inside asks first whether a signal came.
    """
    came = False

    def handler(_: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        if _importing(frame):  # compiled code of a library would abort at an exception; there is no work yet
            os.write(2, IMPORTING)
            os._exit(EXIT_CODE)
        raise KeyboardInterrupt

    restore = _install(handler)
    try:
        yield lambda: came
    finally:
        restore()


@contextmanager
def ignored() -> Iterator[None]:
    """Inside, the signals do nothing: for the last line of a command, which takes a moment."""
    restore = _install(lambda *_: None)
    try:
        yield
    finally:
        restore()


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Inside, the first signal only takes note, and a second one raises KeyboardInterrupt.

    Yields:
        Whether a signal came: work that asks after every step can save its state and stop.
    """
    came = False

    def handler(number: int, _: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True
        if number == signal.SIGINT and sys.stderr.isatty():
            os.write(2, NOTICE)  # a handler may run in the middle of another write to sys.stderr

    restore = _install(handler)
    try:
        yield lambda: came
    finally:
        restore()
