"""What a pool of workers needs of whatever runs them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from robustbench_vlm.evaluation.worker import Answer, Expected, Order

STARTING = 900.0  # seconds that a worker may take to start, and then to load a model and time it
LEAST = 120.0  # seconds that it may always take from one answer to the next
SLOW = 20.0  # factor by which it may be slower than its price says
TICK = 1.0  # seconds between two looks at whether the evaluation has ended

Reference = Any
"""What a cluster calls a value that it holds for all workers."""


class Lost(Exception):  # noqa: N818 - caught where workers are replaced
    """A worker is gone; the message says how."""


@dataclass(frozen=True)
class About:
    """Where a worker runs.

    Attributes:
        pid: of its process.
        node: the cluster's name of the machine.
        device: name of the GPU or the processor.
    """

    pid: int
    node: str
    device: str


class Handle(Protocol):
    """One worker of a cluster."""

    def about(self, seconds: float) -> About | None:
        """Where it runs; None if it has not started within some seconds.

        Raises:
            Lost: it died.
        """

    def answers(self, order: Order, references: Sequence[Reference], tick: float) -> Iterator[Answer | None]:
        """The answers to an order, and None after every `tick` seconds without one.

        Args:
            order: a piece of work.
            references: of the model, and of the `Placed` of the cell.
            tick: seconds.

        Raises:
            Lost: it died.
            VlmrobError: the order or an answer could not be sent.
        """

    def kill(self) -> None:
        """End its process, whatever it does."""


class Cluster(Protocol):
    """Where workers run."""

    @property
    def on_cpu(self) -> bool:
        """Whether they attack on CPUs."""

    @property
    def threads(self) -> int:
        """Of torch in each."""

    @property
    def joining(self) -> bool:
        """Whether places may be added later."""

    def capacity(self) -> int:
        """How many workers there is room for now."""

    def put(self, value: Any) -> Reference:  # noqa: ANN401 - anything
        """Hold a value for all workers."""

    def start(self) -> Handle:
        """Start a worker; it may have to wait for room."""


def answers_in_time(handle: Handle, order: Order, references: Sequence[Reference]) -> Iterator[Answer | None]:
    """The answers to an order, as long as they come in time, and None after every `TICK` without one.

    Raises:
        Lost: the worker died, or was killed since its next answer took `SLOW` times its price.
    """
    allowed, last = STARTING, time.monotonic()
    for answer in handle.answers(order, references, TICK):
        now = time.monotonic()
        if answer is None and now - last > allowed:
            handle.kill()
            raise Lost(f"gave no answer for {now - last:.0f} s")
        if answer is not None:
            last = now
        if isinstance(answer, Expected):
            allowed = LEAST + SLOW * answer.seconds
        else:
            yield answer
