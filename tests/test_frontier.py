"""Frontier studies: fronts and intervals by hand, the rule, the ledger of outcomes, and a small one run."""

import json
import math
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from command_line import run_command
from hypothesis import given, settings
from hypothesis import strategies as st

from robustbench_vlm import one_writer, store
from robustbench_vlm.backends.backend import NATIVE
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.study import Rule, Study
from robustbench_vlm.errors import CardError, DataError, Incomplete, InputError, VlmrobError
from robustbench_vlm.evaluation.worker import Failed
from robustbench_vlm.studies import work_off
from robustbench_vlm.studies.frontier import choice, curves, files, fronts, outcomes, resampling
from robustbench_vlm.studies.frontier.choice import Candidate
from robustbench_vlm.studies.frontier.compared import compared
from robustbench_vlm.studies.frontier.outcomes import OnDataset, Outcome
from robustbench_vlm.studies.frontier.report import Report
from robustbench_vlm.studies.frontier.resampling import Models
from robustbench_vlm.studies.frontier.sections import sections
from robustbench_vlm.studies.frontier.trials import Judging, fingerprint, trained, trials
from robustbench_vlm.studies.task import Resources

POINTS = np.array([[90.0, 30.0], [80.0, 40.0], [85.0, 30.0], [80.0, 35.0], [70.0, 42.0], [90.0, 30.0]])


# --- fronts, by hand ---------------------------------------------------------------------------------------


def test_a_point_that_another_one_dominates_is_not_on_the_front():
    """(85, 30) and (80, 35) are dominated; of the two equal points the first counts."""
    assert fronts.on_front(POINTS).tolist() == [4, 1, 0]
    assert fronts.front(POINTS).tolist() == [[70, 42], [80, 40], [90, 30]]


@pytest.mark.parametrize(
    ("kind", "level", "expected"),
    [
        (fronts.CLEAN, 85, 35),
        (fronts.CLEAN, 75, 41),
        (fronts.CLEAN, 90, 30),
        (fronts.CLEAN, 60, 42),  # (70, 42) has more
        (fronts.CLEAN, 90.1, math.nan),
        (fronts.ROBUST, 35, 85),
        (fronts.ROBUST, 41, 75),
        (fronts.ROBUST, 29, 90),
        (fronts.ROBUST, 42.1, math.nan),
    ],
)
def test_accuracy_at_equal_accuracy_is_linear_between_neighbours_and_never_read_beyond(kind, level, expected):
    assert fronts.at_equal(fronts.front(POINTS), kind, level) == pytest.approx(expected, nan_ok=True)


def test_the_height_of_a_front_is_its_mean_over_clean_accuracies():
    """From 75 to 85: trapezoids (41 + 40) / 2 * 5 and (40 + 35) / 2 * 5, over 10."""
    own = fronts.front(POINTS)
    assert fronts.height(own, 75, 85) == pytest.approx((40.5 * 5 + 37.5 * 5) / 10)
    assert fronts.height(own, 80, 80) == 40
    assert fronts.height(own, 60, 80) == pytest.approx((42 * 10 + 41 * 10) / 20)
    assert math.isnan(fronts.height(own, 80, 91))
    assert fronts.common_range(own, np.array([[75.0, 50.0], [95.0, 10.0]])) == (75, 90)
    assert fronts.common_range(own, np.array([[95.0, 10.0]])) == (95, 90)  # nothing


def test_a_front_is_above_another_one_over_what_both_have_of_an_interval():
    a, b = np.array([[70.0, 40.0], [90.0, 20.0]]), np.array([[75.0, 30.0], [95.0, 10.0]])
    assert fronts.above(a, b, (75, 100)) == pytest.approx(5)  # a falls from 35 to 20, b from 30 to 15
    assert fronts.above(a, b, (70, 80)) == pytest.approx(5)  # b begins at 75
    assert math.isnan(fronts.above(a, b, (70, 74)))
    assert fronts.above(a, a - [0, 10], (80, 85)) == pytest.approx(10)
    assert fronts.above(a, b, (80, 200), fronts.ROBUST) is math.nan  # nothing is so robust
    assert fronts.above(a, b, (25, 200), fronts.ROBUST) == pytest.approx(5)  # 80 to 85 % clean, 75 to 80
    point = np.array([[91.0, 50.0]])  # better than all of a, and nowhere as clean as a point of it
    assert math.isnan(fronts.above(point, a, (70, 90)))


def test_the_hypervolume_is_the_area_between_front_and_reference():
    """(70-60)(42-20) + (80-70)(40-20) + (90-80)(30-20) = 220 + 200 + 100."""
    assert fronts.hypervolume(POINTS, (60, 20)) == pytest.approx(520)
    assert fronts.hypervolume(POINTS, (85, 20)) == pytest.approx(50)
    assert fronts.hypervolume(POINTS, (95, 20)) == 0


coordinates = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda p: (float(p[0]), float(p[1]))),
    min_size=1,
    max_size=12,
).map(np.array)


