"""What benchmarks need: measurements in processes of their own, a look at others, and where it was."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
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


def workers_below(pid: int) -> list[int]:
    """The Ray workers that a process has started, by their pids; Linux."""
    above, workers = {}, []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            title = (path.parent / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        own = int(path.parent.name)
        above[own] = parent
        if title.startswith(b"ray::_Actor"):
            workers.append(own)
    return sorted(worker for worker in workers if pid in _ancestors(worker, above))


def _ancestors(pid: int, above: dict[int, int]) -> set[int]:
    found = set()
    while pid in above:
        pid = above[pid]
        found.add(pid)
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time that another process has had; 0 if it has ended; Linux."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak(pid: int | str = "self") -> float:
    """Highest resident memory of a process so far, MiB; ru_maxrss would keep its parent's; Linux."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


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
