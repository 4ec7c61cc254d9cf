"""Signals: a stopped training saves its state, says where it goes on, and ends as if it never stopped."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import command_line
import pytest
import torch
import toys

from robustbench_vlm import catalogue, interruption, launcher, store, text_files
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.cli.main import _interrupted
from robustbench_vlm.errors import Incomplete, InputError
from robustbench_vlm.models import zoo
from robustbench_vlm.training import folder, log, loop

CPU = torch.device("cpu")


def send_at(step, *numbers):
    """A report that sends signals to this process once a step is logged."""

    def report(line):
        if line["step"] == step and "loss" in line:
            for number in numbers:
                signal.raise_signal(number)

    return report


def quiet(line):
    pass


def lines(folder):
    found = store.records(folder / "log.jsonl")
    return [{k: v for k, v in line.items() if k not in log.TIMES} for line in found]


def files(folder):
    """Contents by name, without the log, whose lines state a speed."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("log"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def recipe(toy):
    return reader.parse(toy.table("tecoa", checkpoint_every=0), Recipe, "a test")


@pytest.fixture
def whole(toy, recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    loop.run(recipe, folder, toy.data, CPU, quiet)
    return folder


@pytest.mark.parametrize("number", interruption.SIGNALS, ids=lambda number: number.name)
def test_a_stopped_training_goes_on_at_its_step_and_ends_with_the_same_bytes(
    toy, recipe, whole, tmp_path, number
):
    if signal.getsignal(number) is signal.SIG_IGN:  # under nohup, which the training respects
        signal.signal(number, signal.SIG_DFL)
    before, steps, remarks = signal.getsignal(number), recipe.optim.steps, []
    with pytest.raises(Incomplete) as stopped:
        loop.run(recipe, tmp_path, toy.data, CPU, send_at(2, number))
    assert stopped.value.exit_code == 75
    assert f"stopped after step 2 of {steps}, which is saved" in str(stopped.value)
    assert "it goes on at step 2" in str(stopped.value)
    assert signal.getsignal(number) is before
    loop.run(recipe, tmp_path, toy.data, CPU, quiet, remark=remarks.append)
    assert any(remark.startswith("training") and "going on at step 2" in remark for remark in remarks)
    assert files(tmp_path) == files(whole)  # the checkpoint of the stop is gone
    assert lines(tmp_path) == lines(whole)
    assert not list(tmp_path.glob("log-*"))  # every line of it is still valid


def test_where_nothing_is_saved_the_message_says_so_and_the_log_stays(toy, recipe, whole, tmp_path):
    with pytest.raises(Incomplete, match=r"nothing is saved; .* it goes on at step 0"):  # a second signal
        loop.run(recipe, tmp_path, toy.data, CPU, send_at(3, signal.SIGINT, signal.SIGINT))
    log, remarks = (tmp_path / "log.jsonl").read_bytes(), []
    loop.run(recipe, tmp_path, toy.data, CPU, quiet, remark=remarks.append)
    assert any(
        "training begins at step 0; the log of the earlier run is now log-1.jsonl" in r for r in remarks
    )
    assert (tmp_path / "log-1.jsonl").read_bytes() == log
    assert lines(tmp_path) == lines(whole)


def test_lines_after_the_last_checkpoint_stay_in_a_second_log(toy, tmp_path):
    recipe = reader.parse(toy.table("tecoa", checkpoint_every=2), Recipe, "a test")
    with pytest.raises(Incomplete, match=r"the last saved step is 2; .* goes on at step 2"):
        loop.run(recipe, tmp_path, toy.data, CPU, send_at(3, signal.SIGTERM, signal.SIGTERM))
    log = (tmp_path / "log.jsonl").read_bytes()
    loop.run(recipe, tmp_path, toy.data, CPU, quiet)
    assert (tmp_path / "log-1.jsonl").read_bytes() == log


def test_a_kill_while_a_log_is_put_aside_loses_no_line(tmp_path, monkeypatch):
    """The copy is whole before the log is cut."""
    for step in (1, 2, 3):
        store.append(tmp_path / "log.jsonl", {"step": step, "loss": 1.0})
    whole, write = (tmp_path / "log.jsonl").read_bytes(), store.write

    def killed(path, content):
        if path.name == "log.jsonl":
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            log.continue_at(tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_bytes() == whole
    log.continue_at(tmp_path, 2)
    assert [line["step"] for line in store.records(tmp_path / "log.jsonl")] == [1, 2]
    assert (tmp_path / "log-2.jsonl").read_bytes() == whole


def test_checkpoints_that_a_kill_left_after_the_end_are_taken_away(toy, whole, recipe, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    extra = tmp_path / "run" / "checkpoints" / "step_0000005.safetensors"
    extra.parent.mkdir(exist_ok=True)
    before = files(tmp_path / "run")
    extra.write_bytes(b"left")
    loop.run(recipe, tmp_path / "run", toy.data, CPU, quiet)
    assert files(tmp_path / "run") == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with interruption.deferred() as stopping:
            signal.raise_signal(signal.SIGTERM)
            assert not stopping()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_changed_recipe_names_its_keys(toy, recipe, whole):
    other = reader.parse(toy.table("tecoa", checkpoint_every=0, seed=99), Recipe, "a test")
    with pytest.raises(InputError, match=rf"with seed = {recipe.seed} \(now 99\); expected the recipe"):
        loop.run(other, whole, toy.data, CPU, quiet)


def test_differences_of_recipes():
    earlier = {"fingerprint": "a", "inner": {"eps": "4/255", "steps": 3}, "lora": None}
    now = {"inner": {"eps": "2/255", "steps": 3}, "lora": {"r": 4}}
    assert folder.differences(earlier, now) == [
        "inner.eps = 4/255 (now 2/255)",
        "lora = nothing (now {'r': 4})",
    ]


# Commands


def run_until(seconds, number, *words):
    """Exit code and stderr of a command that gets a signal some time after its start."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # off in a background job
    )
    code += f"import sys; sys.argv = {['vlmrob', *words]!r}\nfrom robustbench_vlm.cli import main\nmain()"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    time.sleep(seconds)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    return process.returncode, err.decode()


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0])
def test_a_signal_while_libraries_are_imported_is_one_line(seconds):
    code, err = run_until(seconds, signal.SIGINT, "eval", "--dry-run", "--model", "tiny")
    assert (code, err.count("\n"), "Traceback" in err) == (75, 1, False), err
    assert "stopped" in err


class Unlucky:
    """Stands for the part of a command that fails."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *_):
        raise self.error


ENDS = [
    (MemoryError(), 1, "vlmrob list: out of memory (MemoryError: no message); free some"),
    (RuntimeError("first line\nsecond"), 1, "vlmrob list: RuntimeError: first line; the traceback is in "),
    (
        OSError(errno.ENOSPC, "No space left on device", "/x/y"),
        75,
        "/x/y: No space left on device; make room",
    ),
    (OSError(errno.ENAMETOOLONG, "File name too long", "/x/y"), 2, "/x/y: File name too long; expected"),
    (OSError(errno.EACCES, "Permission denied", "/x/y"), 1, "/x/y: Permission denied"),
    (KeyError("a"), 1, "vlmrob list: KeyError: 'a'; the traceback is in "),
    (KeyboardInterrupt(), 75, "vlmrob list: stopped; nothing was saved"),
]


@pytest.mark.parametrize(("error", "code", "expected"), ENDS, ids=lambda value: type(value).__name__)
def test_whatever_ends_a_command_is_one_line(monkeypatch, capsys, error, code, expected):
    monkeypatch.setattr(catalogue, "names", Unlucky(error))
    assert command_line.run_command(monkeypatch, "list", "attacks") == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected}")
    if "traceback" in line:
        file = Path(line.rpartition(" ")[2])
        assert file.read_text().startswith("vlmrob list attacks\nTraceback")
        file.unlink()


def test_a_message_is_printed_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "names", Unlucky(InputError("[red]:x:[/red]", "no")))
    assert command_line.run_command(monkeypatch, "list", "attacks") == 2
    assert capsys.readouterr().err == "error: [red]:x:[/red]: no\n"


def test_a_closed_stdout_is_a_quiet_success(monkeypatch):
    """Python has no `sys.stdout` in a process that was started by `vlmrob list attacks >&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    assert command_line.run_command(monkeypatch, "list", "attacks") == 0
    sys.stdout.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_names_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(text_files, "require_own", lambda _: None)  # the device is no file of ours
    (tmp_path / "ledger").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/ledger'"):
        store.append(tmp_path / "ledger", {})


@pytest.mark.parametrize("command", ["data check", "list", "verify"])
def test_a_command_that_saves_nothing_says_so(command):
    assert "nothing was saved" in _interrupted([*command.split(), "x"])
    assert "goes on from what is saved" in _interrupted(["data", "fetch", "x"])


def test_the_cache_is_where_a_person_would_look_for_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its standard says is to be ignored
    for own, found in {
        "~/c": home / "c", "$HOME/c": home / "c", "${HOME}/c": home / "c", " ": home / ".cache" / "vlmrob",
        "c": Path("c"), "/c": Path("/c"),
    }.items():  # fmt: skip
        monkeypatch.setenv("VLMROB_CACHE", own)
        assert store.cache_folder() == found, own
    monkeypatch.delenv("VLMROB_CACHE")
    for home in ("", " ", "relative"):
        monkeypatch.setenv("HOME", home)
        assert store.cache_folder() == Path(os.devnull) / "vlmrob", home


def test_no_home_and_empty_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("VLMROB_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / "vlmrob"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / ".cache" / "vlmrob"
    monkeypatch.setattr(Path, "home", Unlucky(RuntimeError("Could not determine home directory.")))
    with pytest.raises(NotADirectoryError):
        store.write(store.cache_folder() / "text" / "x", b"")  # as a cache that cannot be written


def test_a_dry_training_names_everything_that_is_missing_before_anything_is_loaded(
    toy, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(zoo, "load", Unlucky(AssertionError("a model was loaded")))
    monkeypatch.chdir(tmp_path)
    table = toy.table("tecoa", student="tinny")
    Path("r.toml").write_text(toys.toml(table))
    words = ["--include", toy.cards, "train", "r.toml", "--data-root", tmp_path / "none"]
    for more in ([], ["--dry-run"]):
        assert command_line.run_command(monkeypatch, *words, *more) == 2
        err = capsys.readouterr().err
        assert "2 inputs are missing" in err
        assert "model 'tinny'" in err
        assert "dataset toy: not below" in err
    Path("r.toml").write_text(toys.toml(toy.table("tecoa")))
    words = ["--include", toy.cards, "train", "r.toml", "--data-root", toy.data, "--dry-run"]
    assert command_line.run_command(monkeypatch, *words) == 0
    assert "steps of 8 images" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


@pytest.mark.parametrize(("launched", "code"), [(True, 0), (False, 99)])
def test_a_process_of_a_launch_ends_before_what_python_does_at_its_end(launched, code, monkeypatch):
    """There PyTorch's process group may abort it, since caches keep the group's threads."""
    for name in launcher.NEEDED:
        monkeypatch.setenv(name, "1" if launched else "")
    last = "import atexit, os, sys; atexit.register(os._exit, 99); from robustbench_vlm.cli import main; "
    words = "sys.argv = ['vlmrob', 'list', 'attacks']; main()"
    ran = subprocess.run([sys.executable, "-c", last + words], capture_output=True, text=True)
    assert (ran.returncode, "autoattack" in ran.stdout) == (code, True)
