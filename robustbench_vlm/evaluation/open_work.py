"""What a pool knows of each of its workers, and of each piece of work that is not finished."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

from robustbench_vlm.evaluation.cluster import About, Handle
from robustbench_vlm.evaluation.remote_work import Work
from robustbench_vlm.evaluation.worker import Answer, Done, Found, Order


@dataclass(eq=False)
class LiveWorker:
    """A worker that has started.

    Attributes:
        handle: of the cluster.
        about: where it runs.
        own_orders: orders for this very worker, each with where its answer goes.
        attacked: numbers of the cells of which it attacked images.
        block: the work that it has a block of.
    """

    handle: Handle
    about: About
    own_orders: deque[tuple[Order, SimpleQueue[Answer]]] = field(default_factory=deque)
    attacked: set[int] = field(default_factory=set)
    block: OpenWork | None = None


@dataclass(eq=False)
class OpenWork:
    """Work that is not finished.

    Attributes:
        work: what is to be done.
        inbox: for the thread that waits: answers, or an error, or None at the end.
        out: number of blocks that workers have.
    """

    work: Work
    inbox: SimpleQueue[tuple[Sequence[int], Found | Done] | Exception | None] = field(
        default_factory=SimpleQueue
    )
    out: int = 0
