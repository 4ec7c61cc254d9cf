"""The script of the workflow for pull requests, on folders as a checkout has them."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import command_line
import forgeries
import pytest

from robustbench_vlm.cards import reader
from robustbench_vlm.results import evidence, submission

SCRIPT = Path(__file__).parents[1] / ".github" / "check_submission.py"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return forgeries.make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def checkout(home, tmp_path_factory):
    """A checkout with an honest submission and a forged one, in which a result was edited with its hashes."""
    root = tmp_path_factory.mktemp("checkout")
    with pytest.MonkeyPatch.context() as patch:
        words = ["--model", home / "models" / "m0", "--data-root", home / "data", "--out", root / "results"]
        words += ["--attack", "aa", "--suite", "toys", "--eps", "4", "--device", "cpu", "--save-evidence"]
        assert command_line.run_command(patch, "--include", home / "cards", "eval", *words) == 0
    reader.include([home / "cards"])
    places = {name: root / "leaderboards" / "submissions" / name for name in ("honest", "forged")}

    def other_image(parts):
        parts.table.loc[0, "image_sha256"] = "0" * 64

    for name, place in places.items():
        if name == "forged":
            forgeries.forge(forgeries.bundle_of(root / "results"), other_image)
        submission.write([root / "results"], place, submission.Answers("MIT", "not public"))
    reader.include([])
    return root


@pytest.fixture
def check(home, tmp_path, monkeypatch, capsys):
    """Run the script in this process: (exit code, comment)."""
    spec = importlib.util.spec_from_file_location("check_submission", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def vlmrob(*words):
        code = command_line.run_command(monkeypatch, *words)
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    monkeypatch.setattr(script, "vlmrob", vlmrob)

    def run(*words):
        code = script.main([*map(str, words), *options(home, tmp_path)])
        return code, (tmp_path / "comment.md").read_text()

    return run


def options(home, tmp_path):
    words = ["--seed", "run 7", "--share", "20%", "--out", tmp_path / "comment.md"]
    return [*map(str, [*words, "--include", home / "cards", "--data-root", home / "data"])]


def test_what_a_pull_request_changes_is_verified_rendered_and_commented(check, home, checkout, tmp_path):
    changed = sorted(path.relative_to(checkout).as_posix() for path in checkout.rglob("*") if path.is_file())
    changed = [name for name in changed if name.startswith("leaderboards/")]
    listed = tmp_path / "changed"
    listed.write_text("\0".join([*changed, "setup.py"]) + "\0")
    code, text = check(
        "--changed", listed, "--root", checkout, "--model", home / "models" / "m0"
    )  # the higher of two exit codes
    assert code == 3
    forged, honest = text.split("## honest")
    assert "**Not accepted.**" in forged
    assert "image files: toy/test/" in forged
    assert "**Verified.**" in honest
    assert "survivors were attacked again" in honest
    assert "66.67" in honest  # the rendered table
    assert "this changes 1 files" in text
    assert "setup.py" in text


def test_weights_that_are_not_at_hand_are_said_and_are_no_verdict(check, checkout):
    code, text = check(checkout / "leaderboards" / "submissions" / "honest")
    assert code == 2
    assert "**Not checked.**" in text
    assert "random0" in text
    assert "Verified" not in text


def test_no_submission_is_an_error(check, tmp_path):
    (tmp_path / "changed").write_text("README.md\0leaderboards/submissions/../x/y\0")
    code, text = check("--changed", tmp_path / "changed")
    assert code == 2
    assert "No submission" in text


def test_the_forgery_is_only_in_the_evidence(checkout):
    """The forged submission is consistent in itself: every hash of every file fits."""
    folder = checkout / "leaderboards" / "submissions" / "forged"
    assert submission.faults(folder) == []
    assert evidence.read(forgeries.bundle_of(folder)).images


@pytest.mark.slow
def test_the_script_as_the_workflow_runs_it(home, checkout, tmp_path):
    folder = checkout / "leaderboards" / "submissions" / "honest"
    command = [sys.executable, SCRIPT, folder, "--model", home / "models" / "m0", *options(home, tmp_path)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "**Verified.**" in (tmp_path / "comment.md").read_text()
