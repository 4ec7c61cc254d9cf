"""A user's own images, from nothing to the table: class folders, cards by --include, every verb as typed.

The images are scikit-learn's digits, written by `benchmarks/digits.py`; `benchmarks/digits.md` is the page.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import command_line
import pandas as pd
import pytest
from PIL import Image

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.cards.suite import Suite

HOME = Path(__file__).parent.parent
CARDS = HOME / "benchmarks" / "digits"
TRAINED = ("digits-clean", "digits-tecoa", "digits-mmt-ard")
FEW = (
    "--set optim.steps=3 --set optim.warmup=1 --set optim.batch_size=20 --set probe.n=20 --set probe.steps=2"
)
MATCHED = "note: my-digits: class folders are matched to class names by number"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data root with the images, written by the script of the page as it is typed there."""
    root = tmp_path_factory.mktemp("digits")
    script = [sys.executable, str(HOME / "benchmarks" / "digits.py")]
    said = subprocess.run(script, cwd=root, check=True, capture_output=True, text=True).stdout
    assert said.splitlines()[0] == "data/my-digits/train: 1277 images"
    return root / "data"


@dataclass(frozen=True)
class Said:
    """What a command leaves: its exit code, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def vlmrob(tmp_path, monkeypatch, capsys):
    """Type a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def typed(line):
        return Said(command_line.run_command(monkeypatch, *line.split()), *capsys.readouterr())

    return typed


@pytest.fixture
def door(tmp_path):
    """The same, each in a process of its own."""

    def typed(line):
        command = [sys.executable, "-m", "robustbench_vlm", *line.split()]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOME)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True
        )
        return Said(done.returncode, done.stdout, done.stderr)

    return typed


def follow(typed, data, drawn, options=""):
    """The page from its first command to its last, `--include` behind the verb: the rows, by model."""
    place = f"--data-root {data} --include {CARDS}"
    for name in TRAINED:
        said = typed(f"train {name} --out runs/{name} --device cpu {options} {place}")
        assert (said.code, said.out) == (0, f"runs/{name}\n"), said.err
        assert MATCHED in said.err
        assert "was never trained on" not in said.err
        line = f"vlmrob eval --model runs/{name} --attack autoattack --suite my-digits {place}"
        assert f"next: {line}\n" in said.err
    models = " ".join(f"--model runs/{name}" for name in TRAINED)
    said = typed(f"eval {models} --attack autoattack --suite my-digits {drawn} --device cpu {place}")
    assert said.code == 0, said.err
    line = f"leaderboard --results results --suite my-digits --include {CARDS}"
    assert f"next: vlmrob {line}\n" in said.err
    said = typed(f"{line} --json")
    assert said.code == 0, said.err
    rows = {row["model_id"]: row for row in json.loads(said.out) if row["dataset"] == "my-digits"}
    assert rows.keys() == {*TRAINED}
    return rows


# the images


def test_the_script_writes_what_the_card_says_and_no_scan_is_in_two_splits(data):
    card = reader.read("datasets", str(CARDS / "datasets" / "my-digits.toml"), DatasetCard)
    seen = {}
    for split, size in card.size.items():
        folders = sorted((data / card.folder / split).iterdir())
        assert [folder.name for folder in folders] == [str(digit) for digit in range(10)]
        paths = [path for folder in folders for path in folder.iterdir()]
        assert len(paths) == size
        for path in paths:
            with Image.open(path) as image:
                assert (image.size, image.mode) == ((8, 8), "L")
                assert seen.setdefault(image.tobytes(), split) == split
    assert len(seen) == sum(card.size.values()) == 1797
    assert card.size["test"] / 1797 == pytest.approx(0.2, abs=0.03)


def test_the_cards_are_sound_and_training_never_looks_at_the_test_split():
    suite = reader.read("suites", str(CARDS / "my-digits.toml"), Suite)
    assert (suite.split, suite.n) == ("test", 0)
    recipes = sorted((CARDS / "recipes").glob("*.toml"))
    assert {*TRAINED} <= {path.stem for path in recipes}
    for path in recipes:
        recipe = reader.read("recipes", str(path), Recipe)
        assert recipe.name == path.stem
        assert (recipe.data.split, recipe.probe.split, recipe.probe.n) == ("train", "val", 0)
        assert recipe.inner is None or recipe.inner.eps in suite.eps
        assert recipe.student == ("tiny" if path.stem == "digits-clean" else "runs/digits-clean")


# the whole way


