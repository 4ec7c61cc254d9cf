"""Several real processes train one model: the same weights, and nothing lost when any of them dies."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import command_line
import pytest
import torch
from safetensors.torch import load_file
from test_train import LORA, PAPER, PROBE, write_recipe

from robustbench_vlm import one_writer, store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.errors import Incomplete, TrainingError
from robustbench_vlm.training import launch, log, loop
from robustbench_vlm.training.state import saved_step

LOG = logging.getLogger(__name__)  # docs/training-many.md quotes the figures
CPU = torch.device("cpu")
LONG = 80  # steps of a run that is stopped in the middle
TIMEOUT = 900.0  # seconds; a machine may be busy
NEAR = 1e-5
KEYS = "in_proj_bias"  # a third of it: see `apart`

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


def quiet(line):
    pass


def plain(toy, **changes):
    """A recipe by which rounding stays rounding; AdamW divides by gradients, some of which are 0."""
    optim = {"lr": 0.05, "steps": LONG, "warmup": 2, "batch_size": 8, "algorithm": "sgd"}
    inner = {"norm": "linf", "eps": "4/255", "steps": 1, "step_size": "2/255"}
    return toy.table("tecoa", optim=optim, inner=inner, **({"checkpoint_every": 5} | changes))


def in_one_process(toy, table, folder):
    loop.run(reader.parse(table, Recipe, "a test"), folder, toy.data, CPU, quiet)
    return folder


def command(toy, recipe, out, *more):
    """The words of a training."""
    words = ["--include", toy.cards, "train", recipe, "--data-root", toy.data, "--out", out, *more]
    return [str(word) for word in words]


def start(words, tmp_path, *, torchrun=()):
    """A training in two processes, by `vlmrob train --nproc 2` or by torchrun with these options."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLMROB_CACHE": str(tmp_path / "cache")}
    if torchrun:
        before = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *torchrun]
        line = [sys.executable, *before, "-m", "robustbench_vlm", *words]
    else:
        line = [sys.executable, "-m", "robustbench_vlm", *words, "--nproc", "2"]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err


def steps_of(folder):
    path = folder / log.NAME
    return [line["step"] for line in store.records(path) if "loss" in line] if path.exists() else []


def process_of(rank, launcher):
    """The process of that rank among those that `launcher` started."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if parent == launcher and f"RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"no process of rank {rank}")


def files_of(folder):
    """Every file of a checkpoint folder but the lock of the command that wrote it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != one_writer.LOCK)


def wait_for_step(step, folder, process):
    began = time.monotonic()
    while len(steps_of(folder)) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - began < TIMEOUT
        time.sleep(0.01)


