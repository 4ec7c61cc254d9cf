"""Which worker gets which images: every image once, whatever dies, and workers that end together."""

import heapq
import random
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustbench_vlm.evaluation.dispatch import LOSSES, Dispatch, Request


def test_blocks_become_smaller_and_are_multiples_of_the_unit():
    dispatch = Dispatch()
    dispatch.add(Request(range(1000), unit=8, most=128))
    sizes = []
    while (block := dispatch.take(len(sizes), workers=4)) is not None:
        sizes.append(len(block.members))
    # an eighth of 1000, in whole units of 8; then an eighth of the 880 that are left
    assert sizes[:3] == [120, 104, 96]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size % 8 == 0 for size in sizes)
    assert sizes[-1] == 8
    assert sum(sizes) == 1000


def test_blocks_are_not_too_small_unless_a_worker_would_have_none():
    dispatch = Dispatch()
    dispatch.add(Request(range(192), unit=8, least=32, most=512))
    found = [len(dispatch.take(i, workers=2).members) for i in range(6)]
    # a quarter of 192, then a quarter of 144 in whole units; from then on 32, or half of what is left
    assert found == [48, 32, 32, 32, 24, 8]


def test_no_block_is_larger_than_the_largest_and_the_last_may_be_broken():
    dispatch = Dispatch()
    dispatch.add(Request(range(77), unit=16, most=32, whole=True))
    found = [dispatch.take(i, workers=1).members for i in range(3)]
    assert [len(members) for members in found] == [32, 16, 16]
    assert len(dispatch.take(3, workers=1).members) == 13
    assert dispatch.take(4, workers=1) is None


def test_the_most_expensive_block_goes_first():
    dispatch = Dispatch()
    cheap, dear = Request(range(8), cost=1.0, most=8), Request(range(8), cost=5.0, most=8)
    dispatch.add(cheap)
    dispatch.add(dear)
    # 48 in all, so blocks of two workers should cost 12: two of the dear ones (10) or eight cheap ones (8)
    first = dispatch.take("a", 2)
    assert (first.request, first.members) == (dear, [0, 1])
    # 38 are left, so 9.5: one dear one (5) or eight cheap ones (8)
    second = dispatch.take("b", 2)
    assert (second.request, second.members) == (cheap, list(range(8)))
    assert dispatch.take("c", 2).request is dear
    dispatch.drop(dear)
    assert dispatch.take("d", 2) is None


def test_what_a_lost_worker_had_not_finished_is_first_in_line():
    dispatch, request = Dispatch(), Request(range(8), most=4)
    dispatch.add(request)
    block = dispatch.take("a", 1)
    assert block.members == [0, 1, 2, 3]
    assert dispatch.finish("a", 1)
    assert dispatch.lose("a") == []
    assert list(request.waiting) == [0, 2, 3, 4, 5, 6, 7]
    assert request.open == {0, 2, 3, 4, 5, 6, 7}
    assert dispatch.lose("a") == []  # it has nothing any more


def test_whole_batches_are_handed_out_again_and_their_finished_images_count_once():
    dispatch, request = Dispatch(), Request(range(6), unit=3, most=6, whole=True)
    dispatch.add(request)
    assert dispatch.take("a", 1).members == [0, 1, 2]
    assert dispatch.finish("a", 0)
    dispatch.lose("a")
    assert dispatch.take("b", 1).members == [0, 1, 2]
    assert not dispatch.finish("b", 0)
    assert dispatch.finish("b", 1)
    assert dispatch.end("b") == [2]


def test_an_image_that_costs_every_worker_is_named():
    dispatch, request = Dispatch(), Request(range(4), most=2)
    dispatch.add(request)
    for worker in range(LOSSES):
        assert dispatch.take(worker, 1).members == [0, 1]
        named = dispatch.lose(worker)
        assert named == ([0, 1] if worker + 1 == LOSSES else [])


