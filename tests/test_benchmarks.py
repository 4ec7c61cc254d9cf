"""The benchmark scripts, at the smallest sizes: they run, count right, go on after a kill, never mix runs."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch.nn.modules.module import register_module_forward_pre_hook

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import miniature
from robustbench_vlm.training import cost

HERE = Path(__file__).parent.parent / "benchmarks"
TINY = [
    "--n",
    "3",
    "--steps",
    "2",
    "--queries",
    "4",
    "--targets",
    "2",
    "--every",
    "2",
    "--shares",
    "0.5",
    "--radii",
    "6",
]


def script(*words, name="attacks.py"):
    return subprocess.run(
        [sys.executable, str(HERE / name), *map(str, words)], capture_output=True, text=True, check=False
    )


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def measured(path):
    return [line for line in lines(path) if "engine" in line]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of ours and the reference on every attack at one radius."""
    out = tmp_path_factory.mktemp("bench") / "table.md"
    words = [*TINY, "--engines", "ours", "autoattack", "--out", out]
    ran = script(*words)
    assert ran.returncode == 0, ran.stderr
    return out, words


def test_every_attack_is_measured_by_every_engine(first):
    out, _ = first
    found = measured(out.with_suffix(".jsonl"))
    names = ["apgd-ce", "apgd-t", "fab-t", "square", "chain"]
    assert [line["attack"] for line in found if line["engine"] == "ours"] == names
    assert [line["attack"] for line in found if line["engine"] == "autoattack"] == names
    assert [line["attack"] for line in found if line["engine"] == "autoattack frozen"] == ["fab-t"]
    rows = [line for line in out.read_text("utf-8").splitlines() if line.startswith("| 50 %")]
    assert len(rows) == len(found) == 11


def test_counts_are_those_of_the_attacks(first):
    found = {(line["attack"], line["engine"]): line for line in measured(first[0].with_suffix(".jsonl"))}
    ours, theirs = (found["apgd-ce", engine] for engine in ("ours", "autoattack"))
    assert theirs["backward_calls"] == 3  # x_0 and two steps
    assert theirs["backward_rows"] == 9
    assert ours["needed"][1] <= 9
    assert 0 < ours["mib"] < 2000
    for line in found.values():
        assert line["robust"] == line["broken"].count("0") <= 3
        calls = {kind: sum(n for k, _, n in line["calls"] if k == kind) for kind in ("forward", "gradient")}
        assert calls["forward"] + calls["gradient"] == line["forward_calls"]
        assert line["cpu"] > 0
        assert line["wall"] > 0
    square = found["square", "ours"]
    assert square["backward_calls"] == 0
    assert square["needed"][0] <= 3 * 5 + 3 + 3  # queries and starts, clean images, verdicts


def test_a_killed_run_goes_on_and_a_finished_one_measures_nothing(first, tmp_path):
    out, words = first
    ledger, again = out.with_suffix(".jsonl"), tmp_path / out.name  # checksums hold the name of the file
    whole = ledger.read_text("utf-8").splitlines(keepends=True)
    again.with_suffix(".jsonl").write_text("".join(whole[:-1]) + whole[-1][:20], "utf-8")
    ran = script(*words[:-1], again)
    assert ran.returncode == 0, ran.stderr
    assert [line[:4] for line in ran.stderr.splitlines() if "/255" in line] == ["1/1 "]
    assert lines(again.with_suffix(".jsonl"))[:-1] == lines(ledger)[:-1]


