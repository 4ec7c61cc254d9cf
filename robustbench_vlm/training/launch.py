"""Start several processes of one command on this machine by PyTorch's own launcher, as `torchrun` does."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from robustbench_vlm import interruption, threads
from robustbench_vlm.errors import Incomplete, TrainingError

KILLED = (*interruption.SIGNALS, signal.SIGKILL)
"""Signals that come from outside: a user, a scheduler, or a system without memory. All others are crashes."""
GRACE = 120  # seconds that a process has to end its step and save, before it is killed


def launch(processes: int, words: Sequence[str]) -> int:
    """Run `vlmrob` with these words in several processes, and wait for all of them.

    Args:
        processes: how many; each finds the others through environment variables (`world.launched`).
        words: the command line, without `vlmrob`.

    Returns:
        The exit code of the processes, which have printed what there is to say.

    Raises:
        Incomplete: a signal came to this process, or killed one of the others, and all were stopped.
        TrainingError: one of the others crashed.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed is one line below
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads.usable_cores() // processes)))
    try:
        elastic_launch(_config(processes), sys.executable)("-m", "robustbench_vlm", *words)
    except SignalException:
        raise Incomplete(
            ""
        ) from None  # the processes got the signal too, and the first one says what it saved
    except ChildFailedError as error:
        return _exit_code({rank: failure.exitcode for rank, failure in error.failures.items()})
    return 0


def _config(processes: int) -> LaunchConfig:
    known = {field.name for field in fields(LaunchConfig)}
    grace: dict[str, Any] = (
        {"shutdown_timeout": GRACE} if "shutdown_timeout" in known else {}
    )  # of torch 2.11
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        **grace,
    )


def _exit_code(codes: Mapping[int, int]) -> int:
    """The exit code of the process that ended first of its own accord; the launcher stops the others.

    Raises:
        Incomplete: a process was killed from outside.
        TrainingError: one crashed: the same command would most likely crash again.
    """
    ended = {rank: signal.Signals(-code) for rank, code in sorted(codes.items()) if code < 0}
    for rank, number in ended.items():  # the launcher ends the others by SIGTERM
        if number in KILLED and number != signal.SIGTERM:
            again = "type the same command again, and it goes on from the last checkpoint"
            raise Incomplete(f"process {rank} of this training was ended by {number.name}; {again}")
    for rank, number in ended.items():
        if number not in KILLED:
            raise TrainingError(f"process {rank} of this training crashed with {number.name}")
    own = [code for code in codes.values() if code > 0]
    return min(own, default=Incomplete.exit_code)  # 1 and 2 are causes, 75 may be their consequence
