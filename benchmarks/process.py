"""What every benchmark needs: measurements in processes of their own, and a word on where they were made."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from robustbench_vlm import store

HERE = Path(__file__).parent

Line = dict[str, Any]


def alone(call: Callable[[], Any], *, copied: bool = False) -> Any:  # noqa: ANN401 - what `call` gives
    """What `call` gives in a process of its own.

    Copied from this one, which then must never compute a gradient, the memory that it starts with is the same
    for all; a CUDA device cannot be used in a copy.
    """
    context = multiprocessing.get_context("fork" if copied else "spawn")
    ours_end, its_end = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(its_end, call))
    child.start()
    its_end.close()
    try:
        given = ours_end.recv()
    except EOFError:
        child.join()
        raise SystemExit(f"a measurement ended without a result, exit status {child.exitcode}") from None
    child.join()
    return given


def _send(end: Any, call: Callable[[], Any]) -> None:  # noqa: ANN401 - a pipe
    end.send(call())


def about(what: argparse.Namespace) -> Line:
    """What all lines of one run share."""
    git = partial(subprocess.run, cwd=HERE, capture_output=True, text=True, check=False)
    commit = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
    changed = git(["git", "status", "--porcelain", "--", "../robustbench_vlm", "."]).stdout
    dirty = [line for line in changed.splitlines() if line.endswith(".py")]
    own = {key: value for key, value in vars(what).items() if key != "out"}
    return {
        "settings": own,
        "commit": commit + "+changes" * bool(dirty),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _processor(),
        "device": torch.cuda.get_device_name() if what.device == "cuda" else "cpu",
    }


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text("utf-8").splitlines() if facts.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def begun(path: Path, what: argparse.Namespace) -> list[Line]:
    """The head of a run and what it has measured; of one that was stopped, or of a new one.

    A run of other settings, another commit or another machine is never gone on with.
    """
    head = json.loads(json.dumps(about(what)))
    store.mend(path)
    known = list(store.records(path))
    if known and known[0] != head:
        raise SystemExit(f"{path}: of another run (settings, commit or machine); remove it or choose --out")
    if not known:
        store.append(path, head)
    return known or [head]
