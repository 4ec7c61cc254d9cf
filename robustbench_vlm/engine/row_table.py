"""The rows of a run: one state for all of them, and which trajectory is in which row of it.

Which rows have ended is known on the device first. To read it at once, the device must wait until the next
iteration is launched. Where that is a noticeable part of an iteration, the flags of a state are read after
the next iteration was launched. Rows that have ended are taken from the state in which they ended, so
results do not depend on it; such a row is stepped once more in vain.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_vlm.engine import trajectories
from robustbench_vlm.engine.batch_shapes import Shapes
from robustbench_vlm.engine.image_queue import ImageQueue
from robustbench_vlm.engine.interface import Attack, LookaheadAttack, State
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.engine.row_ops import scatter, single, take
from robustbench_vlm.engine.trajectories import End, Trajectory

NOTICEABLE = 0.1
"""Share of an iteration that launching it takes, from which on flags are read one iteration behind."""

LOOKAHEAD = 4
"""Rows for each trajectory of an attack that can look ahead, where calls may have so many."""


def reads_behind(device: torch.device, launched: float, waited: float) -> bool:
    """Whether the flags of the next iteration are read after the one that follows it was launched.

    Args:
        device: of the rows; on a CPU nothing is launched and nothing waits.
        launched: seconds that it took to launch the last iteration.
        waited: seconds for which flags were then waited for.
    """
    return device.type != "cpu" and launched > NOTICEABLE * (launched + waited)


@dataclass(frozen=True)
class _Look:
    """Which rows of a state have ended.

    Attributes:
        state: of S rows.
        ended: (S,) bool on the CPU; valid once `copied` is over.
        copied: the copy from the device, None if it is over already.
        busy: rows with a trajectory that may have ended; without those that were given another one since.
    """

    state: State
    ended: Tensor
    copied: torch.cuda.Event | None
    busy: set[int]

    @staticmethod
    def of(state: State, busy: Iterable[int]) -> _Look:
        """A look at a state that was just launched; on a CUDA device nothing waits for it."""
        ended = state.done | state.nonfinite
        if state.stop == "first":
            ended = ended | state.broken
        copied = torch.cuda.Event() if ended.is_cuda else None  # type: ignore[no-untyped-call]
        ended = ended.to("cpu", non_blocking=ended.is_cuda)
        if copied is not None:
            copied.record()
        return _Look(state, ended, copied, set(busy))

    def rows(self) -> list[int]:
        """Rows with a trajectory that has ended; waits until it is known."""
        if self.copied is not None:
            self.copied.synchronize()
        return [row for row in self.ended.nonzero().flatten().tolist() if row in self.busy]


class RowTable:
    """The state of all rows.

    Attributes:
        busy: the trajectory in each row that has one. The other rows are copies, and what they compute is
            ignored.
    """

    def __init__(self, attack: Attack, queue: ImageQueue, shapes: Shapes) -> None:
        """A table without trajectories.

        Args:
            attack: steps the rows of all stages of the job.
            queue: gives the trajectories.
            shapes: says how many rows the state has.
        """
        self.busy: dict[int, Trajectory] = {}
        self._attack, self._queue, self._shapes = attack, queue, shapes
        self._state: State | None = None
        self._looks: deque[_Look] = deque()  # that were not read yet, oldest first
        self._ended: list[tuple[Trajectory, State, End]] = []
        self._behind, self._launched = False, 0.0
        # The leader of each row's lookahead group: the row itself if it works alone. None once rows have
        # moved, which makes group assignments from before invalid.
        self._leaders: list[int] | None = []

    def fill(self) -> None:
        """Give free rows the next trajectories, in the shape that fits them best."""
        shape = self._shape()
        self._queue.full = max(self._queue.full, self._shapes.largest)
        if self._state is not None and len(self._state.labels) != shape:
            while self._looks:  # rows are about to get other numbers
                self._read()
            shape = self._shape()
            self._resize(self._state, shape)
        given = []
        for row in range(min(self._active, shape)):
            trajectory = self._queue.next() if row not in self.busy else None
            if trajectory is not None:
                given.append((row, trajectory))
        fresh = [(row, trajectory) for row, trajectory in given if trajectory.paused is None]
        for stage in sorted({trajectory.image.stage for _, trajectory in fresh}):
            own = [(row, trajectory) for row, trajectory in fresh if trajectory.image.stage == stage]
            begun = self._queue.start([trajectory for _, trajectory in own])
            if self._state is None:
                self._state = take(begun, [min(row, len(own) - 1) for row in range(shape)])
            self._state = scatter(self._state, [row for row, _ in own], begun)
        for row, trajectory in given:
            self.busy[row] = trajectory
            for look in self._looks:
                look.busy.discard(row)
            if trajectory.paused is not None and self._state is not None:
                self._state, trajectory.paused = scatter(self._state, [row], trajectory.paused), None
        if isinstance(self._attack, LookaheadAttack) and self._state is not None:
            self._state = self._assign(self._attack, self._state)

    @property
    def full(self) -> bool:
        """Whether the state has more rows than fit into memory, as a call has shown."""
        return self._state is not None and len(self._state.labels) > self._shapes.largest

    @property
    def _active(self) -> int:
        """Most rows with a trajectory."""
        return self._queue.job.batch_size or self._shapes.largest

    def _shape(self) -> int:
        """Rows of the next calls: one for each image, and for later trajectories that run ahead of need.

        Those are in vain once their image is broken. On a GPU a row costs little, and all that can start get
        one. On a CPU every row costs time, though less in a large call than in a small one: there those of an
        image get one after its first trajectory has failed, since an image that is not broken by its most
        likely target is seldom broken by another.
        """
        queue = self._queue
        on_cpu = queue.device.type == "cpu"
        wanted = len(self.busy) + len(queue.paused) + (queue.likely if on_cpu else queue.startable)
        if isinstance(self._attack, LookaheadAttack):
            wanted *= LOOKAHEAD
        if not wanted and self._state is not None:
            return len(self._state.labels)
        return self._shapes.fit(wanted if queue.job.batch_size is None else min(wanted, self._active))

    def _resize(self, state: State, shape: int) -> None:
        """Another number of rows: the busy ones first, the others copies of the first row.

        Trajectories for which there is no row go on in one that becomes free.
        """
        rows = sorted(self.busy)
        for row in rows[shape:]:
            self._queue.pause(self.busy.pop(row), take(state, [row]))
        rows = rows[:shape]
        self._state = take(state, [*rows, *[0] * (shape - len(rows))])
        self.busy = {new: self.busy[old] for new, old in enumerate(rows)}
        self._leaders = None

    def _assign(self, attack: LookaheadAttack, state: State) -> State:
        """Assign rows without a trajectory, evenly, to the lookahead groups of rows that have one."""
        alone = list(range(len(state.labels)))
        leaders = list(alone)
        if not self._queue.waiting and not self._queue.paused and self.busy:
            busy = sorted(self.busy)
            idle = [row for row in alone[: self._active] if row not in self.busy]
            for number, row in enumerate(idle):
                leaders[row] = busy[number % len(busy)]
        if self._leaders is not None and leaders == alone == (self._leaders or alone):
            return state
        self._leaders = leaders
        sizes: dict[int, int] = {}
        positions = [0] * len(alone)
        for row in sorted(alone, key=lambda row: (leaders[row] != row, row)):
            positions[row] = sizes.get(leaders[row], 0)
            sizes[leaders[row]] = positions[row] + 1
        device = state.labels.device
        assigned: State = attack.assign(
            state, torch.tensor(leaders, device=device), torch.tensor(positions, device=device)
        )
        return assigned

    def step(self, oracle: Oracle) -> None:
        """Step all rows."""
        if self._state is not None:
            started = time.perf_counter()
            self._state = self._attack.step(self._state, oracle)
            self._looks.append(_Look.of(self._state, self.busy))
            self._launched = time.perf_counter() - started

    def take_ended(self) -> list[tuple[Trajectory, State, End]]:
        """Free the rows whose trajectories have ended; each with its state of one row and its end."""
        started, looked = time.perf_counter(), len(self._looks) > self._behind
        while len(self._looks) > self._behind:
            self._read()
        if looked:
            waited = time.perf_counter() - started
            self._behind = reads_behind(self._queue.device, self._launched, waited)
        ended, self._ended = self._ended, []
        return ended

    def _read(self) -> None:
        """Read the oldest look."""
        look = self._looks.popleft()
        ended = [row for row in look.rows() if row in self.busy]
        if ended:
            rows = take(look.state, ended)
            self._ended += [
                (self.busy.pop(row), single(rows, i), end)
                for i, (row, end) in enumerate(zip(ended, trajectories.ends(rows), strict=True))
            ]

    def drop_obsolete(self) -> None:
        """Free the rows of trajectories that an earlier one of the same image has made obsolete."""
        self.busy = {row: trajectory for row, trajectory in self.busy.items() if not trajectory.obsolete}
