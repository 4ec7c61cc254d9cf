"""benchmarks/ledger.md: what ledgers cost, written and read again (`python benchmarks/ledger.py`).

Written: the packaged tiny model is evaluated, and the time that goes into ledger lines is compared with the
whole. Read: the findings of a stopped evaluation are entered into its table, as the same command does before
it attacks the first image; the ledgers are generated. Times are of the clock and of the processor, since a
machine that does other work stretches the former.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from data_memory import card
from evaluate_memory import write

from robustbench_vlm import store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.data.dataset import open_split
from robustbench_vlm.evaluation import measure, stages
from robustbench_vlm.evaluation.cells import EvalSettings, Subject
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.evaluation.ledgers import Ledger
from robustbench_vlm.models import zoo
from robustbench_vlm.results import verdicts
from robustbench_vlm.results.open_table import opened
from robustbench_vlm.threat import Threat

EPS = Fraction(4, 255)
STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")
CLASSES = 1000


def clocks() -> np.ndarray:
    """Seconds of the clock and of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def written(n: int, chain: str, folder: Path) -> str:
    """A row about an evaluation of the tiny model on generated images."""
    loaded = zoo.load("tiny")
    write(folder, n, 32, loaded)
    known, spent, lines = card(n, 32), np.zeros(2), 0
    whole = store.append

    def timed(path: Path, record: Any) -> None:  # noqa: ANN401 - as that of the store
        nonlocal spent, lines
        began = clocks()
        whole(path, record)
        spent += clocks() - began
        lines += 1

    stages.store.append = timed
    chains = (Chain.of(reader.read("attacks", chain, AttackCard)),)
    subject = Subject.of(loaded, known, open_split(known, folder, "test"))
    options: dict[str, Any] = {"norm": "linf", "ladder": (EPS,), "n": 0, "seed": 0}
    settings = EvalSettings(chains, results=folder / "out", device=torch.device("cpu"), **options)
    began = clocks()
    list(measure.evaluate(subject, settings, lambda *_: None))
    took = clocks() - began
    stages.store.append = whole
    share = 100 * spent / took
    return (
        f"| {chain} | {n} | {lines} | {took[0]:.1f} / {took[1]:.1f} | {1e6 * spent[0] / lines:.0f} / "
        f"{1e6 * spent[1] / lines:.0f} | {share[0]:.3f} % / {share[1]:.3f} % |"
    )


def line(key: str, sha: str, i: int, *, broken: bool) -> dict[str, Any]:
    """A finding such as an attack makes."""
    return {
        **{"key": key, "image": sha, "label": i % CLASSES, "broken": broken, "target": -1, "restart": 0},
        **{"iteration": i % 100 if broken else -1, "forwards": 101, "backwards": 100, "error": ""},
        **{"prediction": (i + broken) % CLASSES, "margin": 0.1 + i / 7e6, "zero_gradients": 0},
        **{"progress": i / 3e6, "distance": 0.015686274509803977, "adv_sha256": sha},
    }


def generate(folder: Path, images: int, cells: int) -> None:
    """Ledgers of cells whose images went through all stages, without the last finding of each cell."""
    for cell in range(cells):
        (folder / str(cell)).mkdir()
        for stage in STAGES:
            path = folder / str(cell) / f"{stage}.jsonl"
            last = stage == STAGES[-1]
            with path.open("wb") as file:
                for i in range(images - last):
                    key, sha = f"generated/test/s{i:07d}", f"{i:064x}"
                    file.write(store.sealed(line(key, sha, i, broken=last and i % 2 == 0), path.name))


def resumed(folder: Path, images: int, cells: int) -> np.ndarray:
    """Seconds in which every finding of every cell is in its table again."""
    keys = [f"generated/test/s{i:07d}" for i in range(images)]
    shas, labels = [f"{i:064x}" for i in range(images)], np.arange(images) % CLASSES
    split = SimpleNamespace(keys=keys, labels=labels)
    settings = SimpleNamespace(keeps_image=lambda **_: False, norm="linf")
    threat = Threat("linf", EPS)
    subject = SimpleNamespace(split=split, image_shas=shas)
    described: Any = SimpleNamespace(subject=subject, settings=settings, threat=threat)
    total = np.zeros(2)
    for cell in range(cells):
        table = verdicts.begin(keys, labels, shas, labels, np.ones(images, dtype=np.float32))
        nothing: Any = None
        run = stages.CellRun(described, nothing, nothing, table)
        began = clocks()
        ledgers = {name: Ledger(folder / str(cell) / f"{name}.jsonl", threat, CLASSES) for name in STAGES}
        with opened(table, run.eps) as entries:
            begin, faulty = run.resume(ledgers, range(images), entries)
        for ledger in ledgers.values():
            store.mend(ledger.path)
        total += clocks() - began
        assert len(begin) == 1
        assert not faulty
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200, help="that are attacked")
    parser.add_argument("--lines", type=int, default=1_000_000, help="that are read")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    text = [
        "# What ledgers cost",
        "",
        "Made by `python benchmarks/ledger.py`; what is measured is said there. Every pair is of the clock",
        f"and of the processor; {platform.machine()}, one thread, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}.",
        "",
        "| chain | images | lines | evaluation, s | one line, µs | share |",
        "|---|---|---|---|---|---|",
    ]
    for chain in ("fgsm", "pgd10", "aa2"):
        with tempfile.TemporaryDirectory() as folder:
            text.append(written(options.images, chain, Path(folder)))
    text += ["", "| lines that are read | cells | before the first attack, s |", "|---|---|---|"]
    for cells in (1, 5):
        images = options.lines // cells // len(STAGES)
        with tempfile.TemporaryDirectory() as folder:
            generate(Path(folder), images, cells)
            took = resumed(Path(folder), images, cells)
        text.append(f"| {options.lines:,} | {cells} | {took[0]:.1f} / {took[1]:.1f} |")
    store.write(options.out, ("\n".join(text) + "\n").encode())


if __name__ == "__main__":
    main()
