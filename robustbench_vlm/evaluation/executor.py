"""Who does the model work of an evaluation: this process, workers on this machine, or those of a cluster."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from queue import SimpleQueue
from typing import TypeVar

from robustbench_vlm.errors import InputError
from robustbench_vlm.evaluation.model_work import Works, in_process

INSTALL = "pip install 'robustbench_vlm[ray]'"
CLUSTER = "ray"
"""What stands for the workers of a cluster in place of a number of workers."""

Report = Callable[[str, int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Executor:
    """Who does the model work.

    Attributes:
        works: does it for one cell.
        at_once: how many pairs of model and dataset are measured at once.
        name: what progress lines call it; empty for this process.
    """

    works: Works = in_process
    at_once: int = 1
    name: str = ""


THIS_PROCESS = Executor()
"""This process, without Ray."""


def require_workers(workers: str) -> None:
    """Refuse `--workers` as it was typed, before any time is spent; empty stands for this process.

    Raises:
        InputError: neither a number of workers nor `ray`; Ray is not installed; the address of the cluster is
            not known.
    """
    if not workers:
        return
    where = f"--workers {workers}"
    if workers != CLUSTER and not (workers.isascii() and workers.isdigit() and 0 < int(workers) < 10_000):
        expected = f"a number from 1, or {CLUSTER} for the cluster of RAY_ADDRESS"
        raise InputError(where, "not a number of workers", expected)
    if find_spec("ray") is None:
        raise InputError(where, "Ray is not installed", do=f"type: {INSTALL}")
    if workers == CLUSTER:
        address = os.environ.get("RAY_ADDRESS", "")
        if not address:
            do = "type RAY_ADDRESS=HOST:6379 before the command, or --workers N for this machine alone"
            raise InputError(where, "RAY_ADDRESS is not set", "the address of a Ray cluster", do)
        if address.startswith("ray://"):
            do = "run the command on a node of the cluster, with RAY_ADDRESS=auto"
            raise InputError(f"RAY_ADDRESS {address}", "an address of Ray Client", "that of the cluster", do)


def run_concurrently(tasks: Sequence[Callable[[], T]], at_once: int) -> list[T]:
    """Do tasks in threads, begun in their order and some of them at once; returns their results in order.

    The first error of a task is raised at once. Tasks beside it go on until what they wait for ends.
    """
    if at_once == 1 or len(tasks) < 2:
        return [task() for task in tasks]
    numbers = iter(range(len(tasks)))
    following, ended = threading.Lock(), SimpleQueue[tuple[int, T | None, BaseException | None]]()

    def work() -> None:
        while True:
            with following:
                number = next(numbers, None)
            if number is None:
                return
            try:
                ended.put((number, tasks[number](), None))
            except BaseException as error:  # noqa: BLE001 - raised where the results are waited for
                ended.put((number, None, error))
                return

    for _ in range(min(at_once, len(tasks))):
        threading.Thread(target=work, daemon=True).start()
    found: dict[int, T] = {}
    while len(found) < len(tasks):
        number, result, error = ended.get()
        if error is not None:
            raise error
        found[number] = result  # type: ignore[assignment]
    return [found[number] for number in range(len(tasks))]


class JointProgress:
    """One line of progress for cells that are measured at once."""

    def __init__(self, report: Report, what: str) -> None:
        """Progress is reported as that of `what`."""
        self._report, self._what = report, what
        self._done: dict[str, tuple[int, int]] = {}
        self._alone = threading.Lock()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Note the progress of one cell in one stage, and report that of all that have begun."""
        with self._alone:
            self._done[what] = (done, total)
            counts = self._done.values()
            self._report(self._what, sum(a for a, _ in counts), sum(b for _, b in counts))
