"""Work off the tasks of a study: one after another here, or by workers on Ray; with equal results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from robustbench_vlm import one_writer
from robustbench_vlm.devices import one_thread
from robustbench_vlm.errors import Incomplete, VlmrobError
from robustbench_vlm.evaluation import ray_settings
from robustbench_vlm.studies.task import Resources, Task

T = TypeVar("T", bound=Task)


def perform(tasks: Sequence[T], resources: Resources) -> Iterator[tuple[T, Any, float]]:
    """Do tasks, begun in their order.

    Yields:
        (task, what it returned, seconds), in the order in which they end.

    Raises:
        VlmrobError: a task failed; those beside it are stopped.
        Incomplete: a signal came; in this process the state of a training is saved.
        InputError: a cluster that cannot be joined, a device that cannot be shared out, or a folder that
            another command writes to.
    """
    if resources.workers:
        ray_settings.prepare(resources.workers)
        from robustbench_vlm.studies import remote_tasks  # Ray is an extra, and slow to import

        yield from remote_tasks.perform(tasks, resources)
        return
    for task in tasks:
        begun = time.perf_counter()
        with one_thread(), one_writer.locked(task.folder):
            try:
                found = task.perform(resources)
            except Incomplete:
                raise
            except VlmrobError as error:
                raise VlmrobError(f"{task.name}: {error}") from error
        yield task, found, time.perf_counter() - begun
