"""The file protocol of the Hugging Face hub: list the files of a dataset repository, and download them.

This is plain HTTP of the standard library, because `huggingface_hub` (2.4) deletes a half-downloaded file
when a download fails, does not compare plain downloads with their hash, and raises the network errors of
whichever HTTP package it was built on. Its stored token is used, and sent to the hub alone. The paths are the
hub's, so that a mirror works, too: `/api/datasets/<repo>/revision/<revision>`,
`/api/datasets/<repo>/tree/<commit>` and `/datasets/<repo>/resolve/<commit>/<file>`.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

from robustbench_vlm.data import web
from robustbench_vlm.data.web import Site as Site
from robustbench_vlm.errors import DataError, Incomplete, InputError

TIMEOUT = 30.0  # seconds without a byte
RETRIES = 5  # connections in a row that bring nothing before a download gives up
PAUSE = 1.0  # seconds before the first of them; doubled each time
ANSWER = 60.0  # seconds in which the headers of an answer must come
LISTING = 300.0  # seconds in which a whole listing must come
LARGEST_PAGE = 8 * 2**20  # bytes of JSON of one page; the hub's have 1,000 files and half a megabyte
MOST_PAGES = 1000
MOST_FILES = 200_000
LARGEST_FILE = 2**42  # bytes
POOR = 100  # connections that bring little before a download gives up
LITTLE = 2**16  # bytes
AGAIN = (408, 429, 500, 502, 503, 504)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
DROPPED = (OSError, http.client.HTTPException)  # lost connections; HTTPError is handled before


@dataclass(frozen=True)
class Commit:
    """A dataset repository at one commit."""

    repo: str
    sha: str
    licence: str


@dataclass(frozen=True)
class File:
    """One file of a repository.

    Attributes:
        path: below the repository, `/` between at most two plain names.
        size: bytes.
        sha256: in hex, for large files; empty for small ones.
        blob: git's SHA-1 of a small file; empty for large ones.
    """

    path: str
    size: int
    sha256: str
    blob: str


def site(mirror: str = "") -> Site:
    """The hub, or its mirror: `mirror`, then the environment's HF_ENDPOINT, then the public one.

    Raises:
        InputError: no web address.
    """
    url = (mirror or os.environ.get("HF_ENDPOINT") or web.HUB).rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise InputError(f"--mirror {url}", "not a web address", "https://host")
    if mirror:
        return Site(url)
    from huggingface_hub import get_token

    return Site(url, get_token() or "")


def commit(where: Site, repo: str, revision: str) -> Commit:
    """The commit that `revision` (a commit, tag or branch) of a dataset repository means.

    Raises:
        DataError: no such repository or revision, or no permission to read it.
        Incomplete: no connection.
    """
    address = f"{where.url}/api/datasets/{quote(repo)}/revision/{quote(revision, safe='')}"
    table, _ = _json(where, address, repo, time.monotonic() + LISTING)
    sha = table.get("sha") if isinstance(table, dict) else None
    if not isinstance(sha, str) or not re.fullmatch("[0-9a-f]{40}", sha):
        raise DataError(address, "no commit in the answer", "the hub's JSON", "check the mirror")
    facts = table.get("cardData")
    licence = facts.get("license") if isinstance(facts, dict) else None
    stated = ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence or "")
    return Commit(repo, sha, stated)


def files(where: Site, at: Commit) -> list[File]:
    """Every file of the repository at that commit.

    Raises:
        DataError: an answer that is no listing, or a path that would leave the folder.
        Incomplete: no connection.
    """
    address = f"{where.url}/api/datasets/{quote(at.repo)}/tree/{at.sha}?recursive=true"
    found: list[File] = []
    asked: set[str] = set()
    end = time.monotonic() + LISTING
    while address:
        asked.add(address)
        rows, headers = _json(where, address, at.repo, end)
        if not isinstance(rows, list):
            raise DataError(address, "no list of files in the answer", "the hub's JSON", "check the mirror")
        found += [
            _file(row, address) for row in rows if not isinstance(row, dict) or row.get("type") == "file"
        ]
        if len(found) > MOST_FILES:
            raise DataError(
                address, f"more than {MOST_FILES} files", "the files of a dataset", "check the mirror"
            )
        address = _next_page(where, address, headers, asked)
    return found


def _next_page(where: Site, address: str, headers: Message, asked: set[str]) -> str:
    """The address of the next page of a listing; empty after the last one."""
    link = re.search(r'<([!-~]{1,2000})>;\s*rel="next"', headers.get("Link", "")[:4096])
    found = link.group(1) if link else ""
    if found and not found.startswith(f"{where.url}/"):
        raise DataError(found, "the listing goes on at another host", where.url, "check the mirror")
    if found in asked:
        raise DataError(
            address, "the listing goes on at a page that was read", "a next page", "check the mirror"
        )
    if found and len(asked) >= MOST_PAGES:
        raise DataError(address, f"a listing of more than {MOST_PAGES} pages", "an end", "check the mirror")
    return found


def _file(row: Any, address: str) -> File:  # noqa: ANN401 - JSON of a stranger
    try:
        large = row.get("lfs") or {}
        path, size = str(row["path"]), large.get("size", row["size"])
        sha256, blob = str(large.get("oid", "")), "" if large else str(row["oid"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(address, f"{row!r:.80}", "a file with path, size and hash") from None
    if not re.fullmatch("[0-9a-f]{64}" if large else "[0-9a-f]{40}", sha256 or blob) or not _is_size(size):
        raise DataError(address, f"no hash or size of {path!r:.80}", "a file with path, size and hash")
    return File(path, size, sha256, blob)


def _is_size(size: object) -> bool:
    """Whether a number of the listing can be the bytes of a file."""
    return isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= LARGEST_FILE


def plain(path: str) -> bool:
    """Whether a path is one or two plain names, so that it cannot leave the folder it is written to."""
    parts = path.split("/")
    return len(parts) <= 2 and all(NAME.fullmatch(part) for part in parts)


def download(where: Site, at: Commit, file: File, target: Path, report: Callable[[int], None]) -> str:
    """Fetch one file to `target`, which appears only when size and hash are right; returns its SHA-256.

    A partial download is stored in `<target>.part` and continued, after a lost connection or by a later
    process. If its hash is wrong in the end, the file is downloaded once more from its first byte.

    Args:
        where: the hub or its mirror.
        at: repository and commit.
        file: what to fetch.
        target: where to put it.
        report: called with the number of bytes on disk.

    Raises:
        DataError: a web page, another size or another hash than the listing says; or no permission.
        Incomplete: the connection was lost again and again; the same call continues where it stopped.
    """
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    resumed = part.exists() and part.stat().st_size > 0
    _complete(where, at, file, part, report)
    found = hashed(part, file)
    if found is None and resumed:
        part.unlink()
        _complete(where, at, file, part, report)
        found = hashed(part, file)
    if found is None:
        part.unlink()
        raise DataError(_address(where, at, file), "other bytes than the hub lists", "its hash", "try again")
    part.replace(target)
    return found


def _address(where: Site, at: Commit, file: File) -> str:
    return f"{where.url}/datasets/{quote(at.repo)}/resolve/{at.sha}/{quote(file.path)}"


def _complete(where: Site, at: Commit, file: File, part: Path, report: Callable[[int], None]) -> None:
    """Append to `part` until it has the file's size, with a new connection as long as each brings bytes."""
    address, idle, poor = _address(where, at, file), 0, 0
    if part.exists() and part.stat().st_size > file.size:
        part.unlink()
    part.touch()
    while (there := part.stat().st_size) < file.size:
        report(there)
        slow = False
        try:
            _append(where, address, file, part, report)
            problem = "the connection closed early"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in AGAIN:
                raise web.refused(address, at.repo, error.code) from None
            problem = f"HTTP {error.code}"
        except DROPPED as error:
            slow = isinstance(error, web.TooSlowError)
            problem = web.reason(error)
        brought = part.stat().st_size - there
        idle = 0 if brought and not slow else idle + 1
        poor = 0 if brought >= LITTLE and not slow else poor + 1
        if idle >= RETRIES or poor >= POOR:
            raise Incomplete(
                f"{address}: {problem}; {part.stat().st_size} of {file.size} bytes are stored, and the same "
                "command continues with them"
            )
        if part.stat().st_size < file.size:
            time.sleep(PAUSE * 2**idle if idle else 0)
    report(file.size)


