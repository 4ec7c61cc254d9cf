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
