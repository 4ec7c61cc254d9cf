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
    {"apng", "avif", "cr2", "dds", "dib", "dng", "eps", "exr", "hdr", "heic", "heif", "icns", "ico", "j2k"}
    | {"jp2", "jpf", "jpx", "jxl", "mat", "nef", "npy", "npz", "pbm", "pcx", "pgm", "pnm", "ppm", "psd"}
    | {"qoi", "raw", "sgi", "svg", "tga", "xbm", "xcf"}
)
"""Endings of images that are not decoded here, so a split that has them has lost images."""

MAGIC = {
    **{b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"},
    **{b"II*\0": "tif", b"MM\0*": "tif"},
}
"""First bytes of the formats that are decoded, and their endings; `format_of` looks further where they may
begin a text or a sound, too."""
HEAD = 18  # bytes of a file that `format_of` needs
BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # bytes of a BMP's second header, as its 15th to 18th byte say


def suffix(path: Path) -> str:
    """The ending of a file's name in small letters, without its dot."""
    return path.suffix.lower().removeprefix(".")


def is_image(path: Path) -> bool:
    """Whether a file is read as an image: one of `SUFFIXES`, and not hidden."""
    return suffix(path) in SUFFIXES and not path.name.startswith(".")


def without_suffix(name: str) -> str:
    """A name without the ending of an image; other dots are part of it, as in `v1.0 x`."""
    stem, _, ending = name.rpartition(".")
    return stem if stem and ending.lower() in SUFFIXES | OTHER_SUFFIXES else name


def format_of(head: bytes) -> str:
    """The ending of the format that an image has by its first `HEAD` bytes; empty for anything else."""
    ending = next((ending for magic, ending in MAGIC.items() if head.startswith(magic)), "")
    if ending == "bmp" and int.from_bytes(head[14:18], "little") not in BMP_HEADERS:
        return ""
    return "" if ending == "webp" and head[8:12] != b"WEBP" else ending


def looks_like_image(path: Path) -> bool:
    """Whether a file that is not read as an image is one nevertheless, by its ending or its first bytes.

    A link that leads nowhere may have been an image, or a folder of them.
    """
    if suffix(path) in OTHER_SUFFIXES and not path.name.startswith("."):
        return True
    try:
        with text_files.open_regular(path) as file:
            return bool(format_of(file.read(HEAD)))
    except OSError:
        return path.is_symlink() and not path.exists()


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted, links followed as torchvision's `ImageFolder` follows them.

    Raises:
        DataError: a link that leads back to a folder above it, or a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:  # os.walk leaves it out without a word
        raise DataError(
            str(error.filename), f"cannot be read ({error.strerror})", "a readable folder"
        ) from None

    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders.sort()
        for name in folders:
            child = Path(parent, name)
            above = (Path(parent), *Path(parent).parents)
            if child.is_symlink() and child.resolve() in {path.resolve() for path in above}:
                raise DataError(str(child), "a link to a folder above itself", "no endless tree", "remove it")
        yield from (Path(parent, name) for name in sorted(files))
