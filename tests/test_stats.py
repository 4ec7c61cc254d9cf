"""Intervals and paired tests against published and hand-made numbers."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest
from statsmodels.stats import contingency_tables, multitest, proportion

from robustbench_vlm.results import mean_interval, stats
from robustbench_vlm.results.stats import Paired


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
    assert mean_interval.mean_interval([(15, 148)]) == stats.wilson(15, 148)
    uneven = mean_interval.mean_interval([(0, 10), (10, 10)])
    # the dataset without hits may have 1 - 0.025 ** (1 / 10), that without misses as little less
    assert uneven.high == pytest.approx((1 + 1 - 0.025**0.1) / 2)
    assert uneven.low == pytest.approx(0.025**0.1 / 2)
    with pytest.raises(ValueError, match="no proportions"):
        mean_interval.mean_interval([])


@pytest.mark.parametrize("counts", [[(1, 0)], [(-1, 5), (1, 5)], [(6, 5), (1, 5)]])
def test_the_interval_of_a_mean_refuses_counts_that_cannot_be(counts):
    with pytest.raises(ValueError, match=r".+"):
        mean_interval.mean_interval(counts)


def test_of_one_proportion_the_limits_are_those_of_clopper_and_pearson():
    hits, n = np.array([[0], [1], [7], [49], [50]]), np.array([50])
    low, high = mean_interval.limits(hits, n)
    for hit, a, b in zip(hits[:, 0], low, high, strict=True):
        assert (a, b) == pytest.approx(proportion.proportion_confint(hit, 50, method="beta"), abs=1e-12)


def test_of_rare_hits_in_many_datasets_the_limits_are_the_exact_ones_of_all_images_together():
    """Fifteen datasets of 1000 images, and 0, 1 or 4 hits: as if they were one of 15,000."""
    for hits in (0, 1, 4):
        counts = [(1, 1000)] * hits + [(0, 1000)] * (15 - hits)
        found = mean_interval.mean_interval(counts)
        low, high = proportion.proportion_confint(hits, 15_000, method="beta")
        assert (found.low, found.high) == pytest.approx((low, high), rel=2e-3)
        mirrored = mean_interval.mean_interval([(n - hit, n) for hit, n in counts])
        assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high))


def test_in_the_middle_the_interval_is_as_wide_as_datasets_of_their_own_accuracy_make_it():
    counts = [(200, 1000), (500, 1000), (800, 1000)]
    deviation = math.sqrt(sum(h / n * (1 - h / n) / n for h, n in counts)) / 3
    found = mean_interval.mean_interval(counts)
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.03)
    pooled = stats.wilson(1500, 3000)
    assert found.high - found.low < pooled.high - pooled.low


ACCURACIES = (0.001, 0.003, 0.01, 0.02, 0.1, 0.5, 0.9, 0.98, 0.99)


def coverage(count, n, accuracies, draws, seed=0):
    """Share of draws of `count` datasets whose interval holds the mean of their accuracies."""
    rng = np.random.default_rng(seed)
    hits = rng.binomial(n, accuracies, size=(draws, count))
    low, high = mean_interval.limits(hits, np.broadcast_to(n, (count,)))
    return float(((low <= np.mean(accuracies)) & (np.mean(accuracies) <= high)).mean())


def unequal(p, count):
    """Accuracies between 0.1 p and 1.9 p, or as far from 1 if p is above one half."""
    spread = np.linspace(0.1, 1.9, count)
    return p * spread if p <= 0.5 else 1 - (1 - p) * spread


def settings(draws, accuracies, seeds=1):
    for p, count, seed in itertools.product(accuracies, (3, 9, 15), range(seeds)):
        for n in (100, 500, 1000, np.resize([60, 148, 300, 711, 1000], count)):
            yield coverage(count, n, np.full(count, p), draws, seed)
            yield coverage(count, n, unequal(p, count), draws, seed)
            yield coverage(count, n, np.where(np.arange(count) % 3 == 0, p, 0.3), draws, seed)
            yield coverage(count, n, np.where(np.arange(count) % 2 == 0, p, 1 - p), draws, seed)


def test_the_interval_of_a_mean_covers_near_0_and_1_too():
    """Four mixtures of accuracies, equal and unequal sizes; 2000 draws have a deviation of 0.5 %."""
    found = list(settings(2000, (0.001, 0.01, 0.5, 0.98)))
    assert min(found) >= 0.94 - 0.005
    assert np.mean(found) >= 0.955


@pytest.mark.slow
def test_the_interval_of_a_mean_covers_everywhere():
    found = list(settings(20_000, ACCURACIES))
    assert min(found) >= 0.94


def test_the_interval_of_a_mean_covers_by_enumeration():
    """Two datasets of 30 images: every outcome, weighed by its probability."""
    grid = np.stack(np.meshgrid(np.arange(31), np.arange(31), indexing="ij"), -1).reshape(-1, 2)
    low, high = mean_interval.limits(grid, np.array([30, 30]))
    for a, b in [
        (0.01, 0.01),
        (0.02, 0.2),
        (0.001, 0.05),
        (0.5, 0.98),
        (0.01, 0.99),
        (0.3, 0.6),
        (0.95, 0.97),
    ]:
        weight = binom.pmf(grid[:, 0], 30, a) * binom.pmf(grid[:, 1], 30, b)
        assert weight[(low <= (a + b) / 2) & ((a + b) / 2 <= high)].sum() >= 0.95


def test_wilson_is_cautious_for_images_drawn_class_by_class():
    """Ten classes of 10 images each, accuracies from 5 to 95 %: coverage 99 % and more."""
    rng = np.random.default_rng(0)
    hits = rng.binomial(10, np.linspace(0.05, 0.95, 10), size=(500, 10)).sum(axis=1)
    inside = [(found := stats.wilson(int(h), 100)).low <= 0.5 <= found.high for h in hits]
    assert np.mean(inside) >= 0.985


def test_leaving_one_dataset_out():
    assert mean_interval.leave_one_out([(1, 10), (4, 10), (20, 20)]) == pytest.approx((0.25, 0.7))
    with pytest.raises(ValueError, match="two at least"):
        mean_interval.leave_one_out([(1, 10)])


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


def test_mcnemar_and_wilson_are_those_of_statsmodels():
    rng = np.random.default_rng(0)
    for _ in range(200):
        only_a, only_b = (int(x) for x in rng.integers(0, 60, size=2))
        expected = contingency_tables.mcnemar([[5, only_a], [only_b, 5]], exact=True).pvalue
        assert stats.sign_test(only_a, only_b) == pytest.approx(expected, rel=1e-12)
        assert stats.sign_test(only_a, only_b) == pytest.approx(
            binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0, rel=1e-12
        )
        found = stats.wilson(only_a, only_a + only_b + 1)
        wanted = proportion.proportion_confint(only_a, only_a + only_b + 1, method="wilson")
        assert (found.low, found.high) == pytest.approx(wanted, abs=1e-12)


def test_holm_is_that_of_statsmodels():
    p = [0.01, 0.04, 0.03, 0.005, 0.5]
    assert stats.holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])
    with_gap = stats.holm([0.01, math.nan, 0.04])
    assert with_gap[0] == pytest.approx(0.02)
    assert math.isnan(with_gap[1])


def test_holm_by_hand():
    """0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04, which may not be below 0.06."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


