"""The price that `vlmrob eval` prints against the seconds that it takes: `python benchmarks/prices.py`.

Ten evaluations, each in a process of its own with empty caches. The price is computed as `--dry-run` does it,
then the evaluation runs. The tiny models see rendered images with their labels. The large ones have random
weights and see noise that is labelled with their own predictions, so that every image is attacked.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import evaluate_memory
import process
import torch

from robustbench_vlm import store
from robustbench_vlm.cards import reader
from robustbench_vlm.data.tiny import write
from robustbench_vlm.evaluation import estimate, planning
from robustbench_vlm.models import zoo

OUT = Path(__file__).parent / "prices.md"

SHORT = """name = "short"
title = "AutoAttack's four attacks with few steps"
rows = 64
stop = "first"
[[stage]]
name = "apgd-ce"
attack = "apgd"
loss = "ce"
steps = 10
rho = 0.75
restarts = 1
targets = 0
[[stage]]
name = "apgd-t"
attack = "apgd"
loss = "targeted-dlr"
steps = 5
rho = 0.75
restarts = 1
targets = 3
[[stage]]
name = "fab-t"
attack = "fab"
steps = 5
targets = 3
restarts = 1
alpha_max = 0.1
eta = 1.05
beta = 0.9
[[stage]]
name = "square"
attack = "square"
queries = 100
p = 0.8
restarts = 1
"""

NOISE = """name = "flat"
title = "Noise"
folder = "wds_flat"
n_classes = 10
size = {{ test = {n} }}
canvas = "native"
native_px = {px}
names = {names}
templates = ["a {{c}}"]
licence = "none"
"""


@dataclass(frozen=True)
class Case:
    """One evaluation."""

    model: str
    dataset: str  # of the tiny world, or several with commas between them, or `flat`
    attack: str
    n: int
    eps: str
    px: int = 32


CASES = (
    Case("tiny-robust-teacher", "tiny-colours", "pgd20", 1, "4"),
    Case("tiny-robust-teacher", "tiny-colours", "pgd20", 100, "4"),
    Case("tiny", "tiny-colours", "aa2", 8, "4"),
    Case("tiny-robust-teacher", "tiny-colours", "aa2", 8, "2"),
    Case("tiny-robust-teacher", "tiny-colours", "aa2", 64, "6"),
    Case("tiny-robust-teacher", "tiny-colours", "short", 64, "2"),
    Case("tiny", "tiny-colours", "short", 100, "4"),
    Case("tiny-robust-teacher", "tiny-colours", "autoattack", 1, "2"),
    Case("RN50:random", "flat", "pgd20", 1, "4", 224),
    Case("ViT-B-32:random", "flat", "short", 8, "0.0001", 224),
)


def planned(case: Case, root: Path) -> planning.Plan:
    """The plan of one case, with its data and cards below `root`."""
    os.environ["VLMROB_CACHE"] = str(root / "cache")
    torch.set_num_threads(1)
    store.write(root / "cards" / "attacks" / "short.toml", SHORT.encode())
    reader.include([root / "cards"])
    if case.dataset == "flat":
        known = evaluate_memory.card(case.n, case.px)
        text = NOISE.format(n=case.n, px=case.px, names=list(known.names)).replace("'", '"')
        store.write(root / "cards" / "datasets" / "flat.toml", text.encode())
        evaluate_memory.write(root / "data", case.n, case.px, zoo.load(case.model))
        (root / "cache").rename(root / "used")  # the text bank is part of the price
    else:
        write.make(root / "data", case.dataset.split(","))
    request = planning.EvalRequest(
        models=(case.model,),
        attacks=(case.attack,),
        suite="flat" if case.dataset == "flat" else "tiny",
        results=root / "results",
        data_root=root / "data",
        datasets=tuple(case.dataset.split(",")),
        eps=case.eps,
        n=case.n,
    )
    return planning.plan(request, torch.device("cpu"))


def priced(plan: planning.Plan) -> estimate.Price:
    """The price in processor seconds."""
    with mock.patch.object(estimate, "time", SimpleNamespace(perf_counter=time.process_time)):
        return estimate.total(plan)[0]


def measure(case: Case, root: Path) -> process.Line:
    """Price and seconds of one case."""
    plan = planned(case, root)
    began = time.process_time()
    price = priced(plan)
    started = time.process_time()
    paths = planning.perform(planning.require_data(plan), lambda *_: None)
    seconds = time.process_time() - started
    rows = planning.rows(plan, paths)
    row = rows[rows.cell_sha256 != ""].iloc[0]
    return {
        **{"model": case.model, "dataset": case.dataset, "attack": case.attack, "n": case.n},
        **{"clean": row.clean, "robust": row.robust, "seconds": seconds, "pricing": started - began},
        **asdict(price),
    }


ABOUT = """# Prices

`vlmrob eval` prints what an evaluation costs before it begins, and `--dry-run` stops there. This page
compares the price with the seconds that the evaluation then took. Both are without start-up, and in
processor seconds of one thread, so that other programs on the machine do not count.

A chain that stops at the first success has three prices: if every image is broken at once (`least`), if half
of the images survive every attack (`typical`), and if all do (`worst`). The columns `clean` and `robust`
(accuracy in %) say which of them to expect. `pricing` is what the price itself took.

Made by `python benchmarks/prices.py` on {cpu}, torch {torch}. The chain `short` has the four attacks of
AutoAttack with 5 to 10 steps and 100 queries.

| model | attack | n | clean | robust | least, s | typical, s | worst, s | measured, s | pricing, s |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|
"""


def page(lines: list[process.Line], about: process.Line) -> str:
    """The table."""
    rows = [
        f"| {line['model']} | {line['attack']} | {line['n']} | {line['clean']} | {line['robust']} "
        f"| {line['least']:.1f} | {line['typical']:.1f} | {line['worst']:.1f} | {line['seconds']:.1f} "
        f"| {line['pricing']:.1f} |\n"
        for line in lines
    ]
    return ABOUT.format(**about) + "".join(rows)


def run(
    cases: Sequence[Case],
    measure: Callable[[Case, Path], process.Line],
    page: Callable[[list[process.Line], process.Line], str],
    doc: str | None,
    out: Path,
) -> None:
    """Measure the cases that the command line names, each in a process of its own, and write their page.

    Args:
        cases: all of them.
        measure: gives the line of a case; it may write into a folder.
        page: of all lines, and of what `process.about` says of the run.
        doc: what the script is about.
        out: file of the page, unless the command line names another one.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument(
        "--only", type=int, nargs="*", help="numbers of cases, from 0; the page is then printed"
    )
    what = parser.parse_args()
    lines = []
    for number, case in enumerate(cases):
        if what.only is not None and number not in what.only:
            continue
        with tempfile.TemporaryDirectory() as root:
            lines.append(process.alone(partial(measure, case, Path(root))))
        print(lines[-1], flush=True)
    text = page(lines, process.about(what))
    if what.only is None:
        what.out.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    run(CASES, measure, page, __doc__, OUT)