@given(coordinates)
def test_every_point_is_dominated_by_the_front_and_no_front_point_by_another(points):
    own = fronts.front(points)
    assert (np.diff(own[:, 0]) > 0).all()
    assert (np.diff(own[:, 1]) < 0).all()
    for point in points:
        assert (own >= point).all(axis=1).any()


@given(coordinates)
def test_the_hypervolume_is_the_number_of_dominated_unit_squares(points):
    """Points on a grid: unit squares between (0, 0) and the points can be counted one by one."""
    count = sum(any(x + 1 <= p[0] and y + 1 <= p[1] for p in points) for x in range(20) for y in range(20))
    assert fronts.hypervolume(points, (0, 0)) == count


# --- intervals ---------------------------------------------------------------------------------------------


def models(seeds, images, rng, chance=0.5, effect=0.0):
    """Verdicts of one interpolation; every seed and image has its own chance, `effect` moves all of them."""
    own = (
        chance
        + effect
        + rng.normal(0, 0.03, size=(seeds, 1, 1, 1))
        + rng.normal(0, 0.1, size=(1, 1, 1, images))
    )
    return Models({"a": rng.random((seeds, 1, 2, images)) < own})


def estimate(models, statistic, draws=resampling.DRAWS):
    return resampling.estimates(models, lambda points: [statistic(points)], draws=draws)[0]


def gap(points):
    return float(points[0][0, 1] - points[1][0, 1])


def test_a_difference_of_equal_models_is_zero_and_has_no_width():
    one = models(3, 200, np.random.default_rng(0))
    found = estimate([one, one], gap, draws=200)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_with_one_seed_the_interval_is_that_of_the_images():
    """A proportion of n images has standard error sqrt(q (1 - q) / n): 100 * 1.96 * 0.0158 = 3.1 points."""
    bits = np.arange(1000) % 2 == 0
    one = Models({"a": np.stack([bits, bits])[None, None]})
    found = estimate([one], lambda p: float(p[0][0, 0]))
    assert found.value == 50
    assert found.high - found.low == pytest.approx(2 * 1.96 * 100 * math.sqrt(0.25 / 1000), rel=0.06)


def test_a_draw_is_a_sum_of_whole_numbers_and_the_same_on_every_machine():
    """Three seeds and two datasets, counted one by one: no fraction is added in another order."""
    rng = np.random.default_rng(1)
    one = Models({"a": rng.random((3, 2, 2, 3001)) < 0.4, "b": rng.random((3, 2, 2, 700)) < 0.7})
    of_seeds, of_sets = resampling._counts(3, (3001, 700), 20)
    (found,) = resampling._draws([one], 20)
    for draw in range(20):
        total = 0
        for bits, of_images in zip(one.verdicts.values(), of_sets, strict=True):
            times = of_images[draw].astype(np.int64)
            right = (bits * times).sum(axis=3) * of_seeds[draw].astype(np.int64)[:, None, None]
            total = total + right.sum(axis=0) / (2 * bits.shape[-1])
        assert (found[draw] == 100 * total / 2).all()


def test_models_on_other_images_are_not_paired():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="cannot be paired"):
        estimate([models(2, 50, rng), models(2, 60, rng)], gap)
    with pytest.raises(ValueError, match="cannot be paired"):
        estimate([models(2, 50, rng), models(3, 50, rng)], gap)


def test_a_statistic_that_is_often_without_value_has_no_interval():
    one = models(2, 50, np.random.default_rng(0))
    found = estimate([one], lambda p: math.nan if p[0][0, 0] > 50 else 1.0, draws=200)
    assert math.isnan(found.low)
    assert math.isnan(found.p)


