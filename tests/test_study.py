"""Studies: statistics by hand, cards read strictly, and a small one killed, resumed, worked off by two."""

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import command_line
import numpy as np
import pandas as pd
import pytest
from test_leaderboard import cell
from typer.testing import CliRunner

from robustbench_vlm import store
from robustbench_vlm.cards import overrides, reader
from robustbench_vlm.cards.study import Study
from robustbench_vlm.cli.app import app
from robustbench_vlm.errors import CardError, DataError, InputError
from robustbench_vlm.results import stats
from robustbench_vlm.studies import findings, levels, page, plot, render, runner, tables
from robustbench_vlm.studies.findings import Curve, Findings, FinishedRun

STUDY = """
name = "small"
title = "Two arms on four colours"
baseline = "one"
seeds = [0, 1]
set = ["checkpoint_every=1"]
curves = true

[probe]
every = 2
n = 8
steps = 1

[final]
attack = "{chain}"
suite = "{suite}"
n = 6

[[arm]]
name = "one"
title = "one teacher"
recipe = "{one}"

[[arm]]
name = "two"
title = "two teachers"
recipe = "{two}"
set = ["defense.weighting=static"]

[[claim]]
measure = "robust"
value = 4.32
words = "+4.32 % robust accuracy"
source = "somewhere"

[[claim]]
measure = "speed"
value = 2.3
words = "2.3x training efficiency"
source = "somewhere"
"""


# --- statistics, by hand -----------------------------------------------------------------------------------


def test_the_t_interval_is_students():
    """1, 2, 3, 4, 5: s = sqrt(2.5), t(0.975, 4) = 2.776445 of any table: 3 ± 1.963243."""
    found = stats.t_mean([1, 2, 3, 4, 5])
    assert found.value == 3
    assert (found.low, found.high) == pytest.approx((3 - 1.963243, 3 + 1.963243), abs=1e-6)
    pair = stats.t_mean([1.0, 3.0])  # t(0.975, 1) = 12.706205, s / sqrt(2) = 1
    assert (pair.low, pair.high) == pytest.approx((2 - 12.706205, 2 + 12.706205), abs=1e-5)


def test_one_repetition_has_a_mean_and_no_interval():
    found = stats.t_mean([7.0])
    assert found.value == 7
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    with pytest.raises(ValueError, match="nothing"):
        stats.t_mean([])


@pytest.mark.parametrize(
    ("target", "at"),
    [(10, 0), (20, 10), (25, 12.5), (40, 20), (40.1, None), (35, 17.5), (5, 0)],
)
def test_a_target_is_reached_where_the_line_between_two_probes_crosses_it(target, at):
    assert stats.first_reach([0, 10, 20, 30], [10, 20, 40, 30], target) == at


def test_the_first_crossing_counts_even_when_the_curve_falls_again():
    assert stats.first_reach([0, 10, 20, 30], [0, 30, 10, 40], 20) == pytest.approx(20 / 3)
    with pytest.raises(ValueError, match="2 steps and 1 values"):
        stats.first_reach([0, 1], [0.0], 1)


def outcome(arm, seed, robust, step_seconds=1.0, right=((True, True),)):
    """A run with probes at 0, 10, 20, 30; verdicts are (clean, robust) of the images of one unseen set."""
    study = made()
    recipe = runner.recipe_of(study, next(a for a in study.arm if a.name == arm), seed)
    table = pd.DataFrame(right, columns=["clean", "robust"]).assign(key=[f"i{i}" for i in range(len(right))])
    curve = Curve((0, 10, 20, 30), tuple(100.0 - r for r in robust), tuple(robust))
    run = runner.StudyRun(arm, seed, recipe, None)
    return FinishedRun(run, curve, step_seconds, 30, "processor", {"far": table}, {"far": "unseen"})


def made(**changes):
    table = reader.toml(reader.path("studies", "efficiency"))
    arms = [arm for arm in table["arm"] if arm["name"] in ("single-teacher", "paper")]
    return reader.parse(table | {"arm": arms, "seeds": [0, 1]} | changes, Study, "a test")


def two_seeds(second=(0.0, 20.0, 30.0, 50.0)):
    """single-teacher ends at 40 and at 30; `paper` is at 40 after 15 steps, and at 30 as `second` has it."""
    runs = [
        outcome("single-teacher", 0, [0, 10, 20, 40], 1.0, [(True, True), (True, False), (False, False)]),
        outcome("paper", 0, [0, 20, 60, 60], 2.0, [(True, True), (True, True), (True, True)]),
        outcome("single-teacher", 1, [0, 15, 30, 30], 1.0, [(True, True), (True, True), (True, True)]),
        outcome("paper", 1, second, 2.0, [(True, True), (True, True), (False, False)]),
    ]
    found = {(run.run.arm, run.run.seed): run for run in runs}
    return Findings(made(), found, (0, 1))


