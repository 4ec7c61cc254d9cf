"""APGD against the reference from the same start: equal verdicts, and equal images where bits can be."""

import compare
import pytest
from subjects import NAMES, radius, subject

from robustbench_vlm.attacks.apgd import Apgd

pytestmark = pytest.mark.parity

N, STEPS, TARGETS = 16, 30, 3
models = pytest.mark.parametrize("name", NAMES)
norms = pytest.mark.parametrize("norm", ["linf", "l2"])


@models
@norms
@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted-dlr"])
def test_the_same_start_gives_the_same_walk(name, norm, loss):
    who, threat = subject(name, N), radius(name, N, norm, 0.4)
    targets = TARGETS if loss == "targeted-dlr" else 0
    found = compare.apgd(who, threat, loss, STEPS, targets)
    assert found.flips == []
    assert found.mixed
    if norm == "linf":
        assert found.equal == found.both, "every adversarial image is equal bit for bit"
    assert found.apart < 1e-2
    first = who.attack(Apgd(loss, STEPS, 0.75, 1, targets), threat)
    assert sum(f.broken for f in first) == found.ours, "stopping at the first success changes no verdict"


@pytest.mark.parametrize("name", ["plain", "trained"])
@norms
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted-dlr"])
def test_the_same_start_gives_the_same_walk_at_every_radius(name, norm, share, loss):
    who, threat = subject(name, N), radius(name, N, norm, share)
    found = compare.apgd(who, threat, loss, 20, TARGETS if loss == "targeted-dlr" else 0)
    assert found.flips == []
    assert norm == "l2" or found.equal == found.both
    assert found.ours >= (1 - share) * N - 2


@models
def test_at_a_radius_where_nothing_survives_and_one_where_most_do(name):
    who = subject(name, N)
    for share in (0.0, 0.7):
        found = compare.apgd(who, radius(name, N, "linf", share), "ce", STEPS)
        assert found.flips == []
        assert found.equal == found.both == found.ours
        assert (found.ours == N) == (share == 0)


@norms
def test_restarts_draw_anew_and_only_for_what_is_left(norm):
    who, threat = subject("trained", N), radius("trained", N, norm, 0.6)
    found = compare.apgd(who, threat, "ce", 10, n_restarts=3)
    assert found.flips == []
    assert found.mixed
    assert norm == "l2" or found.equal == found.both
