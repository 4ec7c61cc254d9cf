"""Evaluations that stop when enough is known: the level under peeking, `--until` and `race`."""

import json
import math
import sys

import command_line
import numpy as np
import pandas as pd
import pytest
import toys
from scipy import integrate

from robustbench_vlm.data.dataset import Split
from robustbench_vlm.errors import DataError
from robustbench_vlm.evaluation import sequential
from robustbench_vlm.results import contest, e_process, mean_interval, result_file, stop_rule
from robustbench_vlm.results.stop_rule import StopRule

# --- the e-process -----------------------------------------------------------------------------------------


def test_e_is_the_mean_capital_of_all_bets():
    for won, lost in [(0, 0), (1, 0), (5, 0), (3, 4), (20, 9)]:
        capital = integrate.quad(lambda u, k=won, r=lost: (1 + u) ** k * (1 - u) ** r / 2, -1, 1)[0]
        assert math.exp(e_process.log_e(won, lost)) == pytest.approx(capital)
    assert math.exp(e_process.log_e(8, 0)) == pytest.approx(2**8 / 9)  # 28.4: decided after nine of nine
    assert math.exp(e_process.log_e(7, 0)) == pytest.approx(16.0)
    assert e_process.log_e(4, 9) == pytest.approx(e_process.log_e(9, 4))


def test_what_is_decided_stays_decided_and_holm_shares_the_level():
    first, then = np.array([[0, 9, 5], [0, 0, 2], [4, 1, 0]]), np.array([[0, 9, 6], [7, 0, 3], [6, 2, 0]])
    p = e_process.adjusted([first, then])
    assert p[0, 1] == pytest.approx(3 * 10 / 2**9)  # E = 2^9 / 10 at the first look, times three pairs
    assert (p == p.T).all()
    assert p[0, 2] == 1.0
    with pytest.raises(ValueError, match="no looks"):
        e_process.adjusted([])


def decided(differences, counts):
    """Share of streams in which E reaches 20 at one of the looks after `counts` images."""
    steps = np.cumsum(differences, axis=1)[:, counts]
    apart = np.cumsum(differences != 0, axis=1)[:, counts]
    won = (apart + steps) // 2
    return float((e_process.log_e(won, apart - won).max(axis=1) >= math.log(20)).mean())


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_looking_after_every_image_keeps_the_level(share):
    """3000 streams of 1500 images; without a difference at most 5 % are ever decided."""
    rng = np.random.default_rng(0)
    toss = rng.choice([-1, 0, 1], size=(3000, 1500), p=[share / 2, 1 - share, share / 2])
    assert decided(toss, np.arange(1500)) <= 0.05
    better = rng.choice([-1, 0, 1], size=(300, 1500), p=[share / 4, 1 - share, share * 3 / 4])
    assert decided(better, np.arange(1500)) >= 0.9


def test_datasets_that_favour_one_model_each_keep_the_level():
    """Two datasets in turn, of which each model wins one by 9 to 1: the mean has no difference."""
    rng = np.random.default_rng(1)
    toss = np.empty((3000, 1000), dtype=int)
    toss[:, 0::2] = rng.choice([-1, 0, 1], size=(3000, 500), p=[0.02, 0.8, 0.18])
    toss[:, 1::2] = rng.choice([-1, 0, 1], size=(3000, 500), p=[0.18, 0.8, 0.02])
    assert decided(toss, np.arange(1, 1000, 2)) <= 0.05


def raced(skills, n, block, repetitions, seed):
    """Share of races in which a pair of equal models is called different."""
    rng, wrong = np.random.default_rng(seed), 0
    skills = np.array(skills)
    equal = skills[:, None] == skills
    for _ in range(repetitions):
        drawn = (rng.random((len(skills), n)) < 0.7) & (rng.random(n) < skills[:, None] / 0.7)
        looks = [drawn[:, :k].astype(int) @ (~drawn[:, :k]).T.astype(int) for k in range(block, n + 1, block)]
        wrong += bool(((e_process.adjusted(looks) < 0.05) & equal).any())
    return wrong / repetitions


def test_a_race_of_many_keeps_the_level_for_all_its_pairs():
    assert raced([0.3, 0.3, 0.3, 0.5, 0.5], 400, 20, 150, 0) <= 0.08


@pytest.mark.slow
def test_a_race_of_many_keeps_the_level_for_all_its_pairs_often():
    assert raced([0.3, 0.3, 0.3, 0.5, 0.5], 2000, 20, 1500, 1) <= 0.05


# --- the rule ----------------------------------------------------------------------------------------------


