"""Files: canonical JSON, hashes, atomic writes and append-only ledgers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from robustbench_vlm import text_files
from robustbench_vlm.errors import InputError

LEAST_FREE = 2**24  # bytes on the disk of the results, below which no work is begun

Facts = Mapping[str, Any]
"""Plain JSON values that say what a file was made from."""


def cache_folder() -> Path:
    """Folder of everything that can be computed again: `$VLMROB_CACHE`, else `$XDG_CACHE_HOME/vlmrob`.

    A blank variable counts as one that is not set. `~` and other variables are replaced in the first one,
    since not every shell or job file does so; the second one counts if it is a full path, as its standard
    says. Where there is no home folder either, the path is one that can neither be read nor written, so that
    everything is computed again, as with a read-only cache.
    """
    own, shared, home = (os.environ.get(name, "") for name in ("VLMROB_CACHE", "XDG_CACHE_HOME", "HOME"))
    try:
        if own.strip():
            return Path(os.path.expandvars(own)).expanduser()
        if Path(shared).is_absolute():
            return Path(shared) / "vlmrob"
        if "HOME" not in os.environ or Path(home).is_absolute():
            return Path.home() / ".cache" / "vlmrob"
    except RuntimeError:  # no HOME, and a user without an entry in the password file, as in containers
        pass
    return Path(os.devnull) / "vlmrob"


FULL = (errno.ENOSPC, errno.EDQUOT)
"""Codes of errors of a full disk or quota."""


def require_writable(folder: Path, flag: str, *, make: bool = True) -> None:
    """Write a file into a folder, before the work whose results go into it.

    Args:
        folder: of results.
        flag: the option that names it.
        make: whether a missing folder is made; else the file is written into the nearest one that is there.

    Raises:
        InputError: it cannot be made or written.
        OSError: with the code of a full disk, if there is hardly any space left.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        place = next(parent for parent in (folder, *folder.parents) if parent.exists())
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(1))
    except OSError as error:
        if error.errno in FULL:
            _name_file(error, folder)
            raise
        found, do = error.strerror or str(error), f"choose another folder with {flag}"
        raise InputError(f"{flag} {folder}", found, "a folder that can be written", do) from None
    if shutil.disk_usage(place).free < LEAST_FREE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


@contextmanager
def explained(folder: Path, flag: str) -> Iterator[None]:
    """Inside, a failure to write below `folder` becomes the error of `require_writable`, where that is why.

    For work that writes only what is missing, so that a complete folder need not be writable.
    """
    try:
        yield
    except OSError:
        require_writable(folder, flag)
        raise


def canonical(value: Any) -> bytes:  # noqa: ANN401 - any JSON value
    """A JSON value as the bytes that fingerprints are taken of: sorted keys, no spaces, UTF-8."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def fingerprint(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """SHA-256 of the canonical spelling, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


NAME_BYTES = 120  # of a file name that is made from a name, before its fingerprint
NAME_SIGNS = frozenset("._-:=@+,~ ")
"""Characters beside letters and digits that stay as they are in a file name."""
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names of devices on Windows, where results may be copied to."""


def file_name(name: str) -> str:
    """The name as one part of a path, whatever is in it; two different names have two different results.

    A plain name stays as it is. In every other one the characters that cannot stand in a file name become
    `_`, what is left is cut to `NAME_BYTES` bytes, and a fingerprint of the whole name is appended.

    Example:
        >>> file_name("vit-b-32"), file_name("../x")
        ('vit-b-32', '_x-d6b96a97d147')
    """
    safe = "".join(c if c.isalnum() or c in NAME_SIGNS else "_" for c in name).lstrip(".-~ ").rstrip(". ")
    cut = safe.encode()[:NAME_BYTES].decode(errors="ignore")
    if cut == name and name and not RESERVED.fullmatch(name):
        return name
    whole = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
    return f"{cut or 'unnamed'}-{whole[:12]}"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with text_files.open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, *content: bytes | memoryview) -> None:
    """Write a file atomically: into a temporary file beside it, flushed to disk, then renamed to `path`.

    Args:
        path: of the file; its folder is made if it is missing.
        content: the parts of the file, in order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(content)
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
        InputError: the file is missing or is not JSON. Numbers that are not finite, integers of thousands of
            digits and half characters (lone surrogates) are refused too: no file of this package has them.
    """
    try:
        return _finite(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise InputError(str(path), "no such file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(str(path), f"not JSON ({error!s:.120})", "a file written by vlmrob") from None


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    canonical(value)  # raises ValueError for what JSON has no spelling for
    return value


CHECKSUM = "checksum"
"""The entry of a ledger line that has the checksum of all others."""

DIGITS = 32  # of a checksum: 128 bits


MARK = f'"{CHECKSUM}":"'.encode()
"""What stands before the checksum in a line."""

INFINITE = frozenset({float("inf"), float("-inf")})


class Line(NamedTuple):
    """A complete line of a ledger.

    Attributes:
        number: position in the file, from 1.
        text: the bytes, line end included.
        record: what it says, without the checksum; empty if the line is damaged.
        damage: what is wrong with it; empty if nothing is.
    """

    number: int
    text: bytes
    record: dict[str, Any]
    damage: str = ""


def sealed(record: Mapping[str, Any], ledger: str) -> bytes:
    """A line of a ledger: the record and its checksum, as canonical JSON with a line end.

    The checksum is taken of the record and of the ledger's file name, so a line that was changed, or comes
    from another ledger, does not match.

    Args:
        record: JSON values.
        ledger: name of the file, without its folder.
    """
    return canonical({**record, CHECKSUM: _checksum(dict(record), ledger)}) + b"\n"


def _checksum(record: Mapping[str, Any], ledger: str) -> str:
    return fingerprint([ledger, record])[:DIGITS]


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one sealed line and close the file, so a killed process loses at most that line."""
    text_files.require_own(path)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(sealed(record, path.name))
    except OSError as error:
        _name_file(error, path)
        raise


