"""Formulas of the attacks against values worked out by hand or in float64."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustbench_vlm.attacks import apgd, pgd
from robustbench_vlm.attacks.fab import projection
from robustbench_vlm.attacks.square import Square, square, windows
from robustbench_vlm.engine import geometry, losses
from robustbench_vlm.engine.interface import Rows
from robustbench_vlm.engine.noise import Keyed
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.threat import Threat

LINF, L2 = Threat("linf", Fraction(8, 255)), Threat("l2", Fraction(1, 2))
Z = torch.tensor([[4.0, 1.0, 2.0, -1.0], [1.0, 3.0, 0.0, 2.5]])
Y, T = torch.tensor([0, 0]), torch.tensor([2, 3])


def test_losses_by_hand():
    assert torch.allclose(losses.cross_entropy(Z, Y, T), Z.logsumexp(1) - Z[:, 0])
    assert losses.attack_margin(Z, Y, T).tolist() == [-2.0, 2.0]
    assert losses.correct_margin(Z, Y).tolist() == [2.0, -2.0]
    # rows: -(4 - 2) / (4 - 1), and -(1 - 3) / (3 - 1)
    assert torch.allclose(losses.dlr(Z, Y, T), torch.tensor([-2 / 3, 1.0]))
    # rows: -(4 - 2) / (4 - (1 - 1) / 2), and -(1 - 2.5) / (3 - (1 + 0) / 2)
    assert torch.allclose(losses.targeted_dlr(Z, Y, T), torch.tensor([-0.5, 0.6]))
    assert losses.targeted_margin(Z, Y, T).tolist() == [-2.0, 1.5]


def test_losses_are_per_sample_and_ratios_ignore_scale_and_shift():
    for name, loss in losses.LOSSES.items():
        assert loss(Z, Y, T).shape == (2,)
        if "dlr" in name:
            assert torch.allclose(loss(Z * 100 + 7, Y, T), loss(Z, Y, T), atol=1e-5)


def test_checkpoints_are_those_of_the_released_code():
    assert apgd.checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert apgd.checkpoints(50) == [11, 21, 30, 38, 45]
    assert apgd.checkpoints(10) == list(range(2, 11))
    assert apgd.checkpoints(200) == [44, 82, 114, 140, 160, 174, 186, 198]


def _walk(values, steps):
    """APGD on one pixel row whose loss follows `values`; the step size after each iteration."""
    rows = Rows(
        torch.full((1, 3, 2, 2), 0.5), torch.tensor([0]), torch.tensor([-1]), Keyed(("n",)), (0,), "last"
    )
    attack = apgd.Apgd("margin", steps, 0.75, 1, 0)
    state, sizes = attack.start(rows, LINF), []
    for value in values:

        def classify(x, value=value):
            score = (x - x.detach()).flatten(1).sum(1) + value
            return torch.stack([torch.zeros_like(score), score], dim=1)

        state = attack.step(state, Oracle(classify))
        sizes.append(float(state.size) / float(LINF.eps))
    return state, sizes


def test_step_is_halved_when_a_window_oscillates_and_the_first_window_counts_from_zero():
    # steps=10: windows 2, 1, 1, ...; x_0, then moves. All losses negative: the first rise is judged against 0
    _, sizes = _walk([-5, -4, -3, -2, -1, -0.5], 10)
    # first window: -4 > 0 no, -3 > -4 yes: 1 <= 1.5, so it is halved though the loss rose all the time
    assert sizes == pytest.approx([2, 2, 2, 1, 1, 1])
    _, sizes = _walk([1, 2, 3, 4, 5, 6], 10)
    assert sizes == pytest.approx([2, 2, 2, 2, 2, 2])


def test_a_checkpoint_without_progress_halves_but_never_twice_in_a_row_for_that_reason():
    # windows of one move each after the first: a fall is an oscillation (0 rises), always halved
    _, sizes = _walk([1, 2, 3, 2.5, 2.4], 10)
    assert sizes == pytest.approx([2, 2, 2, 2, 1])


def test_restart_from_best_leaves_the_previous_iterate():
    state, _ = _walk([1, 2, 3, 2.5], 10)
    assert bool(state.pending)
    assert not torch.equal(state.best, state.x) or torch.equal(state.previous, state.x)
    assert float(state.best_value) == 3


def test_square_windows_at_32_pixels():
    sizes = square.window_sides(5000, 0.8, 32, 32, "linf")
    changes = [(i, s) for i, s in enumerate(sizes) if i == 0 or sizes[i - 1] != s]
    assert changes == [(0, 29), (11, 20), (51, 14), (201, 10), (501, 7), (1001, 5), (2001, 4), (4001, 3)]
    assert all(s % 2 and s >= 3 for s in square.window_sides(5000, 0.8, 32, 32, "l2"))
    assert max(square.window_sides(20, 0.8, 8, 64, "linf")) == 8


def test_square_patterns_have_unit_length_and_opposite_halves():
    for side in (3, 5, 8, 21):
        pattern = windows.eta(side)
        assert np.linalg.norm(pattern) == pytest.approx(1)
        assert (pattern[: side // 2] > 0).all()
        assert (pattern[side // 2 :] < 0).all()
    # a 3 x 3 pyramid: 1 everywhere on the outer square, and 1/4 (q = 1) below the centre's 1 (q = 0)
    steps = windows.pyramid(3, 3)
    assert steps[1, 1] / steps[0, 0] == pytest.approx(1.25 / 0.25)


def test_square_changes_one_window_and_touches_the_radius():
    images = torch.full((3, 3, 16, 16), 0.5)
    labels, names = torch.zeros(3, dtype=torch.int64), Keyed(("a", "b", "c"))
    rows = Rows(images, labels, labels - 1, names, (0, 0, 0))
    for threat in (LINF, L2):
        attack = Square(50, 0.8, 1)
        state = attack.start(rows, threat)
        assert torch.allclose(
            geometry.excess(state.x, images, threat), torch.zeros(3, dtype=torch.float64), atol=1e-6
        )
        oracle = Oracle(lambda x: torch.stack([1 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) * 0 - 1], dim=1))
        for _ in range(20):
            before = state
            state = attack.step(state, oracle)
            assert geometry.excess(state.x, images, threat).max() <= geometry.slack(threat)
            assert (state.best_margin <= before.best_margin).all()
    assert torch.equal(state.proposals[0], attack.start(rows, L2).proposals[0])


def _bisect(points, normals, falls, norm):
    """The same projection by bisection in float64."""
    w, t = normals.double() * torch.where(falls < 0, -1, 1)[:, None], points.double()
    way, size, total = torch.where(w > 0, t, 1 - t), w.abs(), falls.abs().double()
    if norm == "l1":
        return _greedy(way, size, total) * -w.sign()
    unit = torch.ones_like(size) if norm == "linf" else size
    low, high = torch.zeros_like(total), torch.full_like(total, 1.0 if norm == "linf" else 1e12)
    for _ in range(200):
        middle = (low + high) / 2
        short = (size * torch.minimum(middle[:, None] * unit, way)).sum(1) < total
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return -torch.minimum(high[:, None] * unit, way) * w.sign()


def _greedy(way, size, total):
    """L1: the entries of largest |w| go to their bound one after the other, the last one part of its way."""
    order = size.argsort(dim=1, descending=True)
    gains = (size * way).gather(1, order)
    before = gains.cumsum(1) - gains
    share = ((total[:, None] - before) / gains.clamp(min=1e-300)).clamp(0, 1)
    return torch.zeros_like(way).scatter(1, order, share) * way


def _moves(points, normals, falls, norm, eased=1.0):
    """(N, d) one move a row, onto a hyperplane of its own."""
    start = torch.full((1, len(falls)), eased)
    found = projection.Hyperplanes.of(normals, norm).moves([points], falls[None], start)
    return found.turn[0][:, None] * normals.sign() * found.reach[0], found.lengths[0]


NORMS = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])


@NORMS
@pytest.mark.parametrize("eased", [1.0, 7.0])
def test_projection_onto_the_hyperplane_is_the_bisection_in_float64(norm, eased):
    make = torch.Generator().manual_seed(0)
    points = torch.rand(60, 500, generator=make)
    points[:, :40] = points[:, :40].round()  # pixels at the box
    normals = torch.randn(60, 500, generator=make) * torch.rand(60, 500, generator=make)
    normals[:, 40:50] = 0
    falls = torch.linspace(-30, 30, 60)
    moves, lengths = _moves(points, normals, falls, norm, eased)
    exact = _bisect(points, normals, falls, norm)
    assert (moves - exact).abs().max() < (5e-6 if norm == "l1" else 3e-7)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    assert torch.allclose(lengths.double(), exact.norm(order, dim=1), rtol=1e-5)
    assert (points + moves).min() >= -1e-7
    assert (points + moves).max() <= 1 + 1e-7
    residual = (normals.double() * moves).sum(1) + falls
    assert residual.abs().max() <= 5e-5


@NORMS
def test_an_unreachable_hyperplane_moves_everything_to_its_bound(norm):
    points, normals = torch.tensor([[0.25, 0.5, 0.75]]), torch.tensor([[1.0, -1.0, 0.5]])
    moves, _ = _moves(points, normals, torch.tensor([100.0]), norm)
    assert torch.allclose(points + moves, torch.tensor([[0.0, 1.0, 0.0]]))


@NORMS
def test_a_projection_does_not_depend_on_the_rows_beside_it(norm):
    make = torch.Generator().manual_seed(1)
    points, normals = torch.rand(32, 300, generator=make), torch.randn(32, 300, generator=make)
    falls = torch.logspace(-4, 2, 32)
    moves, _ = _moves(points, normals, falls, norm)
    turned, _ = _moves(points.flip(0), normals.flip(0), falls.flip(0), norm)
    assert torch.equal(moves, turned.flip(0))
    easy = falls.clone()
    easy[:31] = 0
    assert torch.equal(moves[31], _moves(points, normals, easy, norm)[0][31])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_corrections_that_must_not_be_asked_for_more_end_short_of_the_hyperplane_never_beyond(norm):
    """On a device without a look at the numbers, the fixed number of corrections settles ordinary moves."""
    make = torch.Generator().manual_seed(2)
    points, normals = torch.rand(40, 300, generator=make), torch.randn(40, 300, generator=make)
    sizes = normals.abs() if norm == "linf" else normals.square()
    ways = torch.where(normals > 0, points, 1 - points)
    breaks = (ways if norm == "linf" else ways / normals.abs())[None]
    most = (sizes * breaks[0]).sum(1)
    for share, exact in ((0.5, True), (0.99, False)):
        total = (share * most)[None]
        lower = total / sizes.sum(1)
        m = projection.newton(sizes, breaks, total, lower, lower, projection.CORRECTIONS)
        reached = (sizes * torch.minimum(breaks, m[..., None])).sum(-1) / total
        assert reached.max() <= 1 + 1e-6
        assert not exact or reached.min() >= 1 - 1e-5


pixels = st.integers(0, 2**31 - 1)


@settings(max_examples=40, deadline=None)
@given(seed=pixels, reach=st.floats(0, 3), linf=st.booleans())
def test_projection_lands_inside_and_keeps_what_is_inside(seed, reach, linf):
    threat = LINF if linf else L2
    make = torch.Generator().manual_seed(seed)
    images = torch.rand(4, 3, 5, 5, generator=make)
    far = images + reach * torch.randn(4, 3, 5, 5, generator=make)
    near = geometry.project(far, images, threat)
    assert geometry.excess(near, images, threat).max() <= geometry.slack(threat)
    assert torch.allclose(geometry.project(near.clone(), images, threat), near, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=pixels, linf=st.booleans())
def test_starts_are_inside_and_named(seed, linf):
    threat = LINF if linf else L2
    images = torch.rand(3, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    for start in (geometry.uniform_start, geometry.surface_start):
        whole = start(images, threat, Keyed(("a", "b", f"c{seed}")))
        assert geometry.excess(whole, images, threat).max() <= geometry.slack(threat)
        assert torch.equal(start(images[1:2], threat, Keyed(("b",)))[0], whole[1])
    grey = torch.full((1, 3, 5, 5), 0.5)
    surface = geometry.surface_start(grey, threat, Keyed((f"{seed}",)))
    assert abs(float(geometry.excess(surface, grey, threat))) < 1e-6


def test_excess_sees_ball_box_and_nan():
    images = torch.full((3, 3, 2, 2), 0.995)
    adv = images.clone()
    adv[0, 0, 0, 0] += 0.01
    adv[1, 0, 0, 0] -= 0.5
    adv[2, 0, 0, 0] = torch.nan
    found = geometry.excess(adv, images, LINF)
    assert found[0] == pytest.approx(0.005, abs=1e-6)
    assert found[1] == pytest.approx(0.5 - 8 / 255, abs=1e-6)
    assert found[2] == torch.inf


def test_step_lengths_are_relative_or_absolute():
    assert pgd.step_length("eps/4", LINF) == pytest.approx(2 / 255)
    assert pgd.step_length("eps", LINF) == pytest.approx(8 / 255)
    assert pgd.step_length("1/255", LINF) == pytest.approx(1 / 255)
    assert pgd.step_length("0.1", L2) == pytest.approx(0.1)


def test_not_a_number_is_seen_through_a_maximum():
    images = torch.rand(3, 3, 4, 4)
    scale = torch.tensor([1.0, torch.nan, 0.0])

    def classify(x):
        score = x.flatten(1).sum(1) * scale
        return torch.stack([score, -score], dim=1).nan_to_num(nan=0.5) + 0 * score[:, None].nan_to_num()

    seen = Oracle(classify).gradient(images, lambda z: z[:, 0] * scale)
    assert seen.finite.tolist() == [True, False, True]
    assert seen.zero.tolist() == [False, False, True]
