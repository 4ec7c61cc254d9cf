"""Files of `torch.save` -> tensors, read as data by a separate process with limits on memory and time."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models import checkpoint

PROGRAM = "robustbench_vlm.models.foreign.archives"
HOME = Path(__file__).parents[3]  # folder that the program is imported from, whatever the working directory
MEMORY = 4 * 2**30  # bytes of address space; one storage is in memory at a time
SECONDS = 300
HEADS = {
    b"<": "a web page, not weights: the server sent HTML",
    b"version https://git-lfs": "a pointer of git-lfs, not the weights it points to",
    b"\x1f\x8b": "a gzip file, not weights",
    b"\x93NUMPY": "a NumPy array, not weights",
}


@dataclass(frozen=True)
class Unpickled:
    """The contents of a file.

    Attributes:
        state: tensors by their dotted names.
        old: features that only old programs write (the old file format, scalars of NumPy, options of a run).
    """

    state: dict[str, Tensor]
    old: tuple[str, ...]


def require_file(path: Path) -> None:
    """Refuse what is no ordinary file, is empty, or visibly contains no weights.

    Raises:
        WeightsError: missing, a loop of links, a device, a folder; empty, a web page, a git-lfs pointer.
    """
    where, again = str(path), "download it again"
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise WeightsError(where, f"cannot be read ({reason})", "a file of weights") from None
    if not stat.S_ISREG(found.st_mode):
        raise WeightsError(where, "not an ordinary file", "a file of weights")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise WeightsError(where, "an empty file", "a file of weights", again)
    for start, reason in HEADS.items():
        if head.lstrip().startswith(start):
            raise WeightsError(where, reason, do=again)


def read(path: Path, memory: int = MEMORY, seconds: int = SECONDS) -> Unpickled:
    """The tensors of a file of `torch.save`; nothing that the file names is imported or run.

    Args:
        path: a `.pt`, `.pth`, `.pth.tar` or `.bin`.
        memory: address space of the reading process, bytes.
        seconds: processor time of the reading process; twice that on the wall.

    Raises:
        WeightsError: refused, damaged, or over a limit; one line.
    """
    require_file(path)
    with tempfile.TemporaryDirectory(prefix="vlmrob-") as folder:
        out = Path(folder) / "weights.safetensors"
        command = [sys.executable, "-P", "-s", "-m", PROGRAM, str(path.resolve()), str(out)]
        try:
            done = subprocess.run(
                [*command, str(memory), str(seconds)],
                capture_output=True,
                check=False,
                cwd=folder,
                env={"PATH": os.defpath, "PYTHONPATH": str(HOME), "OPENBLAS_NUM_THREADS": "1"},
                timeout=2 * seconds,
            )
        except subprocess.TimeoutExpired:
            raise WeightsError(str(path), f"not read within {2 * seconds} s") from None
        answer = _answer(path, done, seconds)
        return Unpickled(checkpoint.read_state(out), tuple(answer["old"]))


def _answer(path: Path, done: subprocess.CompletedProcess[bytes], seconds: int) -> dict[str, list[str]]:
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or [""])[-1][:200]
        over = f"stopped by signal {-done.returncode} (it has {seconds} s of processor time)"
        raise WeightsError(str(path), f"could not be read: {over if done.returncode < 0 else last}")
    answer = json.loads(done.stdout)
    if "refused" in answer:
        raise WeightsError(str(path), f"refused: {answer['refused']}", "tensors in plain tables")
    return dict(answer)
