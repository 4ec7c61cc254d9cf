"""Which worker gets which images: every image once, whatever dies, and workers that end together."""

import importlib
import random
from collections import Counter
from pathlib import Path

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


@pytest.fixture
def simulated(monkeypatch):
    """The simulation of `benchmarks/dispatch.py`, with made-up attack times and the real scheduling."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("dispatch").simulated


def test_a_hundred_workers_that_die_at_random_miss_no_verdict_and_make_none_twice(simulated):
    share, simulation = simulated(cells=16, images=2_500, workers=100, lifetime=1_000)
    assert simulation.deaths > 100
    assert share > 0.9


def test_without_deaths_workers_end_together(simulated):
    share, _ = simulated(cells=5, images=1_000, workers=16, lifetime=1e9)
    assert share > 0.95


@pytest.mark.slow
def test_a_million_images(simulated):
    share, simulation = simulated(cells=20, images=50_000, workers=100, lifetime=5_000)
    assert simulation.deaths > 500
    assert share > 0.95


def test_whole_units_stay_whole_however_many_blocks_are_lost():
    request, dispatch = Request(range(100), unit=64, most=64, whole=True), Dispatch()
    dispatch.add(request)
    first, second = dispatch.take("a", 1).members, dispatch.take("b", 1).members
    assert (first, second) == ([*range(64)], [*range(64, 100)])
    dispatch.lose("a")
    dispatch.lose("b")
    assert [dispatch.take(worker, 1).members for worker in "cd"] == [first, second]