def test_texts_of_a_study_are_text_on_its_page_and_in_its_plot():
    """A formula that matplotlib cannot set, a link, a table border and a turned direction of writing."""
    odd = r"$\frac{$ [x](http://evil) <b> a|b `c` \u202e"
    claim = {"measure": "robust", "value": 1.0, "words": odd, "source": odd}
    study = made(title=odd, notes=[odd], claim=[claim], probe={"every": 1, "split": odd})
    found = replace(two_seeds(), study=study)
    text = page.markdown(found).decode()
    assert "[x](" not in text.replace("\\[x", "")
    assert "\u202e" not in text
    assert r"- $\\frac{$ \[x\](http://evil) \<b\> a\|b \`c\` \\u202e" in text
    picture = plot.svg(found).decode()
    ET.fromstring(picture)
    assert r"$\frac{$" in picture
    assert "\u202e" not in picture


def test_differences_are_of_runs_with_the_same_seed():
    """Robust at the end: 60 - 40 and 50 - 30, so 20 without spread; unpaired intervals would be wide."""
    found = two_seeds()
    gap = found.difference("paper", "val", "robust")
    assert (gap.value, gap.low, gap.high) == (20, 20, 20)
    assert found.mean("paper", "val", "robust").value == 55
    unseen = found.difference("paper", "unseen", "robust")  # 3/3 - 1/3 and 2/3 - 3/3, in points
    assert unseen.value == pytest.approx((200 / 3 - 100 / 3) / 2)
    assert unseen.high - unseen.value == pytest.approx(12.706205 * 50, rel=1e-6)  # s / sqrt(2) = 50
    assert found.parts == ("val", "unseen")


def test_each_seed_has_its_exact_mcnemar_test():
    """Seed 0: two images robust with `paper` alone, p = 2 / 4; seed 1: one with the baseline alone, p = 1."""
    assert two_seeds().p_values("paper", "unseen", "robust") == pytest.approx([0.5, 1.0])
    found = two_seeds()
    run = found.finished["paper", 1]
    other = replace(run, verdicts={"far": run.verdicts["far"].assign(key=["a", "b", "c"])})
    with pytest.raises(DataError, match="other images"):
        replace(found, finished=found.finished | {("paper", 1): other}).p_values("paper", "unseen", "clean")


def test_steps_to_the_baselines_last_accuracy_and_the_ratio_in_steps_and_time():
    """Baseline: 40 at step 30, 30 at step 20. `paper`: 40 at 10 + 20/40 * 10 = 15, 30 at 20."""
    found = two_seeds()
    assert found.reach("single-teacher") == [30, 20]
    assert found.reach("paper") == [15, 20]
    assert found.speedups("paper", timed=False) == [2, 1]
    assert found.speedups("paper", timed=True) == [1, 0.5]  # its steps take twice as long
    mean = findings.geometric([2, 1])
    assert mean.value == pytest.approx(math.sqrt(2))
    assert mean.low * mean.high == pytest.approx(2)  # symmetric in the logarithm
    assert mean.high == pytest.approx(math.exp(math.log(2) / 2 * (1 + 12.706205)), rel=1e-5)


def test_a_target_never_reached_is_counted_and_not_dropped():
    found = two_seeds(second=(0.0, 10.0, 20.0, 29.9))
    assert found.reach("paper") == [15, None]
    assert found.speedups("paper", timed=False) == [2, None]
    assert findings.geometric([2, None]) is None
    assert findings.median([15, None], math.inf) == math.inf
    assert findings.median([2, None], 0.0) == 1
    row = tables.summary(found).set_index("arm").loc["paper"]
    assert row.reached == "1"
    assert row.steps_to_target == "15.0 never"
    assert row.steps_to_target_median == "never"
    assert row.speedup == ""
    text = page.markdown(found).decode()
    assert "| paper | 1 of 2 | never | 1.00x (median) |" in text
    assert tables.seconds(found).seconds_to_target.tolist() == ["30.0", "20.0", "30.0", "never"]


