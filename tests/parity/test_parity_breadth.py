"""L1, mean gradients and the chains `plus` and `rand` against the reference."""

import compare
import pytest
import torch
from pyautoattack.autopgd_base import L1_projection
from subjects import NAMES, radius, subject

from robustbench_vlm.attacks.apgd_l1 import ApgdL1
from robustbench_vlm.engine import l1

pytestmark = pytest.mark.parity

N = 16
models = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize("eps", [0.5, 4.0, 12.0])
@pytest.mark.parametrize(("scale", "apart"), [(0.05, 5e-6), (1.0, 5e-5)])
def test_the_projection_is_theirs_to_the_digits_that_its_sums_in_float32_keep(eps, scale, apart):
    make = torch.Generator().manual_seed(0)
    images = torch.rand(16, 3, 16, 16, generator=make)
    images[:, :, :3] = images[:, :, :3].round()
    delta = scale * torch.randn(16, 3, 16, 16, generator=make)
    theirs = images + delta + L1_projection(images, delta, eps)
    ours, counted = l1.onto_counted(delta, images, eps)
    assert (ours - theirs).abs().max() < apart
    assert counted.tolist() == (theirs != images).flatten(1).sum(1).tolist()


@models
@pytest.mark.parametrize("loss", ["dlr", "targeted-dlr"])
def test_l1_apgd_from_the_same_start_gives_the_same_walk(name, loss):
    who, threat = subject(name, N), radius(name, N, "l1", 0.6)
    found = compare.apgd_l1(who, threat, loss, (30,), 3 if loss == "targeted-dlr" else 0)
    assert found.flips == []
    assert found.mixed
    assert found.apart < 1e-3
    attack = ApgdL1(loss, (30,), (1.0,), 1, 3 if loss == "targeted-dlr" else 0)
    assert sum(f.broken for f in who.attack(attack, threat)) == found.ours


@models
def test_l1_apgd_on_cross_entropy_gives_the_same_verdicts(name):
    """Its images may part ways once a class is sure to the last digit, and its gradient rounding."""
    found = compare.apgd_l1(subject(name, N), radius(name, N, "l1", 0.4), "ce", (30,))
    assert found.flips == []
    assert found.mixed


@models
def test_the_schedule_of_radii_agrees_but_for_starts_that_rounding_decides(name):
    """The reference takes its first sparsity from a count in which last bits decide: `l1.onto_counted`."""
    found = compare.apgd_l1(subject(name, N), radius(name, N, "l1", 0.4), "ce", (9, 9, 12))
    assert len(found.flips) <= 1, found.flips
    assert found.mixed


@pytest.mark.parametrize(("name", "targets"), [*[(name, 3) for name in NAMES], ("plain", 0), ("trained", 0)])
def test_fab_in_l1_gives_the_same_verdicts(name, targets):
    found = compare.fab_t(subject(name, N), radius(name, N, "l1", 0.6), 15, targets)
    assert found.flips == []
    assert found.mixed


def test_square_in_l1_is_within_the_spread_of_seeds():
    who, threat = subject("plain", 32), radius("plain", 32, "l1", 0.1)
    runs = [compare.square(who, threat, 150, seeds=(seed, seed)) for seed in range(3)]
    ours, others = [run.ours for run in runs], [run.theirs for run in runs]
    assert min(others) - 1 <= sum(ours) / 3 <= max(others) + 1, (ours, others)
    assert all(run.mixed for run in runs)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_mean_gradients_from_the_same_start_give_the_same_walk(norm):
    found = compare.eot(subject("trained", N), radius("trained", N, norm, 0.4), 10, 4)
    assert found.flips == []
    assert found.mixed
    assert norm == "l2" or found.equal == found.both


@pytest.mark.parametrize(
    ("card", "norm", "steps"),
    [
        ("plus", "linf", 4),
        ("plus", "l2", 4),
        ("rand", "linf", 6),
        ("rand", "l2", 6),
        ("autoattack-l1", "l1", 10),
    ],
)
def test_the_other_chains_agree_whatever_the_noise(card, norm, steps):
    who, threat = subject("plain", N), radius("plain", N, norm, 0.5)
    found = compare.chain(who, threat, card, steps, 40, seeds=(1, 2))
    assert len(found.flips) <= 1, found.flips
    assert found.mixed