def test_a_rule_is_read_as_it_is_written():
    rule = StopRule("until 2.5 points or 500 images", 7, 64)
    assert rule.text == "until 2.5 points or 500 images; 7 looks of 64"
    assert StopRule.of(rule.text) == rule
    assert rule.confidence == pytest.approx(1 - 0.05 / 7)
    assert stop_rule.confidence("") == pytest.approx(0.95)
    for text in ("until 2.5", "x; 0 looks of 3", "x; 3 looks of 0", ""):
        with pytest.raises(ValueError, match="no stop rule"):
            StopRule.of(text)


def test_the_looks_of_a_width_grow_and_end_with_all_images():
    assert sequential.widening(64, 1000) == [64, 128, 192, 320, 512, 768, 1000]
    assert sequential.widening(64, 30) == [30]
    assert sequential.widening(10, 25) == [10, 20, 25]


def test_the_interval_at_the_stop_covers():
    """Two datasets; the width is looked at up to eight times and ends the evaluation."""
    rng, truth, looks = np.random.default_rng(2), np.array([0.1, 0.6]), sequential.widening(20, 600)
    right = np.cumsum(rng.random((2000, 600, 2)) < truth, axis=1)
    going, inside = np.ones(2000, dtype=bool), np.zeros(2000, dtype=bool)
    for n in looks:
        low, high = mean_interval.limits(right[:, n - 1], np.array([n, n]), 1 - 0.05 / len(looks))
        stops = going & ((high - low) / 2 <= 0.06)
        inside |= stops & (low <= truth.mean()) & (truth.mean() <= high)
        going &= ~stops
    assert not going.any()
    assert inside.mean() >= 0.95


# --- commands ----------------------------------------------------------------------------------------------