def test_speedups_at_fixed_accuracies_count_from_the_lowest_probe():
    """The baseline is at 20 after 20 and 13.3 steps, `paper` after 10 each; both start at 0."""
    found = two_seeds()
    assert levels.levels(found, "robust") == [10, 15, 20, 25, 30]  # one of the baseline's runs ends at 30
    assert levels.levels(found, "clean") == []  # it falls to the end
    assert levels.speedups(found, "paper", "robust", 20, timed=False) == pytest.approx([2, 4 / 3])
    assert levels.speedups(found, "paper", "robust", 20, timed=True) == pytest.approx([1, 2 / 3])
    slow = two_seeds(second=(0.0, 5.0, 10.0, 14.0))
    assert levels.speedups(slow, "paper", "robust", 15, timed=False) == [pytest.approx(2), None]
    text = page.markdown(found).decode()
    assert "| arm | robust 10 % | robust 15 % | robust 20 % | robust 25 % | robust 30 % |" in text
    assert "| single-teacher | 1.00x [1.00, 1.00]; time 1.00x [1.00, 1.00] |" in text


def test_clean_accuracy_that_falls_first_is_counted_after_its_fall():
    """90, 50, 70, 80 rises to 60 half way between steps 10 and 20, and not at step 0."""
    found = two_seeds()
    dip = Curve((0, 10, 20, 30), (90.0, 50.0, 70.0, 80.0), (0.0, 1.0, 2.0, 3.0))
    quick = Curve((0, 10, 20, 30), (90.0, 70.0, 80.0, 80.0), (0.0, 1.0, 2.0, 3.0))
    runs = {
        key: replace(run, curve=quick if key[0] == "paper" else dip) for key, run in found.finished.items()
    }
    found = replace(found, finished=runs)
    assert levels.levels(found, "clean") == [60, 65, 70, 75, 80]
    assert levels.speedups(found, "paper", "clean", 60, timed=False) == [1.5, 1.5]
    assert levels.speedups(found, "paper", "clean", 75, timed=False) == pytest.approx([25 / 15] * 2)


def test_intervals_over_seeds_and_images_hold_both_kinds_of_spread():
    """Of two seeds and three images: 0, +1, +1 and 0, 0, -1, so +1/6."""
    found = two_seeds()
    both = levels.over_images(found, "paper", "unseen", "robust")
    assert both.value == pytest.approx(100 / 6)
    assert both.low < 0 < both.value < both.high
    assert levels.over_images(found, "paper", "unseen", "robust") == both  # the same bytes again
    run = found.finished["paper", 1]
    other = replace(run, verdicts={"far": run.verdicts["far"].assign(key=["a", "b", "c"])})
    with pytest.raises(DataError, match="other images"):
        levels.over_images(
            replace(found, finished=found.finished | {("paper", 1): other}), "paper", "unseen", "clean"
        )


