"""scikit-learn's 1,797 scanned digits as class folders: `python benchmarks/digits.py --out data/my-digits`.

What anybody has who brings images of their own: `<out>/<split>/<class>/<image>.png`, and cards for them in
`benchmarks/digits/`, a folder for `--include`. The scans stay what they are, 8 x 8 pixels with 17 levels of
grey; the card says that they are judged on the model's canvas. Nothing here belongs to the package.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

LEVELS = 16  # a scan counts the black points of 4 x 4 of them: 0 to 16
SHARES = (("test", 0.2), ("val", 0.3), ("train", 1.0))  # up to which share of all hashes


def split_of(scan: np.ndarray) -> str:
    """20 % test, 10 % val, 70 % train: by a hash of the pixels alone, so two equal scans stay together."""
    digest = hashlib.sha256(scan.astype(np.uint8).tobytes()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return next(split for split, end in SHARES if share < end)


def write(out: Path) -> dict[str, int]:
    """Write every scan below `out`; returns the number of images of each split."""
    digits = load_digits()
    counts = dict.fromkeys(("train", "val", "test"), 0)
    for number, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = split_of(scan)
        folder = out / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        grey = np.round(scan * (255 / LEVELS)).astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{number:04d}.png")
        counts[split] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("data/my-digits"))
    out = parser.parse_args().out
    for split, count in write(out).items():
        print(f"{out / split}: {count} images")


if __name__ == "__main__":
    main()
