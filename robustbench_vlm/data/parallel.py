"""The one pool of threads that reads and decodes images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from robustbench_vlm.threads import usable_cores

AHEAD = 64  # calls that are started before their results are asked for

T = TypeVar("T")
U = TypeVar("U")


def in_order(call: Callable[[T], U], items: Iterable[T], ahead: int = AHEAD) -> Iterator[U]:
    """`call(item)` for each item, in the order of the items, computed by a few threads.

    Args:
        call: decodes an image, say; PIL and the file system release the interpreter's lock.
        items: taken one at a time, at most `ahead` before the result that is asked for.
        ahead: calls that are started before their results are asked for.

    Raises:
        Exception: whatever `call` raises, when the result of that item is asked for.
    """
    waiting: deque[Future[U]] = deque()
    pool = ThreadPoolExecutor(threads())
    try:
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also when the caller stops early or an image is bad: do not wait for results nobody needs
        pool.shutdown(wait=False, cancel_futures=True)


def threads() -> int:
    """How many threads decode: as many as the cores that this process may use, at most 8."""
    return min(8, usable_cores())