@pytest.mark.slow
def test_the_interval_over_seeds_and_images_covers_the_truth():
    """400 pairs of methods with a true difference of 5 points, five seeds: some 95 % of intervals have it."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(400):
        pair = [models(5, 300, rng, effect=0.05), models(5, 300, rng)]
        found = estimate(pair, gap, draws=400)
        hits += found.low <= 5 <= found.high
    assert 0.90 <= hits / 400 <= 0.99


# --- curves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "at"), [(30, 0), (50, 30), (70, 40), (70.5, None), (60, 35), (40, 25), (20, 0)]
)
def test_a_level_is_reached_where_the_curve_stays_above_it(level, at):
    """A clean accuracy: 90 before training, down to 30, up to 70."""
    assert curves.settled_at([0, 10, 20, 30, 40], [90, 40, 30, 50, 70], level) == at


def run_of(curve, seconds=1.0):
    return Outcome({}, tuple(curve), seconds, (0.0, 0.0))


def test_a_speed_up_is_the_others_steps_over_the_own_ones():
    """The other ends at 40 % robust after 20 steps; the own curve is there at step 10, in steps twice as
    long."""
    other = run_of([(0, 0.9, 0.0), (10, 0.6, 0.2), (20, 0.8, 0.4)])
    own = run_of([(0, 0.9, 0.0), (10, 0.7, 0.4), (20, 0.9, 0.6)], 2.0)
    found = {(s.kind, round(s.level, 6)): s for s in curves.speeds([own], [other])}
    assert found["robust", 40].steps.value == pytest.approx(2)
    assert found["robust", 40].time.value == pytest.approx(1)
    assert found["robust", 32].steps.value == pytest.approx((10 + 10 * 12 / 20) / 8)
    assert found["clean", 80].steps.value == pytest.approx(20 / 15)
    assert curves.speeds([other], [own])[3].steps is None  # 40 of 60 %: it never gets there


def test_a_level_is_that_of_the_runs_of_one_seed():
    """B ends at 40 and at 50 %, A reaches these at 150 and 200 of 200 steps; the levels are 45 on average."""
    b = [outcome_with_curve(0.4), outcome_with_curve(0.5)]
    a = [outcome_with_curve(0.4 * 200 / 150), outcome_with_curve(0.5)]
    last = curves.speeds(a, b)[3]
    assert (last.kind, last.reached) == ("robust", 2)
    assert last.level == pytest.approx(45)
    assert last.steps.value == pytest.approx(math.sqrt(200 / 150 * 1))


def test_a_level_that_a_method_never_loses_is_no_speed_up():
    """A starts at 90 % clean and ends at 90 %, B falls to 50 and comes back to 80 %."""
    a = Outcome({}, ((0, 0.9, 0.0), (100, 0.85, 0.3), (200, 0.9, 0.4)), 0.3, (0.1, 0.1))
    b = Outcome({}, ((0, 0.9, 0.0), (100, 0.5, 0.3), (200, 0.8, 0.4)), 0.3, (0.1, 0.1))
    clean = [speed for speed in curves.speeds([a], [b]) if speed.kind == "clean"]
    assert {(speed.held, speed.steps) for speed in clean} == {(1, None)}


def outcome_with_curve(robust):
    """Robust accuracy rises from 0 at step 0, linearly."""
    return Outcome({}, ((0, 0.9, 0.0), (200, 0.9, robust)), 0.3, (0.1, 0.1))


@pytest.fixture
def few_draws(monkeypatch):
    """Intervals of a tenth of the draws, where none of them is looked at."""
    monkeypatch.setitem(resampling.estimates.__kwdefaults__, "draws", 200)
    monkeypatch.setattr(resampling, "DRAWS", 200)


# --- the card ----------------------------------------------------------------------------------------------


def card(**changes):
    table = reader.toml(reader.path("studies", "frontier"))
    wanted = ("single-teacher", "mmt-ard-static", "mmt-ard-released")
    methods = [method for method in table["method"] if method["name"] in wanted]
    small = [method | {"grid": {"inner.eps": ["4/255", "6/255"]}} for method in methods]
    pair = {"title": "two above one", "a": list(wanted[1:]), "b": ["single-teacher"]}
    usual = {"method": small, "comparison": [pair], "seeds": [0, 1, 2], "interpolation": [1.0, 0.5]}
    return reader.parse(table | usual | changes, Study, "a test")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": []}, "seeds must differ, and there must be one"),
        ({"repeats": 9}, "repeats = 9, and there are 3 seeds"),
        ({"interpolation": [0.5]}, "interpolation must have 1.0"),
        ({"interpolation": [1.0, 0.0]}, "interpolation.1"),
        ({"comparison": [{"title": "x", "a": ["nobody"], "b": ["tecoa"]}]}, "which is no method"),
        ({"comparison": []}, "claims stand beside the first comparison"),
        ({"rule": {"highest": "robust", "fixed": "2026-01-01"}}, "floor goes with"),
        ({"rule": {"highest": "mean", "floor": 80, "fixed": "2026-01-01"}}, "floor goes with"),
        ({"method": [{"name": "a/b", "title": "", "recipe": "x"}]}, "letters, digits"),
        ({"method": [{"name": "a", "title": "", "recipe": "x", "grid": {"optim.lr": []}}]}, "grid.optim.lr"),
        ({"kindd": "x"}, "unknown key 'kindd'"),
    ],
)
def test_a_frontier_study_that_cannot_be_is_one_line(changes, words):
    with pytest.raises(CardError, match=re.escape(words)) as error:
        card(**changes)
    assert "\n" not in str(error.value)


def test_every_study_has_trials_that_differ_and_as_many_for_what_is_compared_first(tmp_path):
    """As many for each method, or for both families together."""
    for study in (reader.read("studies", name, Study) for name in reader.names("studies")):
        found = choice.tried(study, tmp_path, {})
        folders = [trial.folder for one in found for trial in one.trials]
        assert len(set(folders)) == len(folders)
        numbers = {one.method.name: len(one.trials) for one in found}
        first = study.comparison[0]
        both = {sum(numbers[name] for name in family) for family in (first.a, first.b)}
        assert len({numbers[name] for name in study.compared}) == 1 or len(both) == 1
        for measurement in (study.validation, *study.test):
            assert set(measurement.datasets) <= set(reader.suite(measurement.suite).datasets)
        assert reader.suite(study.validation.suite).split != "test"


def test_trials_that_are_one_recipe_are_refused(tmp_path):
    study = card()
    twice = study.method[0].model_copy(update={"grid": {"optim.lr": ("1e-3", "0.001")}})
    with pytest.raises(CardError, match="trials 1 and 2 are one recipe"):
        trials(study, twice, tmp_path, 0)
    with pytest.raises(CardError, match="the study's own list"):
        trials(study, study.method[0].model_copy(update={"set": ("interpolation=0.5",)}), tmp_path, 0)


def test_a_measurement_is_known_by_what_the_model_sees(monkeypatch):
    """Other sentences or another engine are another measurement, another licence is not."""
    measurement = card().validation
    first, read = fingerprint(measurement), reader.read

    def changed(**changes):
        def other(kind, name, record):
            found = read(kind, name, record)
            return found.model_copy(update=changes) if kind == "datasets" else found

        with monkeypatch.context() as patch:
            patch.setattr(reader, "read", other)
            return fingerprint(measurement)

    assert changed(licence="another", notes=("x",)) == first
    assert changed(templates=("no {c}",)) != first
    assert changed(names=("a",)) != first
    monkeypatch.setitem(NATIVE, "fast", "native/0")
    assert fingerprint(measurement) != first


def test_a_trial_goes_on_when_its_recipe_is_reworded(tmp_path):
    """The folder is refused by what is in it if the recipe of the run has another fingerprint."""
    method = card().method[0]
    text = reader.path("recipes", method.recipe).read_text("utf-8")
    found = []
    for name, title in (("before", "One teacher"), ("after", "A single teacher")):
        file = tmp_path / name / "tiny-single-teacher.toml"
        store.write(file, re.sub(r'(?m)^title = ".*"', f'title = "{title}"', text).encode())
        found += trials(card(), method.model_copy(update={"recipe": str(file)}), tmp_path, 0)[:1]
    before, after = found
    assert before.folder == after.folder
    assert before.recipe.fingerprint == after.recipe.fingerprint


def test_another_title_of_a_recipe_is_the_same_trial(tmp_path):
    recipe = trials(card(), card().method[0], tmp_path, 0)[0].recipe
    assert trained(recipe.model_copy(update={"title": "x", "checkpoint_every": 7})) == trained(recipe)
    assert trained(recipe.model_copy(update={"seed": 5})) != trained(recipe)


def test_a_teacher_of_the_study_is_known_by_its_recipe_and_not_by_its_folder(tmp_path):
    teacher = {"name": "weak", "recipe": "tiny-tecoa", "set": ["optim.steps=50"]}
    method = card().method[0].model_copy(update={"set": ("teachers.robust=@weak",)})
    study = card(teacher=[teacher])
    here, there = (trials(study, method, tmp_path / name, 0)[0] for name in ("here", "there"))
    assert here.sha256 == there.sha256
    assert [one.name for one in here.needs] == ["weak"]
    assert here.recipe.teachers["robust"] == str(here.needs[0].model)
    assert here.needs[0].recipe.optim.steps == 50
    longer = card(teacher=[teacher | {"set": ["optim.steps=60"]}])
    assert trials(longer, method, tmp_path, 0)[0].sha256 != here.sha256
    with pytest.raises(CardError, match=r"no teacher 'weak' of the study"):
        trials(card(), method, tmp_path, 0)


def test_a_teacher_of_the_study_may_teach_first(tmp_path):
    method = card().method[1]
    staged = method.model_copy(
        update={"set": (*method.set, "phases.robust=[{ until = 0.3, model = '@early' }]")}
    )
    study = card(teacher=[{"name": "early", "recipe": "tiny-tecoa", "set": ["optim.steps=50"]}])
    trial = trials(study, staged, tmp_path, 0)[0]
    (phase,) = trial.recipe.phases["robust"]
    assert (phase.until, phase.model) == (0.3, str(trial.needs[0].model))
    assert trial.recipe.models == ("tiny", "tiny-robust-teacher", "tiny-clean-teacher", phase.model)
    assert trial.sha256 == trials(study, staged, tmp_path / "elsewhere", 0)[0].sha256


def test_the_command_of_a_trial_can_be_typed(tmp_path):
    """Settings may have quotes; a trial that needs a teacher of the study is made by the study."""
    study = card(set=["teachers.robust=it's here"])
    words = shlex.split(trials(study, study.method[0], tmp_path, 0)[1].command(0.5, study))
    assert words[:5] == ["vlmrob", "train", "single-teacher", "--recipe", "tiny-single-teacher"]
    assert words[5:] == [
        word
        for change in ["teachers.robust=it's here", "inner.eps=6/255", "seed=0", "interpolation=0.5"]
        for word in ("--set", change)
    ]
    method = card().method[0].model_copy(update={"set": ("student=@weak",)})
    study = card(teacher=[{"name": "weak", "recipe": "tiny-tecoa"}])
    trial = trials(study, method, tmp_path, 0)[0]
    assert trial.command(1.0, study) == "vlmrob study frontier --method single-teacher"
    assert trial.start == "weak"


# --- the rule ----------------------------------------------------------------------------------------------


def candidate(clean, robust):
    return Candidate(None, 1.0, clean, robust)


def test_the_rule_by_hand():
    a, b, c = candidate(90, 30), candidate(80, 41), candidate(85, 36)
    mean = Rule(highest="mean", fixed="2026-01-01")
    assert choice.chosen(mean, [a, b, c]) == c or choice.value(mean, b) == choice.value(mean, c) == 60.5
    assert choice.chosen(mean, [a, b, c]) == b  # 60.5 twice: the first in order
    floored = Rule(highest="robust", floor=84, fixed="2026-01-01")
    assert choice.chosen(floored, [a, b, c]) == c
    assert choice.chosen(Rule(highest="clean", floor=40, fixed="2026-01-01"), [a, b, c]) == b
    assert choice.chosen(Rule(highest="clean", floor=50, fixed="2026-01-01"), [a, b, c]) is None


# --- a ledger made by hand ---------------------------------------------------------------------------------


def bits(share, n, seed):
    """Verdicts with exactly that share right; other seeds have other images right."""
    order = np.random.default_rng(seed).permutation(n)
    found = np.zeros(n, dtype=bool)
    found[order[: round(share * n)]] = True
    return found


def on(share_clean, share_robust, seed, exposure="seen", n=200):
    return OnDataset("keys", exposure, bits(share_clean, n, seed), bits(share_robust, n, seed))


ACCURACIES = {  # method -> trial -> interpolation -> clean, robust
    "single-teacher": {1: {1.0: (0.80, 0.40), 0.5: (0.90, 0.25)}, 2: {1.0: (0.70, 0.42), 0.5: (0.85, 0.30)}},
    "mmt-ard-static": {1: {1.0: (0.82, 0.44), 0.5: (0.92, 0.30)}, 2: {1.0: (0.75, 0.46), 0.5: (0.88, 0.36)}},
    "mmt-ard-released": {1: {1.0: (0.81, 0.40), 0.5: (0.9, 0.26)}, 2: {1.0: (0.71, 0.41), 0.5: (0.8, 0.3)}},
}


def ledger(study, tmp_path, *, tested=True):
    """Outcomes of every trial, and of the chosen ones with all seeds."""
    known = {}
    for method in study.method:
        for seed in study.seeds:
            for trial in trials(study, method, tmp_path, seed):
                for share in study.interpolation:
                    clean, robust = ACCURACIES[method.name][trial.number][share]
                    curve = ((0, 0.94, 0.01), (100, clean - 0.1, robust - 0.1), (200, clean, robust))
                    if seed == 0 or tested:
                        one = Outcome({"v": on(clean, robust, 7)}, curve, 0.3, (0.1, 0.1))
                        known[Judging(trial, share, study.validation).id] = one
                    if tested:
                        sets = {
                            "s": on(clean, robust, seed),
                            "u": on(clean - 0.2, robust - 0.1, seed, "unseen"),
                        }
                        one = Outcome(sets, curve, 0.3, (0.1, 0.1))
                        for test in study.test:
                            known[Judging(trial, share, test).id] = one
    return known


def test_a_family_whose_member_reaches_no_floor_is_compared_by_the_others(tmp_path):
    """Only static has a point with at least 91 % clean."""
    floor = {"highest": "robust", "floor": 91, "fixed": "2026-01-01"}
    study = card(rule=floor, test=[LINE])
    report = Report(study, tmp_path, ledger(study, tmp_path))
    assert {name: one and one.trial.number for name, one in report.choices.items()} == {
        "single-teacher": None,
        "mmt-ard-static": 1,
        "mmt-ard-released": None,
    }
    assert choice.contenders(study, report.choices) == {"mmt-ard-static"}
    text = files.markdown(study, list(sections(report))).decode()
    assert "| single-teacher | no trial reaches the floor |" in text


def test_validation_outcomes_of_a_trial_that_is_gone_are_no_hidden_tests(tmp_path):
    study = card(test=[LINE])
    known = ledger(study, tmp_path, tested=False)
    fewer = study.method[0].model_copy(update={"grid": {"inner.eps": ("4/255",)}})
    now = study.model_copy(update={"method": (fewer, *study.method[1:])})
    assert Report(now, tmp_path, known).hidden == 0


def test_sets_are_seen_or_unseen_if_they_are_so_for_every_model(tmp_path):
    study = card(test=[LINE])
    known = ledger(study, tmp_path)
    trial = trials(study, study.method[0], tmp_path, 1)[0]
    id_ = Judging(trial, 1.0, study.test[0]).id
    met = {name: replace(one, exposure="unknown") for name, one in known[id_].datasets.items() if name == "u"}
    known[id_] = replace(known[id_], datasets={**known[id_].datasets, **met})
    report = Report(study, tmp_path, known)
    assert report.names(study.test[0], "seen") == ["s"]
    assert report.names(study.test[0], "unseen") == []
    pair = compared(report, study.comparison[0])
    assert {one.part for one in pair.statements} == {"seen", "validation"}


LINE = {"attack": "pgd20", "suite": "tiny", "n": 0, "of": "line"}
FRONT = {"attack": "pgd20", "suite": "tiny", "n": 7, "of": "front"}


def test_the_contender_of_a_family_is_the_one_that_the_rule_prefers(tmp_path):
    study = card()
    report = Report(study, tmp_path, ledger(study, tmp_path))
    assert {name: (best.trial.number, best.share) for name, best in report.made.items()} == {
        "single-teacher": (1, 1.0),
        "mmt-ard-static": (1, 1.0),
        "mmt-ard-released": (1, 1.0),
    }
    assert choice.contenders(study, report.made) == {"single-teacher", "mmt-ard-static"}


@pytest.mark.usefixtures("few_draws")
def test_differences_at_the_points_and_at_equal_clean_accuracy_by_hand(tmp_path):
    """Points: 82 / 44 against 80 / 40. Fronts: A (82, 44) to (92, 30), B (80, 40) to (90, 25).

    From 82 to 90 % clean A falls from 44 to 32.8, and B from 37 to 25. From 30 to 40 % robust A falls from
    92 to 84.857 % clean, and B from 86.667 to 80.
    """
    study = card(test=[LINE])
    pair = compared(Report(study, tmp_path, ledger(study, tmp_path)), study.comparison[0])
    assert (pair.a, pair.b) == ("mmt-ard-static", "single-teacher")
    tested = [s for s in pair.statements if s.part != "validation"]
    assert {(s.part, s.seeds, s.images) for s in tested} == {("seen", 3, 200), ("unseen", 3, 200)}
    found = {(s.part, s.what): s.estimate.value for s in pair.statements}
    assert found["seen", "clean accuracy at the operating points"] == pytest.approx(2)
    assert found["seen", "robust accuracy at the operating points"] == pytest.approx(4)
    equal = "robust accuracy at equal clean accuracy, mean over 82.0 to 90.0 %"
    assert found["seen", equal] == pytest.approx((44 + 32.8) / 2 - (37 + 25) / 2)
    reverse = "clean accuracy at equal robust accuracy, mean over 30.0 to 40.0 %"
    found_above = (92 + 84.857) / 2 - (86.667 + 80) / 2
    assert found["seen", reverse] == pytest.approx(found_above, abs=1e-3)
    assert all(s.estimate.low <= s.estimate.value <= s.estimate.high for s in pair.statements)


@pytest.mark.usefixtures("few_draws")
def test_fronts_that_share_less_than_a_point_are_not_compared(tmp_path, monkeypatch):
    """B ends at 82.5 % clean, where A begins at 82, and at 30.5 % robust, where A begins at 30."""
    narrow = {**ACCURACIES, "single-teacher": {n: {1.0: (0.8, 0.305), 0.5: (0.825, 0.25)} for n in (1, 2)}}
    monkeypatch.setitem(globals(), "ACCURACIES", narrow)
    study = card(test=[LINE])
    pair = compared(Report(study, tmp_path, ledger(study, tmp_path)), study.comparison[0])
    assert {s.equal for s in pair.statements if s.part != "validation"} == {""}


def opening(study, tmp_path):
    (first, *_) = sections(Report(study, tmp_path, ledger(study, tmp_path)))
    assert first.title == "In short"
    return first


def test_the_page_opens_with_a_sentence_for_each_comparison(tmp_path):
    whole = opening(card(test=[LINE]), tmp_path)
    start, above = "two above one: the front of mmt-ard-static", "lies above that of single-teacher on"
    assert whole.sentences[0] == f"{start} {above} seen, unseen and validation images."
    cells = dict(zip(whole.columns, (cell.text for cell in whole.rows[0]), strict=True))
    assert cells["comparison"] == "two above one"
    assert cells["seen: robust at equal clean"].startswith("+7.4 [")
    points = opening(
        card(test=[LINE | {"of": "chosen"}]), tmp_path
    )  # one point of each: no front on the test
    assert points.sentences[0] == f"{start} {above} validation images."
    assert points.columns[1:] == ("validation: robust at equal clean", "validation: clean at equal robust")
    study = card(test=[], claim=[], interpolation=[1.0])
    short = [m.model_copy(update={"grid": {"inner.eps": ("4/255",)}}) for m in study.method]
    single = opening(study.model_copy(update={"method": tuple(short)}), tmp_path)
    said = "two above one: the fronts of mmt-ard-static and single-teacher share too little for a statement."
    assert (single.sentences, single.columns) == ((said,), ("comparison",))


def test_what_cannot_be_told_apart_is_said_so(tmp_path):
    """The same methods, compared the other way, and one with itself under another name."""
    study = card(test=[LINE], comparison=[{"title": "x", "a": ["single-teacher"], "b": ["mmt-ard-static"]}])
    below = opening(study, tmp_path).sentences[0]
    assert below.startswith("x: the front of single-teacher lies below that of mmt-ard-static on seen,")
    near = {"title": "y", "a": ["mmt-ard-released"], "b": ["single-teacher"]}
    same = opening(card(test=[LINE], comparison=[near]), tmp_path).sentences[0]
    assert "the front of mmt-ard-released lies above that of single-teacher on unseen images" not in same
    assert "cannot be told from that of single-teacher on" in same


@pytest.mark.usefixtures("few_draws")
def test_fronts_are_compared_on_all_that_lies_on_them_in_validation(tmp_path):
    """On validation A has 82 / 44, 92 / 30, 75 / 46 and 88 / 36; B has 80 / 40, 90 / 25, 70 / 42 and 85 / 30.

    None of them is dominated by another one of its method, (85, 30) of B included: between its neighbours
    (80, 40) and (90, 25) the front would be at 32.5.
    """
    study = card(test=[LINE, FRONT])
    report = Report(study, tmp_path, ledger(study, tmp_path))
    points = choice.measured(study.test[1], report.of("single-teacher"), report.made["single-teacher"])
    assert [(one.trial.number, one.share) for one in points] == [(2, 1.0), (1, 1.0), (2, 0.5), (1, 0.5)]
    judged = [j for j in choice.judgings_of_chosen(study, tmp_path, report.tried) if j.measurement.n == 7]
    assert {j.trial.method for j in judged} == {
        "single-teacher",
        "mmt-ard-static",
    }  # not released: no contender
    assert len(judged) == 2 * 4 * 3  # methods, points, seeds
    pair = compared(report, study.comparison[0])
    found = {(s.part, s.what): s.estimate.value for s in pair.statements}
    # From 75 to 90 % clean. A: 46, 44 at 82, 36 at 88, 33 at 90. B: 41, 40 at 80, 30 at 85, 25.
    a = (7 * (46 + 44) / 2 + 6 * (44 + 36) / 2 + 2 * (36 + 33) / 2) / 15
    b = (5 * (41 + 40) / 2 + 5 * (40 + 30) / 2 + 5 * (30 + 25) / 2) / 15
    equal = "robust accuracy at equal clean accuracy, mean over 75.0 to 90.0 %"
    assert found["seen", equal] == pytest.approx(a - b)
    assert found["validation", equal] == pytest.approx(a - b)
    lacking = Judging(trials(study, study.method[0], tmp_path, 2)[1], 0.5, study.test[1]).id
    fewer = Report(study, tmp_path, {i: one for i, one in report.known.items() if i != lacking})
    seeds = {s.what: s.seeds for s in compared(fewer, study.comparison[0]).statements if s.part == "seen"}
    assert seeds[equal] == 2
    assert seeds["clean accuracy at the operating points"] == 3


def test_a_dear_test_may_be_taken_with_fewer_seeds(tmp_path):
    study = card(test=[LINE, FRONT | {"repeats": 1}])
    report = Report(study, tmp_path, ledger(study, tmp_path))
    judged = choice.judgings_of_chosen(study, tmp_path, report.tried)
    seeds = {test: {j.trial.seed for j in judged if j.measurement == test} for test in study.test}
    assert list(seeds.values()) == [{0, 1, 2}, {0}]
    usual = card(test=[LINE, FRONT]).test[1]
    assert fingerprint(usual) == fingerprint(study.test[1])  # so that outcomes stay when a card changes it


@pytest.mark.usefixtures("few_draws")
def test_tests_of_trials_that_were_not_chosen_are_counted_and_not_shown(tmp_path):
    study = card()
    report = Report(study, tmp_path, ledger(study, tmp_path))
    assert report.hidden > 0
    text = files.markdown(study, list(sections(report))).decode()
    assert f"{report.hidden} test outcomes of trials that the rule does not choose are not shown" in text
    table = files.points(report)
    assert (table.chosen == "yes").sum() == 3
    assert (table[table.chosen == "no"].seen_robust == "").all()
    chosen = {j.id for j in choice.judgings_of_chosen(study, tmp_path, report.tried)}
    alone = Report(
        study, tmp_path, {i: o for i, o in report.known.items() if i in chosen or i[2] == judged(study)}
    )
    assert alone.hidden < report.hidden
    assert files.points(alone).equals(table)


def judged(study):
    return fingerprint(study.validation)


@pytest.mark.usefixtures("few_draws")
def test_a_method_with_a_trial_to_do_has_no_choice_and_no_test(tmp_path):
    study = card()
    known = ledger(study, tmp_path)
    last = trials(study, study.method[0], tmp_path, 0)[-1]
    del known[Judging(last, 0.5, study.validation).id]
    report = Report(study, tmp_path, known)
    assert "single-teacher" not in report.made
    assert compared(report, study.comparison[0]) is None
    text = files.markdown(study, list(sections(report))).decode()
    assert "| single-teacher | 1 of 2 trials to do |" in text


@pytest.mark.usefixtures("few_draws")
def test_the_paper_stands_beside_what_was_found_and_p_values_are_adjusted(tmp_path):
    study = card()
    told = {one.title: one for one in sections(Report(study, tmp_path, ledger(study, tmp_path)))}
    rows = [[cell.text for cell in row] for row in told["What the paper claims"].rows]
    assert rows[0][0] == "+4.32 % robust accuracy"
    assert rows[0][2].startswith("robust accuracy on seen sets: +4.0 [")
    assert rows[1][2].startswith("clean accuracy on unseen sets: +2.0 [")
    assert re.match(r"steps to B's last robust accuracy: \d\.\d\dx", rows[2][2])


@pytest.mark.usefixtures("few_draws")
def test_robust_training_curves_are_compared_at_one_radius_alone(tmp_path):
    """A training's probe attacks at the radius of the training."""

    def kinds(study):
        told = {one.title: one for one in sections(Report(study, tmp_path, ledger(study, tmp_path)))}
        rows = told["How soon"].rows
        return {row[1].text for row in rows}, told["What the paper claims"].rows[2][2].text

    study = card()
    assert kinds(study)[0] == {"robust", "clean"}
    smaller = study.method[0].model_copy(update={"grid": {"inner.eps": ("3/255", "6/255")}})
    other = study.model_copy(update={"method": (smaller, *study.method[1:])})
    assert kinds(other) == (
        {"clean"},
        "steps to B's last robust accuracy: not comparable: their probes attack at two radii",
    )