def test_a_few_steps_go_the_whole_way(vlmrob, data, tmp_path):
    rows = follow(vlmrob, data, "--n 10 --eps 16", FEW)
    for name, row in rows.items():
        assert (row["exposure"], row["split"], int(row["n"])) == ("seen", "test", 10)
        made = {path.name for path in (tmp_path / "runs" / name).iterdir()}
        assert {"card.json", "recipe.json", "log.jsonl", "image.safetensors"} <= made
        card = json.loads((tmp_path / "runs" / name / "card.json").read_text())
        assert card["trained_on"] == ["my-digits"]
        assert card["training"]["images"] == 1277
    card = json.loads((tmp_path / "runs" / "digits-mmt-ard" / "card.json").read_text())
    parents = {parent["role"]: parent["model"] for parent in card["parents"]}
    assert parents == {"student": "digits-clean", "robust": "digits-tecoa", "clean": "digits-clean"}
    (verdicts,) = (tmp_path / "results" / "cells").rglob("digits-mmt-ard*/my-digits/*.parquet")
    keys = pd.read_parquet(verdicts)["key"]
    assert len(keys) == 10
    assert all((data / key).is_file() for key in keys), "a key is the path below the data root"
    board = pd.read_csv(tmp_path / "leaderboards" / "my-digits.csv")
    assert {*TRAINED} == {*board[board.dataset == "my-digits"].model_id}


@pytest.mark.slow
def test_trained_models_are_robust_where_the_undefended_one_is_broken(door, data):
    rows = follow(door, data, "--n 100")
    clean = {name: float(row["clean"]) for name, row in rows.items()}
    robust = {name: float(row["robust"]) for name, row in rows.items()}
    assert min(clean.values()) >= 90
    assert robust["digits-clean"] <= 10
    for name in ("digits-tecoa", "digits-mmt-ard"):
        assert robust[name] >= robust["digits-clean"] + 50


# mistakes on the way


def test_a_recipe_that_goes_on_from_another_says_where_it_was_looked_for(vlmrob, data, tmp_path):
    said = vlmrob(f"train digits-tecoa --data-root {data} --include {CARDS}")
    assert said.code == 2
    error = said.err.splitlines()[-1]
    assert "'runs/digits-clean': no such model or folder" in error
    assert f"below {tmp_path}" in error
    assert not (tmp_path / "runs").exists()


def test_class_names_that_the_student_never_met_are_named_when_it_is_trained(vlmrob, data, tmp_path):
    text = (CARDS / "datasets" / "my-digits.toml").read_text()
    (tmp_path / "own" / "datasets").mkdir(parents=True)
    (tmp_path / "own" / "datasets" / "my-digits.toml").write_text(text.replace('"seven"', '"chair"'))
    said = vlmrob(f"--include own train digits-clean --data-root {data} --include {CARDS} {FEW}")
    assert said.code == 0, said.err
    notes = [line for line in said.err.splitlines() if "never trained on" in line]
    assert notes == [
        "note: my-digits: a template or class names with words that tiny was never trained on: chair"
    ]


def test_a_card_that_lacks_several_keys_names_them_all_and_include_may_stand_anywhere(vlmrob, data, tmp_path):
    text = (CARDS / "datasets" / "my-digits.toml").read_text()
    kept = [line for line in text.splitlines() if not line.startswith(("size", "licence"))]
    (tmp_path / "own" / "datasets").mkdir(parents=True)
    (tmp_path / "own" / "datasets" / "my-digits.toml").write_text("\n".join(kept))
    place = f"--data-root {data} --device cpu"
    lines = [
        f"train digits-clean --include=own --include {CARDS} {place}",
        f"train --include own digits-clean {place} --include {CARDS}",
        f"--include own --include {CARDS} train digits-clean {place}",
    ]
    for line in lines:
        said = vlmrob(line)
        assert said.code == 2
        assert said.err.splitlines()[-1] == (
            "error: own/datasets/my-digits.toml: no key size, licence; expected all of them; "
            "vlmrob new KIND NAME writes a card with every key"
        )
    assert "requires an argument" in vlmrob("list suites --include").err
    assert vlmrob("list suites --include nowhere").code == 2


def test_an_export_of_several_splits_is_judged_on_the_test_split_and_tells_what_its_card_lacks(vlmrob, data):
    train, val, test = (
        vlmrob(f"data export {data}/my-digits/{split} --to own --name mine --split {split}")
        for split in ("train", "val", "test")
    )
    assert "counts no" not in train.err
    assert "note: the card of mine counts no val: add val = 186 to its size" in val.err
    assert "note: the card of mine counts no test: add test = 334 to its size" in test.err
    assert reader.read("suites", "own/cards/mine.toml", Suite).split == "test"
    said = vlmrob("data check mine --root own --split val --include own/cards --json")
    (found,) = json.loads(said.out)
    assert (said.code, found["split"], found["images"]) == (0, "val", 186)