def test_a_finding_forgives_the_losses_before_it():
    dispatch, request = Dispatch(), Request(range(40), most=20)
    dispatch.add(request)
    for worker in range(20):  # every worker finishes one image before it dies
        block = dispatch.take(worker, 1)
        assert dispatch.finish(worker, block.members[0])
        assert dispatch.lose(worker) == []
    assert len(request.open) == 20


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9), st.booleans()), min_size=1, max_size=5),
    st.integers(1, 6),
    st.integers(0, 2**32),
)
def test_every_member_is_finished_once_in_any_order_of_deaths(shapes, workers, seed):
    chance = random.Random(seed)
    dispatch = Dispatch()
    requests = [
        Request(range(n), 1.0 + n % 3, unit, unit + n % 2, 2 * unit, whole) for n, unit, whole in shapes
    ]
    for request in requests:
        dispatch.add(request)
    having, finished, deaths = {}, Counter(), 0
    while any(request.open for request in requests):
        worker = chance.randrange(workers)
        if worker not in having:
            block = dispatch.take(worker, workers)
            if block is not None:
                having[worker] = (block, list(block.members))
        elif chance.random() < 0.2 and deaths < LOSSES - 1:
            dispatch.lose(worker)
            del having[worker]
            deaths += 1
        else:
            block, left = having[worker]
            member = left.pop(chance.randrange(len(left)))
            finished[id(block.request), member] += dispatch.finish(worker, member)
            if not left:
                assert dispatch.end(worker) == []
                del having[worker]
    assert finished == {(id(r), m): 1 for r in requests for m in r.members}


class Simulation:
    """Workers with made-up attack times that die at random; the scheduling is the real code.

    Every cell has two stages: all images enter the first, and those with odd numbers survive it.
    """

    RESTART = 20.0  # time in which a new process loads the model; an image takes 1 to 9

    def __init__(self, cells, images, workers, lifetime, seed=0):
        self.chance, self.workers, self.lifetime = random.Random(seed), workers, lifetime
        self.dispatch, self.of = Dispatch(), {}
        self.events, self.order, self.now, self.started = [], 0, 0.0, 0
        self.having, self.idle = {}, set()
        self.verdicts, self.useful, self.last, self.deaths = Counter(), 0.0, 0.0, 0
        for cell in range(cells):
            self.enter(cell, 0, range(images))
        for _ in range(workers):
            self.start(0.0)

    def enter(self, cell, stage, members):
        request = Request(list(members), (1.0 + cell % 3) * (1, 3)[stage], unit=8, most=512)
        self.of[request] = (cell, stage)
        self.dispatch.add(request)
        for worker in sorted(self.idle):
            self.assign(worker)

    def push(self, when, what, worker, found=None):
        self.order += 1
        heapq.heappush(self.events, (when, self.order, what, worker, found))

    def start(self, when):
        self.started += 1
        self.push(when, "ready", self.started)
        self.push(when + self.chance.expovariate(1 / self.lifetime), "dies", self.started)

    def assign(self, worker):
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

    def run(self):
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

    def find(self, worker, member, seconds):
        request = self.having[worker].request
        assert self.dispatch.finish(worker, member)
        self.verdicts[(*self.of[request], member)] += 1
        self.useful += seconds
        if not request.open:
            self.dispatch.drop(request)
            cell, stage = self.of[request]
            if stage == 0:
                self.enter(cell, 1, request.members[1::2])

    def die(self, worker):
        self.deaths += 1
        assert self.dispatch.lose(worker) == []
        self.having.pop(worker, None)
        self.idle.discard(worker)
        self.start(self.now + self.RESTART)
        for waiting in sorted(self.idle):
            self.assign(waiting)


def simulated(cells, images, workers, lifetime):
    """A simulation after its end; every image that entered a stage has one verdict of it."""
    began = time.perf_counter()
    simulation = Simulation(cells, images, workers, lifetime)
    share = simulation.run()
    first = {(cell, 0, i): 1 for cell in range(cells) for i in range(images)}
    second = {(cell, 1, i): 1 for cell in range(cells) for i in range(1, images, 2)}
    assert simulation.verdicts == first | second
    print(  # noqa: T201 - what the simulation is for
        f"{cells * images} images, {workers} workers, {simulation.deaths} deaths: "
        f"{share:.1%} of the workers' time used; {time.perf_counter() - began:.1f} s for the simulation"
    )
    return share, simulation


def test_a_hundred_workers_that_die_at_random_miss_no_verdict_and_make_none_twice():
    share, simulation = simulated(cells=16, images=2_500, workers=100, lifetime=1_000)
    assert simulation.deaths > 100
    assert share > 0.9


def test_without_deaths_workers_end_together():
    share, _ = simulated(cells=5, images=1_000, workers=16, lifetime=1e9)
    assert share > 0.95


@pytest.mark.slow
def test_a_million_images():
    share, simulation = simulated(cells=20, images=50_000, workers=100, lifetime=5_000)
    assert simulation.deaths > 500
    assert share > 0.95
