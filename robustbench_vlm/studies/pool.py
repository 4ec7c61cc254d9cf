"""Work off the tasks of a study in processes of one thread; their number changes no result."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.errors import Incomplete, VlmrobError


@dataclass(frozen=True)
class Resources:
    """What a study is run with.

    Attributes:
        data_root: folder of the datasets.
        device: where to train and attack.
        jobs: processes at a time.
    """

    data_root: Path
    device: str = "cpu"
    jobs: int = 1


class Task(Protocol):
    """A piece of work that can be sent to another process. What it finished is not done again."""

    @property
    def name(self) -> str:
        """What progress lines and errors call it."""

    @property
    def folder(self) -> Path:
        """Where it works; no two processes work in one folder at a time."""

    def perform(self, resources: Resources) -> Any:  # noqa: ANN401 - whatever the task is for
        """Do it, and return what the parent process wants to know, as plain values.

        Raises:
            VlmrobError: it cannot be done.
        """


T = TypeVar("T", bound=Task)


def perform(tasks: Sequence[T], resources: Resources) -> Iterator[tuple[T, Any, float]]:
    """Do the tasks in their order, `resources.jobs` at a time.

    Yields:
        (task, what it returned, seconds), in the order in which they end.

    Raises:
        VlmrobError: a task failed; those beside it are stopped.
        Incomplete: a process was killed.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(tasks))
    running: dict[Any, tuple[SpawnProcess, T, float]] = {}
    try:
        while waiting and len(running) < resources.jobs:
            here, there = context.Pipe()
            cards = (reader.included(), plugins.code_allowed())
            process = context.Process(target=_worker, args=(resources, cards, there), daemon=True)
            process.start()
            there.close()
            _give(here, process, waiting, running)
        while running:
            for ready in wait(list(running)):
                process, task, begun = running.pop(ready)
                found = _result(task, process, ready)
                _give(ready, process, waiting, running)
                yield task, found, time.perf_counter() - begun
    finally:
        for process, *_ in running.values():
            process.terminate()
            process.join()


def _give(worker: Any, process: SpawnProcess, waiting: list[T], running: dict[Any, Any]) -> None:  # noqa: ANN401 - a connection
    """Send the next task to a worker; without one, let its process end."""
    if waiting:
        task = waiting.pop()
        worker.send(task)
        running[worker] = (process, task, time.perf_counter())
    else:
        worker.send(None)
        process.join()


def _result(task: Task, process: SpawnProcess, worker: Any) -> Any:  # noqa: ANN401 - see `Task.perform`
    """What a worker sent at the end of a task."""
    try:
        done, value = worker.recv()
    except EOFError:
        process.join()
        message = f"{task.name}: its process ended with {process.exitcode}; the same command goes on"
        raise Incomplete(message) from None
    if not done:
        process.join()
        raise VlmrobError(f"{task.name}: {value}")
    return value


def _worker(resources: Resources, cards: tuple[list[Path], bool], parent: Connection) -> None:
    """What one process does: tasks, until there is none; a known error is sent as its message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent too, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    include, allowed = cards
    reader.include(include)
    reader.use_cards_of(resources.data_root)
    plugins.allow_code(allowed)
    while (task := parent.recv()) is not None:
        try:
            with _alone(task.folder):
                found = task.perform(resources)
        except VlmrobError as error:
            parent.send((False, str(error)))
            raise SystemExit(error.exit_code) from None
        parent.send((True, found))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # whatever is being written is whole or not there


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process works in `folder`; the system frees the lock of a killed process."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where two studies must not share a folder
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