# --- the mean over datasets --------------------------------------------------------------------------------


def paired(only_a, only_b, n):
    return Paired(only_a, only_b, n, float(stats.sign_test(only_a, only_b)))


def test_models_that_each_win_half_the_datasets_are_not_different():
    """90 to 10 in each; the datasets have other sizes, so all images together call them different."""
    tests = [paired(90, 10, 1000), paired(10, 90, 1000)]
    assert stats.stratified(tests).p == 1.0
    won = [paired(900, 100, 4000), paired(900, 100, 4000), paired(25, 225, 1000), paired(25, 225, 1000)]
    assert stats.sign_test(sum(t.only_a for t in won), sum(t.only_b for t in won)) < 1e-50
    found = stats.stratified(won)
    assert (found.difference, found.p, found.n) == (pytest.approx(0), 1.0, 10_000)
    # the same datasets, all won by A
    assert stats.stratified([paired(90, 10, 1000), paired(90, 10, 500)]).p < 1e-10


def test_the_stratified_test_by_hand():
    found = stats.stratified([paired(12, 2, 100), paired(3, 4, 50)])
    assert found.difference == pytest.approx((0.10 - 0.02) / 2)
    z = (0.10 - 0.02 - 1 / 50) / math.sqrt(14 / 100**2 + 7 / 50**2 + 1 / 50**2)
    assert found.p == pytest.approx(math.erfc(z / math.sqrt(2)))
    assert stats.stratified([paired(0, 0, 10), paired(0, 0, 20)]).p == 1.0
    assert stats.stratified([paired(8, 2, 40)]).p == stats.sign_test(8, 2)
    with pytest.raises(ValueError, match="no datasets"):
        stats.stratified([])


def test_of_many_images_the_stratified_test_is_mcnemars_with_edwards_correction():
    rng = np.random.default_rng(0)
    for _ in range(100):
        a, b = rng.integers(80, 120, size=(2, 5))
        found = stats.stratified_p(a, b, np.full(5, 1000))
        expected = contingency_tables.mcnemar([[0, a.sum()], [b.sum(), 0]], exact=False).pvalue
        assert found == pytest.approx(expected, rel=0.02)
        assert found >= expected or a.sum() == b.sum()  # statsmodels corrects a difference of 0 too


SIZES = [(100, 100, 100), (60, 300, 1000), (60, 1000, 1000), (1000,) * 9]


@pytest.mark.parametrize("share", [0.005, 0.02, 0.15])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("tilt", [0.0, 0.8, 1.0])
def test_the_stratified_test_holds_its_level(share, sizes, tilt):
    """At 5 % and 0.1 %, with three deviations of slack, under equal means of datasets that differ or not.

    `share` of the images tell the models apart. In the first dataset A wins them the more the larger `tilt`
    is, and B wins as much in the others together.
    """
    rng, draws = np.random.default_rng(1), 8000
    n, tilted = np.array(sizes), np.array([tilt] + [-tilt / (len(sizes) - 1)] * (len(sizes) - 1))
    of_a, of_b = share * (1 + tilted) / 2, share * (1 - tilted) / 2
    won = rng.binomial(n, of_a, size=(draws, len(n)))
    lost = rng.binomial(n - won, of_b / (1 - of_a))
    p = stats.stratified_p(won, lost, n)
    for level in (0.05, 0.001):
        assert (p < level).mean() <= level + 3 * math.sqrt(level / draws)
