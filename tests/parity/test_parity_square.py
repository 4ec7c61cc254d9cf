"""Square against the reference with the same proposals: equal verdicts, equal queries, equal best points."""

import compare
import pytest
from subjects import NAMES, radius, subject

from robustbench_vlm.threat import Threat

pytestmark = pytest.mark.parity

norms = pytest.mark.parametrize("norm", ["linf", "l2"])
N = {"plain": 32, "trained": 32, "clip": 16}
QUERIES = {"plain": 600, "trained": 600, "clip": 200}


def wide(name, n, norm):
    """Half as far again as gradients need for all images: Square breaks some."""
    threat = radius(name, n, norm, 0.0)
    return Threat(norm, threat.eps * 3 / 2)


@pytest.mark.parametrize("name", NAMES)
@norms
def test_proposals_shared_by_a_batch_are_accepted_by_both_sides_alike(name, norm):
    who = subject(name, N[name])
    told, counted, ends = compare.square_fed(who, wide(name, N[name], norm), QUERIES[name])
    assert told.flips == []
    assert counted == [], "every image takes as many queries"
    assert told.mixed
    if norm == "linf":
        assert ends == []
        assert told.equal == told.both
    assert len(ends) <= told.n / 10


@pytest.mark.parametrize("name", ["plain", "trained"])
@norms
def test_each_image_alone_with_its_own_stream_as_shipped(name, norm):
    whole, broken = subject(name, 32), 0
    for i in range(10):
        told, counted, ends = compare.square_fed(whole.only([i]), wide(name, 32, norm), 300)
        assert told.flips == counted == []
        assert norm == "l2" or ends == []
        broken += told.ours
    assert 0 < broken < 10
