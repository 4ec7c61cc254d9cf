"""The L1 ball: its projection against float64, and the attacks that live on it, step by step."""

from fractions import Fraction

import pytest
import torch
from attack_models import blobs, classifier, findings
from hypothesis import given, settings
from hypothesis import strategies as st

from robustbench_vlm.attacks import apgd_l1
from robustbench_vlm.attacks.apgd_l1 import ApgdL1
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.attacks.square import Square, windows
from robustbench_vlm.engine import geometry, l1, losses
from robustbench_vlm.engine.interface import Rows
from robustbench_vlm.engine.noise import Keyed
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat

BALL = Threat("l1", Fraction(2))


def bisected(delta, images, radius):
    """(S, d) float64: the projection of a change, by bisection."""
    v, centre = delta.double().flatten(1), images.double().flatten(1)
    size, way = v.abs(), torch.where(v > 0, 1 - centre, centre)
    low, high = torch.zeros(len(v)).double(), size.amax(1)

    def shrunk(m):
        return torch.minimum((size - m[:, None]).clamp(min=0), way)

    inside = shrunk(low).sum(1) <= radius
    for _ in range(200):
        middle = (low + high) / 2
        over = shrunk(middle).sum(1) > radius
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return shrunk(torch.where(inside, 0.0, high)) * v.sign()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    scale=st.sampled_from([1e-3, 0.05, 0.3, 1.0]),
    radius=st.sampled_from([0.01, 0.5, 4.0, 12.0, 60.0]),
)
def test_projection_onto_ball_and_box_is_the_bisection_in_float64(seed, scale, radius):
    make = torch.Generator().manual_seed(seed)
    images = torch.rand(6, 3, 8, 8, generator=make)
    images[:, :, :2] = images[:, :, :2].round()  # pixels at the box
    delta = scale * torch.randn(6, 3, 8, 8, generator=make)
    delta[:, :, 3] = 0
    delta[0, :, 4] = delta[0, 0, 4, 0]  # entries of equal size
    x = l1.onto(delta, images, radius)
    found = (x.double() - images.double()).flatten(1)
    assert (found - bisected(delta, images, radius)).abs().max() < 5e-7
    assert x.min() >= 0
    assert x.max() <= 1
    assert (found.abs().sum(1) <= radius * (1 + 1e-6) + 1e-6).all()
    assert torch.equal(l1.onto(delta[2:3], images[2:3], radius), x[2:3]), "rows do not mix"
    own = torch.full((6,), radius)
    alike = l1.onto(delta, images, own)
    own[1] = radius / 3
    assert torch.equal(l1.onto(delta, images, own)[2:], alike[2:])
    assert torch.allclose(l1.onto(delta, images, own)[1], l1.onto(delta, images, radius / 3)[1], atol=5e-7)


def bisected_bits(size, beyond, radius):
    """`l1.threshold` by a bisection over all positive float32 numbers."""

    def left(m):
        return torch.minimum((size - m[:, None]).clamp(min=0), size - beyond).sum(1)

    high = size.amax(1).view(torch.int32)
    low = torch.zeros_like(high)
    for _ in range(31):
        middle = low + (high - low) // 2
        over = left(middle.view(torch.float32)) > radius
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    m = high.contiguous().view(torch.float32)
    bound, free = beyond >= m[:, None], (size > m[:, None]) & (beyond < m[:, None])
    total = (size * free + (size - beyond) * bound).sum(1, dtype=torch.float64)
    exact = ((total - radius) / free.sum(1).clamp(min=1)).float()
    m = torch.where(free.sum(1) > 0, exact.clamp(min=0), m)
    return torch.where(left(torch.zeros_like(m)) <= radius, 0.0, m)


KINDS = ("dense", "sparse", "ties", "nearly ties", "powers", "subnormal", "one entry", "zero")


