"""Faults in the middle of a command: one line, the right exit code, and the same command goes on.

The table of docs/reliability.md names the tests of the other faults.
"""

import errno
import functools
import importlib
import os
import re
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

import command_line
import killed_evaluations
import pytest
import test_kills
import torch
import toys
from killed_evaluations import forks

from robustbench_vlm import one_writer, store
from robustbench_vlm.data import canvas_images, dataset
from robustbench_vlm.models.clip import Classifier
from robustbench_vlm.training import loop

end = importlib.import_module("robustbench_vlm.cli.main")  # beside a function of that name


class Work:
    """A command that takes a second or two: its words, its data, and what it leaves."""

    def __init__(self, words, data, outcome):
        self.words, self.data, self.outcome = words, data, outcome


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    root = killed_evaluations.write_place(tmp_path_factory.mktemp("evaluation"), queries=5)
    words = functools.partial(killed_evaluations.words, root)
    return Work(words, root / "data", killed_evaluations.outcome)


@pytest.fixture(scope="module")
def training(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    (root / "r.toml").write_text(toys.toml(world.table("tecoa")))

    def words(out):
        typed = ["--include", world.cards, "train", root / "r.toml", "--data-root", world.data]
        return [*map(str, typed), "--out", str(out), "--device", "cpu"]

    return Work(words, world.data, test_kills.trained)


@pytest.fixture(scope="module", params=["evaluation", "training"])
def work(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def whole(work, tmp_path_factory):
    """What the command leaves where nothing happens."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    code, err = ran(work, folder)
    assert code == 0, err
    return work.outcome(folder)


def ran(work, out, prepare=lambda: None):
    """Exit code and stderr of the command in a forked process, in which something was prepared."""
    done = command_line.fork_command(work.words(out), prepare)
    return done.returncode, done.stderr


def require_recovery(work, whole, out, code, words, prepare, repair=lambda: None):
    """A fault ends the command in one line with a code, nothing complete is lost, and the command goes on."""
    found, err = ran(work, out, prepare)
    assert found == code, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert err.splitlines()[-1] == errors[0]
    assert words in errors[0]
    assert "Traceback" not in err
    before = test_kills.completed(out)
    assert sum(isinstance(one, bytes) for one in before) >= 3, "it came too early"
    assert not list(out.rglob("*.part"))
    repair()
    code, err = ran(work, out)
    assert code == 0, err
    assert before <= test_kills.completed(out)
    assert work.outcome(out) == whole


def at_line(number, act):
    """Do something before a line is appended to a ledger or log, counted over all of them."""
    append, left = store.append, [number]

    def counting(path, record):
        left[0] -= 1
        if left[0] == 0:
            act(path)
        append(path, record)

    store.append = counting


def stop(_):
    signal.raise_signal(signal.SIGTERM)


def full_disk_in_a_line():
    """Seven bytes of the fifth line fit."""

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def act(path):
        opened = Path.open
        Path.open = lambda self, mode="r", **more: (
            Full(opened(self, mode, **more)) if mode == "ab" else opened(self, mode, **more)
        )

    at_line(5, act)


def full_disk_in_a_file():
    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_line(4, lambda _: setattr(os, "fsync", fsync))


def read_only_folder():
    def act(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    at_line(5, act)


def out_of_memory():
    def fail(*_, **__):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    def act(_):
        Classifier.forward = fail
        loop.train_step = fail

    at_line(4, act)


FULL = "No space left on device; make room, then type the same command again, and it goes on"
FAULTS = {
    "full disk in a line": (
        full_disk_in_a_line,
        75,
        FULL,
    ),
    "full disk in a file": (
        full_disk_in_a_file,
        75,
        FULL,
    ),
    "read-only folder": (read_only_folder, 1, "Read-only file system"),
    "out of memory": (out_of_memory, 1, "out of memory (OutOfMemoryError: Tried to allocate 2.00 GiB); free"),
}


@forks
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_and_the_same_command_goes_on(work, whole, tmp_path, fault):
    prepare, code, words = FAULTS[fault]
    require_recovery(work, whole, tmp_path / "out", code, words, prepare)


@forks
def test_data_that_vanish_in_the_middle_are_named(evaluation, evaluated, tmp_path):
    """A network folder goes away and comes back."""
    hidden = evaluation.data.with_name("hidden")

    def prepare():
        dataset.IN_MEMORY, canvas_images.AT_ONCE = 0, 1  # so that images are read again and again
        at_line(4, lambda _: evaluation.data.rename(hidden))

    def back():
        hidden.rename(evaluation.data)

    words = "0.tar, s0000000: cannot be read (No such file or directory); check the file"
    require_recovery(evaluation, evaluated, tmp_path / "out", 2, words, prepare, back)


@forks
def test_data_that_are_gone_when_a_command_goes_on_are_named(work, whole, tmp_path):
    out, hidden = tmp_path / "out", work.data.with_name("hidden")
    assert ran(work, out, lambda: at_line(5, stop))[0] == 75
    before = test_kills.completed(out)
    work.data.rename(hidden)
    try:
        code, err = ran(work, out)
    finally:
        hidden.rename(work.data)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(f"(missing|not) below {work.data}", line)
    assert test_kills.completed(out) == before
    assert ran(work, out)[0] == 0
    assert work.outcome(out) == whole


@forks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_ends_an_evaluation_with_75(evaluation, evaluated, tmp_path, number):
    words = "vlmrob eval: stopped; type the same command again, and it goes on from what is saved"
    require_recovery(
        evaluation,
        evaluated,
        tmp_path / "out",
        75,
        words,
        lambda: at_line(4, lambda _: signal.raise_signal(number)),
    )


@pytest.fixture(scope="module")
def evaluated(evaluation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    code, err = ran(evaluation, folder)
    assert code == 0, err
    return evaluation.outcome(folder)


@forks
@pytest.mark.parametrize("moment", ["unwinding", "printing"])
def test_ctrl_c_twice_ends_an_evaluation_in_one_line(evaluation, evaluated, tmp_path, moment):
    """The second one comes while the first is still unwinding, or while the line about it is made."""
    holder, name = (one_writer.FileLock, "release") if moment == "unwinding" else (end, "_interrupted")

    def prepare():
        whole_call = getattr(holder, name)

        def interrupted(*given, **named):
            signal.raise_signal(signal.SIGINT)
            return whole_call(*given, **named)

        setattr(holder, name, interrupted)
        at_line(4, lambda _: signal.raise_signal(signal.SIGINT))

    words = "vlmrob eval: stopped; type the same command again, and it goes on from what is saved"
    require_recovery(evaluation, evaluated, tmp_path / "out", 75, words, prepare)


@forks
def test_a_clock_that_goes_backwards_changes_nothing(work, whole, tmp_path):
    """A run is stopped; its files come to be of the year 2100, and it goes on in 1970."""

    class Past(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(1970, 1, 2, tzinfo=tz)

    out = tmp_path / "out"
    assert ran(work, out, lambda: at_line(5, stop))[0] == 75
    future = datetime(2100, 1, 1, tzinfo=UTC).timestamp()
    for path in out.rglob("*"):
        os.utime(path, (future, future))

    def prepare():
        one_writer.datetime = Past
        sys.modules["robustbench_vlm.evaluation.provenance"].datetime = Past

    code, err = ran(work, out, prepare)
    assert code == 0, err
    assert work.outcome(out) == whole


@forks
def test_a_folder_of_results_that_cannot_be_made_is_told_first(work, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, err = ran(work, tmp_path / "file" / "out")
    assert code == 2
    assert err.startswith(f"error: --out {tmp_path / 'file' / 'out'}: ")


@forks
def test_a_cache_that_cannot_be_written_costs_time_alone(work, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("VLMROB_CACHE", str(Path(os.devnull) / "none"))
    code, err = ran(work, tmp_path / "out")
    assert code == 0, err
    assert work.outcome(tmp_path / "out") == whole
