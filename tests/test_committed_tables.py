"""The committed tables of the tiny world are what the command in the README makes of committed verdicts."""

import csv
import re
from pathlib import Path

import pytest
from command_line import run_command

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
