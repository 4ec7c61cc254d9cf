"""Which worker does which images next; this file knows no processes, clocks or devices.

Work that waits is handed out in blocks: the most expensive block first (longest processing time first, Graham
1969), and in ever smaller blocks towards the end (guided self-scheduling, Polychronopoulos and Kuck 1987), so
that workers end at about the same time. What a lost worker had not finished is handed out again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

LOSSES = 4
"""Workers that may be lost with an image and without a finding, before the evaluation is stopped."""
SHARE = 2
"""A block is this part of what each worker would get of all the work that waits."""


@dataclass(eq=False)
class Request:
    """Images of one cell that wait for the same model work.

    Attributes:
        members: positions of the images, or numbers of other pieces of work.
        cost: expected cost of one member, in any unit that all requests share.
        unit: the length of every block but the last is a multiple of it.
        least: members that a block has at least, where that leaves something for every worker: a block has
            costs of its own.
        most: members of the largest block; a multiple of `unit`.
        whole: whether what is handed out again has to be whole units, as where noise is drawn in batches.
        waiting: members that no worker has.
        open: members that are not finished.
        losses: how many workers were lost with each member since a finding of its block.
    """

    members: Sequence[int]
    cost: float = 1.0
    unit: int = 1
    least: int = 1
    most: int = 1
    whole: bool = False
    waiting: deque[int] = field(init=False)
    open: set[int] = field(init=False)
    losses: Counter[int] = field(default_factory=Counter, init=False)

    def __post_init__(self) -> None:
        self.waiting, self.open = deque(self.members), set(self.members)

    def size(self, share: float, workers: int) -> int:
        """Members of its next block, if the block should cost `share` and there are so many workers."""
        wanted = max(int(share / self.cost), min(self.least, len(self.waiting) // max(workers, 1)))
        return min(max(wanted // self.unit * self.unit, self.unit), self.most, len(self.waiting))


@dataclass(eq=False)
class Assigned:
    """A block that a worker has.

    Attributes:
        request: the members belong to.
        members: of the block, in order.
        progressed: whether the worker finished a member of it.
    """

    request: Request
    members: list[int]
    progressed: bool = False


class Dispatch:
    """Every member of every request waits, is in the block of one worker, or is finished."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._assigned: dict[Hashable, Assigned] = {}

    def add(self, request: Request) -> None:
        """Let the members of a request wait."""
        self.requests.append(request)

    def drop(self, request: Request) -> None:
        """Forget a request; blocks of it that workers have may still end."""
        if request in self.requests:
            self.requests.remove(request)

    def take(self, worker: Hashable, workers: int) -> Assigned | None:
        """Hand out the next block.

        Args:
            worker: that is free.
            workers: how many there are.

        Returns:
            The block, or None if nothing waits.
        """
        waiting = [request for request in self.requests if request.waiting]
        if not waiting:
            return None
        share = sum(len(request.waiting) * request.cost for request in waiting) / (SHARE * max(workers, 1))
        chosen = max(waiting, key=lambda request: request.size(share, workers) * request.cost)
        members = [chosen.waiting.popleft() for _ in range(chosen.size(share, workers))]
        self._assigned[worker] = Assigned(chosen, members)
        return self._assigned[worker]

    def finish(self, worker: Hashable, member: int) -> bool:
        """Note that a worker finished a member; False if it was finished before, as in whole batches."""
        block = self._assigned[worker]
        if not block.progressed:
            block.progressed = True
            for other in block.members:
                del block.request.losses[other]
        if member not in block.request.open:
            return False
        block.request.open.remove(member)
        return True

    def end(self, worker: Hashable) -> list[int]:
        """Note that a worker has nothing to do any more; returns the members that it left unfinished."""
        block = self._assigned.pop(worker)
        return [member for member in block.members if member in block.request.open]

    def lose(self, worker: Hashable) -> list[int]:
        """Let what a lost worker had wait again.

        Returns:
            Its members that too many workers were lost with.
        """
        block = self._assigned.pop(worker, None)
        if block is None:
            return []
        request = block.request
        unit = request.unit if request.whole else 1
        chunks = [block.members[i : i + unit] for i in range(0, len(block.members), unit)]
        again = [member for chunk in chunks if request.open.intersection(chunk) for member in chunk]
        waiting = {*request.waiting, *again}
        request.waiting = deque(member for member in request.members if member in waiting)  # as units begin
        left = [member for member in again if member in request.open]
        request.losses.update(left)
        return [member for member in left if request.losses[member] >= LOSSES]
