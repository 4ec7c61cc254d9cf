"""The verdict table: what is counted from it, what is inherited, and what its fingerprint covers."""

import numpy as np
import pandas as pd

from robustbench_vlm.results import columns, verdicts
from robustbench_vlm.results.open_table import opened


def line(**changes):
    fields = {
        **{"broken": False, "target": -1, "restart": 0, "iteration": -1, "forwards": 5, "backwards": 4},
        **{"prediction": 0, "margin": 0.5, "zero_gradients": 0, "error": "", "distance": 0.01},
        **{"adv_sha256": "aa", "progress": 0.25},
    }
    return fields | changes


def enter(table, i, line, stage, eps):
    """One finding."""
    with opened(table, eps) as entries:
        entries.enter(i, line, stage)


def by_hand():
    """Five images: wrong when clean, robust, broken first, broken second, and without verdict."""
    labels = np.array([1, 0, 0, 0, 0])
    margins = np.array([-1, 1, 1, 1, 1], dtype=np.float32)
    found = verdicts.begin(list("abcde"), labels, ["s"] * 5, np.zeros(5, dtype=np.int64), margins)
    for i in (1, 3):
        enter(found, i, line(), "one", "4/255")
    enter(found, 2, line(broken=True, prediction=1, margin=-0.5, iteration=3), "one", "4/255")
    enter(found, 4, line(error="one: not finite", margin=None, zero_gradients=1), "one", "4/255")
    enter(found, 1, line(), "two", "4/255")
    enter(found, 3, line(broken=True, prediction=2, target=2, restart=1), "two", "4/255")
    return found


def test_every_column_has_its_meaning():
    assert list(by_hand()) == list(columns.VERDICTS)


def test_the_counts_of_a_table_made_by_hand():
    found = by_hand()
    assert found.clean_correct.tolist() == [False, True, True, True, True]
    assert verdicts.standing(found).tolist() == [False, True, False, False, False]
    assert verdicts.robust_after(found, ["one", "two"], "4/255") == {"one": 2, "two": 1}
    assert found.broken_by.tolist() == ["", "", "one", "two", ""]
    assert found.forwards.tolist() == [0, 10, 5, 10, 5]
    assert (found.target[3], found.restart[3], found.iteration[2]) == (2, 1, 3)
    assert verdicts.zero_gradient_share(found) == 1 / 4
    assert verdicts.largest_prediction_share(found) == 1.0
    assert np.isnan(found.adv_margin[4])


def test_the_mean_over_classes_by_hand():
    """Class 0 has images b to e: 4 of 4 right, 1 of 4 robust; class 1 has image a alone, wrong when clean."""
    found = by_hand()
    assert verdicts.per_class(found) == ((1 + 0) / 2, (1 / 4 + 0) / 2)
    found["label"] = [1, 1, 0, 0, 2]  # 1: a wrong, b robust; 0: c, d broken; 2: e without verdict
    assert verdicts.per_class(found) == ((1 / 2 + 1 + 1) / 3, (1 / 2 + 0 + 0) / 3)


def test_progress_is_the_greatest_rise_over_the_stages_whose_gradients_did_not_break_an_image():
    found = by_hand()
    enter(found, 1, line(progress=0.0), "three", "4/255")  # it rose in the two stages before
    enter(found, 3, line(progress=0.0, backwards=0), "three", "4/255")  # black box: says nothing
    # wrong when clean, broken by a gradient at once or later, without verdict
    assert np.isnan(found.progress[[0, 2, 3, 4]]).all()
    assert found.progress[1] == 0.25
    assert verdicts.no_progress_share(found) == 0
    assert verdicts.no_progress_share(found[:1]) == 0


def test_an_image_whose_objective_never_rises_counts_until_a_gradient_breaks_it():
    found = verdicts.begin(list("ab"), np.zeros(2, int), ["s"] * 2, np.zeros(2, int), np.ones(2, np.float32))
    for i in (0, 1):
        enter(found, i, line(progress=0.0), "ce", "4/255")  # saturated
    assert verdicts.no_progress_share(found) == 1
    enter(found, 0, line(broken=True, prediction=1, progress=2.0), "dlr", "4/255")
    enter(found, 1, line(progress=2.0), "dlr", "4/255")
    assert verdicts.no_progress_share(found) == 0


def test_few_zero_gradients_of_an_image_can_be_left_out():
    found = verdicts.begin(list("ab"), np.zeros(2, int), ["s"] * 2, np.zeros(2, int), np.ones(2, np.float32))
    enter(found, 0, line(zero_gradients=2), "one", "4/255")  # of 4
    enter(found, 1, line(zero_gradients=3), "one", "4/255")
    assert [verdicts.zero_gradient_share(found, least) for least in (0, 0.5, 0.75)] == [1, 0.5, 0]


def test_broken_images_are_counted_by_stage_and_radius():
    found = by_hand()
    assert verdicts.broken_in(found, ["two", "three"], "4/255") == 1
    assert verdicts.broken_in(found, ["two"], "8/255") == 0


def test_ledgers_of_the_first_version_go_on():
    found = by_hand()
    old = {name: value for name, value in line().items() if name != "progress"}
    enter(found, 1, old, "three", "4/255")
    assert found.progress[1] == 0.25


def test_an_image_lost_at_a_smaller_radius_stays_lost_with_its_evidence():
    small = by_hand()
    lost = small[small.broken_at_eps != ""]
    again = verdicts.begin(
        list("abcde"), np.array([1, 0, 0, 0, 0]), ["s"] * 5, np.zeros(5, dtype=np.int64), np.ones(5), lost
    )
    assert again.broken_at_eps.tolist() == ["", "", "4/255", "4/255", ""]
    assert again.adv_sha256[2] == "aa"
    assert again.adv_prediction.tolist() == [0, 0, 1, 2, 0]
    assert again.forwards.sum() == 0
    assert verdicts.robust_after(again, ["one", "two"], "8/255") == {"one": 2, "two": 2}


def test_logits_that_are_not_finite_are_errors_before_any_attack():
    margins = np.array([1, np.nan, np.inf], dtype=np.float32)
    found = verdicts.begin(list("abc"), np.zeros(3, dtype=np.int64), ["s"] * 3, np.zeros(3), margins)
    assert found.clean_correct.tolist() == [True, False, False]
    assert (found.error != "").tolist() == [False, True, True]
    assert verdicts.robust_after(found, ["x"], "4/255") == {"x": 1}


def test_the_fingerprint_changes_with_evidence_and_not_with_the_way_through_parquet(tmp_path):
    found = by_hand()
    found.to_parquet(tmp_path / "t.parquet", index=False)
    assert verdicts.sha256(pd.read_parquet(tmp_path / "t.parquet")) == verdicts.sha256(found)
    for column, value in (("adv_sha256", "bb"), ("error", "x"), ("broken_by", ""), ("label", 5)):
        other = found.copy()
        other.loc[2, column] = value
        assert verdicts.sha256(other) != verdicts.sha256(found), column
    slower = found.copy()
    slower.loc[2, "forwards"] = 999  # cost is told, but is no evidence
    assert verdicts.sha256(slower) == verdicts.sha256(found)
