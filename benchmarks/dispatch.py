"""benchmarks/dispatch.md: workers that die at random, with the scheduling of a real evaluation.

`python benchmarks/dispatch.py` hands a million images to a hundred workers. Times of attacks and deaths are
made up; `evaluation/dispatch.py` is the real one. Every image has one verdict of every stage that it enters,
or the script fails. `tests/test_dispatch.py` does the same with fewer images.
"""

from __future__ import annotations

import argparse
import heapq
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robustbench_vlm import store
from robustbench_vlm.evaluation.dispatch import Assigned, Dispatch, Request


class Simulation:
    """Workers with made-up attack times that die at random; the scheduling is the real code.

    Every cell has two stages: all images enter the first, and those with odd numbers survive it.
    """

    RESTART = 20.0  # time in which a new process loads the model; an image takes 1 to 9

    def __init__(self, cells: int, images: int, workers: int, lifetime: float, seed: int = 0) -> None:
        self.chance, self.workers, self.lifetime = random.Random(seed), workers, lifetime  # noqa: S311
        self.dispatch, self.of = Dispatch(), dict[Request, tuple[int, int]]()
        self.events: list[tuple[float, int, str, int, Any]] = []
        self.order, self.now, self.started = 0, 0.0, 0
        self.having, self.idle = dict[int, Assigned](), set[int]()
        self.verdicts, self.useful, self.deaths = Counter[tuple[int, int, int]](), 0.0, 0
        for cell in range(cells):
            self.enter(cell, 0, range(images))
        for _ in range(workers):
            self.start(0.0)

    def enter(self, cell: int, stage: int, members: Sequence[int]) -> None:
        """Let images of a cell wait for a stage."""
        request = Request(list(members), (1.0 + cell % 3) * (1, 3)[stage], unit=8, most=512)
        self.of[request] = (cell, stage)
        self.dispatch.add(request)
        for worker in sorted(self.idle):
            self.assign(worker)

    def push(self, when: float, what: str, worker: int, found: tuple[int, float] | None = None) -> None:
        """Something will happen to a worker."""
        self.order += 1
        heapq.heappush(self.events, (when, self.order, what, worker, found))

    def start(self, when: float) -> None:
        """A new process begins to load the model; it will die some time."""
        self.started += 1
        self.push(when, "ready", self.started)
        self.push(when + self.chance.expovariate(1 / self.lifetime), "dies", self.started)

    def assign(self, worker: int) -> None:
        """Give a free worker its next block."""
        block = self.dispatch.take(worker, self.workers)
        if block is None:
            self.idle.add(worker)
            return
        self.idle.discard(worker)
        self.having[worker] = block
        when = self.now
        for member in block.members:
            seconds = block.request.cost * self.chance.lognormvariate(0.0, 0.5)
            when += seconds
            self.push(when, "finds", worker, (member, seconds))
        self.push(when, "ends", worker)

    def run(self) -> float:
        """The share of the workers' time that went into findings that count."""
        while any(request.open for request in self.dispatch.requests):
            self.now, _, what, worker, found = heapq.heappop(self.events)
            if what == "ready":
                self.assign(worker)
            elif what == "dies":
                self.die(worker)
            elif worker in self.having:  # it is alive
                if what == "finds":
                    self.find(worker, *found)
                else:
                    assert self.dispatch.end(worker) == []
                    del self.having[worker]
                    self.assign(worker)
        return self.useful / (self.workers * self.now)

    def find(self, worker: int, member: int, seconds: float) -> None:
        """A finding comes from a worker."""
        request = self.having[worker].request
        assert self.dispatch.finish(worker, member)
        self.verdicts[(*self.of[request], member)] += 1
        self.useful += seconds
        if not request.open:
            self.dispatch.drop(request)
            cell, stage = self.of[request]
            if stage == 0:
                self.enter(cell, 1, request.members[1::2])

    def die(self, worker: int) -> None:
        """A worker is gone, whatever it was doing, and another one is started."""
        self.deaths += 1
        assert self.dispatch.lose(worker) == []
        self.having.pop(worker, None)
        self.idle.discard(worker)
        self.start(self.now + self.RESTART)
        for waiting in sorted(self.idle):
            self.assign(waiting)


def simulated(cells: int, images: int, workers: int, lifetime: float) -> tuple[float, Simulation]:
    """A simulation after its end, and the share of the workers' time that was used.

    Raises:
        AssertionError: an image that entered a stage has no verdict of it, or two.
    """
    simulation = Simulation(cells, images, workers, lifetime)
    share = simulation.run()
    first = {(cell, 0, i): 1 for cell in range(cells) for i in range(images)}
    second = {(cell, 1, i): 1 for cell in range(cells) for i in range(1, images, 2)}
    assert simulation.verdicts == first | second
    return share, simulation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    text = [
        "# Workers that die at random",
        "",
        "Made by `python benchmarks/dispatch.py`; what is simulated is said there. An image takes about 1",
        f"to 9 units of time, a new worker {Simulation.RESTART:.0f} before its first image. No verdict is",
        "missing or there twice.",
        "",
        "| images | verdicts | workers | mean life of a worker | deaths | time used | simulation, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for lifetime in (1e9, 5_000.0, 1_000.0):
        began = time.perf_counter()
        share, found = simulated(options.cells, options.images // options.cells, options.workers, lifetime)
        life = "endless" if lifetime == 1e9 else f"{lifetime:,.0f}"
        text.append(
            f"| {options.images:,} | {len(found.verdicts):,} | {options.workers} | {life} | {found.deaths:,} "
            f"| {share:.1%} | {time.perf_counter() - began:.0f} |"
        )
        print(text[-1], flush=True)
    store.write(options.out, ("\n".join(text) + "\n").encode())


if __name__ == "__main__":
    main()
