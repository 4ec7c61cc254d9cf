"""Run command lines as a user types them: in this process, or in one that is killed before it ends."""

import os
import signal
import subprocess
import sys
import time

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
