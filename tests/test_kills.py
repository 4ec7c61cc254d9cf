"""A killed evaluation goes on where it was, and ends with the bytes of one that was never killed."""

import json
import signal
import subprocess
import sys
import time
from functools import partial

import command_line
import pandas as pd
import pytest
import toys

from robustbench_vlm.results import verdicts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, cards and a model, and the command that evaluates them."""
    root = tmp_path_factory.mktemp("killed")
    card = toys.dataset_card()
    toys.write(card, root / "data")
    toys.save_model(root / "model")
    chain = toys.chain("aa", "ce", "square")
    queries = chain.stage[1].model_copy(update={"queries": 150})
    chain = chain.model_copy(update={"stage": (chain.stage[0], queries)})
    toys.write_include(root / "cards", [card], [chain], eps=["2/255", "4/255"])
    return root


def command(root, out):
    typed = f"--include {root / 'cards'} eval --model {root / 'model'} --attack aa --suite toys"
    options = f"--data-root {root / 'data'} --out {out} --device cpu"
    return [sys.executable, "-m", "robustbench_vlm", *typed.split(), *options.split()]


def lines(out):
    return sum(path.read_bytes().count(b"\n") for path in (out / "ledger").rglob("*.jsonl"))


def kill_at(root, out, least):
    """Kill the evaluation as soon as the ledgers have `least` lines; how many they had then."""
    return command_line.kill_command(command(root, out), lambda: lines(out), least)


def cells(out):
    found = {}
    for path in sorted((out / "cells").rglob("*.json")):
        content = json.loads(path.read_text())
        del content["run"]
        table = pd.read_parquet(path.with_suffix(".parquet"))
        found[path.relative_to(out).as_posix()] = (content, verdicts.sha256(table), table)
    return found


def test_two_kills_and_a_third_start_end_like_an_undisturbed_run(place, tmp_path):
    whole = tmp_path / "whole"
    done = subprocess.run(command(place, whole), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    total = lines(whole)
    first = kill_at(place, tmp_path / "torn", 2)
    second = kill_at(place, tmp_path / "torn", first + 2)
    assert 2 <= first < second < total
    assert len(cells(tmp_path / "torn")) < 2
    done = subprocess.run(command(place, tmp_path / "torn"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "torn") == total  # what was found before was not found again
    expected, found = cells(whole), cells(tmp_path / "torn")
    assert len(expected) == 2
    assert expected.keys() == found.keys()
    for name, (content, sha, table) in expected.items():
        assert found[name][0] == content
        assert found[name][1] == sha == content["outcome"]["verdicts_sha256"]
        pd.testing.assert_frame_equal(found[name][2], table, check_exact=True)
    last = list(expected.values())[-1][2]
    assert 0 < (last.broken_at_eps != "").sum() < last.clean_correct.sum()


def test_ctrl_c_exits_75_and_says_how_to_go_on(place, tmp_path):
    argv = command(place, tmp_path / "stopped")
    # a shell starts background jobs with Ctrl-C ignored, and children inherit it; a person's shell does not
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(argv, **pipes, text=True, preexec_fn=heeding)
    began = time.monotonic()
    while not lines(tmp_path / "stopped"):
        assert process.poll() is None
        assert time.monotonic() - began < command_line.TIMEOUT
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=command_line.TIMEOUT)
    assert process.returncode == 75, err
    assert out == ""
    assert (
        err.splitlines()[-1]
        == "error: vlmrob eval: stopped; type the same command again, and it goes on from what is saved"
    )
