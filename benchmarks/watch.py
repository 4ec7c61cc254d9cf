"""A model that counts what is asked of it and, turn and turn about, times what the bare call costs.

The machine's speed drifts. So every so many calls the same call is made once more on a full batch, with
nothing around it, and timed by itself: what an attack takes is then compared with calls of its own minutes.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("forward", "gradient")
Call = tuple[str, int]
"""Kind and rows of a model call."""


@dataclass
class Clock:
    """Seconds of wall and of processor, and in how many turns."""

    wall: float = 0.0
    cpu: float = 0.0
    turns: int = 0

    def time(self, call: Callable[[], Any], device: torch.device) -> Any:  # noqa: ANN401 - what `call` gives
        """Add one call."""
        _settle(device)
        wall, cpu = time.perf_counter(), time.process_time()
        given = call()
        _settle(device)
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        self.turns += 1
        return given


@dataclass
class Counts:
    """Model calls and the rows in them; a forward that is differentiated counts as both."""

    forward_calls: int = 0
    forward_rows: int = 0
    backward_calls: int = 0
    backward_rows: int = 0


@dataclass
class Probe:
    """What bare calls cost.

    Attributes:
        images: (rows, 3, H, W), the batch of a bare call, whole or as many rows of it as a call had.
        every: calls of a kind between two bare ones; 0 for none.
        whole: bare calls have all rows, however many the calls beside them have.
        clocks: of bare calls.
        met: calls so far.
    """

    images: Tensor
    every: int
    whole: bool = False
    clocks: dict[Call, Clock] = field(default_factory=dict)
    met: dict[Call, int] = field(default_factory=dict)

    def turn(self, model: Callable[[Tensor], Tensor], kind: str, rows: int) -> None:
        """Note a call, and make a bare one where it is time for it."""
        call = kind, len(self.images) if self.whole else rows
        self.met[call] = self.met.get(call, 0) + 1
        if self.every and self.met[call] % self.every == 1 % self.every:
            clock = self.clocks.setdefault(call, Clock())
            clock.time(lambda: bare(model, self.images[: call[1]], kind), self.images.device)

    def seconds(self, clock: str) -> dict[Call, float]:
        """What one bare call of each sort takes, by `wall` or `cpu`."""
        return {call: getattr(spent, clock) / spent.turns for call, spent in self.clocks.items()}

    @property
    def spent(self) -> tuple[float, float]:
        """Wall and processor seconds of all bare calls."""
        return sum(c.wall for c in self.clocks.values()), sum(c.cpu for c in self.clocks.values())


def bare(model: Callable[[Tensor], Tensor], images: Tensor, kind: str) -> None:
    """One model call and nothing else."""
    if kind == "forward":
        with torch.no_grad():
            model(images)
        return
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        torch.autograd.grad(model(leaf).sum(), leaf)


class Watched(nn.Module):
    """A model under watch.

    Attributes:
        counts: what was asked of it.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], counts: Counts, probe: Probe) -> None:
        super().__init__()
        self.model, self.counts, self.probe = model, counts, probe

    def forward(self, images: Tensor) -> Tensor:
        differentiated = torch.is_grad_enabled() and images.requires_grad
        self.probe.turn(self.model, "gradient" if differentiated else "forward", len(images))
        self.counts.forward_calls += 1
        self.counts.forward_rows += len(images)
        logits = self.model(images)
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, gradient: Tensor) -> None:
        self.counts.backward_calls += 1
        self.counts.backward_rows += len(gradient)


def memory(device: torch.device) -> tuple[float, float]:
    """MiB that this process, or the device, holds now and held at most."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20, torch.cuda.max_memory_allocated(device) / 2**20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    most /= 2**20 if sys.platform == "darwin" else 2**10
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - no file of anybody
            now = int(file.read().split()[1]) * resource.getpagesize() / 2**20
    except FileNotFoundError:
        now = most
    return now, most


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
