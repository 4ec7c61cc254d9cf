"""Peak memory of an evaluation, by the number of images: `python benchmarks/evaluate_memory.py 1000 10000`.

With `--workers N` the model work is done by Ray workers; then the peak of the largest of them is given too.

Each size runs in a process of its own on generated shards whose labels are the model's own predictions, so
every image is attacked: the shards are indexed, every image is looked at once, then come the canonical clean
pass, the attack, verdicts and files. Peaks are above a process that has imported everything and loaded the
model: the shipped tiny one, which shrinks larger images to its 32 px itself.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from data_memory import card
from PIL import Image
from process import peak, workers_below

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.data import dataset, layout
from robustbench_vlm.data.dataset import open_split
from robustbench_vlm.data.loader import as_float
from robustbench_vlm.engine import canonical
from robustbench_vlm.evaluation import measure, ray_settings
from robustbench_vlm.evaluation.cells import EvalSettings, Subject
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.evaluation.executor import THIS_PROCESS, Executor
from robustbench_vlm.models import zoo
from robustbench_vlm.models.clip import Classifier
from robustbench_vlm.models.text_bank import render, text_bank
from robustbench_vlm.models.zoo import Loaded

DIFFERENT = 64  # images that are really different; the others repeat them under other keys
ROWS = 64


def attack(name: str) -> AttackCard:
    """`fgsm`, or `pgd2`: two steps of PGD, judged by the last."""
    if name == "fgsm":
        return reader.read("attacks", name, AttackCard)
    pgd = reader.read("attacks", "pgd10", AttackCard)
    stage = pgd.stage[0].model_copy(update={"steps": 2})
    return pgd.model_copy(update={"name": "pgd2", "stage": (stage,)})


def write(root: Path, n: int, px: int, loaded: Loaded) -> None:
    known = card(n, px)
    dice = np.random.default_rng(0)
    pixels = dice.integers(0, 256, (DIFFERENT, px, px, 3), dtype=np.uint8)
    files = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", compress_level=1)
        files.append(file.getvalue())
    classify = Classifier(loaded.model, text_bank(loaded.model, render(known.names, known.templates)))
    labels = canonical.logits(classify, as_float(pixels), ROWS).argmax(1).tolist()
    layout.write_texts(root / known.folder, known.names, known.templates)
    rows = ((f"s{i:07d}", files[i % DIFFERENT], "png", labels[i % DIFFERENT]) for i in range(n))
    layout.write_split(root / known.folder, "test", rows, 10_000)


def executor_of(workers: str, loaded: Loaded) -> AbstractContextManager[Executor]:
    """Who does the model work; the start of Ray is counted."""
    if not workers:
        return nullcontext(THIS_PROCESS)
    ray_settings.prepare(workers)
    from robustbench_vlm.evaluation.workers import executor  # Ray is an extra

    size = sum(tensor.nbytes for tensor in loaded.model.state_dict().values())
    return executor(workers, torch.device("cpu"), size, print)


def one(root: Path, n: int, px: int, chain: AttackCard, workers: str) -> None:
    known, loaded = card(n, px), zoo.load("tiny")
    imported, started = peak(), time.perf_counter()
    what = Subject.of(loaded, known, open_split(known, root, "test"))
    looked = peak() - imported
    order = EvalSettings(
        chains=(Chain.of(chain),),
        norm="linf",
        ladder=(Fraction(1, 255),),
        n=0,
        seed=0,
        results=root / "results",
        device=torch.device("cpu"),
    )
    with executor_of(workers, loaded) as executor:
        (path,) = measure.evaluate(what, order, lambda *_: None, works=executor.works)
        peaks = [peak(worker) for worker in workers_below(os.getpid())]
    assert path.with_suffix(".parquet").exists()
    kept = 0 if what.images.pixels is None else what.images.pixels.nbytes / 2**20
    seconds = time.perf_counter() - started
    sizes = (n * px * px * 12 / 2**20, kept, looked, peak() - imported)
    shown = [f"{size:.0f}" for size in [*sizes, *([max(peaks)] if peaks else [])]]
    print("\t".join([str(n), str(px), *shown, f"{seconds:.0f}"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", type=int, default=[1000, 10_000, 50_000])
    parser.add_argument("--attack", choices=("fgsm", "pgd2"), default="fgsm")
    parser.add_argument("--px", type=int, default=32)
    parser.add_argument("--keep", type=float, help="MiB of decoded images up to which they stay in memory")
    parser.add_argument(
        "--workers", default="", help="Ray workers on this machine; this process alone if left out"
    )
    parser.add_argument("--measure", type=Path)
    options = parser.parse_args()
    if options.keep is not None:
        dataset.IN_MEMORY = int(options.keep * 2**20)
    if options.measure:
        one(options.measure, options.sizes[0], options.px, attack(options.attack), options.workers)
        return
    of_workers = "\tlargest worker, MB" if options.workers else ""
    print(
        f"images\tpx\tas float32, MB\tkept, MB\tlooked at, MB\tevaluated, MB{of_workers}\ttook, s", flush=True
    )
    loaded = zoo.load("tiny")
    words = ["--attack", options.attack, "--px", str(options.px), "--workers", options.workers]
    words += [] if options.keep is None else ["--keep", str(options.keep)]
    for n in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), n, options.px, loaded)
            subprocess.run([sys.executable, __file__, str(n), *words, "--measure", folder], check=True)


if __name__ == "__main__":
    main()
