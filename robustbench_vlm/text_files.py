"""Read files that somebody else wrote: regular files alone, and text as every editor writes it.

A FIFO would make a reader wait for ever and a device would never end, so neither is opened. Text is UTF-8
with or without a byte order mark, and its lines end in LF or CRLF.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

from robustbench_vlm.errors import InputError

LARGEST_TEXT = 256 * 2**20  # bytes of one text file; the list of a million image names has 40 MB


def open_regular(path: Path) -> io.BufferedReader:
    """A regular file, opened for reading bytes; links are followed.

    Raises:
        OSError: no such file, no permission, or something that is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO does not block
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def require_regular(path: Path) -> None:
    """Refuse a file that exists and is no regular file; links are followed.

    Raises:
        OSError: it is a FIFO, a device or a folder.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def require_own(path: Path) -> None:
    """Refuse to write to a path that is a link or no regular file: what it leads to would be changed.

    Raises:
        InputError: it is one.
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        found = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
        raise InputError(str(path), found, "a file that vlmrob wrote", "remove it")


def read_bytes(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: as `open_regular`, or a file of more than `largest` bytes.
    """
    with open_regular(path) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise OSError(errno.EFBIG, f"more than {largest} bytes", str(path))
    return content


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without byte order mark and with LF at the ends of its lines.

    Raises:
        OSError: as `read_bytes`.
        UnicodeDecodeError: it is not UTF-8.
    """
    return decoded(read_bytes(path))


def decoded(content: bytes) -> str:
    """UTF-8 bytes as text, without byte order mark and with LF at the ends of its lines.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return content.decode("utf-8-sig").replace("\r\n", "\n")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without trailing blank lines; blank lines between others stay.

    Raises:
        OSError, UnicodeDecodeError: as `read_text`.
    """
    text = read_text(path).rstrip("\n")
    return text.split("\n") if text.strip() else []
