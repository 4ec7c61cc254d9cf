"""Outputs of frozen teachers on clean training images, computed once and stored between epochs and runs.

Training images are not augmented, so the embedding that a teacher gives an image is always the same. A file
has one row per image: a checksum, then the embedding in fp32. The checksum is a hash of the encoded image,
the embedding and the name of the file, so a row that was never written, was torn by a kill, or belongs to
another image under the same key or to another file does not match and is computed again. Everything else that
the bits depend on (weights, selection, resolution, rows of a call, precision, machine) is hashed into the
file's name and written in the JSON beside it.
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

from robustbench_vlm import devices, store
from robustbench_vlm.data.dataset import Split
from robustbench_vlm.errors import Incomplete, WeightsError
from robustbench_vlm.store import cache_folder
from robustbench_vlm.types import Batch, Encoder, Wrapped

CHECKSUM = 16  # bytes of the hash before each embedding


def default_folder() -> Path:
    """The folder of the cache files: `embeddings` below `$VLMROB_CACHE`, else below the user's cache."""
    return cache_folder() / "embeddings"


def source_of(
    model: str, split: Split, px: int, rows: int, compute: store.Facts, device: torch.device
) -> store.Facts:
    """Everything that the bits of an embedding depend on, beside the image itself.

    Args:
        model: SHA-256 of the teacher, preprocessing included.
        split: the training images.
        px: side of the images in pixels.
        rows: images of one call; a matrix product of another size rounds differently.
        compute: precision and kernels of the recipe.
        device: where the teacher runs.
    """
    return {
        "model": model,
        "dataset": split.card.name,
        "split": split.split,
        "images": len(split),
        "keys": split.sha256,
        "px": px,
        **({} if split.card.resize in ("model", "bicubic") else {"resize": split.card.resize}),
        "rows": rows,
        "compute": dict(compute),
        **devices.kernels(device),
    }


@dataclass(frozen=True)
class TeacherCache:
    """The stored embeddings of one teacher on one split.

    Attributes:
        path: the file.
        keys: image keys of the split, sorted; row i of the file belongs to `keys[i]`.
        width: D.

    Rows are read and written by system calls, and no part of the file is mapped: on a full disk, touching a
    mapped row that was never written would end the process by a signal.
    """

    path: Path
    keys: Sequence[str]
    width: int

    @property
    def _row_bytes(self) -> int:
        return CHECKSUM + 4 * self.width

    def embeddings(self, batch: Batch, teacher: Encoder) -> Tensor:
        """Embeddings (B, D) float32 of `batch.images`; runs `teacher` on all of them if one is missing.

        A row is found by the image's key and valid for the image's SHA-256, so `batch.images` must be the
        pixels that the loader decoded.

        Raises:
            Incomplete: the disk of the file is full.
        """
        positions = [bisect_left(self.keys, key) for key in batch.keys]
        found = self._read(positions)
        missing = [
            i
            for i, row in enumerate(found)
            if row[:CHECKSUM].tobytes() != self._checksum(batch.sha256[i], row[CHECKSUM:])
        ]
        if not missing:
            stored = torch.from_numpy(found[:, CHECKSUM:].copy().view("<f4"))
            return stored.to(batch.images.device, non_blocking=True)
        embeddings = teacher(batch.images)
        values = np.ascontiguousarray(embeddings.detach().float().cpu().numpy().astype("<f4", copy=False))
        self._write([(positions[i], batch.sha256[i], values[i].view(np.uint8)) for i in missing])
        return embeddings

    def _read(self, positions: Sequence[int]) -> np.ndarray:
        """(B, 16 + 4 D) uint8, the rows at these positions; zeros where the file ends before."""
        size = self._row_bytes
        with self.path.open("rb", buffering=0) as file:
            rows = [
                os.pread(file.fileno(), size, position * size).ljust(size, b"\0") for position in positions
            ]
        return np.frombuffer(b"".join(rows), np.uint8).reshape(len(positions), size)

    def _write(self, lines: Sequence[tuple[int, str, np.ndarray]]) -> None:
        try:
            with self.path.open("r+b", buffering=0) as file:
                for position, sha256, embedding in lines:
                    row = self._checksum(sha256, embedding) + embedding.tobytes()
                    done = 0
                    while done < len(row):  # near the end of the disk a call writes a part
                        done += os.pwrite(file.fileno(), row[done:], position * len(row) + done)
        except OSError as error:
            if error.errno not in store.FULL:
                raise
            do = "make room or type --no-cache, and the same command goes on from the last checkpoint"
            raise Incomplete(f"{self.path}: {error.strerror}; {do}") from None

    def _checksum(self, image_sha256: str, embedding: np.ndarray) -> bytes:
        """Of a row: it holds for one image in one file, so a row from another teacher's file fails it."""
        content = embedding.tobytes() + image_sha256.encode() + self.path.stem.encode()
        return hashlib.blake2b(content, digest_size=CHECKSUM).digest()


def open_cache(folder: Path, source: store.Facts, split: Split, width: int) -> TeacherCache:
    """The cache file of `source` below `folder`; it is made, sparse and empty, if it is missing.

    Args:
        folder: folder of the cache files.
        source: what the embeddings are computed from, by `source_of`.
        split: the training images.
        width: D.

    Raises:
        WeightsError: the JSON beside the file names another source.
        OSError: the folder cannot be written.
    """
    whole = {**source, "width": width}
    path = folder / f"{store.fingerprint(whole)[:32]}.rows"
    beside, size = path.with_suffix(".json"), len(split) * (CHECKSUM + 4 * width)
    if beside.exists():
        _require_same(beside, whole)
    else:
        store.write_json(beside, whole)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, size)  # rows that are there stay: another process may be writing them
    finally:
        os.close(descriptor)
    return TeacherCache(path, split.keys, width)


def _require_same(beside: Path, whole: dict[str, Any]) -> None:
    found = store.read_json(beside)
    found = found if isinstance(found, dict) else {}
    for name, wanted in whole.items():
        if found.get(name) != wanted:
            what, expected = f"{name} {str(found.get(name))[:16]}", f"{str(wanted)[:16]}, as of this run"
            raise WeightsError(str(beside), f"a cache made from another {what}", expected, "delete the file")


@dataclass(frozen=True)
class CachedTeacher(Wrapped):
    """A frozen teacher that reads its embeddings of the clean images of one batch from a cache.

    The clean images are recognised by their pixels, so a copy of them is recognised too. On all other images,
    adversarial ones above all, the teacher is run. Patch tokens are never stored: those of a whole dataset
    would fill a disk.

    Attributes:
        cache: the stored embeddings of this teacher.
        batch: the clean images of the present step, as the loader gave them.
    """

    cache: TeacherCache
    batch: Batch

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D)."""
        if self._are_clean(images):
            return self.cache.embeddings(self.batch, self.encoder)
        return self.encoder(images)

    def _are_clean(self, images: Tensor) -> bool:
        """Whether these are the clean images, pixel by pixel; never where their gradient is wanted."""
        clean = self.batch.images
        if images is clean:
            return True
        same_kind = (images.shape, images.dtype, images.device) == (clean.shape, clean.dtype, clean.device)
        return same_kind and not images.requires_grad and torch.equal(images, clean)
