"""One writer a folder: the second is told who is there; what a killed one leaves behind is no obstacle."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

import command_line
import pytest
import torch
import toys

from robustbench_vlm import one_writer
from robustbench_vlm.demo import weights, whole_job
from robustbench_vlm.errors import InputError

HOLDS = """
import sys, time
from pathlib import Path
from robustbench_vlm import one_writer
with one_writer.locked(Path(sys.argv[1])):
    (Path(sys.argv[1]) / "work").write_text("begun")
    print("holds", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holding(folder, seconds=300.0):
    """A process that holds a folder."""
    argv = [sys.executable, "-c", HOLDS, str(folder), str(seconds)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    with process.stdout:
        assert process.stdout.readline() == "holds\n"
    return process


def test_the_second_is_told_who_is_there(tmp_path):
    process = holding(tmp_path / "out")
    try:
        with (
            pytest.raises(InputError, match="a folder with one writer; wait for") as caught,
            one_writer.locked(tmp_path / "out"),
        ):
            raise AssertionError("two writers")
        assert f"process {process.pid} on {platform.node()} writes to it since 20" in str(caught.value)
        with pytest.raises(InputError, match=f"process {process.pid} on"):
            one_writer.require_free(tmp_path / "out")
        assert json.loads((tmp_path / "out/.writer.json").read_text())["pid"] == process.pid
    finally:
        process.kill()
        process.wait()


def test_the_demo_and_the_packaged_weights_have_one_writer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cpu = torch.device("cpu")
    process = holding(weights.WORK)
    try:
        with pytest.raises(InputError, match=f"process {process.pid} on"):
            weights.make(tmp_path / "data", cpu)
        with pytest.raises(InputError, match=f"process {process.pid} on"):
            whole_job.run(weights.WORK, tmp_path / "data", cpu, print, print, full=False)
        assert not (tmp_path / "data").exists()
    finally:
        process.kill()
        process.wait()


def test_what_a_killed_one_leaves_behind_is_taken_over(tmp_path):
    process = holding(tmp_path)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert json.loads((tmp_path / one_writer.HOLDER).read_text())["pid"] == process.pid
    one_writer.require_free(tmp_path)
    with one_writer.locked(tmp_path):
        found = json.loads((tmp_path / one_writer.HOLDER).read_text())
        assert (found["pid"], found["host"]) == (os.getpid(), platform.node())
        since = datetime.fromisoformat(found["since"])
        assert 0 <= (datetime.now(UTC) - since).total_seconds() < 60
    assert not (tmp_path / one_writer.HOLDER).exists()


def test_it_may_come_when_the_first_has_ended(tmp_path):
    process = holding(tmp_path, 0.2)
    assert process.wait(timeout=command_line.TIMEOUT) == 0
    with one_writer.locked(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [one_writer.LOCK, "work"]


def test_a_folder_in_which_nothing_was_written_is_as_before(tmp_path):
    one_writer.require_free(tmp_path / "new")
    with one_writer.locked(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    with one_writer.locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_two_in_one_process_are_two(tmp_path):
    with (
        one_writer.locked(tmp_path),
        pytest.raises(InputError, match="one writer"),
        one_writer.locked(tmp_path),
    ):
        raise AssertionError("two writers")


@pytest.mark.parametrize("name", [one_writer.LOCK, one_writer.HOLDER])
def test_a_link_in_its_place_is_refused(tmp_path, name):
    (tmp_path / "else").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "else")
    with pytest.raises(InputError, match="a symbolic link"), one_writer.locked(tmp_path / "out"):
        raise AssertionError("written through a link")
    assert (tmp_path / "else").read_text() == "precious"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, cards and a model of an evaluation that takes seconds."""
    root = tmp_path_factory.mktemp("writers")
    card = toys.dataset_card()
    toys.write(card, root / "data")
    toys.save_model(root / "model")
    chain = toys.chain("aa", "ce", "square")
    queries = chain.stage[1].model_copy(update={"queries": 400})
    toys.write_include(
        root / "cards", [card], [chain.model_copy(update={"stage": (chain.stage[0], queries)})]
    )
    return root


def vlmrob(*words):
    return [sys.executable, "-m", "robustbench_vlm", *map(str, words)]


def begun(argv, file):
    """A command, from the moment at which it holds its folder and has said so in a file."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    since = time.monotonic()
    while not file.exists() or not file.stat().st_size:
        assert process.poll() is None, "it ended before it held its folder"
        assert time.monotonic() - since < command_line.TIMEOUT
        time.sleep(0.01)
    return process


def test_a_second_eval_is_refused_and_a_leaderboard_is_not(place, tmp_path):
    out = tmp_path / "out"
    words = f"--include {place / 'cards'} eval --model {place / 'model'} --attack aa --suite toys"
    argv = vlmrob(*words.split(), "--data-root", place / "data", "--out", out, "--device", "cpu")
    first = begun(argv, out / one_writer.HOLDER)
    first.send_signal(signal.SIGSTOP)
    try:
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        second = command_line.fork_command(argv[3:])
        assert second.returncode == 2, second.stderr
        (line,) = [line for line in second.stderr.splitlines() if line.startswith("error")]
        assert f"process {first.pid} on {platform.node()} writes to it since" in line
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        words = f"--include {place / 'cards'} leaderboard --results {out} --suite toys"
        read = command_line.fork_command([*words.split(), "--out", tmp_path / "boards"])
        assert "writes to it" not in read.stderr
        assert read.returncode in (0, 2), read.stderr  # 2: there is no finished result yet
    finally:
        first.kill()
        first.wait()
    third = command_line.fork_command(argv[3:])
    assert third.returncode == 0, third.stderr


def test_a_second_training_is_refused(toy, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "r.toml").write_text(
        f'name = "long"\ntitle = "long"\nstudent = "{toy.student}"\n[defense]\nname = "clean"\n'
        '[data]\ndataset = "toy"\ntemplate = "a photo of a {c}"\n'
        "[optim]\nlr = 1e-3\nsteps = 100000\nwarmup = 1\nbatch_size = 8\n"
    )
    words = (
        f"--include {toy.cards} train {tmp_path / 'r.toml'} --data-root {toy.data} --out {out} --device cpu"
    )
    first = begun(vlmrob(*words.split()), out / "recipe.json")
    try:
        second = command_line.fork_command(words.split())
        assert second.returncode == 2, second.stderr
        assert f"process {first.pid} on {platform.node()} writes to it since" in second.stderr
    finally:
        first.kill()
        first.wait()