N = 24


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two datasets, which the first model labelled, and three models."""
    root = tmp_path_factory.mktemp("home")
    datasets = [
        toys.dataset_card("toy", size={"test": N}),
        toys.dataset_card("pair", ("cat", "dog"), size={"test": N}),
    ]
    for card in datasets:
        toys.write(card, root / "data", N)
    for seed in (0, 1, 2):
        toys.save_model(root / "models" / f"m{seed}", seed)
    toys.write_include(root / "cards", datasets, [toys.pgd("pgd5", rows=8)], n=N)
    return root


@pytest.fixture
def vlmrob(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def typed(line):
        words = ["--include", home / "cards", *line.format(home=home).split()]
        code = command_line.run_command(monkeypatch, *words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return typed


EVAL = "--attack pgd5 --suite toys --data-root {home}/data --eps 0.1/255"
RACE = "race {home}/models/m0 {home}/models/m1 --decide --block 8 " + EVAL


def cells(folder):
    return {path.name: path.read_bytes() for path in (folder / "results" / "cells").rglob("*.parquet")}


def test_a_race_is_decided_and_its_results_stand_apart(vlmrob, tmp_path):
    """The images have the labels of the first model, so the second one is right on few of them."""
    code, out, err = vlmrob(RACE + " --json")
    assert code == 0, err
    found = json.loads(out)
    (pair,) = found["pairs"]
    assert pair["decided"] == 1
    assert pair["only_a"] + pair["only_b"] <= pair["images"] == 2 * found["models"][0]["images"] < 2 * N
    expected = e_process.log_e(pair["only_a"], pair["only_b"])
    assert pair["e"] == pytest.approx(math.exp(expected))
    assert [(m["rank_low"], m["rank_high"]) for m in found["models"]] == [(1, 1), (2, 2)]
    assert "1 of 1 pairs decided; the race is over" in err
    results = result_file.read(tmp_path / "results")
    assert len(results) == 4
    (rule,) = {result.contest.stop_rule for result in results}
    assert StopRule.of(rule) == StopRule(StopRule.of(rule).goal, 3, 8)
    # the table has them, apart from those of a fixed number, and no test of them
    assert vlmrob("eval --model {home}/models/m0 " + EVAL)[0] == 0
    assert vlmrob("leaderboard --suite toys")[0] == 0
    board = pd.read_csv(tmp_path / "leaderboards" / "toys.csv", keep_default_na=False)
    assert set(board.stop_rule) == {"", rule}
    assert set(board.rank_low) == {""}
    assert "stopped by race" in (tmp_path / "leaderboards" / "toys.md").read_text()
    code, _, err = vlmrob("compare {home}/models/m0 {home}/models/m1 --suite toys")
    assert code == 2
    assert "stopped by a rule" in err


def test_a_race_goes_on_where_it_was_killed_and_ends_alike(home, vlmrob, tmp_path):
    race = RACE.replace("--block 8", "--block 6 --dataset toy")
    whole = vlmrob(race + " --json")
    before = cells(tmp_path)
    assert before
    (tmp_path / "results").rename(tmp_path / "whole")
    words = race.format(home=home).split()
    command = [sys.executable, "-m", "robustbench_vlm", "--include", str(home / "cards"), *words]

    def lines():
        return sum(p.read_bytes().count(b"\n") for p in (tmp_path / "results" / "ledger").rglob("*.jsonl"))

    command_line.kill_command(command, lines, 3)
    assert not cells(tmp_path)
    again = vlmrob(race + " --json")
    assert again[:2] == whole[:2]
    assert cells(tmp_path) == before


def test_the_verdicts_of_a_race_are_those_of_the_first_images(vlmrob, tmp_path):
    """A fixed evaluation on as many images has the same verdicts, and takes them from the ledgers."""
    code, out, _ = vlmrob(RACE + " --json")
    assert code == 0
    n = json.loads(out)["models"][0]["images"]
    lines = sum(p.read_bytes().count(b"\n") for p in (tmp_path / "results" / "ledger").rglob("*.jsonl"))
    assert vlmrob("eval --model {home}/models/m0 --n " + str(n) + " " + EVAL)[0] == 0
    assert lines == sum(
        p.read_bytes().count(b"\n") for p in (tmp_path / "results" / "ledger").rglob("*.jsonl")
    )
    by_rule = {}
    for result in result_file.read(tmp_path / "results"):
        if result.model[0] == "random0":
            by_rule.setdefault(result.dataset, []).append(result)
    for pair in by_rule.values():
        assert len({result.contest for result in pair}) == 2
        pd.testing.assert_frame_equal(*(result.verdicts() for result in pair), check_exact=True)


def test_a_model_whose_pairs_are_decided_is_attacked_no_more(vlmrob):
    line = RACE.replace("{home}/models/m1", "{home}/models/m1 {home}/models/m2")
    found = json.loads(vlmrob(line + " --json")[1])
    images = {model["model"]: model["images"] for model in found["models"]}
    first = min(images, key=images.get)
    assert images[first] < max(images.values()) <= N
    for pair in found["pairs"]:
        shared = min(images[pair["a"]], images[pair["b"]])
        assert pair["images"] == 2 * shared
        assert pair["decided"] != 0 or (shared == N and first not in (pair["a"], pair["b"]))


def test_without_decide_only_the_price_is_printed(vlmrob, tmp_path):
    code, out, err = vlmrob(RACE.replace("--decide ", ""))
    assert code == 0
    assert "4 cells" in out
    assert "--decide starts the race" in err
    assert not (tmp_path / "results").exists()


def test_an_evaluation_stops_at_its_width(vlmrob, tmp_path):
    line = "eval --model {home}/models/m0 " + EVAL + " --until "
    code, out, err = vlmrob(line + "30 --json")
    assert code == 0, err
    rows = {row["dataset"]: row for row in json.loads(out)}
    mean = rows["mean"]
    assert (mean["ci_high"] - mean["ci_low"]) / 2 <= 30.005
    assert mean["stop_rule"].startswith(f"until 30 points or {N} images; ")
    assert rows["toy"]["n"] < N
    assert "images a dataset: ± " in err
    code, out, err = vlmrob(line + "1 --json")
    assert code == 0
    assert "± 1 points needs more images" in err
    assert {row["n"] for row in json.loads(out)} == {N, 2 * N}
    assert len({result.contest for result in result_file.read(tmp_path / "results")}) == 2


def test_an_image_that_an_evaluation_tolerates_stops_no_look(home, vlmrob, tmp_path, monkeypatch):
    """What all images may have undecodable counts, and not what the first few of them may have."""
    monkeypatch.setattr(sequential, "TOLERATED", 0.05)  # one of 24
    bad, read = [], Split.read

    def damaged(split, i, px):
        key = split.entries[i].key
        bad.append(key)
        if key == bad[0]:
            raise DataError(key, "cannot be decoded")
        return read(split, i, px)

    monkeypatch.setattr(Split, "read", damaged)
    line = EVAL.replace("--suite", "--dataset toy --suite")
    code, out, err = vlmrob("eval --model {home}/models/m0 " + line + " --until 40 --json")
    assert code == 0, err
    (row,) = [row for row in json.loads(out) if row["dataset"] == "toy"]
    assert row["n"] in (7, 15, 23)
    assert "bad-images" in row["flag"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (RACE.replace("{home}/models/m1", ""), ("2 models or more", "two different models")),
        (RACE.replace("m1", "m0"), ("1 of them different",)),
        (RACE + " --eps 1,2", ("2 radii",)),
        (RACE + " --suite imagenet-robustbench", ("lists its images",)),
        ("eval --model tiny --until 0", ("half-width", "between 0 and 50")),
        ("eval --model tiny --until 2 --protocol fare", ("fixes the number of images",)),
        ("eval --model tiny --until 2 --mode reference", ("noise in batches", "--mode fast")),
    ],
)
def test_what_cannot_be_stopped_is_refused_in_one_line(vlmrob, line, words):
    code, out, err = vlmrob(line)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert any(word in err for word in words), err


def test_a_contest_has_its_rule():
    assert "stop_rule" in contest.COLUMNS
