"""Peak memory of reading a generated shard set, by its size: `python benchmarks/data_memory.py 1000 100000`.

Each size runs in a process of its own: open (every shard is indexed to its last member), draw 1000 images and
decode them, then `data check --decode` over everything. Peaks are above a process that has only imported.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from process import peak

from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import check, layout
from robustbench_vlm.data.dataset import open_split

DRAWN = 1000
NAMES = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "white", "black", "grey")


def card(n: int, px: int = 32) -> DatasetCard:
    return DatasetCard(
        name="flat",
        title="Generated",
        folder="wds_flat",
        n_classes=10,
        size={"test": n},
        canvas="native",
        native_px=px,
        names=NAMES,
        templates=("a {c}",),
        licence="none",
    )


def write(root: Path, n: int) -> None:
    dice = np.random.default_rng(0)
    images = []
    for _ in range(64):
        file = io.BytesIO()
        Image.fromarray(dice.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        images.append(file.getvalue())
    layout.write_texts(root / "wds_flat", card(n).names, card(n).templates)
    rows = ((f"s{i:07d}", images[i % 64], "png", i % 10) for i in range(n))
    layout.write_split(root / "wds_flat", "test", rows, 10_000)


def measure(root: Path, n: int) -> None:
    imported, started = peak(), time.perf_counter()
    split = open_split(card(n), root, "test")
    opened, seconds = peak() - imported, time.perf_counter() - started
    assert len(split) == n
    images = split.subset(DRAWN).images(32)
    drawn = peak() - imported
    del split, images
    found = check.check(card(n), root, "test", lambda *_: None, decode=True)
    assert not found.problems
    print(f"{n}\t{opened:.1f}\t{drawn:.1f}\t{peak() - imported:.1f}\t{seconds:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", type=int, default=[1000, 10_000, 100_000])
    parser.add_argument("--measure", type=Path)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.sizes[0])
        return
    print("images\topened, MB\tdrawn, MB\tchecked, MB\topening, s", flush=True)
    for n in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), n)
            subprocess.run([sys.executable, __file__, str(n), "--measure", folder], check=True)


if __name__ == "__main__":
    main()
