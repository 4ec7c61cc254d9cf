"""FAB against the reference: it draws nothing for its first trajectories, so verdicts are to be equal."""

import compare
import pytest
from subjects import NAMES, radius, subject

pytestmark = pytest.mark.parity

N, STEPS, TARGETS = 16, 20, 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_targeted_fab_gives_the_same_verdicts(name, norm):
    found = compare.fab_t(subject(name, N), radius(name, N, norm, 0.4), STEPS, TARGETS)
    assert found.flips == []
    assert found.mixed


@pytest.mark.parametrize("name", ["plain", "trained"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_walked_to_the_end_it_comes_as_near(name, norm, share):
    who, threat = subject(name, N), radius(name, N, norm, share)
    found = compare.fab_t(who, threat, 30, 3, stop="last")
    first = compare.fab_t(who, threat, 30, 3)
    assert found.flips == first.flips == []
    assert found.ours == first.ours
    assert found.apart < 2e-3


def test_a_point_that_is_wrong_only_once_brought_into_the_ball_is_no_success():
    """A few steps at a radius where FAB is still on its way: it breaks less than the ball allows."""
    who = subject("clip", 20)
    told = compare.fab_t(who, radius("clip", 20, "linf", 0.0), 6, 3)
    assert told.flips == []
    assert told.mixed