def sizes_of(kind, rows, entries, make):
    """(rows, entries) absolute values of a change, awkward in one way."""
    dense = torch.randn(rows, entries, generator=make).abs()
    if kind == "sparse":
        return dense * (torch.rand(rows, entries, generator=make) < 0.05)
    if kind == "ties":
        return (4 * dense).round() / 4
    if kind == "nearly ties":
        bits = torch.full((rows, entries), 0.1).view(torch.int32)
        return (bits + torch.randint(0, 4, (rows, entries), generator=make).int()).view(torch.float32)
    if kind == "powers":
        return 2.0 ** torch.randint(-140, 3, (rows, entries), generator=make).float()
    if kind == "subnormal":
        return dense * 1e-41
    if kind == "one entry":
        return dense * (torch.arange(entries) == entries // 2)
    return dense if kind == "dense" else torch.zeros_like(dense)


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    kind=st.sampled_from(KINDS),
    entries=st.sampled_from([1, 2, 7, 64, 300, 3072]),
    share=st.sampled_from([1e-7, 1e-3, 0.1, 0.5, 0.999999, 1.0, 1.000001, 5.0]),
    boxed=st.sampled_from([0.0, 0.3, 1.0]),
    own=st.booleans(),
)
def test_newton_finds_the_bits_of_a_bisection_over_all_float32_numbers(
    seed, kind, entries, share, boxed, own
):
    make = torch.Generator().manual_seed(seed)
    size = sizes_of(kind, 5, entries, make)
    gaps = torch.rand(5, entries, generator=make) * (2 if boxed < 1 else 0)
    gaps[torch.rand(5, entries, generator=make) < boxed / 2] = 0
    beyond = (size - gaps).clamp_(min=0) if boxed else torch.zeros_like(size)
    sums = (size - beyond).sum(1)
    radius = share * sums if own else share * float(sums.mean())
    assert torch.equal(l1.threshold(size, beyond, radius), bisected_bits(size, beyond, radius))


def test_a_search_of_few_steps_ends_inside_the_ball(monkeypatch):
    """On a GPU nobody asks whether the search has ended, so that the number of steps is fixed."""
    size = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).abs()
    exact, behind = bisected_bits(size, torch.zeros_like(size), 4.0), []
    for steps in range(l1.PROBES + 1):
        monkeypatch.setattr(l1, "MOST", steps)
        m = l1.threshold(size, torch.zeros_like(size), 4.0)
        assert (m >= exact).all()
        assert ((size - m[:, None]).clamp(min=0).sum(1) <= 4.0 * (1 + 1e-6)).all()
        behind.append(int((m > exact).sum()))
    assert behind == sorted(behind, reverse=True)
    assert behind[0] == 40
    assert behind[-1] == 0


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), kind=st.sampled_from(KINDS), entries=st.sampled_from([1, 2, 300]))
def test_the_entry_at_a_rank_is_that_of_the_sorted_row(seed, kind, entries):
    make = torch.Generator().manual_seed(seed)
    values = sizes_of(kind, 5, entries, make)
    values[torch.rand(5, entries, generator=make) < 0.1] = torch.nan
    values[torch.rand(5, entries, generator=make) < 0.1] = torch.inf
    rank = torch.randint(0, entries, (5,), generator=make)
    wanted = values.sort(dim=1).values.gather(1, rank[:, None]).squeeze(1)
    assert torch.equal(apgd_l1._at_rank(values, rank).view(torch.int32), wanted.view(torch.int32))


def test_projection_by_hand():
    images = torch.tensor([[0.5, 0.9, 0.2, 0.0]]).reshape(1, 1, 2, 2)
    delta = torch.tensor([[0.4, 0.5, -0.3, -0.7]]).reshape(1, 1, 2, 2)
    # ways 0.5, 0.1, 0.2, 0; at radius 0.5 the sum is min(.4-m,.5) + .1 + min(.3-m,.2): m = 0.15
    x = l1.onto(delta, images, 0.5)
    assert torch.allclose(x.flatten(), torch.tensor([0.75, 1.0, 0.05, 0.0]))
    assert torch.equal(l1.onto(delta, images, 0.7), l1.onto(delta, images, 9.0)), "the box alone allows 0.7"
    assert torch.equal(l1.onto(torch.zeros_like(delta), images, 0.5), images)


def test_excess_and_starts_are_those_of_the_ball():
    images = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    start = geometry.surface_start(images, BALL, Keyed(("a", "b", "c")))
    assert geometry.excess(start, images, BALL).abs().max() <= geometry.slack(BALL)
    assert ((start != images).flatten(1).sum(1) < 40).all(), "noise projected onto the ball is sparse"
    assert torch.equal(geometry.surface_start(images[1:2], BALL, Keyed(("b",)))[0], start[1])
    grey = torch.full((1, 3, 2, 2), 0.5)
    moved = grey.clone()
    moved[0, 0] += 0.3  # four entries: a length of 1.2 in L1
    assert float(geometry.excess(moved, grey, Threat("l1", Fraction(1)))) == pytest.approx(0.2, abs=1e-6)
    far = grey + torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    assert geometry.excess(geometry.project(far, grey, BALL), grey, BALL).max() <= geometry.slack(BALL)
    for dense in (lambda: geometry.direction(far, BALL), lambda: geometry.uniform_start(grey, BALL, None)):
        with pytest.raises(InputError, match="norm 'l1': no dense step or start; expected linf or l2"):
            dense()


