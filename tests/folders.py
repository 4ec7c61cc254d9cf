"""Small datasets on disk for the tests of the folder data."""

import io
import tarfile

import numpy as np
from PIL import Image

from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import layout
from robustbench_vlm.store import fingerprint

NAMES = ("red", "green", "blue")
TEMPLATES = ("a photo of a {c}.",)


def card(**changes):
    fields = {
        "name": "toy",
        "title": "Toy",
        "folder": "wds_toy",
        "n_classes": 3,
        "size": {"test": 24},
        "canvas": "native",
        "native_px": 8,
        "names": NAMES,
        "templates": TEMPLATES,
        "licence": "none",
    }
    return DatasetCard.model_validate(fields | changes)


def encode(array, kind="png"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def folder_sha(keys, labels, images):
    """Fingerprint of what a folder holds: ordered keys, labels and hashes of the images."""
    return fingerprint([[k, int(y), h] for k, y, h in zip(keys, labels, images, strict=True)])


def noise(seed, px=8):
    return np.random.default_rng(seed).integers(0, 256, (px, px, 3), dtype=np.uint8)


def samples(n, px=8, start=0):
    return [(f"s{i:07d}", encode(noise(i, px)), "png", i % 3) for i in range(start, start + n)]


def write_toy(root, n=24, per_shard=10, px=8, order=None, split="test"):
    """The toy dataset below `root`; `order` permutes the samples over shards. Returns the split folder."""
    folder = root / "wds_toy"
    layout.write_texts(folder, NAMES, TEMPLATES)
    rows = samples(n, px)
    layout.write_split(folder, split, [rows[i] for i in order] if order is not None else rows, per_shard)
    return folder / split


def tar_bytes(members, form=tarfile.USTAR_FORMAT):
    """An archive of (name, content) pairs, or of ready TarInfo for hostile members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if content is not None:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if content is not None else None)
    return file.getvalue()


def one_shard(folder, content, nshards="1\n"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "0.tar").write_bytes(content)
    (folder / "nshards.txt").write_text(nshards)
    return folder
