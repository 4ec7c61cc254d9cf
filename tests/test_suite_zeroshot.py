"""The fifteen zero-shot datasets, as miniatures in the real layout, from one command each to one table."""

import csv
import shutil
from pathlib import Path

import pytest
import toys
from command_line import run_command as vlmrob

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.data.dataset import open_split

N = 8
EPS = "1,4"  # radii at which the random model loses some images of every dataset, and keeps some
LONG = ("imagenet-r", "imagenet-sketch", "imagenet")  # 176,000 of the suites' 184,680 sentences
STAGES = ("ce", "t", "fab", "square")


def write_cards(folder, *, whole):
    """AutoAttack with few steps under its own name; for the fast edition, few templates for the long ones."""
    changed = []
    for name in () if whole else LONG:
        card = reader.read("datasets", name, DatasetCard)
        short = {"templates": card.templates[:3], "templates_sha256": ""}
        changed.append(DatasetCard.model_validate(card.model_dump() | short))
    chains = [toys.chain("autoattack", *STAGES, rows=N), toys.pgd("pgd20", rows=N)]
    return toys.write_include(folder, changed, chains)


@pytest.fixture(autouse=True)
def _no_cards_of_another_test():
    reader.include([])
    yield
    reader.include([])


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fast", "whole"])
def test_the_line_of_the_readme_over_all_fifteen(tmp_path, monkeypatch, capsys, whole):
    monkeypatch.chdir(tmp_path)
    model, root = toys.save_model(tmp_path / "model"), tmp_path / "data"
    include = ["--include", write_cards(tmp_path / "cards", whole=whole)]
    make = ["data", "make", "zeroshot", "--root", root, "--n", N, "--label-with", model]
    assert vlmrob(monkeypatch, *include, *make) == 0
    capsys.readouterr()

    reader.include([tmp_path / "cards"])
    suite = reader.read("suites", "zeroshot", Suite)  # with shorter cards it is another one, and says so
    assert (suite.name == "zeroshot") == whole
    assert len(suite.datasets) == 15
    for name in suite.datasets:  # the reader holds class names and their number to the card
        card = reader.read("datasets", name, DatasetCard)
        assert len(open_split(card, root, "test")) == N
        assert card.n_classes == len((root / card.folder / "classnames.txt").read_text().splitlines())

    line = ["eval", "--attack", "autoattack", "--suite", "zeroshot", "--data-root", root]
    more = ["--model", model, "--eps", EPS, "--device", "cpu"]
    assert vlmrob(monkeypatch, *include, *line, *more) == 0
    assert vlmrob(monkeypatch, *include, "leaderboard", "--suite", "zeroshot") == 0
    said = capsys.readouterr()
    assert "generated-images" in said.err  # nobody takes these numbers for real ones

    rows = read(Path(f"leaderboards/{suite.name}.csv"))
    for eps in EPS.split(","):
        names = [row["dataset"] for row in rows if row["eps"] == f"{eps}/255"]
        assert names == [*suite.datasets, "mean", "mean:fare-13", "mean:without-pcam"]
    attackable(rows, suite.datasets)
    mean = next(row for row in rows if row["dataset"] == "mean" and row["eps"] == "4/255")
    finals = [float(r["robust"]) for r in rows if r["eps"] == "4/255" and r["dataset"] in suite.datasets]
    assert float(mean["robust"]) == pytest.approx(sum(finals) / 15, abs=0.01)
    pair = next(row for row in rows if row["dataset"] == "pcam")
    assert pair["n_classes"] == "2"


def test_the_full_suite_under_pgd_and_autoattack_in_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, root = toys.save_model(tmp_path / "model"), tmp_path / "data"
    include = ["--include", write_cards(tmp_path / "cards", whole=False)]
    make = ["data", "make", "full", "--root", root, "--n", N, "--label-with", model]
    assert vlmrob(monkeypatch, *include, *make) == 0
    assert vlmrob(monkeypatch, *include, "data", "check", "full", "--root", root, "--decode") == 0
    line = ["eval", "--suite", "full", "--attack", "pgd20", "--attack", "autoattack", "--data-root", root]
    assert vlmrob(monkeypatch, *include, *line, "--model", model, "--eps", EPS, "--device", "cpu") == 0
    assert vlmrob(monkeypatch, *include, "leaderboard", "--suite", "full") == 0
    reader.include([tmp_path / "cards"])
    suite = reader.read("suites", "full", Suite)
    rows = read(Path(f"leaderboards/{suite.name}.csv"))
    assert {row["n_classes"] for row in rows} >= {"2", "10", "1000"}
    for attack in ("pgd20", "autoattack"):
        own = [row for row in rows if row["attack"].partition("@")[0] == attack]
        for eps in EPS.split(","):
            names = [row["dataset"] for row in own if row["eps"] == f"{eps}/255"]
            assert names == [*suite.datasets, "mean", "mean:fare-13", "mean:zeroshot"]
    attackable([row for row in rows if row["attack"].startswith("autoattack")], suite.datasets)


def attackable(rows, datasets):
    """Of every dataset images are attacked, and at one radius one breaks while one stands."""
    for name in datasets:
        own = [row for row in rows if row["dataset"] == name]
        right = [round(float(row["clean"]) * N / 100) for row in own]
        left = [round(float(row["robust"]) * N / 100) for row in own]
        assert min(right) >= 2
        assert any(0 < standing < clean for clean, standing in zip(right, left, strict=True)), (name, left)
        assert left == sorted(left, reverse=True)


def test_with_one_dataset_missing_nothing_is_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, root = toys.save_model(tmp_path / "model"), tmp_path / "data"
    include = ["--include", write_cards(tmp_path / "cards", whole=False)]
    assert vlmrob(monkeypatch, "data", "make", "zeroshot", "--root", root, "--n", 2) == 0
    shutil.rmtree(root / "wds_food101")
    capsys.readouterr()
    line = ["eval", "--attack", "autoattack", "--suite", "zeroshot", "--data-root", root, "--model", model]
    assert vlmrob(monkeypatch, *include, *line) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "1 of 15 datasets are missing" in said.err
    assert "food101" in said.err
    assert f"vlmrob data fetch food101 --root {root}" in said.err
    assert "--skip-missing" in said.err
    assert not Path("results").exists()
