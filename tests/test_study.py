"""`vlmrob study`: a small one killed and worked off by two, what cannot be run, and texts on its page."""

import math
import subprocess
import sys
import xml.etree.ElementTree as ET

import command_line
import pytest
from test_frontier import card
from typer.testing import CliRunner

from robustbench_vlm import store
from robustbench_vlm.cards import overrides, plugins, reader
from robustbench_vlm.cards.study import Study
from robustbench_vlm.cli.app import app
from robustbench_vlm.errors import CardError, InputError
from robustbench_vlm.results import stats
from robustbench_vlm.studies import trainings
from robustbench_vlm.studies.frontier import files, outcomes, perform
from robustbench_vlm.studies.frontier.trials import trials

# --- means over seeds, by hand -----------------------------------------------------------------------------


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


# --- cards -------------------------------------------------------------------------------------------------


def test_a_note_in_the_recipe_card_makes_no_other_run(tmp_path):
    study = reader.read("studies", "efficiency", Study)
    arguments = ("a test", "tiny-single-teacher", study.set)
    first = trainings.resolved(*arguments, 0, study.probe)
    assert first.notes == ()
    table = overrides.override(reader.toml(reader.path("recipes", "tiny-single-teacher")), [])
    named = tmp_path / "tiny-single-teacher.toml"
    store.write(named, overrides_text(table | {"notes": ["something learned later"]}))
    again = trainings.resolved("a test", str(named), study.set, 0, study.probe)
    assert again.model_copy(update={"name": first.name}).fingerprint == first.fingerprint
    assert trainings.resolved(*arguments, 1, study.probe).fingerprint != first.fingerprint


@pytest.mark.parametrize("setting", ['defense={name="this:x"}', "defense.name=this:x"])
def test_the_settings_of_a_study_name_code_only_where_it_is_allowed(setting):
    sys.modules.pop("this", None)
    study = reader.read("studies", "efficiency", Study)
    arguments = ("a test", "tiny-single-teacher", [*study.set, setting], 0, study.probe)
    with pytest.raises(CardError, match=r"names 'this:x', so Python would import.*--allow-code"):
        trainings.resolved(*arguments)
    plugins.allow_code()
    try:
        assert trainings.resolved(*arguments).defense["name"] == "this:x"
    finally:
        plugins.allow_code(False)
    assert "this" not in sys.modules


def overrides_text(table):
    import tomlkit

    return tomlkit.dumps(table).encode()


def test_recipes_that_cannot_be_are_found_before_anything_runs(tmp_path):
    study = card()
    typo = study.method[0].model_copy(update={"set": ("optim.stepps=3",)})
    with pytest.raises(CardError, match=r"method single-teacher: unknown key 'optim.stepps'; did you mean"):
        trials(study, typo, tmp_path, 0)
    nobody = study.method[0].model_copy(update={"recipe": "tiny-singel"})
    with pytest.raises(CardError, match=r"recipe 'tiny-singel'.*did you mean 'tiny-single-teacher'"):
        trials(study, nobody, tmp_path, 0)


def test_a_mistyped_study_is_told_the_nearest_one():
    typed = CliRunner().invoke(app, ["study", "eficiency"])
    assert isinstance(typed.exception, CardError)
    assert "study 'eficiency': no such card; did you mean 'efficiency'?" in str(typed.exception)


def test_a_method_that_the_study_does_not_have_is_told_the_nearest_one(monkeypatch, capsys):
    typed = ("study", "efficiency", "--method", "relesed", "--dry-run")
    assert command_line.run_command(monkeypatch, *typed) == 2
    said = capsys.readouterr().err
    assert "--method relesed: no method of study efficiency; did you mean 'released'?" in said


