"""The door: every verb, what goes to stdout, exit codes, and one line for every mistake."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time

import command_line
import pandas as pd
import pytest
import toys
from PIL import Image

from robustbench_vlm.backends import installed, torchattacks
from robustbench_vlm.cards import reader

VERBS = (
    "train",
    "eval",
    "leaderboard",
    "compare",
    "lint",
    "verify",
    "submit",
    "plan",
    "race",
    "demo",
    "crosscheck",
    "new",
    "list",
    "show",
    "doctor",
    "data",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data, cards and two models; nothing in it is written again."""
    root = tmp_path_factory.mktemp("home")
    datasets = [toys.dataset_card("toy"), toys.dataset_card("pair", ("cat", "dog"))]
    for card in datasets:
        toys.write(card, root / "data")
    for seed in (0, 1):
        toys.save_model(root / "models" / f"m{seed}", seed)
    attacks = [toys.chain("aa", "ce", "square"), toys.pgd("pgd5")]
    toys.write_include(root / "cards", datasets, attacks)
    return root


@pytest.fixture
def vlmrob(home, tmp_path, monkeypatch, capsys):
    """Type a command line in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def typed(line, *more):
        words = ["--include", home / "cards", *line.format(home=home).split(), *more]
        code = command_line.run_command(monkeypatch, *words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return typed


EVAL = "eval --model {home}/models/m0 --attack aa --suite toys --data-root {home}/data --device cpu"


def one_line(code, out, err, *words):
    """A mistake: exit 2, nothing on stdout, one line that has these words."""
    assert code == 2, err
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert err.splitlines()[-1] == errors[0]
    assert "Traceback" not in err
    for word in words:
        assert word in errors[0]


# --- opening it --------------------------------------------------------------------------------------------


def test_version(vlmrob):
    code, out, _ = vlmrob("--version")
    assert (code, re.fullmatch(r"\d+\.\d+\.\d+\n", out) is not None) == (0, True)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(vlmrob, verb):
    code, out, _ = vlmrob(f"{verb} --help")
    assert code == 0
    assert "Usage" in out


def test_an_unknown_option_or_verb_is_wrong_input(vlmrob):
    assert vlmrob("eval --foo")[0] == 2
    assert vlmrob("evla")[0] == 2


# --- eval, leaderboard, compare ----------------------------------------------------------------------------


def test_the_street_from_eval_to_compare(vlmrob, tmp_path):
    code, out, err = vlmrob(EVAL + " --model {home}/models/m1 --attack pgd5 --eps 2,4")
    assert code == 0, err
    titles = [line for line in out.splitlines() if line.startswith("# ")]
    assert titles == [
        f"# {attack} · linf {eps}/255 · n = 12: clean / robust [95 % interval of robust], %"
        for attack in ("aa", "pgd5")
        for eps in (2, 4)
    ]
    assert out.splitlines()[1].startswith("dataset\trandom")
    assert [line.split("\t")[0] for line in out.splitlines()[2:6]] == ["rank", "mean", "toy", "pair"]
    assert "16 cells: 2 models x 2 datasets (24 images) x 2 attacks x linf 2/255, linf 4/255" in err
    assert "next: vlmrob leaderboard --results results --suite toys" in err

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*")}
    code, again, _ = vlmrob(EVAL + " --model {home}/models/m1 --attack pgd5 --eps 2,4")
    assert (code, again) == (0, out)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*")} == before

    code, out, err = vlmrob("leaderboard --suite toys")
    assert code == 0
    assert "written: leaderboards/toys.csv" in err
    first = (tmp_path / "leaderboards" / "toys.csv").read_bytes()
    assert first.count(b"\n") == 1 + 8 * 3  # header; eight contests and models, two datasets and a mean each
    code, out, _ = vlmrob("leaderboard --suite toys --json")
    assert len(json.loads(out)) == 24
    assert (tmp_path / "leaderboards" / "toys.csv").read_bytes() == first

    code, out, _ = vlmrob("compare random0 random1 --suite toys --json")
    found = json.loads(out)
    assert code == 0
    assert [line["dataset"] for line in found[:4]] == ["toy", "pair", "all images", "mean"]
    assert len(found) == 16
    assert {type(line[key]) for line in found for key in ("clean_difference", "robust_p")} == {float}
    assert "24 images: random0 against random1: " in vlmrob("compare random0 random1 --suite toys")[2]
    one_line(*vlmrob("compare random0 rondom1 --suite toys"), "did you mean 'random1'", "known: random0")


def test_json_is_all_of_stdout(vlmrob):
    code, out, err = vlmrob(EVAL + " --json --dataset toy --n 4 --batch-size 3")
    assert code == 0
    (row, *_) = json.loads(out)
    assert (row["dataset"], row["n"], type(row["robust_ce"])) == ("toy", 4, float)
    assert "1 cell: 1 model x 1 dataset (4 images)" in err


def test_adversarial_images_are_kept_on_request(vlmrob, tmp_path):
    assert vlmrob(EVAL + " --dataset toy --save-adversarial")[0] == 0
    assert len(list((tmp_path / "results" / "cells").rglob("*.safetensors"))) == 1


def test_ways_to_attack_stand_apart(vlmrob, tmp_path):
    line = EVAL + " --dataset toy --json"
    rows = []
    for way in ("", " --mode reference", " --engine autoattack", " --precision bf16"):
        code, out, err = vlmrob(line + way)
        assert code == 0, err
        rows += json.loads(out)
    kinds = [(row["engine"], row["precision"]) for row in rows]
    assert kinds[:2] == [("native/3", "fp32"), ("native-reference/1", "fp32")]
    assert kinds[2][0].startswith("autoattack/")
    assert kinds[3] == ("native/3", "bf16-find")
    code, out, _ = vlmrob("leaderboard --suite toys --json")
    assert code == 0
    assert sorted((row["engine"], row["precision"]) for row in json.loads(out)) == sorted(kinds)
    titles = [line for line in vlmrob("leaderboard --suite toys")[1].splitlines() if line[0] == "#"]
    assert len(titles) == 4
    assert len(set(titles)) == 4
    assert len(list((tmp_path / "results" / "ledger").rglob("*.jsonl"))) == 8  # two stages each, none shared


CROSS = "crosscheck {home}/models/m0 --suite toys --data-root {home}/data --device cpu"


def test_engines_are_held_against_each_other_on_the_same_images(vlmrob, tmp_path):
    code, out, err = vlmrob(CROSS + " --attack aa --engine autoattack --json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["model"], found["dataset"], found["n"], found["attacked"]) == ("random0", "toy", 12, 12)
    names = ["native fast", "native reference", "autoattack"]
    assert [run["engine"] for run in found["runs"]] == names
    for run in found["runs"]:
        assert len(run["verdicts"]) == 12
        assert {"broken", "robust"} == set(run["verdicts"].values())
        assert run["cost"]["gradients"] > 0
        assert run["seconds"] > 0
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == [
        (names[0], names[1]), (names[0], names[2]), (names[1], names[2])
    ]  # fmt: skip
    same = found["pairs"][2]
    assert (same["only_a"], same["only_b"], same["agreement"]) == ([], [], 1.0)
    broken = [key for key, verdict in found["runs"][1]["verdicts"].items() if verdict == "broken"]
    assert same["both"] == len(broken)
    assert not (tmp_path / "results").exists()


def test_an_engine_that_cannot_is_left_out_aloud_and_the_tables_are_told(vlmrob):
    code, out, err = vlmrob(CROSS + " --attack pgd5 --eps 2 --n 6 --seed 4 --engine native")
    assert code == 0, err
    assert "left out: native reference: --mode reference: stage pgd5" in err
    lines = out.splitlines()
    assert lines[0] == "# pgd5 on random0, toy, linf 2/255, seed 4"
    assert lines[1].startswith("a\tb\tboth broken\tonly a\tonly b\tagreement %\tdisagree on")
    assert [line.split("\t")[:3] for line in lines[3:] if line[0] != "#"][1] == [
        "native fast", "native/3", "6 of 6"
    ]  # fmt: skip


def test_a_measured_cell_is_said_to_be_there_and_costs_nothing(vlmrob):
    line = EVAL + " --dataset toy --n 4"
    assert "measured already" not in vlmrob(line + " --dry-run")[1]
    _, out, err = vlmrob(line + " --eps 2,4")
    assert "measured already" not in err
    _, out, _ = vlmrob(line + " --eps 2,4 --dry-run")
    assert "2 of 2 cells measured already, in results" in out
    assert "checks included" not in out
    _, out, _ = vlmrob(line + " --eps 2,4 --attack pgd5 --dry-run")
    assert "2 of 4 cells measured already" in out
    assert "checks included" in out
    assert "measured already" not in vlmrob(line + " --eps 2,4 --n 5 --dry-run")[1]


def test_results_that_cannot_be_written_are_refused_before_the_attack(vlmrob, tmp_path):
    (tmp_path / "file").touch()
    one_line(
        *vlmrob(EVAL + " --dataset toy --out file/r"), "--out file/r", "choose another folder with --out"
    )


def test_hints_can_be_pasted(vlmrob, tmp_path):
    _, _, err = vlmrob(EVAL + " --dataset toy --n 4", "--out", "my results; rm x")
    assert "next: vlmrob leaderboard --results 'my results; rm x' --suite toys" in err


def test_a_dry_run_writes_nothing(vlmrob, tmp_path):
    code, out, _ = vlmrob(EVAL + " --dry-run")
    assert code == 0
    assert "2 cells" in out
    assert "checks included" in out
    code, out, _ = vlmrob("eval --model {home}/models/m0 --dry-run")  # suite tiny, which is not there yet
    assert code == 0
    assert "not below data yet: tiny-seen" in out
    assert list(tmp_path.iterdir()) == []


def test_a_flag_is_told_and_strict_makes_it_exit_3(vlmrob, home, tmp_path):
    shutil.copytree(home / "data", tmp_path / "marked")
    (tmp_path / "marked" / "wds_toy" / "miniature.txt").write_text("generated\n")
    line = EVAL.replace("{home}/data", str(tmp_path / "marked")) + " --dataset toy"
    code, out, err = vlmrob(line)
    assert code == 0
    assert "flag: random0 on toy: generated-images" in err
    assert " !" in out
    code, again, _ = vlmrob(line + " --strict")
    assert (code, again) == (3, out)
    assert vlmrob(EVAL + " --dataset pair --strict")[0] == 0


def test_a_fact_is_told_and_strict_does_not_count_it(vlmrob, home, tmp_path):
    twins = toys.dataset_card("twins", (*toys.NAMES[:5], toys.NAMES[0]))
    toys.write(twins, tmp_path / "data")
    toys.write_include(tmp_path / "cards", [twins])
    line = f"--include {tmp_path}/cards " + EVAL.replace("{home}/data", str(tmp_path / "data"))
    code, out, err = vlmrob(line.replace("--suite toys", "--dataset twins") + " --n 0 --eps 4 --strict")
    assert code == 0, err
    assert "note: random0 on twins: tied-classes" in err
    assert "flag: " not in err
    assert "!" not in out
    assert "note: tied-classes (random0 on twins): classes with the same text" in err


def test_without_a_model_the_newest_checkpoint_is_taken_and_named(vlmrob, home, tmp_path):
    line = EVAL.replace("--model {home}/models/m0 ", "") + " --dry-run"
    for name, age in (("m0", 100), ("m1", 0)):
        shutil.copytree(home / "models" / name, tmp_path / "runs" / "deep" / name)
        stamp = time.time() - age
        os.utime(tmp_path / "runs" / "deep" / name / "card.json", (stamp, stamp))
    code, _, err = vlmrob(line)
    assert code == 0
    assert "no --model: taking the newest checkpoint, runs/deep/m1" in err


def test_notes_of_a_careful_reader_are_told(vlmrob, home, tmp_path):
    shutil.copytree(home / "data", tmp_path / "data")
    (tmp_path / "data" / "wds_toy" / "zeroshot_classification_templates.txt").unlink()
    _, _, err = vlmrob(EVAL.replace("{home}/data", str(tmp_path / "data")) + " --dataset toy")
    assert "note: toy: no templates file" in err


# --- missing data ------------------------------------------------------------------------------------------


def test_missing_data_stop_everything_unless_told(vlmrob, home, tmp_path):
    shutil.copytree(home / "data" / "wds_toy", tmp_path / "data" / "wds_toy")
    line = EVAL.replace("{home}/data", str(tmp_path / "data"))
    code, out, err = vlmrob(line)
    assert (code, out) == (2, "")
    assert "1 of 2 datasets are missing" in err
    assert "--skip-missing" in err
    assert "pair: no " in err
    assert not (tmp_path / "results").exists()
    code, out, err = vlmrob(line + " --skip-missing")
    assert code == 0
    assert "left out: pair" in err
    assert [row.split("\t")[0] for row in out.splitlines()[2:]] == ["toy"]  # and no mean over a hole


def test_a_missing_public_dataset_comes_with_the_command_that_gets_it(vlmrob, tmp_path):
    code, _, err = vlmrob("eval --model {home}/models/m0 --suite zeroshot --data-root nowhere")
    assert code == 2
    assert "15 of 15 datasets are missing" in err
    assert "vlmrob data fetch food101" in err
    assert not (tmp_path / "results").exists()


# --- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train mmt-adr", ["'mmt-adr'", "did you mean 'mmt-ard'"]),
        ("train mmt-ard --recipe nowhere.toml", ["nowhere.toml", "no such file"]),
        ("train mmt-ard --recipe tiny-tecoa", ["no teacher 'robust'", "--set teachers.robust=MODEL"]),
        (
            "train fare --recipe tiny-clean --set teachers.anchor=tiny",
            ["no [inner] table", "--recipe tiny-agft"],
        ),
        ("train mmt-ard --set optim.setps=3", ["optim.setps", "did you mean 'steps'"]),
        ("train mmt-ard --set optim.steps", ["key=value"]),
        ("train mmt-ard --device gpu", ["--device gpu", "cpu, cuda"]),
        (EVAL + " --eps 1.5", ["'1.5'", "1.5/255", "N/255"]),
        (EVAL + " --eps zero", ["'zero'", "not a number"]),
        (EVAL + " --eps 4,,2", ["not a number"]),
        (EVAL + " --eps -1", ["not positive"]),
        (EVAL + " --eps 0,4", ["'0'", "at radius 0 no attack is run: robust accuracy is the clean accuracy"]),
        (EVAL + " --attack autoatack", ["did you mean 'autoattack'"]),
        (EVAL.replace("toys", "zeroshoot"), ["did you mean 'zeroshot'"]),
        (EVAL + " --dataset tyo", ["not in suite toys", "did you mean 'toy'"]),
        (EVAL + " --norm l3", ["--norm l3", "did you mean 'l2'"]),
        (EVAL + " --engine torchatacks", ["--engine torchatacks", "did you mean 'torchattacks'"]),
        (EVAL + " --mode slow", ["--mode slow", "known: fast, reference"]),
        (EVAL + " --mode reference --engine torchattacks", ["a mode of the native engine", "leave out one"]),
        (EVAL + " --mode reference --attack pgd5", ["stage pgd5, pgd in linf", "type --mode fast"]),
        (EVAL + " --mode reference --precision bf16", ["--mode reference", "bf16-find"]),
        (EVAL + " --mode reference --batch-size 3", ["--batch-size 3", "leave it out"]),
        (EVAL + " --engine autoattack --attack pgd5", ["stage pgd5", "the package has no pgd"]),
        (EVAL + " --engine autoattack --compile", ["leave --compile and --cuda-graphs out"]),
        (EVAL + " --precision fp16", ["'fp16'", "fp32 or bf16"]),
        (EVAL + " --cuda-graphs", ["--cuda-graphs: device cpu", "leave it out, or type --device cuda"]),
        (EVAL + " --tf32", ["--tf32: device cpu"]),
        (
            "crosscheck {home}/models/m0 --suite toys --attack pgd5 --device cpu --engine autoattack",
            ["no pgd"],
        ),
        (
            "crosscheck {home}/models/m0 --suite toys --attack aa --device cpu --engine foolbox",
            ["no such engine"],
        ),
        (EVAL.replace("--device cpu", "--device tpu"), ["--device tpu", "auto, cpu"]),
        (EVAL.replace("--device cpu", "--device cuda:99"), ["--device cuda:99", "vlmrob doctor"]),
        (EVAL.replace("{home}/models/m0", "{home}/models/m7"), ["m7", "no such model or folder"]),
        (EVAL.replace("{home}/models/m0", "{home}/data"), ["no card.json"]),
        (EVAL.replace("{home}/models/m0", "ViT-B-23:openai"), ["no such architecture", "did you mean"]),
        (EVAL.replace("{home}/models/m0", "ViT-B-32:opnai"), ["no weights tagged", "did you mean 'openai'"]),
        ("--include nowhere list attacks", ["--include nowhere", "no such folder"]),
        ("list atacks", ["did you mean 'attacks'"]),
        ("show suite zeroshoot", ["did you mean 'zeroshot'"]),
        ("show defense mmt-adr", ["did you mean 'mmt-ard'"]),
        ("show model nobody", ["'nobody'"]),
        ("data make zeroshoot", ["did you mean 'zeroshot'"]),
        ("leaderboard --results nowhere --suite toys", ["no results of suite toys", "vlmrob eval"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(vlmrob, tmp_path, line, words):
    one_line(*vlmrob(line), *words)
    assert [path.name for path in tmp_path.iterdir()] == []  # nothing was begun


@pytest.mark.parametrize("line", [EVAL + " --n -5", EVAL + " --n some"])
def test_numbers_out_of_range_are_wrong_input(vlmrob, line):
    code, out, err = vlmrob(line)
    assert (code, out) == (2, "")
    assert "Invalid value" in err


@pytest.mark.parametrize("size", ["0", "-1", "8193", "1.5", "some", "Auto"])
def test_a_batch_size_is_auto_or_a_number_of_images(vlmrob, size):
    wanted = "expected auto, or a number of images from 1 to 8192"
    one_line(*vlmrob(f"{EVAL} --batch-size {size}"), f"--batch-size: '{size}'; {wanted}")


def test_a_recipe_with_an_unknown_key(vlmrob, tmp_path):
    text = (reader.home() / "recipes" / "tiny-tecoa.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace("weight_decay", "wieght_decay"))
    one_line(*vlmrob("train mine.toml"), "mine.toml", "optim.wieght_decay", "did you mean 'weight_decay'")


def test_an_attack_card_with_an_unknown_field_stops_before_the_model_is_loaded(vlmrob, tmp_path):
    text = (reader.home() / "attacks" / "pgd20.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace("random_start", "random_strat"))
    line = EVAL.replace("--attack aa", "--attack mine.toml").replace("{home}/models/m0", "nobody")
    one_line(*vlmrob(line), "random_strat", "did you mean 'random_start'")


@pytest.mark.parametrize(
    ("chain", "change", "words"),
    [
        ("pgd20", ('attack = "pgd"', 'attack = "pgdd"'), ["unknown attack 'pgdd'", "did you mean 'pgd'"]),
        ("pgd20", ("steps = 20", "steps = 0"), ["pgd: steps 0", "at least 1"]),
        ("autoattack", ("queries = 5000", "queries = 0"), ["square: queries 0", "at least 1"]),
        ("autoattack", ("rows = 16", "rows = 0"), ["rows", "greater than or equal to 1"]),
        ("autoattack", ('name = "apgd-t"', 'name = "apgd-ce"'), ["stage names must differ"]),
        (
            "autoattack",
            ('attack = "square"\n', ""),
            ["no key stage.3.attack", "name of the attack, or `module:Class`"],
        ),
    ],
)
def test_a_chain_that_cannot_run_stops_before_the_model_is_loaded(vlmrob, tmp_path, chain, change, words):
    text = (reader.home() / "attacks" / f"{chain}.toml").read_text()
    assert change[0] in text
    (tmp_path / "mine.toml").write_text(text.replace(*change))
    line = EVAL.replace("--attack aa", "--attack mine.toml").replace("{home}/models/m0", "nobody")
    one_line(*vlmrob(line), *words)


def test_a_norm_that_an_attack_lacks_stops_before_the_model_is_loaded(vlmrob, tmp_path):
    text = (reader.home() / "attacks" / "pgd20.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace('attack = "pgd"', 'attack = "test_api:OnlyLinf"'))
    line = EVAL.replace("--attack aa", "--attack mine.toml").replace("{home}/models/m0", "nobody")
    one_line(*vlmrob(line), "it names 'test_api:OnlyLinf'", "type --allow-code")
    one_line(
        *vlmrob(line + " --allow-code --norm l1 --eps 12"),
        "stage pgd20: norm 'l1'; expected linf; chains for l1",
    )


def test_a_dataset_without_images_is_found_before_the_first_attack(vlmrob, damaged, tmp_path):
    folder, line = damaged
    for shard in (folder / "test").glob("*.tar"):
        with tarfile.open(shard, "w"):
            pass
    one_line(*vlmrob(line), "no images in any shard")
    assert not any((tmp_path / "results").iterdir())


@pytest.fixture
def damaged(home, tmp_path):
    """A copy of the data whose second dataset is to be damaged, and the line that evaluates both."""
    shutil.copytree(home / "data", tmp_path / "damaged")
    return tmp_path / "damaged" / "wds_pair", EVAL.replace("{home}/data", str(tmp_path / "damaged"))


def test_a_truncated_shard_is_found_before_the_first_attack(vlmrob, damaged, tmp_path):
    folder, line = damaged
    shard = folder / "test" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:1500])
    one_line(*vlmrob(line), "1.tar")
    assert not any((tmp_path / "results").iterdir())


def test_a_label_outside_the_class_list_is_found_before_the_first_attack(vlmrob, damaged, tmp_path):
    folder, line = damaged
    shutil.rmtree(folder)
    toys.write(toys.dataset_card("pair", ("cat", "dog")), folder.parent, labels=[0, 1] * 5 + [2, 0])
    one_line(*vlmrob(line), "label", "2")
    assert not any((tmp_path / "results").iterdir())


def test_another_class_list_is_refused(vlmrob, damaged):
    folder, line = damaged
    (folder / "classnames.txt").write_text("cat\nhorse\n")
    one_line(*vlmrob(line), "classnames.txt", "'horse'")


def changed_card(home, tmp_path, **changes):
    shutil.copytree(home / "models" / "m0", tmp_path / "changed")
    path = tmp_path / "changed" / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return EVAL.replace("{home}/models/m0", str(tmp_path / "changed"))


def test_a_checkpoint_of_another_architecture(vlmrob, home, tmp_path):
    line = changed_card(home, tmp_path, arch="vlmrob-tiny-teacher")
    one_line(*vlmrob(line), "image.safetensors", "architecture")


def test_a_checkpoint_whose_bytes_were_changed(vlmrob, home, tmp_path):
    line = changed_card(home, tmp_path)
    shutil.copy(home / "models" / "m1" / "image.safetensors", tmp_path / "changed" / "image.safetensors")
    one_line(*vlmrob(line), "fingerprint")


def test_results_that_were_tampered_with(vlmrob, tmp_path):
    assert vlmrob(EVAL)[0] == 0
    path = next((tmp_path / "results" / "cells").rglob("*.json"))
    path.write_text(path.read_text().replace('"errors": 0', '"errors": 1'))
    one_line(*vlmrob("leaderboard --suite toys"), path.name, "fingerprint")
    one_line(*vlmrob("compare random0 random0 --suite toys"), path.name, "fingerprint")


def test_a_folder_that_cannot_be_written_is_one_line(vlmrob, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, out, err = vlmrob(EVAL + " --out file/results")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert "file" in err.splitlines()[-1]


# --- the other verbs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["attacks", "datasets", "defenses", "models", "recipes", "suites"])
def test_list_and_show_agree(vlmrob, kind):
    code, out, _ = vlmrob(f"list {kind} --json")
    names = [row["name"] for row in json.loads(out)]
    assert code == 0
    assert names
    more = "\tdefense\tarchitecture\teps\tsource\tlicence\tweights" if kind == "models" else ""
    assert vlmrob(f"list {kind}")[1].splitlines()[:2] == [f"# {kind}", "name\twhat it is" + more]
    for name in [name for name in names if name not in ("ARCH:TAG", "DIR")]:
        code, out, _ = vlmrob(f"show {kind.removesuffix('s')} {name}")
        assert code == 0
        assert json.loads(out)["name"] == name


def test_included_cards_are_listed(vlmrob):
    assert "\ntoy\tToy\n" in vlmrob("list datasets")[1]


def test_doctor_says_what_is_missing(vlmrob, monkeypatch):
    code, out, _ = vlmrob("doctor --json")
    found = {row["what"]: row for row in json.loads(out)}
    assert code == 0
    assert {"python", "torch", "cores", "packaged models"} <= found.keys()
    assert found["engine autoattack"]["found"].startswith(("autoattack-", "pyautoattack-"))
    assert {"vlmrob", "data root", "datasets there", "cache", "VLMROB_CACHE"} <= found.keys()
    modules = (("torchattacks_that_is_missing",), torchattacks.INSTALL)
    monkeypatch.setitem(installed.PACKAGES, "torchattacks", modules)
    missing = json.loads(vlmrob("doctor --json")[1])
    (row,) = [row for row in missing if row["what"] == "engine torchattacks"]
    assert row["found"] == "not there"
    assert row["do"].startswith("pip install --no-deps torchattacks (its wheel also carries files")
    assert vlmrob("doctor")[1].startswith("# doctor\nwhat\tfound\twhat to do\n")


@pytest.mark.parametrize(
    "words", ["list models", "doctor", "show model tiny", "eval --model nope", "train --help"]
)
def test_light_commands_do_not_import_torch(words):
    code = f"import sys; sys.argv = ['vlmrob', *{words.split()!r}]\nfrom robustbench_vlm.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    sys.exit('torch' in sys.modules)\n"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_quiet_leaves_out_remarks_and_keeps_flags(vlmrob):
    line = EVAL + " --dataset toy --n 4 --json"
    flags = [text for text in vlmrob(line)[2].splitlines() if text.startswith("flag: ")]
    code, out, err = vlmrob(f"{line} --quiet")
    assert (code, err.splitlines()) == (0, flags)
    assert json.loads(out)
    vlmrob("list attacks")  # the next command is not quiet
    assert "measured already" in vlmrob(line)[2]


def test_train_a_defense_and_evaluate_it_bare(vlmrob, home, tmp_path):
    recipe = {"name": "short", "title": "Short", "student": f"{home}/models/m0", "seed": 1}
    text = toys.toml(recipe) + '[defense]\nname = "tecoa"\n[data]\ndataset = "toy"\nsplit = "test"\n'
    text += '[inner]\neps = "4/255"\nsteps = 1\nstep_size = "2/255"\n'
    text += "[optim]\nlr = 1e-3\nsteps = 2\nbatch_size = 4\n"
    (tmp_path / "short.toml").write_text(text)
    code, out, err = vlmrob("train short.toml --data-root {home}/data --device cpu")
    assert code == 0, err
    folder = out.strip()
    assert re.fullmatch(r"runs/short-[0-9a-f]{8}", folder)
    assert (tmp_path / folder / "card.json").exists()
    assert f"next: vlmrob eval --model {folder}" in err
    assert vlmrob("train short.toml --data-root {home}/data --device cpu")[:2] == (0, out)
    one_line(*vlmrob("train short.toml --no-resume --data-root {home}/data --device cpu"), "not empty")
    line = EVAL.replace("--model {home}/models/m0 ", "") + " --dataset toy --json"
    code, out, err = vlmrob(line)
    assert code == 0, err
    assert f"taking the newest checkpoint, {folder}" in err
    row = json.loads(out)[0]
    assert (row["defense"], row["train_eps"], row["exposure"]) == ("tecoa", "4/255", "seen")


def test_data_make_writes_a_miniature_of_every_dataset(vlmrob, tmp_path):
    code, out, _ = vlmrob("data make toys --root made --n 3")
    assert (code, out) == (0, "made\n")
    for name in ("toy", "pair"):
        assert (tmp_path / "made" / f"wds_{name}" / "test" / "nshards.txt").exists()
        assert (tmp_path / "made" / f"wds_{name}" / "miniature.txt").exists()
    assert vlmrob("data make toys --root made --n 3")[:2] == (0, "made\n")  # and again, without harm


# --- images without a card ---------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """Class folders of six pictures of two classes, and tables of the same pictures."""
    card = toys.dataset_card("photos", ("cat", "dog"))
    rows = []
    for i, picture in enumerate(toys.pictures(card, 6)):
        path = tmp_path / "photos" / card.names[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
        rows.append({"path": str(path.relative_to(tmp_path)), "label": card.names[i % 2]})
    (tmp_path / "photos.csv").write_text(
        "path,label\n" + "".join(f"{row['path']},{row['label']}\n" for row in rows)
    )
    (tmp_path / "photos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pd.DataFrame(rows).to_parquet(tmp_path / "photos.parquet")
    return "eval --model {home}/models/m0 --attack pgd5 --device cpu"


@pytest.mark.parametrize("source", ["photos", "photos.csv", "photos.jsonl", "photos.parquet"])
def test_images_without_a_card_are_evaluated(vlmrob, tmp_path, photos, source):
    code, out, err = vlmrob(f"{photos} --data {source} --json")
    assert code == 0, err
    row = json.loads(out)[0]
    assert (row["n"], row["n_classes"], row["canvas_px"]) == (6, 2, toys.model().image_size)
    assert row["suite"] == row["dataset"]
    assert f"note: {source}: 6 images of 2 classes: 'cat', 'dog'" in err
    code, out, err = vlmrob(f"{photos} --data {source}")  # finished: nothing is exported or attacked again
    assert code == 0, err
    assert f"next: vlmrob leaderboard --results results --suite {row['suite']} --include" in err
    line = err.partition("next: vlmrob ")[2].splitlines()[0]
    assert json.loads(vlmrob(f"{line} --json")[1])[0]["dataset"] == row["dataset"]


def test_names_templates_and_columns_of_images_without_a_card(vlmrob, tmp_path, photos):
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    (tmp_path / "templates.txt").write_text("a sketch of a {c}.\n")
    (tmp_path / "other.csv").write_text(
        (tmp_path / "photos.csv").read_text().replace("path,label", "where,what")
    )
    options = "--names names.txt --templates templates.txt --columns where,what"
    code, _, err = vlmrob(f"{photos} --data other.csv {options} --json")
    assert code == 0, err
    card = next((tmp_path / "data" / "cards" / "datasets").glob("*.toml")).read_text()
    assert 'names = ["dog", "cat"]' in card
    assert "a sketch of a {c}." in card


def test_a_dry_run_over_images_without_a_card_writes_nothing(vlmrob, tmp_path, photos):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = vlmrob(f"{photos} --data photos --dry-run")
    assert code == 0
    assert "4 cells" in out or "2 cells" in out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--data photos --suite toys", ["--data photos", "--suite beside it", "leave out --suite or --data"]),
        ("--data photos --dataset toy", ["--dataset beside it"]),
        ("--data photos --protocol aa2", ["--protocol beside it"]),
        ("--names names.txt --suite toys", ["--names", "no --data", "add --data"]),
        ("--split val --suite toys", ["--split", "no --data"]),
        ("--data nowhere", ["nowhere", "no such file or folder", "class folders, or a file in"]),
        ("--data photos --names nowhere.txt", ["--names nowhere.txt", "No such file", "one entry a line"]),
        ("--data photos.csv --columns where,what", ["photos.csv", "'where'"]),
    ],
)
def test_images_without_a_card_that_cannot_be_used(vlmrob, tmp_path, photos, options, words):
    one_line(*vlmrob(f"{photos} {options}"), *words)
    assert not (tmp_path / "data").exists()


# --- one dataset without a suite ---------------------------------------------------------------------------


def test_a_dataset_without_a_suite_is_evaluated_alone(vlmrob):
    line = EVAL.replace(" --suite toys", "") + " --dataset toy --json"
    code, out, err = vlmrob(line)
    assert code == 0, err
    row = json.loads(out)[0]
    assert (row["suite"], row["dataset"], row["eps"], row["n_requested"]) == ("toy", "toy", "4/255", 1000)
    assert "no --suite: toy alone, eps 4/255, n 1000" in err
    assert "suites with toy: toys; --suite takes their radii and images" in err
    one_line(
        *vlmrob(EVAL.replace(" --suite toys", "") + " --dataset toy,pair"),
        "several datasets without --suite", "--suite toys", "vlmrob new suite",
    )  # fmt: skip
    one_line(
        *vlmrob(EVAL.replace("toys", "tiny") + " --dataset toy"),
        "not in suite tiny", "leave --suite out to evaluate toy alone, or type --suite toys",
    )  # fmt: skip


def test_attacks_and_datasets_take_commas(vlmrob):
    code, out, err = vlmrob(EVAL.replace("--attack aa", "--attack aa,pgd5") + " --dataset toy,pair --dry-run")
    assert code == 0, err
    assert "4 cells: 1 model x 2 datasets (24 images) x 2 attacks" in out