def run(attack, values, images, ball=BALL, gradient=None):
    """States of one row of l1-APGD whose margin follows `values`, all of them after an evaluation."""
    rows = Rows(images, torch.tensor([0]), torch.tensor([-1]), Keyed(("n",)), (0,))
    slope = torch.arange(images[0].numel()).float() + 1 if gradient is None else gradient
    state, states = attack.start(rows, ball), []
    for value in values:

        def classify(x, value=value):
            score = ((x - x.detach()).flatten(1) * slope).sum(1) + value
            return torch.stack([torch.zeros_like(score), score], dim=1)

        state = attack.step(state, Oracle(classify))
        states.append(state)
    return states


def test_a_single_run_begins_with_a_fifth_of_the_entries_and_steps_of_the_radius():
    images = torch.full((1, 3, 10, 10), 0.5)
    first, second = run(ApgdL1("margin", (40,), (1.0,), 1, 0), [-2, -1], images)
    assert float(first.share) == pytest.approx(0.2)
    assert float(first.size) == 2
    # the largest 60 of 300 gradients (and the one at the threshold) take a step of 2 / 60 each
    moved = images + torch.where(torch.arange(300) >= 240, 2 / 60, 0.0).reshape(1, 3, 10, 10)
    assert torch.allclose(second.x, l1.onto(first.x + moved - 2 * images, images, 2.0), atol=1e-6)
    assert geometry.excess(second.x, images, BALL).max() <= geometry.slack(BALL)


def test_sparsity_follows_the_best_point_and_the_step_shrinks_only_once_it_has_settled():
    images = torch.full((1, 3, 10, 10), 0.5)
    states = run(ApgdL1("margin", (100,), (1.0,), 1, 0), range(-30, -10), images)  # a look every 4 moves
    sizes, shares = [float(s.size) for s in states], [float(s.share) for s in states]
    counts = [float(s.best_changed) for s in states]
    assert sizes[:5] == [2] * 5, "from 300 entries the first count is a fall: the step is the radius again"
    assert bool(states[4].pending)
    assert shares[:4] == [pytest.approx(0.2)] * 4
    assert shares[4] == pytest.approx(counts[4] / 300 / 1.5)
    for look in range(8, 20, 4):
        falls = counts[look] / counts[look - 4] < 0.95
        assert sizes[look] == pytest.approx(2 if falls else max(sizes[look - 1] / 1.5, 0.2))
        assert shares[look] == pytest.approx(counts[look] / 300 / 1.5)
    settled = run(ApgdL1("margin", (25,), (1.0,), 1, 0), [-1.0] * 26, images)  # nothing ever better
    assert float(settled[-1].size) == pytest.approx(0.2), "never below a tenth of the radius"


def test_each_run_has_its_radius_and_only_the_last_can_succeed():
    images, ball = torch.full((1, 3, 10, 10), 0.5), Threat("l1", Fraction(3))
    attack = ApgdL1("margin", (2, 2, 3), (3.0, 2.0, 1.0), 1, 0)
    states = run(attack, [1.0] * 9 + [-1.0], images, ball)
    lengths = [float((s.x - images).abs().sum()) for s in states]
    assert lengths == pytest.approx([9] * 3 + [6] * 3 + [3] * 4, rel=1e-4)
    assert [bool(s.broken) for s in states] == [False] * 6 + [True] * 3 + [False]
    assert [bool(s.done) for s in states] == [False] * 9 + [True]
    assert int(states[-1].first) == 6
    for start in (0, 3, 6):
        begun = states[start]
        assert float(begun.share) == pytest.approx(float(begun.changed) / 300 / 1.5)
        assert float(begun.size) == pytest.approx(lengths[start], rel=1e-4)
    # the second run begins at the best point of the first, which was its first evaluation, projected
    again = l1.onto(states[2].best - images, images, 6.0)
    assert torch.equal(states[3].x, again)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("ce", (3, 4), (1.0,), 1, 0), "1 step at each of the radii"),
        (("ce", (3, 0), (2.0, 1.0), 1, 0), "1 step at each of the radii"),
        (("ce", (3, 3), (1.0, 2.0), 1, 0), "the last one 1"),
        (("ce", (), (), 1, 0), "the last one 1"),
        (("ce", (3,), (1.0,), 1, 5), "targets"),
        (("targeted-dlr", (3,), (1.0,), 1, 0), "targets"),
    ],
)
def test_runs_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        ApgdL1(*fields)


