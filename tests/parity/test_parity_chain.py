"""Chains with noise of each side's own, and what the reference and we spend on an image that survives."""

from fractions import Fraction

import compare
import pytest
import theirs
from subjects import Subject, radius, subject

from robustbench_vlm.threat import Threat

pytestmark = pytest.mark.parity

N, STEPS, QUERIES = 16, 8, 60


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("plain", "linf"),
        ("plain", "l2"),
        ("trained", "linf"),
        ("trained", "l2"),
        ("clip", "linf"),
        ("clip", "l2"),
    ],
)
def test_the_chain_agrees_whatever_the_noise(name, norm):
    found = compare.chain(
        subject(name, N), radius(name, N, norm, 0.5), "autoattack", STEPS, QUERIES, seeds=(1, 2)
    )
    assert len(found.flips) <= 1, found.flips
    assert found.mixed


@pytest.mark.parametrize("name", ["plain", "trained"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_same_noise_through_the_whole_chain_gives_the_same_breakers(name, norm, share):
    """Three steps leave something to FAB and Square."""
    who, threat = subject(name, 24), radius(name, 24, norm, share)
    ours, others = compare.fed_chain(who, threat, steps=3, queries=150)
    assert ours == others
    assert len(set(ours)) >= 2


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_is_within_the_spread_of_seeds(norm):
    who, threat = subject("plain", 32), radius("plain", 32, norm, 0.1)
    runs = [compare.square(who, threat, 200, seeds=(seed, seed)) for seed in range(3)]
    ours, others = [run.ours for run in runs], [run.theirs for run in runs]
    assert min(others) - 1 <= sum(ours) / 3 <= max(others) + 1, (ours, others)
    assert all(run.mixed for run in runs)


def test_a_surviving_image_costs_what_it_costs_the_reference_but_for_the_listed_savings():
    """Not spent again: the clean prediction of each attack, and the clean logits that rank targets."""
    steps, targets, queries = 6, 9, 20
    whole, tiny = subject("plain", 4), Threat("linf", Fraction(1, 25500))
    one = Subject("plain", whole.model, whole.images[:1], whole.labels[:1])
    saved = {  # what the reference repeats on clean images, and FAB's and Square's look at the result
        "apgd-ce": 1,
        "apgd-t": 1 + targets,
        "fab-t": 1 + 3 * targets,
        "square": 2,
    }
    runs = {
        "apgd-ce": lambda model: theirs.apgd(model, tiny, "ce", steps),
        "apgd-t": lambda model: theirs.apgd(model, tiny, "", steps, targets),
        "fab-t": lambda model: theirs.fab(model, tiny, steps, targets),
        "square": lambda model: theirs.squares(model, tiny, queries),
    }
    for name, attack in compare.stages("autoattack", steps, queries):
        model = theirs.Watched(one.model)
        theirs.run(runs[name](model), one)
        (ours,) = one.attack(attack, tiny)
        assert not ours.broken
        assert (ours.forwards, ours.backwards) == (model.forwards - saved[name], model.backwards), name
