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
    """Run `vlmrob WORDS` in a forked process, which imports nothing again; its exit code and its stderr.

    Args:
        words: of the command line.
        prepare: called there first, to make something fail.
    """
    with tempfile.NamedTemporaryFile() as file:

        def main():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler)  # as in a terminal
            os.dup2(file.fileno(), 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            sys.stdout = sys.stderr
            sys.argv = ["vlmrob", *map(str, words)]
            prepare()
            cli.main()

        child = multiprocessing.get_context("fork").Process(target=main)
        child.start()
        child.join(TIMEOUT)
        assert child.exitcode is not None
        return child.exitcode, Path(file.name).read_text()


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
