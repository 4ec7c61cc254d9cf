"""The committed tables of the tiny world are what the command of the README makes from the committed verdicts."""

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
