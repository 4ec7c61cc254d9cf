"""The committed tables of the tiny world are what the command in the README makes of committed verdicts."""

import csv
import re
import shutil
from pathlib import Path

import pytest
from command_line import run_command

from robustbench_vlm.cards import overrides, reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.cards.study import Study
from robustbench_vlm.results import leaderboard
from robustbench_vlm.studies.frontier import choice, files, outcomes
from robustbench_vlm.studies.frontier.report import Report

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "leaderboards"


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    out = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        words = ["--suite", "tiny", "--results", COMMITTED / "results", "--out", out]
        assert run_command(patch, "leaderboard", *words) == 0
    return out


@pytest.mark.parametrize("name", ["tiny.csv", "tiny.md", "tiny.html"])
def test_a_committed_table_is_rendered_again_to_the_same_bytes(rendered, name):
    assert (rendered / name).read_bytes() == (COMMITTED / name).read_bytes()


MODELS = ("tiny", "tiny-single-teacher", "tiny-mmt-ard")
LABELS = {
    "seen: 40 classes": "tiny-seen",
    "pairs never drawn in training": "tiny-pairs",
    "real scanned digits": "tiny-digits",
}


def test_the_table_of_the_readme_has_the_committed_numbers():
    with (COMMITTED / "tiny.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["attack"], row["n"]) == ("aa2", "100")]
    numbers = {(row["model_id"], row["dataset"]): (row["clean"], row["robust"]) for row in rows}
    text = (ROOT / "README.md").read_text("utf-8")
    lines = re.findall(r"^\| ([^|]+) \| \d+ \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    assert len(lines) == 9
    for label, *cells in lines:
        dataset = LABELS.get(label, f"tiny-{label}")
        found = [numbers[model, dataset] for model in MODELS]
        assert cells == [f"{float(clean):.0f} / {float(robust):.0f}" for clean, robust in found], label


# --- studies -----------------------------------------------------------------------------------------------

STUDIES = [path.name.removesuffix("-outcomes.jsonl") for path in sorted(COMMITTED.glob("*-outcomes.jsonl"))]
TUNED = {
    "frontier": {
        "tiny-mmt-ard-released": ["mmt-ard-released"],
        **{f"tiny-{name}": [name] for name in ("trades", "ard", "mtard", "b-mtard", "pmg-aft")},
    },
    "schedules": {
        "tiny-single-teacher": ["single-teacher", "single-radius-grows"],
        "tiny-rslad": ["rslad", "rslad-radius-grows"],
        "tiny-tecoa": ["tecoa", "tecoa-radius-grows"],
        "tiny-mmt-ard": ["static", "radius-grows", "mix-to-robust", "radius-and-mix"],
    },
}
"""By study: recipes whose hyperparameters it chose, and the methods that they were chosen from."""


@pytest.mark.parametrize("name", STUDIES)
def test_the_rows_of_a_committed_study_are_those_of_its_outcomes(name, tmp_path):
    known = outcomes.read(outcomes.ledger(COMMITTED, name))
    rows = files.points(Report(reader.read("studies", name, Study), tmp_path, known))
    assert leaderboard.csv(rows) == (COMMITTED / f"{name}.csv").read_bytes()


@pytest.mark.slow  # 20 seconds a study: every interval is of 2000 draws
@pytest.mark.parametrize("name", STUDIES)
def test_a_committed_study_is_rendered_again_to_the_same_bytes(name, tmp_path, monkeypatch):
    shutil.copyfile(outcomes.ledger(COMMITTED, name), outcomes.ledger(tmp_path, name))
    assert run_command(monkeypatch, "study", name, "--render", "--tables", tmp_path) == 0
    for file in (f"{name}.csv", f"{name}-comparisons.csv", f"{name}.md", f"{name}.html"):
        assert (tmp_path / file).read_bytes() == (COMMITTED / file).read_bytes(), file


@pytest.mark.parametrize("study", TUNED)
def test_tiny_recipes_have_what_a_study_chose(study, tmp_path):
    known = outcomes.read(outcomes.ledger(COMMITTED, study))
    report = Report(reader.read("studies", study, Study), tmp_path, known)
    for name, family in TUNED[study].items():
        method = choice.contender(report.study, family, report.choices)
        best = report.made[method]
        table = reader.table("recipes", reader.path("recipes", name))
        recipe = reader.parse(table, Recipe, name)
        changes = [*report.study.set, *report.of(method).method.set, *best.trial.settings]
        pinned = overrides.override(table, [*changes, f"name={name}"])
        chosen = reader.parse(pinned, Recipe, name)
        assert recipe.model_dump() == chosen.model_dump()
        assert any(f"{best.clean:.1f} / {best.robust:.1f}" in note for note in recipe.notes), name
        assert sum(len(report.of(one).trials) for one in family) in (4, 8)
        assert (recipe.optim.steps, recipe.optim.warmup) == (200, 14)


INTERVAL = re.compile(r"([+-]\d+\.\d) \(([+-]\d+\.\d) to ([+-]\d+\.\d)\)")
ON_A_PAGE = re.compile(r"([+-]\d+\.\d) \\\[([+-]\d+\.\d), ([+-]\d+\.\d)\\\]")


def test_the_figures_of_the_frontier_studies_in_the_docs_are_the_committed_ones():
    """Every `+1.2 (+0.3 to +2.1)` of docs/mmt-ard.md, and the two of the README."""
    quoted = set(INTERVAL.findall((ROOT / "docs" / "mmt-ard.md").read_text("utf-8")))
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    seen = re.search(r"has ([\d.]+) points more clean accuracy .* interval ([\d.]+) to ([\d.]+),", readme)
    unseen = re.search(r"seeds\) and ([\d.]+) on the unseen sets \(([\d.]+) to ([\d.]+)\)", readme)
    quoted |= {tuple(f"+{number}" for number in found.groups()) for found in (seen, unseen)}
    pages = [(COMMITTED / f"{name}.md").read_text("utf-8") for name in STUDIES]
    known = {found for page in pages for found in ON_A_PAGE.findall(page)}
    assert len(quoted) > 30
    assert quoted <= known
