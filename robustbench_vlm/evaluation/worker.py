"""What a worker does: it holds models on its device, carries out orders, and answers in a stream.

A worker writes no file and reads none. Everything that it is told comes in an order; beside the weights it
keeps what attacks on an open cell brought to light about the model, for the checks after them.
"""

from __future__ import annotations

import platform
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any, Literal

import torch
from torch import Tensor

from robustbench_vlm import errors
from robustbench_vlm.engine.isolation import isolated, restored_buffers
from robustbench_vlm.engine.job import ImageBlock, Stages
from robustbench_vlm.errors import VlmrobError
from robustbench_vlm.evaluation import estimate
from robustbench_vlm.evaluation.calls import Calls
from robustbench_vlm.evaluation.model_work import AttackSetup, Block, CellModel, Line
from robustbench_vlm.models.zoo import Loaded

EXAMINATION = 40
"""Gradient calls that an examination, or the checks after an attack, make at most; for the expected time."""


@dataclass(frozen=True)
class Placed:
    """What every worker needs of a cell beside the model.

    Attributes:
        setup: of the attacks.
        first: (n, 3, H, W) uint8, the first images of the cell.
    """

    setup: AttackSetup
    first: Tensor


@dataclass(frozen=True)
class Attack:
    """Images to be attacked.

    Attributes:
        stages: name and attack of stages that share rows.
        members: position of each image in its cell.
        block: the images; their pixels are uint8.
    """

    stages: Stages
    members: Sequence[int]
    block: Block


@dataclass(frozen=True)
class Order:
    """One piece of model work.

    Attributes:
        cell: number of the cell.
        model: fingerprint of the model.
        content: images (uint8) of the canonical pass, images of an examination, an attack, or the word for
            what is done when the attacks are over.
    """

    cell: int
    model: str
    content: Tensor | ImageBlock | Attack | Literal["checks", "forget"]

    def without_finding(self, members: Sequence[int]) -> Sequence[int]:
        """The members that are finished with the order, since there is no finding about them."""
        if not isinstance(self.content, Attack):
            return members
        block = self.content.block
        return [i for i, key in zip(members, block.images.keys, strict=True) if key in block.again]


@dataclass(frozen=True)
class Expected:
    """The first answer to an order: seconds until the next one, if all goes as slowly as it may."""

    seconds: float


@dataclass(frozen=True)
class Found:
    """A finding about one image of an attack.

    Attributes:
        member: position of the image.
        ended: whether the image needs no further stage of the attack.
        stage: name of the stage.
        line: of its ledger.
        image: (3, H, W) the adversarial image, if it is kept.
    """

    member: int
    ended: bool
    stage: str
    line: Line
    image: Tensor | None


@dataclass(frozen=True)
class Done:
    """The last answer to an order that was carried out, with its result."""

    value: Any = None


@dataclass(frozen=True)
class Failed:
    """The last answer to an order that could not be carried out.

    Attributes:
        error: name of the class of the error.
        text: its message.
        trace: where it happened.
    """

    error: str
    text: str
    trace: str

    @property
    def raised(self) -> VlmrobError:
        """The error, to be raised by the driver; one that no part of the package expects is one line."""
        kind = getattr(errors, self.error, None)
        if isinstance(kind, type) and issubclass(kind, VlmrobError):
            error = kind.__new__(kind, self.text)
            error.args = (self.text,)  # the class has arguments of its own, and the message is made already
            return error
        line = (self.text.strip().splitlines() or ["no message"])[0]
        do = "; take a smaller --batch-size" if self.error == "OutOfMemoryError" else ""
        failure = VlmrobError(f"a worker failed: {self.error}: {line:.300}{do}")
        failure.add_note(self.trace)
        return failure


Answer = Expected | Found | Done | Failed


def packed(images: Tensor) -> Tensor:
    """(n, 3, H, W) float32 pixels v / 255 -> the v, as uint8; exact, since images are read from bytes."""
    return images.mul(255).round().to(torch.uint8)


def unpacked(images: Tensor) -> Tensor:
    """The inverse of `packed`."""
    return images.float().div_(255)