def test_the_nodes_of_a_cluster_need_paths_from_the_root(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    typed = CliRunner().invoke(app, ["study", "efficiency", "--workers", "ray", "--out", "runs"])
    assert isinstance(typed.exception, InputError)
    said = "--out runs: a relative path, with --workers ray; expected a path from the root"
    assert said in str(typed.exception)


# --- the page ----------------------------------------------------------------------------------------------


def test_texts_of_a_study_are_text_on_its_page_and_in_its_plot(tmp_path):
    """A formula that matplotlib cannot set, a link, a table border and a turned direction of writing."""
    odd = r"$\frac{$ [x](http://evil) <b> a|b `c` \u202e"
    changes = {"title": odd, "notes": [odd], "method": [{"name": "a", "title": odd, "recipe": "tiny-tecoa"}]}
    study = card(**changes, comparison=[{"title": odd, "a": ["a"], "b": ["a"]}])
    made = files.write(study, perform.Places(tmp_path / "runs", tmp_path))
    text = next(path for path in made if path.suffix == ".md").read_text("utf-8")
    assert "[x](" not in text.replace("\\[x", "")
    assert "\u202e" not in text
    assert r"- $\\frac{$ \[x\](http://evil) \<b\> a\|b \`c\` \\u202e" in text
    page = next(path for path in made if path.suffix == ".html").read_text("utf-8")
    assert "<b>" not in page
    assert "\u202e" not in page
    picture = next(path for path in made if path.suffix == ".svg").read_bytes()
    ET.fromstring(picture)
    assert "\u202e" not in picture.decode()


# --- the whole ---------------------------------------------------------------------------------------------

STUDY = """
kind = "frontier"
name = "small"
title = "One teacher <and> two"
seeds = [0, 1]
repeats = 1
interpolation = [1.0, 0.5]
set = ["optim.steps=4"]

[probe]
every = 2
n = 8
steps = 1

[validation]
attack = "step"
suite = "heldout"
n = 6

[rule]
highest = "mean"
fixed = "2026-01-01"

[[test]]
attack = "step"
suite = "short"
n = 6

[[method]]
name = "one"
title = "one teacher"
recipe = "one"
[method.grid]
"optim.lr" = ["1e-3", "2e-3"]

[[teacher]]
name = "first"
recipe = "one"
set = ["optim.steps=1"]

[[method]]
name = "two"
title = "two teachers"
recipe = "two"
set = ["defense.weighting=static", "teachers.robust=@first"]

[[comparison]]
title = "two above one"
a = ["two"]
b = ["one"]
"""


def words(root, data, out):
    typed = f"--include {root / 'cards'} study small --data-root {data} --device cpu"
    return [*typed.split(), "--out", f"{out}/runs", "--tables", f"{out}/t"]


@pytest.fixture(scope="module")
def world_of_study(study_cards):
    """Cards of a study of a teacher, three trials and their tests."""
    root, data = study_cards
    (root / "cards" / "studies" / "small.toml").write_text(STUDY)
    (root / "cards" / "heldout.toml").write_text(
        'name = "heldout"\ntitle = "held out"\ndatasets = ["toy"]\neps = ["4/255"]\nseed = 5\n'
    )
    return root, data


def steps_done(out):
    return sum(path.read_bytes().count(b'"loss"') for path in out.rglob("log.jsonl"))


def told(out):
    """What the outcomes say, without times and dates."""
    return {
        id_: (
            one.curve,
            {
                name: (got.keys_sha256, got.clean.tolist(), got.robust.tolist())
                for name, got in one.datasets.items()
            },
        )
        for id_, one in outcomes.read(outcomes.ledger(out / "t", "small")).items()
    }


NAMES = ["small.csv", "small-comparisons.csv", "small.svg", "small.md", "small.html"]


def tables(out):
    return {name: (out / "t" / name).read_bytes() for name in NAMES}


def test_a_study_killed_and_gone_on_with_by_two_workers_has_the_outcomes_of_one_that_ran_through(
    world_of_study, tmp_path
):
    root, data = world_of_study
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    require_whole(command_line.fork_command(words(root, data, whole)), whole)
    require_rendered_again(root, whole)
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "robustbench_vlm"]
    first = [*command, *words(root, data, torn)]
    assert command_line.kill_command(first, lambda: steps_done(torn), 3) < steps_done(whole)
    # the same folders, spelled from elsewhere
    second = [*command, *words(root, data, "torn"), "--workers", "2"]
    ran = subprocess.run(second, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert told(torn) == told(whole)
    for name in ("small.csv", "small-comparisons.csv"):
        assert tables(torn)[name] == tables(whole)[name], name
    weights = sorted(path.relative_to(whole) for path in whole.rglob("image.safetensors"))
    assert len(weights) >= 4
    assert all((whole / path).read_bytes() == (torn / path).read_bytes() for path in weights)


def require_whole(ran, out):
    """What a study says that ran through, and what is in its tables and its page."""
    assert ran.returncode == 0, ran.stderr
    assert "1 trainings or measurements to do" in ran.stderr  # the teacher
    assert "3 trainings or measurements to do" in ran.stderr
    assert [line.rsplit("/", 1)[1] for line in ran.stdout.split()] == NAMES
    found = tables(out)
    page = found["small.html"].decode()
    assert "One teacher &lt;and&gt; two" in page
    assert 'xlink:href="#one-1-1"' in page
    assert 'id="one-1-1"' in page
    assert found["small.csv"].decode().count("\n") == 1 + 2 * 3
    assert b"two,one,2,6,seen,clean accuracy at the operating points" in found["small-comparisons.csv"]


def require_rendered_again(root, out):
    """Outcomes in any order give the same bytes, without the folder of the trainings."""
    ledger = out / "t" / "small-outcomes.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    made, elsewhere = tables(out), perform.Places(out / "nowhere", out / "t")
    ledger.write_bytes(b"".join(reversed(lines)))
    reader.include([root / "cards"])
    try:
        study = reader.read("studies", "small", Study)
        files.write(study, elsewhere)
        state = perform.state(study, elsewhere)
    finally:
        reader.include([])
    assert tables(out) == made
    assert {row[-1] for row in state} == {"done"}


def test_a_trial_that_cannot_be_is_one_line(world_of_study, tmp_path):
    root, data = world_of_study
    reader.include([root / "cards"])
    try:
        study = reader.read("studies", "small", Study)
        folder = trials(study, study.method[0], tmp_path / "runs", 0)[0].folder
    finally:
        reader.include([])
    store.write_json(folder / "model" / "recipe.json", {"fingerprint": "another"})
    ran = command_line.fork_command([*words(root, data, tmp_path), "--method", "one"])
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("error: one 1 (optim.lr=1e-3), seed 0, step: --out ")
    assert "a run of another recipe is in it, with " in last


def test_a_dry_run_lists_the_trainings_and_makes_nothing(world_of_study, tmp_path):
    root, data = world_of_study
    try:
        ran = CliRunner().invoke(app, [*words(root, data, tmp_path / "none"), "--dry-run"])
    finally:
        reader.include([])
    assert ran.exit_code == 0, ran.output
    lines = [line.split("\t") for line in ran.stdout.strip().splitlines()]
    assert lines[0] == ["# study small"]
    assert lines[2:] == [
        ["one", "0", "1", "optim.lr=1e-3", "2 of 2 measurements to do"],
        ["one", "0", "2", "optim.lr=2e-3", "2 of 2 measurements to do"],
        ["two", "0", "1", "none", "2 of 2 measurements to do"],
    ]
    assert not (tmp_path / "none").exists()
