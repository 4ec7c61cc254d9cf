"""One writer a folder: who comes second is told who is there, and writes nothing.

The operating system holds a lock for as long as the process lives, so what a killed process leaves behind
is no obstacle. A file beside the lock says who has it.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from robustbench_vlm import text_files
from robustbench_vlm.errors import InputError

LOCK = ".writer.lock"
HOLDER = ".writer.json"


@contextmanager
def locked(folder: Path, flag: str = "--out") -> Iterator[None]:
    """Be the only writer of a folder inside the `with` block; the folder is made if it is missing.

    A folder in which nothing else was written is left as it was found.

    Args:
        folder: of results, or of a checkpoint.
        flag: the option that names it, for the message.

    Raises:
        InputError: another process writes to it; the message says which, on which machine and since when.
    """
    missing = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LOCK, HOLDER):
        text_files.require_own(folder / name)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise _taken(folder, flag) from None
    try:
        me = {
            "host": platform.node(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        (folder / HOLDER).write_text(json.dumps(me) + "\n", encoding="utf-8")
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()  # before the lock is let go, so that nobody can have locked this file
            if missing:
                with suppress(OSError):
                    folder.rmdir()
        lock.release()


def require_free(folder: Path, flag: str = "--out") -> None:
    """Refuse a folder that another process writes to, before any work; see `locked`, which decides.

    Raises:
        InputError: see `locked`.
    """
    if (folder / LOCK).exists():
        with locked(folder, flag):
            pass


def _taken(folder: Path, flag: str) -> InputError:
    """Who writes to a folder."""
    who = "another process writes to it"
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(text_files.read_text(folder / HOLDER))
        who = f"process {found['pid']} on {found['host']} writes to it since {found['since']}"
    do = "wait for its end, stop it, or choose another folder"
    return InputError(f"{flag} {folder}", who, "a folder with one writer", do)