# --- the ledger's file -------------------------------------------------------------------------------------


def record(recipe="r", share=1.0, keys="k", n=3):
    one = {
        "n": n,
        "keys_sha256": keys,
        "exposure": "seen",
        "clean": "4A==",
        "robust": "gA==",
        "table_sha256": "t",
    }
    return {
        "study_run": {"recipe": recipe, "interpolation": share, "measurement": "m"},
        "datasets": {"d": one},
        "curve": [[0, 0.9, 0.1]],
        "step_seconds": 0.5,
        "run": {"seconds": 36.0},
    }


def test_outcomes_come_back_as_they_were_written(tmp_path):
    """0xE0 is 111 and 0x80 is 100, of three images."""
    path = tmp_path / "x-outcomes.jsonl"
    outcomes.append(path, [record(), record(share=0.5), record()])
    found = outcomes.read(path)
    assert list(found) == [("r", 1.0, "m"), ("r", 0.5, "m")]
    one = found["r", 1.0, "m"]
    assert one.mean("clean") == 100
    assert one.mean("robust") == pytest.approx(100 / 3)
    assert one.hours == (0.0, 0.01)


def test_a_changed_line_and_other_images_are_refused(tmp_path):
    path = tmp_path / "x-outcomes.jsonl"
    outcomes.append(path, [record(), record(share=0.5)])
    lines = path.read_bytes().splitlines(keepends=True)
    changed = json.loads(lines[0])
    changed["datasets"]["d"]["robust"] = "4A=="
    path.write_bytes(store.canonical(changed) + b"\n" + lines[1])
    with pytest.raises(InputError, match=r"line 1.*checksum"):
        outcomes.read(path)
    path.unlink()
    outcomes.append(path, [record(), record(share=0.5, keys="other")])
    with pytest.raises(DataError, match="line 2: other images of d"):
        outcomes.read(path)
    path.unlink()
    outcomes.append(path, [{"study_run": {}}])
    with pytest.raises(DataError, match="line 1: no outcome of a study"):
        outcomes.read(path)


