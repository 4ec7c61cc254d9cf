"""Command lines as a user types them, in this process or in one that is killed on the way."""

import os
import signal
import subprocess
import sys
import time

from robustbench_vlm import cli
from robustbench_vlm.cards import reader

PATIENCE = 300.0  # seconds; every process imports torch first


def typed(monkeypatch, *words):
    """The exit code of a command line; what `--include` brought is gone afterwards."""
    monkeypatch.setattr(sys, "argv", ["vlmrob", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    finally:
        reader.include([])
    return 0


def killed(command, progress, least):
    """Start a command, and kill it as soon as `progress()` is `least`; how much it was then."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while progress() < least:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return progress()