def _append(where: Site, address: str, file: File, part: Path, report: Callable[[int], None]) -> None:
    """One connection: the bytes from the end of `part` on, never more than the file has."""
    begin = part.stat().st_size
    request = web.request(where, address)
    if begin:
        request.add_header("Range", f"bytes={begin}-")
    with web.opened(request, TIMEOUT, ANSWER) as answer, part.open("r+b") as out:
        if answer.status != http.client.PARTIAL_CONTENT:
            begin = 0  # the server sends the whole file
        elif not (answer.headers.get("Content-Range") or "").startswith(f"bytes {begin}-"):
            raise http.client.HTTPException("another range than asked for")
        length = answer.headers.get("Content-Length")
        stated = begin + int(length) if length and length.isdigit() else file.size
        if stated != file.size:
            web.require_no_page(address, answer.headers, answer.read1(256))
            raise DataError(address, f"{stated} bytes", f"{file.size}, as the hub lists", "try again later")
        out.seek(begin)
        out.truncate()
        _copy(address, answer, out, file.size, report)


def _copy(
    address: str,
    answer: http.client.HTTPResponse,
    out: BinaryIO,
    size: int,
    report: Callable[[int], None],
) -> None:
    """Copy an answer to the end of `out` until that has `size` bytes."""
    first, pace = out.tell() == 0, web.Pace()
    while left := size - out.tell():
        chunk = answer.read1(min(web.CHUNK, left))
        if not chunk:
            return
        if first:
            web.require_no_page(address, answer.headers, chunk)
            first = False
        out.write(chunk)
        report(out.tell())
        pace.add(len(chunk))
    if answer.read1(1):
        raise DataError(address, f"more than {size} bytes", "as many as the hub lists", "try again later")


