"""benchmarks/workers.md: what a second worker saves, in processor time (`python benchmarks/workers.py`).

One evaluation is made by one worker and by two, each with one thread. The time of the slowest worker decides
when an evaluation ends; in processor time it depends little on what else the machine does. So the ratio of
those times is about the speed-up on a machine with two free cores. The start of Python and the imports of a
worker, some ten seconds, are not counted; loading the model and timing it are.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from process import cpu_seconds, workers_below

IMAGES = 288
EVAL = "eval --model tiny-robust-teacher --attack aa2 --suite tiny --eps 4 --device cpu"
DATASETS = "tiny-digits,tiny-textures"


def measured(number: int, root: Path) -> tuple[list[float], float]:
    """Seconds of processor time of each worker, and of the clock from the first finding to the last."""
    out = root / f"results{number}"
    first: dict[int, float] = {}
    words = (
        f"{EVAL} --dataset {DATASETS} --n {IMAGES} --data-root {root / 'data'} --out {out} --workers {number}"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "robustbench_vlm", "--quiet", *words.split()]
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL)
    spent: dict[int, float] = {}
    began = None
    while process.poll() is None:
        spent |= {worker: cpu_seconds(worker) for worker in workers_below(process.pid)}
        first = {**spent, **first}
        if began is None and (out / "ledger").exists():
            began = time.perf_counter()
        time.sleep(0.5)
    if process.returncode or began is None:
        raise SystemExit(f"{' '.join(argv)} ended with {process.returncode}")
    return sorted(spent[worker] - first[worker] for worker in spent), time.perf_counter() - began


def main() -> None:
    """Measure, and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        (one,), clock_one = measured(1, Path(folder))
        two, clock_two = measured(2, Path(folder))
    lines = [
        "# Two workers beside one",
        "",
        "Made by `python benchmarks/workers.py`; what is measured is said there.",
        "",
        f"AutoAttack's first two stages on {IMAGES} images each of {DATASETS}; tiny-robust-teacher, CPU, one",
        "thread a worker.",
        "",
        "| workers | processor seconds of each | seconds of the clock from the first finding | load |",
        "|---|---|---|---|",
        f"| 1 | {one:.1f} | {clock_one:.0f} | {os.getloadavg()[0]:.1f} |",
        f"| 2 | {two[0]:.1f}, {two[1]:.1f} | {clock_two:.0f} | {os.getloadavg()[0]:.1f} |",
        "",
        f"Speed-up by processor time: {one:.1f} / {two[1]:.1f} = {one / two[1]:.2f}, without the start",
        f"of the workers. All work together: {sum(two) / one:.2f} times that of one worker.",
        "",
    ]
    Path(__file__).with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