@pytest.mark.parametrize(("of_seeds", "of_images"), [(0.0, 1.0), (1.0, 0.0), (0.5, 1.0)])
def test_the_crossed_interval_covers_by_hand(of_seeds, of_images):
    """Normal effects of 40 seeds and 400 images: half the width is near 1.96 standard errors of the mean."""
    make = np.random.default_rng(0)
    seeds, images = of_seeds * make.standard_normal((40, 1)), of_images * make.standard_normal((1, 400))
    table = seeds + images
    found = stats.crossed_mean([table], "a test")
    error = math.sqrt(seeds.var(ddof=1) / 40 + images.var(ddof=1) / 400)
    assert found.value == pytest.approx(table.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    twice = stats.crossed_mean([table, table + 1], "a test")
    assert twice.value == pytest.approx(table.mean() + 0.5)


def test_the_crossed_interval_of_one_seed_is_unknown():
    found = stats.crossed_mean([np.array([[1.0, 0.0]])], "a test")
    assert found.value == 0.5
    assert math.isnan(found.low)
    with pytest.raises(ValueError, match="1, 2"):
        stats.crossed_mean([np.ones((1, 2)), np.ones((2, 2))], "a test")


def test_what_was_reached_at_the_start_counts_as_one_step():
    found = two_seeds(second=(35.0, 10.0, 20.0, 30.0))
    assert found.reach("paper") == [15, 1]


def test_the_page_has_the_papers_numbers_beside_ours_whatever_they_are():
    text = page.markdown(two_seeds()).decode()
    claims = [line for line in text.splitlines() if line.startswith("| +3.5") or line.startswith("| 2.3x")]
    assert len(claims) == 2  # the suite of this test has no seen set, so +4.32 has nothing beside it
    assert "+0.00 [-423.54, +423.54]" in claims[0]  # clean on unseen: +1/3 and -1/3
    assert "1.41x [0.02, 115.61] (0.71x [0.01, 57.80])" in claims[1]


def test_results_of_two_radii_are_not_one_finding(tmp_path):
    paths = {
        cell(tmp_path / "results", "m", "one", 9, {}, eps=eps, eps_ladder=[eps]) for eps in ("1/255", "2/255")
    }
    run = runner.StudyRun("paper", 0, None, tmp_path)
    with pytest.raises(DataError, match=r"aa linf 1/255 n=10 and aa linf 2/255 n=10; .*one radius"):
        findings._final_results(run, paths)


# --- cards -------------------------------------------------------------------------------------------------


ARMS = [name for name in reader.names("studies") if isinstance(reader.study(name), Study)]


@pytest.mark.parametrize("name", ARMS)
def test_every_study_names_recipes_chains_and_a_suite_that_exist(name, tmp_path):
    study = reader.read("studies", name, Study)
    runs = runner.runs(study, tmp_path)
    assert len(runs) == len(study.arm) * len(study.seeds)
    assert all(run.recipe.probe == study.probe for run in runs)
    assert {run.cells(study.final).parent for run in runs} == {run.folder for run in runs}
    starts = {(run.recipe.student, run.recipe.data, run.recipe.optim, run.recipe.inner) for run in runs}
    assert len(starts) == 1, "arms differ in more than the defense and its teachers"


def test_studies_share_the_runs_that_are_one_recipe(tmp_path):
    a, b = (runner.runs(reader.read("studies", n, Study), tmp_path, 2) for n in ("efficiency", "ablation"))
    shared = {run.folder for run in a} & {run.folder for run in b}
    assert len(shared) == 2 * 5


def test_a_note_in_the_recipe_card_makes_no_other_run(tmp_path):
    study = made()
    arm = study.arm[1]
    first = runner.recipe_of(study, arm, 0)
    assert first.notes == ()
    changed = overrides.override(reader.toml(reader.path("recipes", arm.recipe)), [])
    changed["notes"] = ["something learned later"]
    assert runner.recipe_of(study, arm, 0).fingerprint == first.fingerprint
    assert runner.recipe_of(study, arm, 1).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "nobody"}, "baseline 'nobody' is no arm; arms: single-teacher, paper"),
        ({"seeds": []}, "seeds must differ, and there must be one"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"seeds": [-1]}, "greater than or equal to 0"),
        ({"basline": "x"}, "unknown key 'basline'; did you mean 'baseline'"),
        ({"final": {"attack": "aa2", "suite": "tiny", "n": 0}}, "final.n"),
        ({"arm": [{"name": "a/b", "title": "", "recipe": "x"}], "baseline": "a/b"}, "letters, digits"),
        ({"arm": [{"name": "a", "title": "", "recipe": "x"}] * 2, "baseline": "a"}, "arm names must differ"),
    ],
)
def test_a_study_that_cannot_be_is_one_line(changes, words):
    with pytest.raises(CardError, match=re.escape(words)) as error:
        made(**changes)
    assert "\n" not in str(error.value)


def test_arms_that_cannot_be_are_found_before_anything_runs(tmp_path):
    arm = {"name": "b", "title": "", "recipe": "tiny-single-teacher"}
    same = made(arm=[arm | {"name": "a"}, arm], baseline="a")
    with pytest.raises(CardError, match="arms a and b are one recipe"):
        runner.runs(same, tmp_path)
    typo = made(arm=[arm | {"set": ["optim.stepps=3"]}], baseline="b")
    with pytest.raises(CardError, match=r"study efficiency, arm b: unknown key 'optim.stepps'; did you mean"):
        runner.runs(typo, tmp_path)
    with pytest.raises(CardError, match=r"recipe 'tiny-singel'.*did you mean 'tiny-single-teacher'"):
        runner.runs(made(arm=[arm | {"recipe": "tiny-singel"}], baseline="b"), tmp_path)
    with pytest.raises(InputError, match=r"--seeds 3: study efficiency has 2 seeds"):
        runner.runs(made(), tmp_path, 3)


# --- the whole ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world_of_study(study_cards):
    """Cards of a study of four runs of four steps."""
    root, data = study_cards
    text = STUDY.format(chain="step", suite="short", one="one", two="two")
    (root / "cards" / "studies" / "small.toml").write_text(text)
    return root, data


def command(root, data, out, *options):
    typed = (
        f"--include {root / 'cards'} study small --data-root {data} --device cpu --out {out} --tables {out}/t"
    )
    return [sys.executable, "-m", "robustbench_vlm", *typed.split(), *options]