def test_lines_of_another_run_are_refused(first):
    _, words = first
    ran = script(*words, "--queries", "5")
    assert ran.returncode == 1
    assert "of another run" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_a_random_tower_at_another_resolution_finding_in_bf16(tmp_path):
    out = tmp_path / "gpu.md"
    ran = script(
        *TINY[:-2], "--arch", "vlmrob-tiny", "--px", 40, "--precision", "bf16", "--engines", "ours",
        "--attacks", "chain", "--out", out,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert [line["engine"] for line in measured(out.with_suffix(".jsonl"))] == ["ours", "ours bf16-find"]
    text = out.read_text("utf-8")
    assert "vlmrob-tiny at 40 px, 3 correctly classified images" in text
    assert "chain, ours bf16-find:" in text


def test_graphs_without_a_gpu_are_refused_at_once():
    ran = script("--graphs")
    assert ran.returncode == 2
    assert "--graphs needs --device cuda" in ran.stderr


@pytest.mark.slow
def test_the_memory_of_an_evaluation_is_measured():
    ran = script(70, "--px", 40, "--keep", 0.1, name="evaluate_memory.py")
    assert ran.returncode == 0, ran.stderr
    head, row = (line.split("\t") for line in ran.stdout.splitlines())
    assert head[:2] + row[:2] == ["images", "px", "70", "40"]
    assert row[3] == "0"  # 0.3 MB are over the bound
    assert 0 < float(row[5]) < 500


@pytest.mark.parity
def test_torchattacks_is_measured_beside(tmp_path):
    out = tmp_path / "three.md"
    ran = script(*TINY, "--engines", "ours", "torchattacks", "--out", out)
    assert ran.returncode == 0, ran.stderr
    found = {(line["attack"], line["engine"]): line for line in measured(out.with_suffix(".jsonl"))}
    assert found["apgd-ce", "torchattacks"]["backward_rows"] == 9
    assert len(found) == 10


# Training


@pytest.mark.slow
def test_a_training_step_is_measured_every_way_once(tmp_path):
    out = tmp_path / "steps.md"
    words = ["--rounds", "2", "--batch", "8", "--steps", "1", "--out", out]
    ran = script(*words, name="training.py")
    assert ran.returncode == 0, ran.stderr
    _, line = lines(out.with_suffix(".jsonl"))
    assert set(line["seconds"]) == set(line["flops"]) == set(line["mib"])
    assert all(seconds["cpu"] > 0 for seconds in line["seconds"].values())
    rows = [row.split(" | ") for row in out.read_text("utf-8").splitlines() if row.startswith("| 8 |")]
    assert [row[2] for row in rows] == ["ours", "ours, no cache", "released", "floor"]
    assert float(rows[3][4]) == 1.0
    again = script(*words, name="training.py")
    assert again.stdout.strip() == out.read_text("utf-8").strip()
    assert len(lines(out.with_suffix(".jsonl"))) == 2
    other = script(*words, "--threads", "2", name="training.py")
    assert "of another run" in other.stderr


def test_every_way_takes_the_passes_that_it_is_charged_for(tmp_path, monkeypatch):
    """Rows through each tower, in batches: what the FLOP of the table count."""
    monkeypatch.syspath_prepend(str(HERE))
    training = importlib.import_module("training")
    what = training.parsed(["--batch", "8", "--steps", "2"])
    recipe = training.recipe_of(what, 8, "fp32")
    card = reader.read("datasets", recipe.data.dataset, DatasetCard)
    miniature.make(card, tmp_path, n=16, split="train")
    passes = dict.fromkeys(training.WAYS)
    calls = training.ways(what, recipe, tmp_path)
    student, teacher = (
        cost.tower(open_clip.get_model_config(name)).flops for name in ("vlmrob-tiny", "vlmrob-tiny-teacher")
    )
    for t in range(2):  # fills the file of the clean teacher
        calls["ours"](t)
    for way in training.WAYS:
        seen = Counter()
        handle = register_module_forward_pre_hook(
            lambda module, args, seen=seen: (
                seen.update({module.transformer.resblocks[0].ln_1.normalized_shape: len(args[0]) // 8})
                if isinstance(module, VisionTransformer)
                else None
            )
        )
        calls[way](0)
        handle.remove()
        passes[way] = {width[0]: count for width, count in seen.items()}
    k = 2
    assert passes == {
        "ours": {80: k + 2, 128: 1},
        "ours, no cache": {80: k + 2, 128: 2},
        "released": {80: k + 2, 128: 3},
        "floor": {80: k + 2, 128: 1},
    }
    for way, flops in training.flops(what, recipe).items():
        assert flops == student * (2 * k + 2 * 3) + teacher * passes[way][128]


@pytest.fixture(scope="module")
def gpu_parts(tmp_path_factory):
    """The folder in which every part of the GPU script has been run at the smallest sizes on the CPU."""
    out = tmp_path_factory.mktemp("gpu")
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        gpu, training = importlib.import_module("gpu"), importlib.import_module("training")
        patch.setattr(training, "alone", lambda call: call())
        patch.setattr(gpu, "REFERENCES", {"autoattack": gpu.REFERENCES["autoattack"]})
        for part in ("attacks", "training", "page"):
            gpu.main([part, "--device", "cpu", "--tiny", "--out", str(out)])
        yield gpu, out
    matmul.fp32_precision, conv.fp32_precision = before


def test_every_part_of_the_gpu_script_is_measured(gpu_parts):
    _, out = gpu_parts
    found = measured(out / "gpu-attacks.jsonl")
    assert [line["engine"] for line in found] == ["ours", "autoattack", "ours bf16"]
    assert {line["rows"] for line in found} == {4}
    assert all(rows <= 4 for line in found for _, rows, _ in line["calls"])
    _, step = lines(out / "gpu-training.jsonl")
    assert (step["batch"], step["precision"]) == (4, "fp32")
    page = (out / "gpu.md").read_text("utf-8")
    assert "**No GPU was at hand**" in page
    assert page.count("| 4 | fp32 | 50 % | 4 |") == 2
    assert "| 4 | fp32 | released |" in page
    assert "Not measured" not in page


def test_the_page_of_the_gpu_names_what_is_missing(gpu_parts, tmp_path, capsys):
    gpu, out = gpu_parts
    whole = (out / "gpu-attacks.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "gpu-attacks.jsonl").write_text("".join(whole[:-1]), "utf-8")
    words = ["--tiny", "--device", "cpu", "--out", str(tmp_path)]
    gpu.main(["page", *words])
    said = capsys.readouterr().out
    assert "Not measured, for lack of time: 4 rows 50 % ours bf16." in said
    assert "## A training step" not in said
    gpu.main(["attacks", *words])  # goes on with what is missing
    assert [line[:4] for line in capsys.readouterr().err.splitlines()] == ["1/1 "]


def test_the_tests_of_the_gpu_script_are_those_that_need_a_gpu(gpu_parts, monkeypatch, tmp_path):
    gpu, _ = gpu_parts
    typed = []

    def run(words, **_):
        typed.append(words)
        return subprocess.CompletedProcess(words, 1, "..F\n1 failed, 2 passed in 3 s\n", "")

    monkeypatch.setattr(gpu, "about", lambda _: {"device": "a GPU", "commit": "c", "torch": "t", "cpu": "p"})
    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    gpu.main(["tests", "--out", str(tmp_path)])
    ((*_, first, second),) = typed
    assert [Path(first).name, Path(second).name] == ["test_attacked_view.py", "test_training_speed.py"]
    assert typed[0][1:-2] == ["-m", "pytest", "-n", "0", "-m", "gpu"]
    assert "--collect-only" not in typed[0]
    gpu.main(["page", "--out", str(tmp_path)])
    page = (tmp_path / "gpu.md").read_text("utf-8")
    assert "1 failed, 2 passed in 3 s (exit 1)" in page
    assert "device a GPU" in page
    assert "No GPU was at hand" not in page


def test_the_gpu_script_gives_every_part_its_seconds_and_writes_the_page(tmp_path):
    """With a stand-in for Python, whose part `attacks` ends as `timeout` ends what is too slow."""
    python = tmp_path / "python"

    def run(code):
        python.write_text(f'#!/bin/sh\necho "$2 $3 $4"\n[ "$2" != attacks ] || exit {code}\n', "utf-8")
        python.chmod(0o755)
        own = {"PYTHON": str(python), "OUT": str(tmp_path)}
        return subprocess.run(
            ["bash", str(HERE / "gpu.sh")], env=os.environ | own, capture_output=True, text=True, check=False
        )

    ran = run(124)
    assert ran.returncode == 0
    parts = [f"{part} --device cuda" for part in ("tests", "attacks", "training", "page")]
    assert ran.stdout.splitlines() == parts
    assert ran.stderr == "gpu.sh: attacks stopped after 160 s\n"
    ran = run(3)  # an error is no lack of time
    assert ran.returncode == 1
    assert ran.stdout.splitlines() == parts
    assert ran.stderr == "gpu.sh: attacks failed with exit code 3\n"
    limits = re.findall(r"^part (\d+) ", (HERE / "gpu.sh").read_text("utf-8"), re.MULTILINE)
    assert sum(map(int, limits)) + 20 <= 7 * 60  # the page takes the rest


def test_a_gpu_that_is_not_there_is_one_line(gpu_parts, monkeypatch, capsys):
    gpu, _ = gpu_parts
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["attacks"])
    said = capsys.readouterr().err.splitlines()
    assert said[-1].endswith("no CUDA device here; try the script itself with --device cpu --tiny")


def test_races_are_simulated_and_their_page_is_written(tmp_path):
    ran = script("--repetitions", 2, "--out", tmp_path / "race.md", name="race.py")
    assert ran.returncode == 0, ran.stderr
    rows = [
        line for line in (tmp_path / "race.md").read_text("utf-8").splitlines() if line.startswith("| 10 ")
    ]
    assert "| 100.0 % | 6.4 % |" in rows[0]  # ten points are seen at the first look: 64 of 1000


def test_patch_embeddings_are_compared_and_their_page_is_written(tmp_path):
    words = ["--towers", "vlmrob-tiny", "--turns", "1", "--out", tmp_path / "patches.md"]
    ran = script(*words, name="patches.py")
    assert ran.returncode == 0, ran.stderr
    page = (tmp_path / "patches.md").read_text("utf-8")
    parts = (
        "patch embedding, forward",
        "patch embedding, gradient",
        "whole tower, forward",
        "whole tower, gradient",
    )
    for part in parts:
        (row,) = (
            line for line in page.splitlines() if line.startswith(f"| vlmrob-tiny, 32 px | 64 | {part} |")
        )
        before, after, ratio = (float(cell) for cell in row.split("|")[4:7])
        assert ratio == pytest.approx(before / after, abs=0.02, rel=0.02)
    (gap,) = re.findall(r"between the two ways was (\S+)\.\n", page)
    assert 0 < float(gap) < 1e-5


@pytest.mark.parity
def test_few_images_are_compared_and_missed_targets_are_named(tmp_path):
    out = tmp_path / "few.md"
    words = [
        "--models",
        "tiny",
        "--attacks",
        "apgd",
        "--n",
        "1",
        "--steps",
        "2",
        "--repeats",
        "1",
        "--eps",
        "1/2550",
    ]
    ran = script(*words, "--large", "0", "--out", out, name="few_images.py")
    assert ran.returncode == 0, ran.stderr
    (line,) = lines(out.with_suffix(".jsonl"))
    # one image: two calls of 16 rows at least, and every call of the attack has four rows or more
    assert line["ours_units"] > 32 + 2.2 * 4 * 3
    assert 0 < line["reference_units"] < line["ours_units"]
    text = out.read_text("utf-8")
    assert f"--out {out}" in text
    assert (
        f"- tiny, 1/2550, apgd, 1 images: units {line['ours_units'] / line['reference_units']:.2f} times"
        in text
    )