@settings(max_examples=30)
@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_packed_verdicts_are_unpacked(values):
    told = np.array(values)
    assert (outcomes._unpacked(outcomes._bits(told), len(told)) == told).all()


# --- who works, and what failed ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    folder: Path
    name: str = "a task"

    def perform(self, resources):
        return 7


def test_a_folder_that_another_command_works_in_is_refused(tmp_path):
    resources = Resources(tmp_path)
    with (
        one_writer.locked(tmp_path / "run"),
        pytest.raises(InputError, match=r"run: process \d+ .* writes to it"),
    ):
        list(work_off.perform([Work(tmp_path / "run")], resources))
    ((_, found, _),) = work_off.perform([Work(tmp_path / "run")], resources)
    assert found == 7


def test_what_failed_in_a_worker_is_named_as_it_is(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    remote_tasks = pytest.importorskip("robustbench_vlm.studies.remote_tasks")

    def ended(value):
        def get(reference):
            if isinstance(value, Exception):
                raise value
            return value

        monkeypatch.setattr(remote_tasks.ray, "get", get)
        return remote_tasks._result(Work(tmp_path), None)

    assert ended((7, 1.0)) == (7, 1.0)
    broken = ray.exceptions.RayTaskError("perform", "trace", ValueError("no such layer"))
    with pytest.raises(VlmrobError, match=r"^a task: ValueError: no such layer$"):
        ended(broken)
    with pytest.raises(Incomplete, match="its worker died 4 times"):
        ended(ray.exceptions.WorkerCrashedError())
    with pytest.raises(Incomplete, match=r"^the disk is full$"):
        ended((Failed("Incomplete", "the disk is full", ""), 0.0))
    with pytest.raises(VlmrobError, match=r"^a task: model x: not there$"):
        ended((Failed("InputError", "model x: not there", ""), 0.0))


@pytest.mark.parametrize("flag", [["--method", "rslad"], ["--dry-run"]])
def test_pages_are_rendered_of_all_methods(flag, monkeypatch, capsys):
    assert run_command(monkeypatch, "study", "frontier", "--render", *flag) == 2
    assert f"--render {flag[0]}: the pages have all methods" in capsys.readouterr().err
