"""Whether weights may be asked for from the network, and a quick answer where it cannot be reached."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

SECONDS = 0.7  # the library itself tries for a minute, many times


def hub_is_reachable() -> bool:
    """Whether the hub answers within `SECONDS`; true behind a proxy, where only a request could show it."""
    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT)
    proxies = getproxies()
    if proxies.get(address.scheme) or proxies.get("all"):
        return True
    answered = threading.Event()

    def connect() -> None:
        port = address.port or (80 if address.scheme == "http" else 443)
        try:
            socket.create_connection((address.hostname or "", port), SECONDS).close()
        except OSError:
            return
        answered.set()

    worker = threading.Thread(target=connect, daemon=True)  # looking a name up has no limit of its own
    worker.start()
    worker.join(SECONDS)
    return answered.is_set()


@contextmanager
def only_local() -> Iterator[None]:
    """Within this block huggingface_hub reads its cache and sends no request."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def file_of_url(url: str) -> Path:
    """Where open_clip stores a file that it downloads from an address."""
    return Path("~/.cache/clip").expanduser() / url.rpartition("/")[2]
