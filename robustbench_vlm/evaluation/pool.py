"""A pool of workers: hands out images, hands answers over, and replaces workers that are lost.

Each worker has a thread here that gives it work. A worker that dies loses the images that it was attacking
and nothing else, since every finding is sent as it is made: another worker is started, and its images are
handed out again. The threads that measure cells wait for answers, and they alone write ledgers and results.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from robustbench_vlm.errors import Incomplete, VlmrobError, some
from robustbench_vlm.evaluation.cells import Cell
from robustbench_vlm.evaluation.cluster import (
    STARTING,
    TICK,
    Cluster,
    Lost,
    Reference,
    answers_in_time,
)
from robustbench_vlm.evaluation.dispatch import LOSSES, Dispatch
from robustbench_vlm.evaluation.model_work import AttackSetup, ModelWork, first_images
from robustbench_vlm.evaluation.open_work import LiveWorker, OpenWork
from robustbench_vlm.evaluation.remote_work import RemoteWork, Work
from robustbench_vlm.evaluation.worker import (
    Answer,
    Attack,
    Done,
    Failed,
    Found,
    Order,
    Placed,
    packed,
)
from robustbench_vlm.models.zoo import Loaded

CLOSING = 30.0  # seconds that a cell whose model work has ended may take to end itself
LOOK = 5.0  # seconds between two looks for places of workers that joined


class Pool:
    """The workers of one evaluation. What its threads share is changed under one lock."""

    def __init__(self, cluster: Cluster, remark: Callable[[str], None]) -> None:
        """Start workers at every place of a cluster; `remark` gets a line about each that is lost."""
        self._cluster, self._remark = cluster, remark
        self._changed = threading.Condition()
        self._dispatch, self._open = Dispatch(), dict[Any, OpenWork]()
        self._live: list[LiveWorker] = []
        self._threads: list[threading.Thread] = []
        self._cells: dict[int, tuple[Reference, Reference]] = {}
        self._models: dict[str, tuple[Reference, list[int]]] = {}  # with the numbers of its open cells
        self._numbers = itertools.count()
        self._error: Exception | None = None
        self._grow()
        if cluster.joining:
            threading.Thread(target=self._watch, daemon=True).start()

    # --- for the threads that measure cells ---------------------------------------------------------------

    @contextmanager
    def works(self, cell: Cell) -> Iterator[ModelWork]:
        """See `model_work.Works`."""
        loaded, setup = cell.subject.loaded, AttackSetup.of(cell)
        placed = Placed(replace(setup, bank=setup.bank.cpu()), packed(first_images(cell)))
        with self._changed:
            self._require_running()
            number = next(self._numbers)
            self._cells[number] = (self._model(loaded, number), self._cluster.put(placed))
        try:
            yield RemoteWork(self, cell, number, setup, self._cluster.on_cpu)
        finally:
            with self._changed:
                del self._cells[number]
                self._models[loaded.card.sha256][1].remove(number)
                forget = Order(number, loaded.card.sha256, "forget")
                for live in self._live:
                    live.own_orders.append((forget, SimpleQueue()))
                self._changed.notify_all()

    def _model(self, loaded: Loaded, number: int) -> Reference:
        """The model of a cell, held by the cluster; it no longer holds models of no open cell."""
        name = loaded.card.sha256
        if name not in self._models:
            self._models = {key: held for key, held in self._models.items() if held[1]}
            on_cpu = replace(loaded, model=deepcopy(loaded.model).to("cpu"))
            self._models[name] = (self._cluster.put(on_cpu), [])
        held, cells = self._models[name]
        cells.append(number)
        return held

    def answers(self, work: Work) -> Iterator[tuple[Sequence[int], Found | Done]]:
        """See `remote_work.Workers`."""
        opened = OpenWork(work)
        with self._changed:
            self._require_running()
            self._open[work.request] = opened
            self._dispatch.add(work.request)
            self._changed.notify_all()
        try:
            while (found := opened.inbox.get()) is not None:
                if isinstance(found, Exception):
                    raise found
                yield found
        finally:
            with self._changed:
                self._dispatch.drop(work.request)
                self._open.pop(work.request, None)

    def ask_all(self, cell: int, order: Order) -> Iterable[Done]:
        """See `remote_work.Workers`; a worker that is lost before it answers is left out."""
        replies: list[SimpleQueue[Answer]] = []
        with self._changed:
            self._require_running()
            for live in (one for one in self._live if cell in one.attacked):
                replies.append(SimpleQueue())
                live.own_orders.append((order, replies[-1]))
            self._changed.notify_all()
        for reply in replies:
            answer = reply.get()
            self._require_running()  # else the answer may be that of nobody
            if isinstance(answer, Failed):
                raise answer.raised
            assert isinstance(answer, Done)
            yield answer

    def _require_running(self) -> None:
        """Raise the error of an evaluation that has ended; nobody serves its workers any more."""
        if self._error is not None:
            raise self._error

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `remote_work.Workers`."""
        with self._changed:
            devices = sorted({live.about.device for live in self._live})
            return {
                "device": ", ".join(devices),
                "threads": self._cluster.threads,
                "workers": len(self._live),
            }

    def close(self) -> None:
        """End every worker, and whatever waits for one; cells end before what they write to does."""
        self._fail(VlmrobError("the evaluation was stopped"))
        for live in list(self._live):
            live.handle.kill()
        with self._changed:
            self._changed.wait_for(lambda: not self._cells, timeout=CLOSING)
        for thread in self._threads:
            thread.join(timeout=2 * TICK)

    # --- for the threads that give work to workers --------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        """Let every thread that waits raise an error, and every other one end."""
        with self._changed:
            if self._error is None:
                self._error = error
                for opened in self._open.values():
                    opened.inbox.put(error)
                for live in self._live:
                    self._cancel_own_orders(live)
            self._changed.notify_all()

    def _grow(self) -> None:
        """Start a thread for every place that has none."""
        for _ in range(self._cluster.capacity() - len(self._threads)):
            self._threads.append(threading.Thread(target=self._keep_running, daemon=True))
            self._threads[-1].start()

    def _watch(self) -> None:
        """Look for places that were added."""
        while self._error is None:
            time.sleep(LOOK)
            try:
                self._grow()
            except Exception as error:  # noqa: BLE001 - the cluster is gone; raised by the threads that wait
                self._fail(error)

    def _keep_running(self) -> None:
        """Start a worker and give it work; where it is lost, start another one."""
        unstarted = 0
        while self._error is None:
            live = None
            try:
                live = self._started()
                unstarted = 0
                self._serve(live)
            except Lost as lost:
                unstarted += live is None
                if unstarted == LOSSES:
                    self._fail(VlmrobError(f"{LOSSES} workers in a row did not start: {lost}"))
                if live is not None and self._error is None:
                    self._replace(live, str(lost))
            except Exception as error:  # noqa: BLE001 - raised by the threads that wait
                self._fail(error)

    def _started(self) -> LiveWorker:
        """Start a worker; in a cluster that may grow, wait as long as there is no room for it."""
        handle, begun = self._cluster.start(), time.monotonic()
        while (about := handle.about(TICK)) is None:
            late = not self._cluster.joining and time.monotonic() - begun > STARTING
            if late or self._error is not None:
                handle.kill()
                raise Lost(f"no answer for {STARTING:.0f} s" if late else "the evaluation has ended")
        live = LiveWorker(handle, about)
        with self._changed:
            self._live.append(live)
        return live

    def _serve(self, live: LiveWorker) -> None:
        """Give work to a worker until the evaluation ends."""
        while True:
            with self._changed:
                members: Sequence[int] | None = None
                while not live.own_orders and self._error is None:
                    block = self._dispatch.take(live, len(self._live))
                    if block is not None:
                        members, live.block = block.members, self._open[block.request]
                        live.block.out += 1
                        break
                    self._changed.wait()
                if self._error is not None:
                    return
            if members is None:
                self._run_own_order(live)
            else:
                self._run_block(live, members)

    def _run_own_order(self, live: LiveWorker) -> None:
        """Give a worker an order that is for it alone."""
        order, reply = live.own_orders[0]
        for answer in self._answers(live, order):
            if isinstance(answer, Done | Failed):
                reply.put(answer)
        with self._changed:
            live.own_orders.popleft()
            if order.content == "forget":
                live.attacked.discard(order.cell)

    def _run_block(self, live: LiveWorker, members: Sequence[int]) -> None:
        """Give a worker a block, and hand its answers over."""
        opened, last = live.block, None
        assert opened is not None
        try:
            with opened.work.lock:
                order = opened.work.order(members)
            for answer in self._answers(live, order):
                if isinstance(answer, Found):
                    if answer.ended:
                        with self._changed:
                            self._dispatch.finish(live, answer.member)
                    opened.inbox.put((members, answer))
                last = answer
        except (VlmrobError, OSError) as error:  # of an image that cannot be read, for one
            opened.inbox.put(error)
        with self._changed:
            if isinstance(last, Failed):
                opened.inbox.put(last.raised)
            elif isinstance(last, Done):
                for member in order.without_finding(members):
                    self._dispatch.finish(live, member)
                opened.inbox.put((members, last))
            left = self._dispatch.end(live)
            if isinstance(last, Done) and left:
                opened.inbox.put(VlmrobError(f"a worker made no finding about {len(left)} images"))
            self._put_back(live)

    def _put_back(self, live: LiveWorker) -> None:
        """Note that a worker has no block any more; the last one of finished work ends it."""
        opened, live.block = live.block, None
        if opened is not None:
            opened.out -= 1
            if not opened.out and not opened.work.request.open:
                opened.inbox.put(None)

    def _answers(self, live: LiveWorker, order: Order) -> Iterator[Answer]:
        """Answers to an order, as long as they come in time."""
        with self._changed:
            references = self._cells.get(order.cell, ())
            if isinstance(order.content, Attack):
                live.attacked.add(order.cell)
        for answer in answers_in_time(live.handle, order, references):
            if self._error is not None:
                raise Lost("the evaluation has ended")
            if answer is not None:
                yield answer

    def _replace(self, live: LiveWorker, how: str) -> None:
        """Let what a lost worker had be handed out again."""
        live.handle.kill()
        with self._changed:
            opened = live.block
            named = self._dispatch.lose(live)
            self._cancel_own_orders(live)
            self._put_back(live)
            self._live.remove(live)
            self._changed.notify_all()
        again = "" if opened is None else ", and its images are handed out again"
        self._remark(f"worker {live.about.pid} {how}; another one is started{again}")
        if named and opened is not None:
            names = some([opened.work.name(member) for member in named])
            text = f"{LOSSES} workers were lost with {names}; the last one {how}"
            self._fail(Incomplete(f"{text}; the same command goes on"))

    def _cancel_own_orders(self, live: LiveWorker) -> None:
        """Answer the own_orders of a worker that is gone."""
        for _, reply in live.own_orders:
            reply.put(Done())
        live.own_orders.clear()
