"""The processor time of every step of a training."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from robustbench_vlm import store
from robustbench_vlm.training import loop

NAME = "clock.jsonl"


class Clock:
    """Writes the processor time of every training step: `{"step": 1, "cpu": 0.24}`, without probes.

    The processor time of one thread hardly depends on what else the machine does. Steps that are repeated
    after a stop are written twice. It does not measure an accelerator, which works beside the process.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._last: float | None = None
        store.mend(self._path)

    def __call__(self, line: loop.Line) -> None:
        """Record one line of the training log."""
        now = time.process_time()
        if "loss" in line and self._last is not None:
            record: dict[str, Any] = {"step": line["step"], "cpu": round(now - self._last, 6)}
            store.append(self._path, record)
        self._last = time.process_time()


def step_seconds(folder: Path) -> tuple[float, int] | None:
    """Mean processor time of a step, and the number of steps that it is over; None without a clock."""
    known = {line["step"]: float(line["cpu"]) for line in store.records(folder / NAME)}
    # a dict, since a step that was repeated after a stop counts once
    return (math.fsum(known.values()) / len(known), len(known)) if known else None