def mend(path: Path) -> None:
    """Remove a half-written last line, which a process killed while appending leaves behind."""
    text_files.require_own(path)
    if not path.exists() or not (size := path.stat().st_size):
        return
    with path.open("rb") as file:
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        whole = sum(len(line) for line in file if line.endswith(b"\n"))
    os.truncate(path, whole)


def lines(path: Path) -> Iterator[Line]:
    """The complete lines of a ledger, damaged ones too; a half-written last line is left out.

    Lines of before there were checksums stand at the beginning of a file. They are taken as they are; after
    the first line with a checksum, a line without one is damaged.
    """
    if not path.exists():
        return
    seen, beginning = False, canonical([path.name])[:-1] + b","
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                continue
            record = _as_sealed(text, beginning)
            if record is None:
                line = _line(number, text, path.name, needed=seen)
                seen = seen or CHECKSUM.encode() in text
                yield line
            else:
                seen = True
                yield Line(number, text, record)


def _as_sealed(text: bytes, beginning: bytes) -> dict[str, Any] | None:
    """What a line says that is to the byte as `sealed` makes it; None for every other line, bad or not.

    The checksum is compared with the bytes of the line, so nothing has to be spelled again: a resumed
    evaluation reads a million lines in seconds.

    Args:
        text: the line.
        beginning: of what the checksum is taken of, before the record.
    """
    at = text.find(MARK)
    end = at + len(MARK) + DIGITS
    if at < 0 or text[end : end + 2] != b'",':  # the last entry of a record is left to `_line`
        return None
    body = text[:at] + text[end + 2 : -1]
    if hashlib.sha256(beginning + body + b"]").hexdigest()[:DIGITS].encode() != text[end - DIGITS : end]:
        return None
    try:
        record = from_json(body, allow_inf_nan=False, cache_strings="keys")
        return record if INFINITE.isdisjoint(record.values()) else None
    except (ValueError, TypeError):  # TypeError: a record with lists or tables
        return None


def _line(number: int, text: bytes, ledger: str, *, needed: bool) -> Line:
    try:
        record = _finite(json.loads(text))
    except (ValueError, RecursionError) as error:
        return Line(number, text, {}, f"not JSON ({error!s:.80})")
    if not isinstance(record, dict):
        return Line(number, text, {}, "not a JSON object")
    stated = record.pop(CHECKSUM, None)
    if stated is None and needed:
        return Line(number, text, {}, "no checksum, which every line after the first with one has")
    if stated is not None and stated != _checksum(record, ledger):
        return Line(number, text, {}, "its checksum is not that of its content in this file")
    return Line(number, text, record)


def records(path: Path) -> Iterator[dict[str, Any]]:
    """What the complete lines of a ledger say; a half-written last line is left out.

    Raises:
        InputError: a damaged line before the end; the message gives its number.
    """
    for line in lines(path):
        if line.damage:
            do = "put the whole file back, or delete its folder and run the same command again"
            raise InputError(f"{path}, line {line.number}", line.damage, "a line as vlmrob wrote it", do)
        yield line.record
