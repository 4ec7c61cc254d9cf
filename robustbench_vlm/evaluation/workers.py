"""Workers on Ray: a local one that ends with the evaluation, or the cluster of `RAY_ADDRESS`.

A worker is a Ray actor that does what `worker.Worker` does. A model, and what else is known of a cell, is put
into Ray's object store once; the store copies it to a node when the first worker there asks. So no node
needs the files of models, and all workers have the same weights. Images travel with their orders, as bytes:
10 MB for 64 images of 224 px, which are attacked for minutes. So no node but the driver's needs the datasets.

This file and `studies/remote_tasks.py` import Ray; all others do without it.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from robustbench_vlm.errors import InputError, VlmrobError
from robustbench_vlm.evaluation.cluster import About, Lost, Reference
from robustbench_vlm.evaluation.executor import CLUSTER, Executor
from robustbench_vlm.evaluation.pool import Pool
from robustbench_vlm.evaluation.worker import Answer, Order, Placed, Worker
from robustbench_vlm.models.zoo import Loaded

SUBJECTS = 8  # models and datasets that are measured at once; each may have half a GiB of pixels
STORE = 256 * 2**20  # bytes of Ray's object store beside models
BLOCK = 96 * 2**20  # bytes of images of one worker in it


@contextmanager
def executor(
    workers: str, device: torch.device, model_bytes: int, remark: Callable[[str], None]
) -> Iterator[Executor]:
    """Start workers, or join those of a cluster; they end with the context.

    Args:
        workers: how many on this machine, or `ray` for the cluster of `RAY_ADDRESS`.
        device: where to attack.
        model_bytes: of all models together.
        remark: called with a line about each worker that is lost.

    Raises:
        InputError: a device that cannot be shared out, or a cluster that cannot be joined.
    """
    with connected(workers, device, model_bytes) as cluster:
        pool = Pool(cluster, remark)
        try:
            at_once = min(SUBJECTS, cluster.capacity() + 1)
            yield Executor(pool.works, at_once, f"{cluster.capacity()} workers")
        finally:
            pool.close()


def connected(workers: str, device: torch.device, model_bytes: int = 0) -> AbstractContextManager[RayCluster]:
    """A Ray of this machine, which ends with the context, or the cluster of `RAY_ADDRESS`.

    Args:
        workers: how many on this machine, or `ray` for the cluster.
        device: of the workers.
        model_bytes: that the workers share.

    Raises:
        InputError: a device that cannot be shared out, or a cluster that cannot be joined.
    """
    return _cluster(device) if workers == CLUSTER else _here(int(workers), device, model_bytes)


class _Actor(Worker):
    """A worker with what Ray adds: where it runs, and how it gets models."""

    def about(self) -> About:
        """Where it runs."""
        return About(os.getpid(), ray.get_runtime_context().get_node_id(), self.device_name)

    def perform(self, order: Order, references: Sequence[Any]) -> Iterator[Answer]:
        """Carry out an order; the references are not resolved by Ray, since most orders need none."""

        def fetch(with_model: bool) -> tuple[Loaded | None, Placed]:
            model, placed = references
            return ray.get(model) if with_model else None, ray.get(placed)

        yield from self.carry_out(order, fetch)


@dataclass(frozen=True)
class _Handle:
    """One actor; see `cluster.Handle`."""

    actor: Any
    described: Any

    def about(self, seconds: float) -> About | None:
        if not ray.wait([self.described], timeout=seconds)[0]:
            return None
        try:
            about: About = ray.get(self.described)
        except RayError as error:
            raise Lost(_first_line(error)) from error
        return about

    def answers(self, order: Order, references: Sequence[Reference], tick: float) -> Iterator[Answer | None]:
        stream = self.actor.perform.options(num_returns="streaming").remote(order, list(references))
        while True:
            try:
                if not ray.wait([stream], timeout=tick)[0]:
                    yield None
                    continue
                answer: Answer = ray.get(next(stream))
            except StopIteration:
                return
            except RayTaskError as error:
                raise VlmrobError(f"a worker failed: {_first_line(error.cause or error)}") from error
            except RayError as error:  # the actor died, or its node
                raise Lost("died") from error
            yield answer

    def kill(self) -> None:
        with suppress(RayError, ValueError):
            ray.kill(self.actor)
        with suppress(RayError, Lost, ProcessLookupError):  # Ray's own order does not reach a stopped process
            about = self.about(0)
            if about is not None and about.node == ray.get_runtime_context().get_node_id():
                os.kill(about.pid, signal.SIGKILL)


@dataclass(frozen=True)
class RayCluster:
    """A Ray that this process is connected to; see `cluster.Cluster`.

    Attributes:
        device: of the workers.
        threads: of torch in each.
        joining: whether nodes may join.
        gpu: share of a GPU that each worker has; 0 where they attack on CPUs.
        most: number of workers; None for as many as there is room for.
    """

    device: str
    threads: int
    joining: bool
    gpu: float
    most: int | None

    @property
    def on_cpu(self) -> bool:
        """See `cluster.Cluster`."""
        return self.device == "cpu"

    def capacity(self) -> int:
        """See `cluster.Cluster`."""
        if self.most is not None:
            return self.most
        room = ray.cluster_resources()
        return int(room.get("GPU", 0) / self.gpu if self.gpu else room.get("CPU", 0))

    def put(self, value: Any) -> Reference:  # noqa: ANN401 - anything
        """See `cluster.Cluster`."""
        return ray.put(value)

    def start(self) -> _Handle:
        """See `cluster.Cluster`."""
        options = {"num_cpus": 0 if self.gpu else 1, "num_gpus": self.gpu, "max_restarts": 0}
        actor = ray.remote(**options)(_Actor).remote(self.device, self.threads)
        return _Handle(actor, actor.about.remote())


@contextmanager
def _here(number: int, device: torch.device, model_bytes: int) -> Iterator[RayCluster]:
    """A Ray of this machine alone, that ends with the context; the folder that it writes to is removed."""
    _require_shared(device)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    folder = tempfile.mkdtemp(prefix="vlmrob-ray-")
    options: dict[str, Any] = {
        "address": "local",
        "num_cpus": number,
        "num_gpus": gpus,
        "include_dashboard": False,
        "object_store_memory": STORE + number * BLOCK + 2 * model_bytes,
        "_temp_dir": folder,
    }
    try:
        with _connected(options):
            threads = max(1, torch.get_num_threads() // number)
            yield RayCluster(device.type, threads, joining=False, gpu=share(gpus, number), most=number)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _cluster(device: torch.device) -> Iterator[RayCluster]:
    """The cluster of `RAY_ADDRESS`: a worker for every GPU, or for every CPU where there is no GPU."""
    _require_shared(device)
    address = os.environ["RAY_ADDRESS"]
    with _connected({"address": address}):
        gpu = 1.0 if device.type != "mps" and ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
        yield RayCluster("cuda" if gpu else device.type, 1, joining=True, gpu=gpu, most=None)


def share(gpus: int, workers: int) -> float:
    """The part of a GPU for each of some workers, so that all of them find room; 0 without GPUs.

    Example:
        >>> share(8, 8), share(2, 3), share(1, 3)
        (1.0, 0.5, 0.3333)
    """
    on_one = -(-workers // gpus) if gpus else 0
    return 10_000 // on_one / 10_000 if on_one else 0.0  # Ray counts in steps of 1/10,000


def _require_shared(device: torch.device) -> None:
    """Refuse one GPU of several.

    Raises:
        InputError: Ray decides which worker has which GPU.
    """
    if device.type == "cuda" and device.index is not None:
        do = f"type CUDA_VISIBLE_DEVICES={device.index} before the command, and --device cuda"
        raise InputError(f"--device {device}", "with --workers, which shares out all GPUs", do=do)


@contextmanager
def _connected(options: dict[str, Any]) -> Iterator[None]:
    """Connect to Ray, quietly; it keeps the signal handlers of this process as they were."""
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"RAY_ADDRESS {options['address']}" if options["address"] != "local" else "--workers"
        raise InputError(where, _first_line(error), "a Ray that can be used") from error
    ray._private.worker._worker_logs_enabled = False  # it prints to stdout, which is for results
    if main:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0]:.200}" if lines else type(error).__name__