def test_stages_with_equal_runs_share_rows():
    ce, t = (
        ApgdL1("ce", (3, 4), (2.0, 1.0), 5, 0),
        ApgdL1("targeted-dlr", (3, 4), (2.0, 1.0), 1, 5),
    )
    assert ce.shares_rows(t)
    assert t.shares_rows(ce)
    assert not ce.shares_rows(ApgdL1("ce", (4, 3), (2.0, 1.0), 5, 0))
    images, labels = torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    names = ("ce", "targeted-dlr")
    rows = Rows(images, labels, labels + 1, Keyed(("a", "b")), (0, 0), loss_names=names)
    assert [losses.NAMES[i] for attack in (ce, t) for i in attack.start(rows, BALL).loss.tolist()] == [
        *("ce", "ce"),
        *("targeted-dlr", "targeted-dlr"),
    ]
    assert ce.start(rows, BALL).loss_names == t.start(rows, BALL).loss_names == names


def test_square_patterns_have_unit_mass_and_its_proposals_stay_in_ball_and_box():
    for side in (3, 5, 8):
        assert abs(windows.eta(side, "l1")).sum() == pytest.approx(1)
    # a 3 x 3 pyramid: 1/16 (q = 1) everywhere, and 1 more at the centre (q = 0)
    steps = windows.pyramid(3, 3, "l1")
    assert steps[1, 1] / steps[0, 0] == pytest.approx((1 + 1 / 16) * 16)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(3, dtype=torch.int64)
    rows = Rows(images, labels, labels - 1, Keyed(("a", "b", "c")), (0, 0, 0))
    attack, oracle = Square(60, 0.8, 1), Oracle(_brightness)
    state = attack.start(rows, BALL)
    assert geometry.excess(state.x, images, BALL).abs().max() <= 1e-5
    moved = 0
    for _ in range(40):
        before = state.best.clone()
        state = attack.step(state, oracle)
        assert geometry.excess(state.x, images, BALL).max() <= 0
        moved += int((state.best != before).flatten(1).any(1).sum())
    assert moved > 10


def _brightness(x):
    mean = x.mean((1, 2, 3))
    return torch.stack([9 - mean, mean], dim=1)


def test_the_largest_change_of_a_linear_classifier_is_found_where_it_is():
    """A margin falls fastest along the largest weights, so how far it can fall is known."""
    weights = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)
    images = torch.full((6, 3, 4, 4), 0.5) + torch.linspace(0.01, 0.06, 6)[:, None, None, None] * weights

    def model(x):
        score = ((x - 0.5) * weights).flatten(1).sum(1)
        return torch.stack([score, -score], dim=1)

    margins = ((images - 0.5) * weights).flatten(1).sum(1)
    # entries in order of |w|, each up to the box: how far the margin can fall within the radius
    size, ball = weights.flatten().abs(), Threat("l1", Fraction(3, 5))
    reachable = []
    for image, margin in zip(images, margins, strict=True):
        order = size.argsort(descending=True)
        way = torch.where(weights.flatten() > 0, image.flatten(), 1 - image.flatten())[order]
        spent = torch.minimum((0.6 - (way.cumsum(0) - way)).clamp(min=0), way)
        reachable.append(bool((spent * size[order]).sum() > margin))
    assert 0 < sum(reachable) < 6
    labels = torch.zeros(6, dtype=torch.int64)
    for attack in (
        ApgdL1("margin", (60,), (1.0,), 1, 0),
        ApgdL1("ce", (15, 15, 20), (3.0, 2.0, 1.0), 1, 0),
        Fab(20, 1, 1, 0.1, 1.05, 0.9),
    ):
        assert [f.broken for f in findings(model, images, labels, attack, ball)] == reachable


def test_the_four_l1_attacks_break_what_each_radius_leaves_them():
    """More radius breaks more, and what one breaks at a radius lies on it or within."""
    model, (images, labels) = classifier(10), blobs(20, 10, seed=1)
    for attack in (ApgdL1("ce", (6,), (1.0,), 1, 0), Fab(5, 3, 1, 0.1, 1.05, 0.9), Square(40, 0.8, 1)):
        counts = []
        for eps in ("1/2", "2", "8"):
            ball = Threat("l1", Fraction(eps))
            found = findings(model, images, labels, attack, ball)
            counts.append(sum(f.broken for f in found))
            adv = torch.stack([f.adv for f in found])
            assert geometry.excess(adv, images, ball).max() <= geometry.slack(ball)
        assert counts[0] < counts[1] < counts[2]