def steps_done(out):
    return sum(path.read_bytes().count(b'"loss"') for path in out.rglob("log.jsonl"))


def test_a_study_killed_and_resumed_by_two_workers_has_the_tables_of_one_that_ran_through(
    world_of_study, tmp_path
):
    pytest.importorskip("ray")
    root, data = world_of_study
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    ran = command_line.fork_command(command(root, data, whole)[3:])
    assert ran.returncode == 0, ran.stderr
    assert "study small: 4 runs, 0 finished" in ran.stderr
    assert command_line.kill_command(command(root, data, torn), lambda: steps_done(torn), 3) < 16
    ran = subprocess.run(
        command(root, data, "torn", "--workers", "2"),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    same = ("small.csv", "small-summary.csv")
    for name in same:
        assert (torn / "t" / name).read_bytes() == (whole / "t" / name).read_bytes(), name
    weights = sorted(path.relative_to(whole) for path in whole.rglob("image.safetensors"))
    assert len(weights) == 4
    assert all((whole / path).read_bytes() == (torn / path).read_bytes() for path in weights)

    table = pd.read_csv(whole / "t" / "small.csv")
    assert table.groupby(["arm", "seed"]).steps.apply(list).tolist() == [[0, 2, 4]] * 4
    assert (table.images == 8 * table.steps).all()
    summary = pd.read_csv(whole / "t" / "small-summary.csv").set_index("arm")
    assert {"seen_robust", "unseen_robust_diff", "val_clean_high"} <= set(summary.columns)
    assert summary.loc["one"].filter(like="diff").isna().all()
    seconds = pd.read_csv(whole / "t" / "small-seconds.csv")
    assert (seconds.clock == "processor").all()
    assert (seconds.seconds_per_step > 0).all()
    picture = ET.fromstring((whole / "t" / "small.svg").read_bytes())
    assert picture.tag.endswith("svg")
    assert "![curves](small.svg)" in (whole / "t" / "small.md").read_text()

    study = reader.parse(reader.toml(root / "cards" / "studies" / "small.toml"), Study, "small")
    reader.include([root / "cards"])
    try:
        runs = runner.runs(study, whole)
        found = findings.read(study, runs)
        again = render.write(found, tmp_path / "again")
        assert all(path.read_bytes() == (whole / "t" / path.name).read_bytes() for path in again)
        runs[0].cells(study.final).unlink()
        with pytest.raises(InputError, match="not finished; run vlmrob study small again"):
            findings.read(study, runs)
    finally:
        reader.include([])


def test_a_run_that_cannot_be_is_one_line_and_leaves_nothing_running(world_of_study, tmp_path):
    root, data = world_of_study
    options = ("--seeds", "1")
    out = tmp_path / "out"
    first = work_folder(root, out)
    store.write_json(first / "model" / "recipe.json", {"fingerprint": "another"})
    ran = command_line.fork_command(command(root, data, out, *options)[3:])
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("error: one, seed 0: --out ")
    assert "a run of another recipe is in it, with " in last


def test_the_nodes_of_a_cluster_need_paths_from_the_root(world_of_study, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    typed = CliRunner().invoke(app, ["study", "efficiency", "--workers", "ray", "--out", "runs"])
    assert isinstance(typed.exception, InputError)
    assert "--out runs: a relative path, with --workers ray; expected a path from the root" in str(
        typed.exception
    )


def work_folder(root, out):
    reader.include([root / "cards"])
    try:
        return runner.runs(reader.read("studies", "small", Study), out)[0].folder
    finally:
        reader.include([])


def test_a_mistyped_study_is_told_the_nearest_one():
    typed = CliRunner().invoke(app, ["study", "eficiency"])
    assert isinstance(typed.exception, CardError)
    assert "study 'eficiency': no such card; did you mean 'efficiency'?" in str(typed.exception)


def test_a_dry_run_lists_the_runs_and_makes_nothing(world_of_study, tmp_path):
    root, data = world_of_study
    out = tmp_path / "none"
    try:
        ran = CliRunner().invoke(app, command(root, data, out, "--dry-run")[3:])
    finally:
        reader.include([])
    assert ran.exit_code == 0, ran.output
    lines = ran.stdout.strip().splitlines()
    assert lines[0] == "# study small"
    assert [line.split("\t")[:4] for line in lines[2:]] == [
        [arm, seed, "4", "to do"] for seed in "01" for arm in ("one", "two")
    ]
    assert not out.exists()
