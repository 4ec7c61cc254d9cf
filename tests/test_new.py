"""`vlmrob new`: what it writes is read, listed and run as it is."""

import json
import os
import subprocess
import sys

import command_line
import pytest
import toys
from PIL import Image

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.fields import fields
from robustbench_vlm.cli import new

CARDS = {"dataset": "datasets", "suite": ".", "model": "models", "recipe": "recipes"}

SHORT = " ".join(
    f"--set {change}"
    for change in (
        *("student=m0", "data.dataset=toy", "data.split=test", "optim.steps=2", "optim.batch_size=4"),
        *("optim.warmup=0", "probe.split=test", "probe.n=4", "inner.steps=1", "probe.steps=1"),
    )
)
"""Changes to a recipe that make it train the model `m0` for two steps on the dataset `toy`."""


@pytest.fixture
def vlmrob(tmp_path, monkeypatch, capsys):
    """Type a command line in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def typed(line):
        code = command_line.run_command(monkeypatch, *line.split())
        return code, *capsys.readouterr()

    return typed


@pytest.fixture
def toy(tmp_path):
    """Data and a suite of random models' own labels, below `data` and `toys`."""
    card = toys.dataset_card("toy")
    toys.write(card, tmp_path / "data")
    toys.write_include(tmp_path / "toys", [card])
    toys.save_model(tmp_path / "m0")
    return "--data-root data --device cpu --include toys --include cards"


@pytest.mark.parametrize(("kind", "folder"), CARDS.items())
def test_a_card_is_listed_and_shown(vlmrob, tmp_path, kind, folder):
    code, out, err = vlmrob(f"new {kind} mine")
    assert (code, out) == (0, str((tmp_path / "cards" / folder / "mine.toml").relative_to(tmp_path)) + "\n")
    assert "vlmrob " in err.splitlines()[-1]
    assert "--include cards" in err.splitlines()[-1]
    assert "mine" in [row["name"] for row in json.loads(vlmrob(f"list {kind} --include cards --json")[1])]
    assert json.loads(vlmrob(f"show {kind} mine --include cards")[1])["name"] == "mine"


@pytest.mark.parametrize("kind", ["attack", "dataset", "model", "recipe", "suite"])
def test_every_key_of_a_card_has_a_line_and_every_required_one_a_meaning(vlmrob, tmp_path, kind):
    assert vlmrob(f"new {kind} mine")[0] == 0
    folder, record = reader.FOLDERS[f"{kind}s"]
    text = (tmp_path / "cards" / folder / "mine.toml").read_text()
    for field in fields(record):
        lines = [line for line in text.splitlines() if field.key in line.replace("=", " ").replace("[", " ")]
        assert lines, field.key
    assert max(map(len, text.splitlines())) <= 110


def test_nothing_is_overwritten(vlmrob, tmp_path):
    assert vlmrob("new attack mine")[0] == 0
    for path in ("mine.py", "attacks/mine.toml"):
        before = (tmp_path / "cards" / path).read_bytes()
        other = tmp_path / "cards" / ("attacks/mine.toml" if path == "mine.py" else "mine.py")
        other.unlink()
        code, out, err = vlmrob("new attack mine")
        assert (code, out) == (2, "")
        assert f"error: cards/{path}: exists already" in err
        assert (tmp_path / "cards" / path).read_bytes() == before
        assert not other.exists()  # all or nothing
        other.write_bytes(b"")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("new atack mine", ["did you mean 'attack'"]),
        ("new suite ../mine", ["not a name", "letters, digits"]),
        ("new suite tiny", ["there is a suite of that name", "vlmrob list suites"]),
        ("new defense mmt-ard", ["there is a defense of that name"]),
        ("new defense json", ["Python has a module json already"]),
        ("new attack 2fast", ["beginning with a letter"]),
    ],
)
def test_a_bad_name_is_refused_and_nothing_written(vlmrob, tmp_path, line, words):
    code, out, err = vlmrob(line)
    assert (code, out) == (2, "")
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_is_filled_by_export_and_evaluated_alone(vlmrob, tmp_path):
    assert vlmrob("new dataset pets")[0] == 0
    for i, name in enumerate(("red", "blue")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for j in range(2):
            Image.new("RGB", (40, 40), (90 * i, 50 * j, 99)).save(tmp_path / "photos" / name / f"{j}.png")
    assert vlmrob("data export photos --name pets --include cards")[0] == 0
    line = "eval --model tiny --attack fgsm --dataset pets --include cards --device cpu --json"
    code, out, err = vlmrob(line)
    assert code == 0, err
    assert "no --suite: pets alone, eps 4/255, n 1000" in err
    (row, *_) = json.loads(out)
    assert (row["dataset"], row["n"], row["suite"]) == ("pets", 4, "pets")
    assert json.loads(vlmrob("leaderboard --suite pets --include cards --json")[1])[0]["dataset"] == "pets"


def test_a_suite_and_a_model_are_evaluated(vlmrob):
    assert vlmrob("new suite short")[0] == 0
    assert vlmrob("new model blank")[0] == 0
    line = "eval --model blank --attack fgsm --suite short --include cards --device cpu --dry-run"
    code, out, err = vlmrob(line)
    assert code == 0, err
    assert "4 cells: 1 model x 2 datasets" in out


def test_a_recipe_is_trained(vlmrob, toy):
    assert vlmrob("new recipe mine")[0] == 0
    code, out, err = vlmrob(f"train mine --out run {SHORT} {toy}")
    assert (code, out) == (0, "run\n"), err


def test_a_defense_is_trained(vlmrob, toy, tmp_path, monkeypatch):
    code, out, err = vlmrob("new defense my-own")
    assert out.splitlines() == ["cards/my_own.py", "cards/recipes/my-own.toml"]
    assert "PYTHONPATH=cards vlmrob train my-own --allow-code --include cards" in err
    monkeypatch.syspath_prepend(tmp_path / "cards")
    code, out, err = vlmrob(f"train my-own --out run {SHORT} {toy}")
    assert (code, out) == (2, "")
    assert "Python would import 'my_own' and run its code" in err
    assert "type --allow-code" in err
    code, out, err = vlmrob(f"train my-own --allow-code --out run {SHORT} {toy}")
    assert (code, out) == (0, "run\n"), err
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert '"ce_adv"' in log
    assert '"ce_clean"' in log


def test_an_attack_runs_by_the_line_that_is_printed(vlmrob, toy, tmp_path):
    _, _, err = vlmrob("new attack push")
    (line,) = [line for line in err.splitlines() if line.startswith("next: PYTHONPATH=cards vlmrob ")]
    words = (
        line.partition(" vlmrob ")[2]
        .replace("--model tiny", "--model m0")
        .replace("--suite tiny", "--suite toys")
    )
    path = os.pathsep.join(["cards", *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "robustbench_vlm", *words.split(), *toy.split()[:-2], "--json"],
        env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row, *_) = json.loads(done.stdout)
    assert row["robust_push"] != ""
    assert float(row["robust_push"]) < float(row["clean"])


def test_the_templates_have_the_names_that_are_replaced():
    for kind in ("attack", "defense"):
        assert f"class My{kind.capitalize()}" in (new.TEMPLATES / f"{kind}.py").read_text()
