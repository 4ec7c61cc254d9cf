"""Workers on a real local Ray, killed, stopped and interrupted: the files are those of one process."""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import command_line
import pytest
import toys
from killed_evaluations import outcome

ray_settings = pytest.importorskip("robustbench_vlm.evaluation.ray_settings")
pytest.importorskip("ray")

IMPATIENT = """
import sys
from robustbench_vlm.evaluation import cluster
cluster.LEAST, cluster.SLOW, cluster.STARTING = {least}, 0.0, {starting}
from robustbench_vlm.cli import main
main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, cards and a model; the attack takes long enough to be disturbed, and the files of one process."""
    root = tmp_path_factory.mktemp("workers")
    card = toys.dataset_card()
    toys.write(card, root / "data", n=16)
    toys.save_model(root / "model")
    chain = toys.chain("aa", "ce", "square")
    queries = chain.stage[1].model_copy(update={"queries": 300})
    chain = chain.model_copy(update={"stage": (chain.stage[0], queries)})
    toys.write_include(root / "cards", [card], [chain], eps=["1/255", "2/255"], n=16)
    done = command_line.fork_command(command(root, root / "one")[3:])
    assert done.returncode == 0, done.stderr
    return root


def command(root, out, *more, least=None):
    typed = f"--include {root / 'cards'} eval --model {root / 'model'} --attack aa --suite toys"
    options = f"--data-root {root / 'data'} --out {out} --device cpu"
    program = ["-m", "robustbench_vlm"]
    if least is not None:
        program = ["-c", IMPATIENT.format(least=least, starting=6 * least)]
    return [sys.executable, *program, *typed.split(), *options.split(), *map(str, more)]


def run(root, out, *more):
    return subprocess.run(command(root, out, *more), capture_output=True, text=True, check=False)


def started(argv, log):
    """A command with its own process group, as a shell starts it, that heeds Ctrl-C."""
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with log.open("wb") as file:
        return subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=file, text=True, preexec_fn=heeding, process_group=0
        )


def lines(out):
    return sum(path.read_bytes().count(b"\n") for path in (out / "ledger").rglob("*.jsonl"))


def wait_for(what, process):
    since = time.monotonic()
    while not (found := what()):
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() - since < command_line.TIMEOUT
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def workers_below():
    """Pids of the workers below a driver, as the benchmarks find them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        return importlib.import_module("process").workers_below


def assert_same(place, out):
    expected, found = outcome(place / "one"), outcome(out)
    assert found == expected
    assert sum(name.endswith(".parquet") for name in found) == 2
    assert rendered(place, out) == rendered(place, place / "one")


def rendered(place, results):
    """The CSV of the leaderboard."""
    boards = results.parent / f"{results.name}-boards"
    words = f"--include {place / 'cards'} leaderboard --results {results} --suite toys --out {boards}"
    assert command_line.fork_command(words.split()).returncode == 0
    return (boards / "toys.csv").read_bytes()


def test_a_worker_that_is_killed_in_the_middle_of_an_attack_changes_no_byte(place, tmp_path, workers_below):
    out = tmp_path / "out"
    process = started(command(place, out, "--workers", 2, "--json"), tmp_path / "log")
    wait_for(lambda: lines(out), process)
    (victim, *_) = wait_for(lambda: workers_below(process.pid), process)
    os.kill(victim, signal.SIGKILL)
    stdout, _ = process.communicate(timeout=command_line.TIMEOUT)
    log = (tmp_path / "log").read_text()
    assert process.returncode == 0, log
    assert f"worker {victim} died; another one is started" in log
    assert "Traceback" not in log
    assert {row["model_id"] for row in json.loads(stdout)} == {"random0"}  # Ray wrote nothing there
    assert_same(place, out)
    runs = [json.loads(path.read_text())["run"] for path in (out / "cells").rglob("*.json")]
    assert {run["threads"] for run in runs} == {1}


@pytest.mark.slow
def test_a_killed_driver_leaves_no_worker_and_the_same_command_goes_on(place, tmp_path, workers_below):
    out = tmp_path / "out"
    process = started(command(place, out, "--workers", 2), tmp_path / "log")
    wait_for(lambda: lines(out) >= 3, process)
    workers = workers_below(process.pid)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    known = lines(out)
    since = time.monotonic()
    while any(Path(f"/proc/{pid}/cmdline").exists() and command_of(pid) for pid in workers):
        assert time.monotonic() - since < 60
        time.sleep(0.1)
    done = run(place, out, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert lines(out) == lines(place / "one") >= known
    assert_same(place, out)


def command_of(pid):
    """The words of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_ctrl_c_ends_with_75_and_one_process_may_go_on(place, tmp_path, workers_below):
    out = tmp_path / "out"
    process = started(command(place, out, "--workers", 2), tmp_path / "log")
    wait_for(lambda: lines(out) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    stdout, _ = process.communicate(timeout=command_line.TIMEOUT)
    log = (tmp_path / "log").read_text()
    assert process.returncode == 75, log
    assert stdout == ""
    assert log.splitlines()[-1] == (
        "error: vlmrob eval: stopped; type the same command again, and it goes on from what is saved"
    )
    assert "Traceback" not in log
    assert not workers_below(process.pid)
    done = run(place, out)  # without workers: what they found counts
    assert done.returncode == 0, done.stderr
    assert_same(place, out)


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(place, tmp_path, workers_below):
    out = tmp_path / "out"
    process = started(command(place, out, "--workers", 2, least=20.0), tmp_path / "log")
    wait_for(lambda: lines(out), process)
    (victim, *_) = wait_for(lambda: workers_below(process.pid), process)
    os.kill(victim, signal.SIGSTOP)
    process.communicate(timeout=command_line.TIMEOUT)
    log = (tmp_path / "log").read_text()
    assert process.returncode == 0, log
    assert f"worker {victim} gave no answer for " in log
    assert not command_of(victim)
    assert_same(place, out)


@contextlib.contextmanager
def node(*more):
    """A node of a cluster that ends with the block; its folder has a short path, since sockets are in it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        program = str(Path(sys.executable).parent / "ray")
        sizes = ["--num-cpus=1", "--include-dashboard=false", "--object-store-memory=200000000"]
        own = [f"--temp-dir={folder}"] if "--head" in more else []
        argv = [program, "start", "--block", *sizes, *own, *more]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=60)


@pytest.mark.slow
def test_a_node_that_joins_the_cluster_is_used(place, tmp_path, monkeypatch, workers_below):
    """A cluster of one node with one place; a second node joins while the first one attacks."""
    for name, value in ray_settings.SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6399")
    out = tmp_path / "out"
    with node("--head", "--port=6399") as head:
        wait_for(lambda: listens(6399), head)
        process = started(command(place, out, "--workers", "ray"), tmp_path / "log")
        wait_for(lambda: lines(out), process)
        (first,) = workers_below(head.pid)
        os.kill(first, signal.SIGSTOP)  # so that the second one has something to do
        known = lines(out)
        with node("--address=127.0.0.1:6399"):
            wait_for(lambda: lines(out) >= known + 4, process)
            with contextlib.suppress(ProcessLookupError):  # it counts as hung after two minutes
                os.kill(first, signal.SIGCONT)
            process.communicate(timeout=command_line.TIMEOUT)
        assert process.returncode == 0, (tmp_path / "log").read_text()
    runs = [json.loads(path.read_text())["run"] for path in sorted((out / "cells").rglob("*.json"))]
    assert runs[-1]["workers"] == 2
    assert_same(place, out)


def listens(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0
