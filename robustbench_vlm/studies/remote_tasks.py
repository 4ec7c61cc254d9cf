"""The tasks of a study as Ray tasks: of a Ray of this machine, or of the cluster of `RAY_ADDRESS`.

Ray starts a task again whose worker died; a task goes on from what it finished. The folders of the study and
the datasets have to be the same ones for every node.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from robustbench_vlm import one_writer
from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.devices import one_thread
from robustbench_vlm.errors import Incomplete, VlmrobError
from robustbench_vlm.evaluation import workers
from robustbench_vlm.evaluation.worker import Failed
from robustbench_vlm.studies.task import Resources, Task

STARTED_AGAIN = 3  # times at most, after deaths of its worker

T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class Place:
    """What a worker has to know of the process that gives it tasks.

    Attributes:
        resources: what the study is run with.
        cards: folders of further cards.
        code: whether cards may bring code.
    """

    resources: Resources
    cards: tuple[Path, ...]
    code: bool


def perform(tasks: Sequence[T], resources: Resources) -> Iterator[tuple[T, Any, float]]:
    """See `work_off.perform`."""
    place = Place(resources, tuple(reader.included()), plugins.code_allowed())
    with workers.connected(resources.workers, torch.device(resources.device)) as cluster:
        options = {"num_cpus": 0 if cluster.gpu else 1, "num_gpus": cluster.gpu}
        start = ray.remote(max_retries=STARTED_AGAIN, **options)(_perform).remote
        waiting, running = list(tasks), dict[Any, T]()
        while waiting or running:
            while len(running) < cluster.capacity():
                task = _next(waiting, [other.folder for other in running.values()])
                if task is None:
                    break
                waiting.remove(task)
                running[start(task, place)] = task
            ended, _ = ray.wait(list(running), timeout=1.0)  # nodes may join while it waits
            for reference in ended:
                task = running.pop(reference)
                yield task, *_result(task, reference)


def _next(waiting: Sequence[T], taken: Sequence[Path]) -> T | None:
    """The first task whose folder no other one works in."""
    return next((task for task in waiting if task.folder not in taken), None)


def _result(task: Task, reference: Any) -> tuple[Any, float]:  # noqa: ANN401 - of Ray
    """What a task returned, and its seconds.

    Raises:
        VlmrobError: it failed.
        Incomplete: it stopped, or its worker died again and again.
    """
    try:
        found, seconds = ray.get(reference)
    except RayTaskError as failed:  # of Python, in the worker
        lines = str(failed.cause or failed).strip().splitlines() or ["no message"]
        raise VlmrobError(f"{task.name}: {type(failed.cause or failed).__name__}: {lines[0]}") from failed
    except RayError as died:
        message = f"{task.name}: its worker died {STARTED_AGAIN + 1} times; the same command goes on"
        raise Incomplete(message) from died
    if isinstance(found, Failed):
        error = found.raised
        raise error if isinstance(error, Incomplete) else VlmrobError(f"{task.name}: {error}")
    return found, seconds


def _perform(task: Task, place: Place) -> tuple[Any, float]:
    """Do a task in a worker: what it returned, or how it failed, and its seconds."""
    reader.include(list(place.cards))
    reader.use_cards_of(place.resources.data_root)
    plugins.allow_code(place.code)
    begun = time.perf_counter()
    try:
        with one_thread(), one_writer.locked(task.folder):
            found = task.perform(place.resources)
    except VlmrobError as error:
        return Failed(type(error).__name__, str(error), ""), 0.0
    return found, time.perf_counter() - begun