def apart(one, other):
    """Largest difference between two finished models' weights.

    The bias of an attention's keys is left out: it adds the same number to all scores of a query, which a
    softmax does not see. So its gradient is 0 but for rounding, and AdamW scales the rounding to full steps.
    """
    a, b = (load_file(folder / "image.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    found = 0.0
    for name in a:
        difference = (a[name] - b[name]).abs()
        if name.endswith(KEYS):
            width = len(difference) // 3
            difference[width : 2 * width] = 0
        found = max(found, float(difference.max()))
    return found


def assert_same_log(one, other):
    for a, b in zip(*(list(store.records(f / log.NAME)) for f in (one, other)), strict=True):
        assert a.keys() == b.keys()
        a, b = ({k: v for k, v in line.items() if k not in log.TIMES} for line in (a, b))
        if "probe" in a:
            assert a == b
        else:
            assert b == pytest.approx(a, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("to", ["process 1", pytest.param("the launcher", marks=pytest.mark.slow)])
def test_a_signal_stops_all_processes_at_one_step_and_one_process_goes_on(toy, tmp_path, to):
    table = plain(toy, checkpoint_every=0)
    whole = in_one_process(toy, table, tmp_path / "whole")
    shared = tmp_path / "shared"
    process = start(command(toy, write_recipe(tmp_path, table), shared), tmp_path)
    wait_for_step(3, shared, process)
    os.kill(process.pid if to == "the launcher" else process_of(1, process.pid), signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 75, err
    step = saved_step(shared)
    assert 3 <= step < LONG
    assert steps_of(shared) == list(range(1, step + 1))
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert f"stopped after step {step} of {LONG}, which is saved" in line
    in_one_process(toy, table, shared)
    assert apart(whole, shared) < NEAR
    assert_same_log(whole, shared)
    assert not list(shared.glob("log-*"))


def test_two_processes_of_which_one_is_killed_train_the_model_of_one(toy, tmp_path):
    """With dropout, running statistics, a teacher cache and a probe; one of them alone writes and prints."""
    optim = {"lr": 1e-3, "steps": 30, "warmup": 2, "batch_size": 8}
    changes = {"optim": optim, "checkpoint_every": 5, "lora": LORA, "probe": PROBE | {"every": 10}}
    table = toy.table("mmt-ard", "robust", "clean", defense=PAPER, **changes)
    whole = in_one_process(toy, table, tmp_path / "whole")
    two, recipe = tmp_path / "two", write_recipe(tmp_path, table)
    process = start(command(toy, recipe, two), tmp_path)
    wait_for_step(7, two, process)
    os.kill(process_of(1, process.pid), signal.SIGKILL)
    code, _, err = ended(process)
    assert code == 75, err
    assert "process 1 of this training was ended by SIGKILL; type the same command again" in err
    assert "Traceback" not in err
    step = saved_step(two)
    assert step >= 5
    assert step % 5 == 0
    assert not (two / "card.json").exists()
    code, out, err = ended(start(command(toy, recipe, two), tmp_path))
    assert code == 0, err
    assert out == f"{two}\n"
    assert err.count(f"in 2 processes, going on at step {step}") == 1
    assert apart(whole, two) < NEAR
    assert_same_log(whole, two)
    assert [name for name in files_of(two) if not name.startswith("log-")] == files_of(whole)
    assert list((tmp_path / "cache" / "embeddings").glob("*.rows"))


@pytest.mark.slow
def test_torchrun_starts_the_processes_again_after_one_was_killed(toy, tmp_path):
    table = plain(toy)
    whole = in_one_process(toy, table, tmp_path / "whole")
    shared = tmp_path / "shared"
    words = command(toy, write_recipe(tmp_path, table), shared)
    process = start(words, tmp_path, torchrun=("--max-restarts", "1"))
    wait_for_step(7, shared, process)
    os.kill(process_of(1, process.pid), signal.SIGKILL)
    code, _, err = ended(process)
    assert code == 0, err
    assert "going on at step" in err
    assert steps_of(shared) == list(range(1, LONG + 1))
    assert apart(whole, shared) < NEAR


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
def test_a_hundred_steps_of_the_tiny_world(tmp_path, algorithm):
    """The recipe `tiny-mmt-ard` with the packaged models, smaller batches and fewer images."""
    settings = {"optim.steps": 100, "optim.batch_size": 32, "optim.warmup": 5, "data.n": 256}
    settings |= {"probe.every": 50, "probe.n": 48, "optim.algorithm": algorithm, "inner.steps": 2}
    settings |= {"optim.lr": 1e-3 if algorithm == "adamw" else 1e-4}
    words = ["train", "tiny-mmt-ard", "--data-root", str(tmp_path / "data")]
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLMROB_CACHE": str(tmp_path / "cache")}
    for name, more in (("one", []), ("two", ["--nproc", "2"])):
        line = [sys.executable, "-m", "robustbench_vlm", *words, "--out", str(tmp_path / name), *more]
        subprocess.run(line, env=environment, check=True, timeout=1200)
    found = apart(tmp_path / "one", tmp_path / "two")
    LOG.info("%s: weights %.1e apart after 100 steps", algorithm, found)
    assert found < NEAR
    assert_same_log(tmp_path / "one", tmp_path / "two")


def test_what_is_wrong_is_said_once_before_any_process_starts(toy, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, toy.table("tecoa"))
    assert command_line.run_command(monkeypatch, *command(toy, recipe, tmp_path / "out", "--nproc", "3")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "batch_size = 8 for 3 processes with accumulate = 1; expected a multiple of 3" in line
    assert not (tmp_path / "out").exists()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert command_line.run_command(monkeypatch, *command(toy, recipe, tmp_path / "out", "--nproc", "4")) == 2
    assert "--nproc 4: torchrun started 2 processes; leave --nproc out" in capsys.readouterr().err


def test_the_exit_code_of_several_processes():
    assert launch._exit_code({0: 2, 1: 75}) == 2  # a cause, and what followed from it
    assert launch._exit_code({0: 75, 1: 1, 2: -15}) == 1
    assert launch._exit_code({0: 75, 1: -15}) == 75
    assert launch._exit_code({0: -15, 1: -15}) == 75  # stopped while they were starting
    with pytest.raises(Incomplete, match="process 3 of this training was ended by SIGKILL"):
        launch._exit_code({0: -6, 3: -9})  # who loses a peer may abort
    for code, name in ((-11, "SIGSEGV"), (-6, "SIGABRT"), (-7, "SIGBUS")):  # the same command ends so again
        with pytest.raises(TrainingError, match=f"process 3 of this training crashed with {name}"):
            launch._exit_code({0: 75, 1: -15, 3: code})