def hashed(part: Path, file: File) -> str | None:
    """SHA-256 of a complete download; `None` if it is not the listed file."""
    if part.stat().st_size != file.size:
        return None
    digest, git = hashlib.sha256(), hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with part.open("rb") as content:
        while chunk := content.read(web.CHUNK):
            digest.update(chunk)
            if file.blob:
                git.update(chunk)
    same = git.hexdigest() == file.blob if file.blob else digest.hexdigest() == file.sha256
    return digest.hexdigest() if same else None


def _json(where: Site, address: str, repo: str, end: float) -> tuple[Any, Message]:
    """The JSON at an address and the headers of the answer; a few attempts until the clock says `end`."""
    problem = f"the listing takes longer than {LISTING:.0f} s"
    for pause in _pauses():
        time.sleep(pause)
        left = end - time.monotonic()
        if left <= 0:
            break
        try:
            with web.opened(web.request(where, address), TIMEOUT, min(ANSWER, left)) as answer:
                content = web.body(answer, LARGEST_PAGE, left)
                if content is None:
                    found = f"a page of more than {LARGEST_PAGE} bytes"
                    raise DataError(address, found, "the hub's listing", "check the mirror")
                web.require_no_page(address, answer.headers, content)
                return json.loads(content), answer.headers
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in AGAIN:
                raise web.refused(address, repo, error.code) from None
            problem = f"HTTP {error.code}"
        except (ValueError, RecursionError):
            raise DataError(address, "not JSON", "the hub's listing", "check the mirror") from None
        except DROPPED as error:
            problem = web.reason(error)
    raise Incomplete(f"{address}: {problem}; check the network, name a --mirror, or use --offline")


def _pauses() -> Iterator[float]:
    yield 0.0
    yield from (PAUSE * 2**i for i in range(RETRIES - 2))
