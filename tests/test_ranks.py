"""Rank sets, tie groups and their level, from bits; and which rows of a table are ranked together."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest
from statsmodels.stats import multitest
from test_leaderboard import SUITE, cell, row, rows, two_models

from robustbench_vlm.errors import InputError
from robustbench_vlm.results import grids, ranks


def bits(*right):
    """(M, n) bool: row i is right on the images of `right[i]`."""
    found = np.zeros((len(right), 40), dtype=bool)
    for i, images in enumerate(right):
        found[i, list(images)] = True
    return found


def test_a_clear_order_has_one_rank_each():
    found = ranks.standings([bits(range(10), range(40), range(22))])
    assert [(one.low, one.high, one.group) for one in found] == [(3, 3, "c"), (1, 1, "a"), (2, 2, "b")]


def test_ties_chain_from_row_to_row():
    """30 to 24 and 24 to 18 images are 6 against 0 (p = 0.03, with Holm 0.06); 30 to 18 is 12 against 0."""
    found = ranks.standings([bits(range(30), range(24), range(18))])
    assert [(one.low, one.high, one.group) for one in found] == [(1, 2, "a"), (1, 3, "a b"), (2, 3, "b")]
    p = ranks.adjusted([bits(range(30), range(24), range(18))])
    assert p[0, 1] == p[1, 0] == pytest.approx(2 * 2 / 2**6)
    assert p[0, 2] == pytest.approx(3 * 2 / 2**12)
    assert (np.diag(p) == 1).all()


def test_pairs_are_those_of_scipy_and_statsmodels():
    rng = np.random.default_rng(0)
    skills = np.linspace(0.3, 0.7, 7)[:, None]
    drawn = (rng.random((7, 300)) < skills) & (rng.random(300) < 0.9)
    pairs = list(itertools.combinations(range(7), 2))
    p = []
    for a, b in pairs:
        only_a, only_b = int((drawn[a] & ~drawn[b]).sum()), int((drawn[b] & ~drawn[a]).sum())
        p.append(binomtest(only_a, only_a + only_b).pvalue)
    expected = multitest.multipletests(p, method="holm")[1]
    found = ranks.adjusted([drawn])
    assert [found[pair] for pair in pairs] == pytest.approx(expected.tolist(), rel=1e-12)
    for i, one in enumerate(ranks.standings([drawn])):
        of = [(p < 0.05, drawn[j].mean() > drawn[i].mean()) for j in range(7) if j != i
              for p in [found[i, j]]]  # fmt: skip
        assert one.low == 1 + sum(differs and better for differs, better in of)
        assert one.high == 7 - sum(differs and not better for differs, better in of)


def test_the_order_of_rows_changes_nothing_but_their_places():
    rng = np.random.default_rng(3)
    parts = [rng.random((6, n)) < np.linspace(0.2, 0.8, 6)[:, None] for n in (80, 120)]
    order = rng.permutation(6)
    before, after = ranks.standings(parts), ranks.standings([part[order] for part in parts])
    assert after == [before[i] for i in order]


def test_rows_without_a_common_letter_differ():
    rng = np.random.default_rng(4)
    for _ in range(50):
        means = rng.random(9)
        differ = rng.random((9, 9)) < 0.5
        differ = np.triu(differ, 1) | np.triu(differ, 1).T
        letters = [set(group.split()) for group in ranks.tie_groups(means, differ)]
        assert all(letters)
        for i, j in itertools.combinations(range(9), 2):
            assert letters[i] & letters[j] or differ[i, j]


def test_more_groups_than_letters_have_names_of_two():
    means = np.linspace(1, 0, 30)
    names = ranks.tie_groups(means, ~np.eye(30, dtype=bool))
    assert (names[0], names[25], names[26], names[29]) == ("a", "z", "aa", "ad")


def test_equal_rows_are_tied_whatever_their_number():
    same = bits(*[range(20)] * 4)
    assert {(one.low, one.high, one.group) for one in ranks.standings([same, same])} == {(1, 4, "a")}


def test_a_mean_weighs_datasets_alike():
    """A wins 90 to 10 on a large dataset, B 23 to 3 on a small one: the means are alike, the images not."""
    large, small = np.zeros((2, 1000), dtype=bool), np.zeros((2, 250), dtype=bool)
    large[0, :90], large[1, 90:100], small[1, :23], small[0, 23:26] = True, True, True, True
    assert [one.high for one in ranks.standings([large, small])] == [2, 2]
    assert [one.high for one in ranks.standings([large])] == [1, 2]


def test_datasets_of_other_rows_are_refused():
    with pytest.raises(ValueError, match="rows"):
        ranks.standings([bits(range(3)), bits(range(3), range(4))])
    with pytest.raises(ValueError, match="0 datasets"):
        ranks.standings([])


def simulated(repetitions, models, n, seed):
    """Share of repetitions in which every true rank lies inside its rank set, under dependent verdicts."""
    rng = np.random.default_rng(seed)
    skills = np.repeat(np.linspace(0.30, 0.45, models // 2), 2)  # pairs of equal models
    inside = 0
    for _ in range(repetitions):
        shared, own = rng.random((1, n)), rng.random((models, n))
        drawn = np.where(rng.random((models, n)) < 0.8, shared, own) < skills[:, None]
        better = (skills[:, None] > skills).sum(axis=0)  # of rows with the same skill any order is true
        worse = (skills[:, None] < skills).sum(axis=0)
        found = ranks.standings([drawn])
        inside += all(
            one.low <= 1 + b and one.high >= models - w
            for one, b, w in zip(found, better, worse, strict=True)
        )
    return inside / repetitions


def test_rank_sets_hold_together():
    assert simulated(150, 10, 400, 0) >= 0.92


@pytest.mark.slow
def test_rank_sets_hold_together_often():
    assert simulated(2000, 20, 1000, 1) >= 0.95


# --- which rows are ranked together ------------------------------------------------------------------------


def test_rows_of_one_contest_are_ranked(tmp_path):
    two_models(tmp_path)
    found = rows(tmp_path)
    one = [row(found, model, "one") for model in ("defended", "clean")]  # 6 images against 0: p = 0.03
    assert [(r.rank_low, r.rank_high, r.tie_group) for r in one] == [(1, 1, "a"), (2, 2, "b")]
    two = [row(found, model, "two") for model in ("defended", "clean")]  # 4 against 1
    assert [(r.rank_low, r.rank_high, r.tie_group) for r in two] == [(1, 2, "a"), (1, 2, "a")]
    assert row(found, "defended", "mean").rank_low == 1
    assert row(found, "defended", "mean:unseen").rank_low == ""  # the other model has no such mean


def test_a_model_with_a_hole_is_ranked_where_it_has_results(tmp_path):
    two_models(tmp_path)
    cell(tmp_path, "partial", "one", 10, {})
    found = rows(tmp_path)
    assert (row(found, "partial", "one").rank_low, row(found, "partial", "one").rank_high) == (1, 2)
    assert row(found, "defended", "mean").rank_high == 1
    assert not ((found.model_id == "partial") & (found.dataset == "mean")).any()


def test_other_contests_and_single_rows_have_no_rank(tmp_path):
    cell(tmp_path, "a", "one", 9, {})
    cell(tmp_path, "b", "one", 9, {}, eps_ladder=["2/255", "4/255"])
    assert set(rows(tmp_path).rank_low) == {""}
    assert b"rank" not in grids.markdown(rows(tmp_path), SUITE)


def test_rows_that_a_rule_stopped_have_wider_intervals_and_no_rank(tmp_path):
    rule = "race 1a2b3c4d of 2 models; 10 looks of 10"
    for model, broken in (("a", {}), ("b", dict.fromkeys(range(9), "apgd-ce"))):
        cell(tmp_path, model, "one", 9, broken, stop_rule=rule)
        cell(tmp_path, model, "one", 9, broken)
    found = rows(tmp_path)
    fixed, stopped = (row(found, "a", "one", stop_rule=text) for text in ("", rule))
    assert (fixed.rank_low, stopped.rank_low) == (1, "")
    assert float(stopped.ci_low) < float(fixed.ci_low)
    titles = [title for title, _ in grids.grids(found)]
    assert [f"stopped by {rule}" in title for title in titles] == [False, True]


def test_a_stop_rule_that_cannot_be_read_is_refused(tmp_path):
    path = cell(tmp_path, "a", "one", 9, {}, stop_rule="whenever I like")
    with pytest.raises(InputError, match=r"config.stop_rule is 'whenever I like'"):
        rows(tmp_path)
    assert path.exists()
