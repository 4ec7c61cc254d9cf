"""Run a command line; only this file prints errors and exits."""

from __future__ import annotations

import atexit
import errno
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from robustbench_vlm import interruption, launcher, threads

SAVES_NOTHING = (
    *("canary", "check", "compare", "convert", "crosscheck", "doctor", "leaderboard", "list", "new", "show"),
    *("export", "lint", "plan", "plot", "slurm", "submit", "verify"),
)
"""Commands that begin again when they are repeated; the others go on from what they had saved."""


def main() -> None:
    """Run the command line; every error becomes one line on stderr and an exit code."""
    words = sys.argv[1:]
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, as by `>&-`: nobody wants to read it
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - until the end
    threads.wait_briefly()
    with interruption.raised() as stopped:
        try:
            code = _run(words)
        except (KeyboardInterrupt, SystemExit, Exception) as error:  # noqa: BLE001 - the end of the program
            with interruption.ignored():  # a second Ctrl-C
                code = _end(error, words, stopped)
        if stopped() or launcher.launched():
            atexit.register(_exit_code, code)
    sys.exit(code)


def _exit_code(code: int) -> None:
    """End the process with an exit code.

    Python ends a process by SIGINT, whatever its exit code should be, if the interrupt passed through an
    extension module that runs Python code, as some do while they are imported. And it may abort a process of
    a launch, whose process group keeps its threads until the end, since caches of PyTorch hold the group.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _run(words: list[str]) -> int:
    from robustbench_vlm.cli.app import run

    return run(words)


def _end(error: BaseException, words: Sequence[str], stopped: Callable[[], bool]) -> int:
    """Print what ended a command, as one line; returns the exit code."""
    from robustbench_vlm import errors, store

    if isinstance(error, SystemExit):
        raise error
    if isinstance(error, errors.Incomplete):
        return _print(error)
    if isinstance(error, KeyboardInterrupt) or stopped():  # libraries turn an interrupt into other errors
        sys.stderr.write(
            f"error: {_interrupted(words)}\n"
        )  # not by Rich: its import may have been interrupted
        return interruption.EXIT_CODE
    if isinstance(error, errors.VlmrobError):
        return _print(error)
    if isinstance(error, OSError) and error.errno in store.FULL:
        return _print(errors.Incomplete(_disk_full(error)))
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        where = f"{error.filename or 'a path'!s:.80}"
        return _print(errors.InputError(where, str(error.strerror), "a shorter one"))
    if isinstance(error, OSError) and error.filename and error.errno:
        return _print(errors.VlmrobError(f"{error.filename}: {error.strerror}"))
    return _print(errors.VlmrobError(_unexpected(error, words)))


def _print(error: Any) -> int:  # noqa: ANN401 - VlmrobError, not imported before it is needed
    from robustbench_vlm import console

    if text := str(error):  # else another process of the same training says it
        rank = os.environ.get("RANK", "0")  # of a process that torchrun started
        console.error(text if rank == "0" else f"process {rank}: {text}")
    return int(error.exit_code)


def _command(words: Sequence[str]) -> str:
    """The command out of the words of a command line, for a message."""
    try:
        from robustbench_vlm.cli.app import command_of
    except Exception:  # noqa: BLE001 - its import was interrupted, and may fail in any way now
        return "vlmrob"
    return f"vlmrob {command_of(words)}".rstrip()


def _interrupted(words: Sequence[str]) -> str:
    command = _command(words)
    if command.split()[-1] in SAVES_NOTHING:
        return f"{command}: stopped; nothing was saved, so the same command begins again"
    return f"{command}: stopped; type the same command again, and it goes on from what is saved"


def _disk_full(error: OSError) -> str:
    where = error.filename or "input or output"
    return f"{where}: {error.strerror}; make room, then type the same command again, and it goes on"


def _unexpected(error: BaseException, words: Sequence[str]) -> str:
    """The line of an error that no part of the package expects; its traceback goes to a file.

    With `--verbose` it is printed, too.
    """
    if "--verbose" in words:
        sys.stderr.writelines(traceback.format_exception(error))
    text = str(error).strip()
    line = text.splitlines()[0] if text else "no message"
    found = f"{type(error).__name__}: {line:.300}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        found, do = f"out of memory ({found})", "free some, or take a smaller --batch-size or --n; "
    else:
        do = ""
    return f"{_command(words)}: {found}; {do}the traceback is in {_traceback_file(error, words)}"


def _traceback_file(error: BaseException, words: Sequence[str]) -> str:
    """Write the traceback of an error to a new file; returns its name, or why there is none."""
    lines = [f"{shlex.join(['vlmrob', *words])}\n", *traceback.format_exception(error)]
    try:
        handle, name = tempfile.mkstemp(prefix="vlmrob-error-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)
    except OSError as failure:
        return f"no file ({failure.strerror})"
    return str(Path(name))