class Worker:
    """Models on one device, by fingerprint, and the open cells that they are attacked in."""

    def __init__(self, device: str, threads: int) -> None:
        """Choose the device.

        Args:
            device: as torch names it.
            threads: of torch on the CPU.
        """
        torch.set_num_threads(threads)
        self._device = torch.device(device)
        self._models: dict[str, Loaded] = {}
        self._speeds: dict[str, estimate.Speed] = {}
        self._cells: dict[int, _OpenCell] = {}

    @property
    def device_name(self) -> str:
        """Of the GPU, or of the processor's architecture."""
        return torch.cuda.get_device_name() if self._device.type == "cuda" else platform.machine()

    def carry_out(
        self, order: Order, fetch: Callable[[bool], tuple[Loaded | None, Placed]]
    ) -> Iterator[Answer]:
        """Do what an order says; answers come as they are made.

        Args:
            order: the piece of work.
            fetch: gives the model, if asked for it, and what else is known of the cell.
        """
        answers: SimpleQueue[Answer] = SimpleQueue()

        def work() -> None:  # attacks call back; in a thread of their own, the callbacks become a stream
            try:
                answers.put(Done(self._result(order, fetch, answers.put)))
            except Exception as error:  # noqa: BLE001 - told to the driver, which raises it
                answers.put(Failed(type(error).__name__, str(error), traceback.format_exc()))

        threading.Thread(target=work, daemon=True).start()
        while True:
            answer = answers.get()
            yield answer
            if isinstance(answer, Done | Failed):
                return

    def _result(
        self,
        order: Order,
        fetch: Callable[[bool], tuple[Loaded | None, Placed]],
        answer: Callable[[Answer], None],
    ) -> Any:  # noqa: ANN401 - as different as the orders
        content = order.content
        if content == "forget" or (content == "checks" and order.cell not in self._cells):
            self._forget(order)
            return None
        cell = self._open(order, fetch)
        model, setup = cell.model, cell.model.setup
        with isolated(tf32=setup.backend.precision.tf32):
            speed, rows = self._speed(order.model, cell), setup.job.full
            if isinstance(content, Tensor):
                answer(Expected(speed.of(Calls(setup.job.rows, -(-len(content) // setup.job.rows)))))
                return model.logits(unpacked(content))
            if isinstance(content, Attack):
                costs = [attack.cost(setup.job.n_classes) for _, attack in content.stages]
                forwards, gradients = (sum(numbers) for numbers in zip(*costs, strict=True))
                answer(Expected(speed.of(Calls(rows, forwards, gradients))))
                return _attack(cell, content, answer)
            answer(Expected(speed.of(Calls(rows, EXAMINATION, EXAMINATION))))
            if isinstance(content, ImageBlock):
                return model.examine(replace(content, images=unpacked(content.images)))
            return None if cell.clean is None else model.checks(cell.clean)

    def _open(self, order: Order, fetch: Callable[[bool], tuple[Loaded | None, Placed]]) -> _OpenCell:
        """The cell of an order, with its model on the device."""
        if order.cell not in self._cells:
            loaded, placed = fetch(order.model not in self._models)
            if loaded is not None:
                self._models[order.model] = loaded.to(self._device)
            loaded = self._models[order.model]
            state = ExitStack()
            state.enter_context(restored_buffers(loaded.model))
            model = CellModel(loaded, placed.setup, unpacked(placed.first), self._device)
            self._cells[order.cell] = _OpenCell(order.model, model, state)
        return self._cells[order.cell]

    def _forget(self, order: Order) -> None:
        """End a cell; models of no open cell are dropped, but for the one that was used last."""
        cell = self._cells.pop(order.cell, None)
        if cell is not None:
            cell.state.close()
        used = {order.model, *(other.name for other in self._cells.values())}
        self._models = {name: loaded for name, loaded in self._models.items() if name in used}

    def _speed(self, name: str, cell: _OpenCell) -> estimate.Speed:
        """Seconds of the calls of a model on this device, timed once."""
        if name not in self._speeds:
            side = cell.model.first.shape[-1]
            self._speeds[name] = estimate.timed(self._models[name].model, side, self._device)
        return self._speeds[name]


@dataclass
class _OpenCell:
    """A cell that this worker has worked on, and that is not measured yet.

    Attributes:
        name: fingerprint of its model.
        model: on the device.
        state: gives the buffers of the model their values back at the end of the cell.
        clean: canonical logits of its first images, by this worker, before it attacked any.
    """

    name: str
    model: CellModel
    state: ExitStack
    clean: Tensor | None = None


def _attack(cell: _OpenCell, order: Attack, answer: Callable[[Answer], None]) -> Any:  # noqa: ANN401 - its cost
    """Attack the images of an order."""
    if cell.clean is None:
        cell.clean = cell.model.logits(cell.model.first)
    images = order.block.images
    member = dict(zip(images.keys, order.members, strict=True))
    last = order.stages[-1][0]

    def note(stage: str, line: Line, image: Tensor | None) -> None:
        ended = line["broken"] or bool(line["error"]) or stage == last
        answer(Found(member[line["key"]], ended, stage, line, image))

    block = replace(order.block, images=replace(images, images=unpacked(images.images)))
    return cell.model.attack(order.stages, [block], note)
