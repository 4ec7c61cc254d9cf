"""Which files are images: by their ending, and by their first bytes where the ending says nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from robustbench_vlm import text_files
from robustbench_vlm.errors import DataError

SUFFIXES = frozenset({"webp", "png", "jpg", "jpeg", "jpe", "jfif", "bmp", "gif", "tif", "tiff"})
"""Endings of the formats that `pixels` decodes."""

OTHER_SUFFIXES = frozenset(
    {"apng", "avif", "cr2", "dds", "dib", "dng", "exr", "hdr", "heic", "heif", "ico", "j2k", "jp2", "jxl"}
    | {"mat", "nef", "npy", "npz", "pbm", "pcx", "pgm", "pnm", "ppm", "psd", "raw", "svg", "tga", "xcf"}
)
"""Endings of images that are not decoded here, so a split that has them has lost images."""

MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
"""First bytes of the formats that are decoded."""


def suffix(path: Path) -> str:
    """The ending of a file's name in small letters, without its dot."""
    return path.suffix.lower().removeprefix(".")


def is_image(path: Path) -> bool:
    """Whether a file is read as an image: one of `SUFFIXES`, and not hidden."""
    return suffix(path) in SUFFIXES and not path.name.startswith(".")


def looks_like_image(path: Path) -> bool:
    """Whether a file that is not read as an image is one nevertheless, by its ending or its first bytes."""
    if suffix(path) in OTHER_SUFFIXES and not path.name.startswith("."):
        return True
    try:
        with text_files.open_regular(path) as file:
            return file.read(4).startswith(MAGIC)
    except OSError:
        return False


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted, links followed as torchvision's `ImageFolder` follows them.

    Raises:
        DataError: a link that leads back to a folder above it.
    """
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in folders:
            child = Path(parent, name)
            above = (Path(parent), *Path(parent).parents)
            if child.is_symlink() and child.resolve() in {path.resolve() for path in above}:
                raise DataError(str(child), "a link to a folder above itself", "no endless tree", "remove it")
        yield from (Path(parent, name) for name in sorted(files))
