"""Files: canonical JSON, hashes, atomic writes and append-only ledgers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from robustbench_vlm import text_files
from robustbench_vlm.errors import InputError

LEAST_FREE = 2**24  # bytes on the disk of the results, below which no work is begun

Facts = Mapping[str, Any]
"""Plain JSON values that say what a file was made from."""


def cache_folder() -> Path:
    """Folder of everything that can be computed again: `$VLMROB_CACHE`, else `$XDG_CACHE_HOME/vlmrob`.

    An empty variable counts as one that is not set. Where there is no home folder either, the path is one
    that can neither be read nor written, so that everything is computed again, as with a read-only cache.
    """
    if own := os.environ.get("VLMROB_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "vlmrob"
    try:
        return Path.home() / ".cache" / "vlmrob"
    except RuntimeError:  # no HOME, and a user without an entry in the password file, as in containers
        return Path(os.devnull) / "vlmrob"


def require_writable(folder: Path, flag: str) -> None:
    """Make a folder, if it is missing, and write a file there, before the work whose results go into it.

    Args:
        folder: of results.
        flag: the option that names it.

    Raises:
        InputError: it cannot be made or written.
        OSError: with the code of a full disk, if there is hardly any space left.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        found, do = error.strerror or str(error), f"choose another folder with {flag}"
        raise InputError(f"{flag} {folder}", found, "a folder that can be written", do) from None
    if shutil.disk_usage(folder).free < LEAST_FREE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def canonical(value: Any) -> bytes:  # noqa: ANN401 - any JSON value
    """A JSON value as the bytes that fingerprints are taken of: sorted keys, no spaces, UTF-8."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def fingerprint(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """SHA-256 of the canonical spelling, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with text_files.open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, content: bytes) -> None:
    """Write a file atomically: into a temporary file beside it, flushed to disk, then renamed to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes private files; results are meant to be read
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name_file(error, path)
        raise


def _name_file(error: BaseException, path: Path) -> None:
    """Put the name of a file into an error of the system, which has none where a write failed (full disk)."""
    if isinstance(error, OSError):
        error.filename = str(path)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write a JSON value indented by two spaces, with its keys in the given order and a final newline."""
    write(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    """The JSON value of a file.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(str(path), "no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(str(path), f"not JSON ({error})", "a file written by vlmrob") from None


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line and close the file, so a killed process loses at most that line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text_files.require_own(path)
    try:
        with path.open("ab") as file:
            file.write(canonical(dict(record)) + b"\n")
    except OSError as error:
        _name_file(error, path)
        raise


def mend(path: Path) -> None:
    """Remove a half-written last line, which a process killed while appending leaves behind."""
    text_files.require_own(path)
    if not path.exists():
        return
    whole = 0
    with path.open("rb") as file:
        for line in file:
            whole += len(line) if line.endswith(b"\n") else 0
    if whole < path.stat().st_size:
        os.truncate(path, whole)


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a ledger; a half-written last line is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)
