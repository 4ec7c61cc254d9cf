"""HTTP answers with bounds: a server that sends for ever, or one byte a minute, ends in an error.

The timeout of a socket counts the seconds without a byte, so a server that drips bytes is never late by it.
"""

from __future__ import annotations

import http.client
import queue
import threading
import time
import urllib.request
from dataclasses import dataclass
from email.message import Message

from robustbench_vlm.errors import DataError

CHUNK = 2**20  # bytes that are read at once
HUB = "https://huggingface.co"
SLOWEST = 1024  # bytes a second of a body, over a window
WINDOW = 60.0  # seconds


@dataclass(frozen=True)
class Site:
    """The address of a hub.

    Attributes:
        url: scheme and host, maybe a path; no final slash.
        token: sent to this host alone, never along a redirect; empty for none.
    """

    url: str
    token: str = ""


class TooSlowError(OSError):
    """The server sends, and far too slowly."""


def opened(request: urllib.request.Request, timeout: float, seconds: float) -> http.client.HTTPResponse:
    """The answer to a request, once all its headers are there.

    Args:
        request: of a web address.
        timeout: seconds without a byte.
        seconds: in which the headers must have come, redirections included.

    Raises:
        TooSlowError: they have not.
        OSError, http.client.HTTPException: as `urllib.request.urlopen`.
    """
    found: queue.Queue[http.client.HTTPResponse | BaseException] = queue.Queue()
    late = threading.Event()

    def ask() -> None:
        try:
            answer = urllib.request.urlopen(request, timeout=timeout)  # noqa: S310 - http(s) by `hub.site`
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            found.put(error)
            return
        found.put(answer)
        if late.is_set():
            answer.close()

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = found.get(timeout=seconds)
    except queue.Empty:
        late.set()
        raise TooSlowError(f"no whole answer within {seconds:.0f} s") from None
    if isinstance(answer, BaseException):
        raise answer
    return answer


def body(answer: http.client.HTTPResponse, largest: int, seconds: float) -> bytes | None:
    """The body of an answer; None if it has more than `largest` bytes.

    Raises:
        TooSlowError: it has not come within these seconds.
        OSError, http.client.HTTPException: the connection was lost.
    """
    parts, size, end = [], 0, time.monotonic() + seconds
    while chunk := answer.read1(min(CHUNK, largest + 1)):
        parts.append(chunk)
        size += len(chunk)
        if size > largest:
            return None
        if time.monotonic() > end:
            raise TooSlowError(f"only {size} bytes within {seconds:.0f} s")
    if answer.length:  # what is left of the stated length
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(parts)


class Pace:
    """Whether a download is fast enough to end."""

    def __init__(self) -> None:
        self.since, self.bytes = time.monotonic(), 0

    def add(self, count: int) -> None:
        """Count bytes that have come.

        Raises:
            TooSlowError: fewer than `SLOWEST` a second in the last window.
        """
        self.bytes += count
        passed = time.monotonic() - self.since
        if passed >= WINDOW:
            if self.bytes < SLOWEST * passed:
                raise TooSlowError(f"{self.bytes} bytes in {passed:.0f} s")
            self.since, self.bytes = time.monotonic(), 0


def request(where: Site, address: str) -> urllib.request.Request:
    """A request for an address of that hub, with its token."""
    made = urllib.request.Request(address, headers={"User-Agent": "vlmrob"})  # noqa: S310 - http(s) by `site`
    if where.token:
        made.add_unredirected_header("Authorization", f"Bearer {where.token}")
    return made


def require_no_page(address: str, headers: Message, begin: bytes) -> None:
    """Refuse a web page where a file is meant: a sign-in form, a proxy's notice."""
    page = begin[:256].lstrip().lower().startswith((b"<!doctype", b"<html"))
    if page or headers.get_content_type() == "text/html":
        do = "check the network's sign-in page, or the mirror"
        raise DataError(address, "the server sent a web page (HTML)", "the file", do)


def refused(address: str, repo: str, code: int) -> DataError:
    """The error for an answer that another attempt would not change."""
    if code in (401, 403):
        do = f"accept its licence at {HUB}/datasets/{repo}, then type: hf auth login"
        return DataError(
            address, f"HTTP {code}: it needs your permission", "a public or accepted dataset", do
        )
    if code == 404:
        return DataError(
            address, "HTTP 404: no such repository, revision or file", do="check card and mirror"
        )
    return DataError(address, f"HTTP {code}", do="check the mirror")


def reason(error: BaseException) -> str:
    """What a lost connection says, in one line: some errors repeat what the server sent."""
    text = (str(error) or type(error).__name__)[:120]
    return text if text.isprintable() else repr(text)
