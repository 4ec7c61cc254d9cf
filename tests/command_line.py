"""Run command lines as a user types them: in this process, in a forked one, or in one that is killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from robustbench_vlm import cli
from robustbench_vlm.cards import reader

TIMEOUT = 300.0  # seconds; every process imports torch first


def run_command(monkeypatch, *words):
    """Run `vlmrob WORDS` in this process and return its exit code; its `--include` folders are forgotten."""
    monkeypatch.setattr(sys, "argv", ["vlmrob", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    finally:
        reader.include([])
    return 0


def fork_command(words, prepare=lambda: None):
    """Run `vlmrob WORDS` in a forked process, which imports nothing again, as `subprocess.run` would.

    Args:
        words: of the command line.
        prepare: called there first, to make something fail.
    """
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:

        def main():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler)  # as in a terminal
            for number, file in ((1, out), (2, err)):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            sys.argv = ["vlmrob", *map(str, words)]
            reader.include([])  # a test may have included its own
            prepare()
            cli.main()

        child = multiprocessing.get_context("fork").Process(target=main)
        child.start()
        child.join(TIMEOUT)
        assert child.exitcode is not None
        texts = [Path(file.name).read_text() for file in (out, err)]
        return subprocess.CompletedProcess(words, child.exitcode, *texts)


def kill_command(command, progress, least):
    """Start a process, kill it once `progress()` reaches `least`, and return the progress at its end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while progress() < least:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() - began < TIMEOUT
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return progress()
