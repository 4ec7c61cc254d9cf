"""What a frozen teacher says of clean images, computed once and kept between epochs, runs and kills.

Training images are not augmented, so a teacher's embedding of one is a fact. A file holds one row an image:
a mark, then the embedding in fp32. The mark is a hash over the encoded image and the embedding, so a row that
was never written, was torn by a kill or belongs to another picture under the same name counts as absent and
is computed. Everything else the bits depend on (weights, selection, canvas, rows of a call, precision,
machine) is in the file's name and again in the JSON beside it.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustbench_vlm import store
from robustbench_vlm.data.dataset import Split
from robustbench_vlm.errors import WeightsError
from robustbench_vlm.store import cache_folder
from robustbench_vlm.types import Batch, Encoder, Wrapped

MARK = 16  # bytes of the hash before each embedding


def folder() -> Path:
    """Where embeddings are kept: `embeddings` below `$VLMROB_CACHE`, else below the user's cache."""
    return cache_folder() / "embeddings"


def facts(
    model: str, split: Split, px: int, rows: int, compute: store.Facts, device: torch.device
) -> store.Facts:
    """Everything that the bits of an embedding depend on, beside the image itself.

    Args:
        model: SHA-256 of the teacher, preprocessing included.
        split: the training images.
        px: side of the canvas.
        rows: images of one call; a product of other size rounds otherwise.
        compute: precision and kernels of the recipe.
        device: where it runs.
    """
    kernels = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return {
        "model": model,
        "dataset": split.card.name,
        "split": split.split,
        "images": len(split),
        "keys": split.sha256,
        "px": px,
        "rows": rows,
        "compute": dict(compute),
        "kernels": kernels,
        "torch": torch.__version__,
    }


def _cpu() -> str:
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class Kept:
    """The rows of one teacher over one split.

    Attributes:
        path: the file.
        keys: of the split, sorted: row i belongs to `keys[i]`.
        rows: (N, 16 + 4 D) uint8, mapped from the file.
    """

    path: Path
    keys: Sequence[str]
    rows: np.ndarray

    def recall(self, batch: Batch, teacher: Encoder) -> Tensor:
        """Embeddings (B, D) float32 of `batch.images`; asks `teacher` for all of them if one is absent."""
        at = [bisect_left(self.keys, key) for key in batch.keys]
        found = self.rows[at]
        missing = [
            i for i, row in enumerate(found) if row[:MARK].tobytes() != _mark(batch.sha256[i], row[MARK:])
        ]
        if not missing:
            kept = torch.from_numpy(found[:, MARK:].copy().view("<f4"))
            return kept.to(batch.images.device, non_blocking=True)
        embeddings = teacher(batch.images)
        said = np.ascontiguousarray(embeddings.detach().float().cpu().numpy().astype("<f4", copy=False))
        self._write([(at[i], batch.sha256[i], said[i].view(np.uint8)) for i in missing])
        return embeddings

    def _write(self, lines: Sequence[tuple[int, str, np.ndarray]]) -> None:
        """By system calls, not through the map: there a full disk would be a signal that kills the run."""
        with self.path.open("r+b", buffering=0) as file:
            for at, sha, embedding in lines:
                file.seek(at * self.rows.shape[1])
                file.write(_mark(sha, embedding) + embedding.tobytes())


def _mark(image_sha256: str, embedding: np.ndarray) -> bytes:
    return hashlib.blake2b(embedding.tobytes() + image_sha256.encode(), digest_size=MARK).digest()


def keep(place: Path, known: store.Facts, split: Split, width: int) -> Kept:
    """The file of `known` below `place`, made (sparse, empty) if it is not there.

    Args:
        place: folder of such files.
        known: see `facts`.
        split: the training images.
        width: D.

    Raises:
        WeightsError: the file says that it was made from something else.
        OSError: the folder cannot be written.
    """
    whole = {**known, "width": width}
    path = place / f"{store.fingerprint(whole)[:32]}.rows"
    beside, size = path.with_suffix(".json"), len(split) * (MARK + 4 * width)
    if beside.exists():
        _require_same(beside, whole)
    else:
        store.write_json(beside, whole)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, size)  # keeps what is there: a second process may be writing
    finally:
        os.close(descriptor)
    rows = np.memmap(path, np.uint8, "r", shape=(len(split), MARK + 4 * width))
    return Kept(path, split.keys, rows)


def _require_same(beside: Path, whole: dict[str, Any]) -> None:
    found = store.read_json(beside)
    found = found if isinstance(found, dict) else {}
    for name, wanted in whole.items():
        if found.get(name) != wanted:
            what, so = f"{name} {str(found.get(name))[:16]}", f"{str(wanted)[:16]}, as of this run"
            raise WeightsError(str(beside), f"a cache made from another {what}", so, "delete the file")


@dataclass(frozen=True)
class Recalled(Wrapped):
    """A frozen teacher that remembers what it said of the clean images of one batch.

    Any other images, adversarial ones above all, it is asked about anew; patch tokens are never kept: those
    of a dataset would fill a disk.
    """

    kept: Kept
    batch: Batch

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D)."""
        if images is self.batch.images:
            return self.kept.recall(self.batch, self.encoder)
        return self.encoder(images)
