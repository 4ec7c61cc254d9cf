"""The model work of one cell, cut into orders for workers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor

from robustbench_vlm.engine.check_record import Check, Examined
from robustbench_vlm.engine.job import Cost, ImageBlock, Stages, total
from robustbench_vlm.evaluation.cells import Cell
from robustbench_vlm.evaluation.dispatch import Request
from robustbench_vlm.evaluation.model_work import AttackSetup, Note, Read
from robustbench_vlm.evaluation.worker import Attack, Done, Found, Order, packed

UNIT = 8
"""Blocks are multiples of so many images on a CPU, where smaller calls than the full shape cost less."""
LEAST = 2
"""A block fills at least this part of the rows of a call, if there are images enough.

It begins with calls that find out which smaller shapes give the same bits, and ends with calls that are not
full.
"""
MOST = 8
"""Rows of calls that the largest block fills."""


@dataclass(frozen=True, eq=False)
class Work:
    """A request with what workers are to do for it.

    Attributes:
        request: what waits.
        order: makes the order of some members; it reads images, so it is called by one thread at a time.
        name: of a member, for messages.
        lock: held by the thread that calls `order`.
    """

    request: Request
    order: Callable[[Sequence[int]], Order]
    name: Callable[[int], str]
    lock: threading.Lock = field(default_factory=threading.Lock)


class Workers(Protocol):
    """Those who carry out orders."""

    def answers(self, work: Work) -> Iterator[tuple[Sequence[int], Found | Done]]:
        """Let workers do some work.

        Yields:
            The members of a block, and an answer to its order, as answers come.

        Raises:
            VlmrobError: the work failed, or too many workers were lost.
        """

    def ask_all(self, cell: int, order: Order) -> Iterable[Done]:
        """Give the same order to every worker that attacked images of a cell, and wait for their answers."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """How many workers there are, and on which devices."""


@dataclass(frozen=True)
class RemoteWork:
    """Model work that is done by workers.

    Attributes:
        workers: who do it.
        cell: to be measured.
        number: of the cell, which no other has.
        setup: of the cell.
        on_cpu: whether the workers are on CPUs.
    """

    workers: Workers
    cell: Cell
    number: int
    setup: AttackSetup
    on_cpu: bool

    here: ClassVar[bool] = False

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the `run` block of the result says of the workers."""
        return self.workers.facts

    @property
    def _price(self) -> int:
        """Of one forward pass, in a unit that all models share: its parameters stand for its operations."""
        return max(self.cell.subject.loaded.card.parameters, 1)

    def _order(self, content: Any) -> Order:  # noqa: ANN401 - see `Order`
        return Order(self.number, self.cell.subject.loaded.card.sha256, content)

    def _called(self, what: str) -> Callable[[int], str]:
        subject = self.cell.subject
        return lambda _: f"{what} of {subject.loaded.card.name} on {subject.card.name}"

    def examine(self, block: ImageBlock) -> Examined:
        """See `ModelWork`."""
        order = self._order(replace(block, images=packed(block.images)))
        request = Request([0], float(self._price * 40 * len(block.keys)))
        ((_, answer),) = self.workers.answers(Work(request, lambda _: order, self._called("the examination")))
        assert isinstance(answer, Done)
        examined: Examined = answer.value
        return examined

    def logits(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """See `ModelWork`; parts that end before an earlier one wait for it."""
        if not parts:
            return
        images = self.cell.subject.images
        request = Request(range(len(parts)), float(self._price * len(parts[0])))

        def order(part: Sequence[int]) -> Order:
            return self._order(packed(images.floats(parts[part[0]])))

        work = Work(request, order, self._called("the clean pass"))
        found: dict[int, Tensor] = {}
        following = 0
        for (part,), answer in self.workers.answers(work):
            assert isinstance(answer, Done)
            found[part] = answer.value
            while following in found:
                yield found.pop(following)
                following += 1

    def attack(self, stages: Stages, members: Sequence[int], read: Read, note: Note) -> Cost:
        """See `ModelWork`."""
        keyed = self.setup.backend.keyed
        rows = self.setup.job.full if keyed else self.setup.job.rows
        costs = [attack.cost(self.setup.job.n_classes) for _, attack in stages]
        passes = sum(forwards + 2 * gradients for forwards, gradients in costs)
        unit = min(UNIT, rows) if keyed and self.on_cpu else rows
        cost, least = float(self._price * passes), max(rows // LEAST, unit)
        request = Request(members, cost, unit, least, MOST * rows, whole=not keyed)

        def order(part: Sequence[int]) -> Order:
            block = read(part)
            images = replace(block.images, images=packed(block.images.images))
            return self._order(Attack(stages, part, replace(block, images=images)))

        made: list[Cost] = []
        for _, answer in self.workers.answers(
            Work(request, order, lambda i: self.cell.subject.split.keys[i])
        ):
            if isinstance(answer, Found):
                note(answer.stage, answer.line, answer.image)
            else:
                made.append(answer.value)
        return total(made)

    def checks(self, clean: Tensor) -> tuple[list[Check], Cost]:  # noqa: ARG002 - each worker compares with its own logits
        """What the attacks of every worker brought to light; of checks with one name the worst counts."""
        worst: dict[str, Check] = {}
        costs = [Cost()]
        for answer in self.workers.ask_all(self.number, self._order("checks")):
            if answer.value is None:  # it was lost, or has no attack to tell of
                continue
            found, cost = answer.value
            costs.append(cost)
            for check in found:
                if check.name not in worst or _badness(check) > _badness(worst[check.name]):
                    worst[check.name] = check
        return list(worst.values()), total(costs)


def _badness(check: Check) -> tuple[bool, float]:
    """Failed checks are worse than others, and greater values are; no value is worst."""
    return check.level == "fail", float("inf") if check.value is None else check.value
