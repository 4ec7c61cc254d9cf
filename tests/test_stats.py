"""Intervals and paired tests against published and hand-made numbers."""

import math

import pytest

from robustbench_vlm.results import stats


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        # Newcombe (Statistics in Medicine 17, 1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(hits, n, low, high):
    interval = stats.wilson(hits, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_the_formula_and_is_symmetric():
    z, p, n = 1.959963984540054, 0.3, 100
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    interval = stats.wilson(30, 100)
    assert (interval.low, interval.high) == pytest.approx((centre - half, centre + half), abs=1e-12)
    mirrored = stats.wilson(70, 100)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((interval.low, interval.high))
    assert stats.wilson(20, 20).high == 1.0


@pytest.mark.parametrize(("hits", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_counts_that_cannot_be(hits, n):
    with pytest.raises(ValueError, match=r".+"):
        stats.wilson(hits, n)


def test_the_interval_of_a_mean():
    one, same = stats.wilson(15, 148), stats.wilson_mean([(15, 148)])
    assert (same.low, same.high) == pytest.approx((one.low, one.high), abs=1e-12)
    single, pair = stats.wilson(50, 100), stats.wilson_mean([(50, 100), (50, 100)])
    assert pair.high - 0.5 == pytest.approx((single.high - 0.5) / math.sqrt(2))  # independent halves
    uneven = stats.wilson_mean([(0, 10), (10, 10)])
    assert 0 < uneven.low < 0.5 < uneven.high < 1
    with pytest.raises(ValueError, match="no proportions"):
        stats.wilson_mean([])


def verdicts(both, only_a, only_b, neither):
    a = [True] * both + [True] * only_a + [False] * only_b + [False] * neither
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return a, b


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 1, 1.0),
        (5, 0, 2 / 2**5),
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
    ],
)
def test_mcnemar_by_hand(only_a, only_b, p):
    found = stats.mcnemar(*verdicts(7, only_a, only_b, 4))
    assert (found.only_a, found.only_b, found.n) == (only_a, only_b, 11 + only_a + only_b)
    assert found.p == pytest.approx(p, abs=1e-12)
    assert found.difference == pytest.approx((only_a - only_b) / found.n)


def test_mcnemar_looks_at_discordant_images_alone():
    assert stats.mcnemar(*verdicts(0, 8, 2, 0)).p == stats.mcnemar(*verdicts(900, 8, 2, 400)).p


@pytest.mark.parametrize(("a", "b"), [([], []), ([True], [True, False])])
def test_mcnemar_refuses_lists_that_are_not_paired(a, b):
    with pytest.raises(ValueError, match="verdicts"):
        stats.mcnemar(a, b)
