"""An index of the images in the clip-benchmark webdataset layout, or in a tree with a folder a class.

Only names, labels and byte ranges are read here; nothing is decoded, extracted, unpickled or run. A shard
that was cut off anywhere before its end-of-archive marker is an error, and never a smaller dataset.
"""

from __future__ import annotations

import codecs
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from robustbench_vlm import text_files
from robustbench_vlm.data import class_names, image_files
from robustbench_vlm.errors import DataError

LABEL_SUFFIX = "cls"
KEY_SUFFIX = "key"  # of our exports: the name that the image had where it came from
LARGEST_LABEL = 32  # bytes; a class index needs a dozen, more is not a label
LARGEST_KEY = 1024  # bytes
LARGEST_IMAGE = 256 * 2**20  # bytes of one encoded image; more is a damaged header or an attack on memory
LARGEST_HEADER = 32 * 2**10  # bytes of one PAX or GNU header; tarfile needs 20 s for one of 2 MB
BLOCK = tarfile.BLOCKSIZE
EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
AGAIN = "fetch or write this shard again"


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image and the position of its bytes.

    Attributes:
        name: path of the member in its shard without extension, the key stored beside it by an export, or
            the path below the split for class folders.
        label: class index.
        path: the shard, or the image file itself.
        offset: first byte of the encoded image inside `path`.
        size: its number of bytes; -1 for the whole file.
    """

    name: str
    label: int
    path: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The encoded image, as stored.

        Raises:
            DataError: the file is gone, or shorter than when it was indexed, or absurdly large.
        """
        where = f"{self.path}, {self.name}"
        try:
            with text_files.open_regular(self.path) as file:
                if self.size < 0 and os.fstat(file.fileno()).st_size > LARGEST_IMAGE:
                    raise DataError(where, f"larger than {LARGEST_IMAGE} bytes", "one encoded image")
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise DataError(where, f"cannot be read ({error.strerror})", do="check the file") from None
        if self.size >= 0 and len(content) != self.size:
            raise DataError(where, f"{len(content)} bytes left", f"{self.size}, as indexed", AGAIN)
        return content


@dataclass(frozen=True)
class Index:
    """All samples of a split, sorted by name, and what was not read.

    Attributes:
        samples: the images with their labels.
        ignored: number of files or members that are neither image nor label.
        left_out: those of them that are images nevertheless: hidden, of a format that is not decoded, or dead
            links.
        rule: how class folders were matched to class names (`class_names.match`); empty for shards.
    """

    samples: tuple[Sample, ...]
    ignored: int
    left_out: tuple[str, ...] = ()
    rule: str = ""


def is_sharded(folder: Path) -> bool:
    """Whether a split folder has tar shards, or a file that promises them."""
    return (folder / "nshards.txt").exists() or any(folder.glob("*.tar"))


def index_shards(folder: Path, n_classes: int) -> Index:
    """Index of `nshards.txt`, `0.tar`, `1.tar`, ... in a split folder; each archive is read once.

    Raises:
        DataError: shards missing, truncated, damaged or in excess; an image without label or a label
            without image; a name used twice; a label that is no integer below `n_classes`.
    """
    samples: dict[str, Sample] = {}
    ignored = 0
    for shard in shard_files(folder):
        found, skipped = index_shard(shard, n_classes)
        ignored += skipped
        for sample in found:
            other = samples.setdefault(sample.name, sample)
            if other is not sample:
                where = "the same shard" if other.path == shard else other.path.name
                raise DataError(str(shard), f"key {sample.name!r} is also in {where}", "each key once", AGAIN)
    if not samples:
        raise DataError(str(folder), "no images in any shard", "members like s0000000.webp, s0000000.cls")
    return Index(tuple(samples[name] for name in sorted(samples)), ignored)


def index_folders(
    folder: Path, names: tuple[str, ...], other_names: class_names.OtherNames = class_names.NO_OTHER_NAMES
) -> Index:
    """Index of `<folder>/<class>/<image>`; links are followed, hidden files and folders are left out.

    Class folders are matched to the class names by `class_names.match`, never by their order.

    Raises:
        DataError: no images, another number of class folders than classes, or folders that match no class.
    """
    classes = class_folders(folder)
    if len(classes) != len(names):
        raise DataError(
            str(folder), f"{len(classes)} class folders", f"{len(names)}", "one folder for each class"
        )
    matched = class_names.match(classes, names, str(folder), other_names)
    label_of = dict(zip(classes, matched.labels, strict=True))
    samples, left_out, ignored = [], [], 0
    for path in image_files.walk(folder):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if len(relative.parts) > 1 and not hidden and image_files.is_image(path):
            _require_printable(folder, relative.as_posix())
            samples.append(Sample(relative.as_posix(), label_of[relative.parts[0]], path))
            continue
        ignored += 1
        if image_files.looks_like_image(path):
            left_out.append(relative.as_posix())
    if not samples:
        raise DataError(str(folder), "no images below the class folders", "<class>/<image>.jpg")
    ordered = tuple(sorted(samples, key=lambda sample: sample.name))
    return Index(ordered, ignored, tuple(sorted(left_out)), matched.rule)


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a split's folder, sorted, without hidden ones."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def shard_files(folder: Path) -> list[Path]:
    """The shard files that `nshards.txt` promises, in order; they must be exactly those on disk.

    Raises:
        DataError: no such number, shards missing, or more than promised.
    """
    stated = folder / "nshards.txt"
    try:
        text = text_files.read_bytes(stated, 64).decode("utf-8-sig").strip()
    except FileNotFoundError:
        raise DataError(
            str(stated), "no such file", "the number of shards", "fetch the split again"
        ) from None
    except (OSError, UnicodeDecodeError):
        text = "(unreadable)"
    if not re.fullmatch(r"\d{1,7}", text) or int(text) == 0:
        raise DataError(str(stated), repr(text), "one positive integer, the number of shards")
    wanted = [f"{i}.tar" for i in range(int(text))]
    present = {path.name for path in folder.glob("*.tar")}
    absent = [name for name in wanted if name not in present]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise DataError(
            str(folder), f"{', '.join(absent[:3])}{more} missing", f"{text} shards", "fetch the split again"
        )
    extra = sorted(present - set(wanted))
    if extra:
        raise DataError(
            str(folder), f"{extra[0]} is there", f"{text} shards by nshards.txt", "correct either"
        )
    return [folder / name for name in wanted]


def index_shard(shard: Path, n_classes: int) -> tuple[list[Sample], int]:
    """Samples of one archive in member order, and the number of ignored members.

    Raises:
        DataError: truncated or damaged anywhere; an image without label, a label without image, a name used
            twice, a label that is no integer below `n_classes`, or a stored key that is no text.
    """
    images: dict[str, tuple[int, int]] = {}  # first byte and size
    texts: dict[str, dict[str, bytes]] = {LABEL_SUFFIX: {}, KEY_SUFFIX: {}}
    ignored = 0
    with _opened(shard) as file:
        for member in _members(shard, file):
            name, suffix = _key_and_suffix(member.name)
            plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.sparse is None
            if not plain or not name or suffix not in (*image_files.SUFFIXES, *texts):
                ignored += 1
                continue
            _require_printable(shard, name)
            if name in texts.get(suffix, images):
                kind = {LABEL_SUFFIX: "labels", KEY_SUFFIX: "stored keys"}.get(suffix, "images")
                raise DataError(str(shard), f"key {name!r} has two {kind}", "each key once", AGAIN)
            if suffix in texts:
                largest = LARGEST_LABEL if suffix == LABEL_SUFFIX else LARGEST_KEY + 1
                texts[suffix][name] = os.pread(file.fileno(), min(member.size, largest), member.offset_data)
            elif member.size > LARGEST_IMAGE:
                raise DataError(f"{shard}, {name}", f"an image of {member.size} bytes", "less", AGAIN)
            else:
                images[name] = (member.offset_data, member.size)
    dotted = {name for name in images if "." in name.rpartition("/")[2]} - texts[LABEL_SUFFIX].keys()
    for name in dotted:  # s0.mask.png beside s0.png is another picture of the sample, not an image
        del images[name]
    ignored += len(dotted)
    labels = {name: _label(shard, name, text, n_classes) for name, text in texts[LABEL_SUFFIX].items()}
    lonely = sorted(images.keys() ^ labels.keys()) + sorted(texts[KEY_SUFFIX].keys() - images.keys())
    if lonely:
        lacks = (
            "no label (.cls)"
            if lonely[0] in images
            else f"no image (.{' .'.join(sorted(image_files.SUFFIXES))})"
        )
        raise DataError(str(shard), f"key {lonely[0]!r} has {lacks}", "one image and one label a key", AGAIN)
    keys = {name: _stored_key(shard, name, text) for name, text in texts[KEY_SUFFIX].items()}
    found = [Sample(keys.get(name, name), labels[name], shard, *span) for name, span in images.items()]
    return found, ignored


def _key_and_suffix(member: str) -> tuple[str, str]:
    """The key of a member, its path up to the ending (the folder is part of it, as in webdataset), and that.

    The ending begins at the first dot of the file's name, or at the last one where only that is known.
    """
    folder, slash, file = member.removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    if stem and "." in suffix:
        stem, _, suffix = file.rpartition(".")
    return (f"{folder}{slash}{stem}" if stem else ""), suffix.lower()


def _stored_key(shard: Path, name: str, text: bytes) -> str:
    """The original name of an exported image."""
    where = f"{shard}, {name}.{KEY_SUFFIX}"
    try:
        key = text.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(where, f"{text!r:.80}", "a name in UTF-8", AGAIN) from None
    if not key or len(text) > LARGEST_KEY:
        raise DataError(where, f"{len(text)} bytes", f"a name of 1 to {LARGEST_KEY} bytes", AGAIN)
    _require_printable(shard, key)
    return key


def _require_printable(where: Path, name: str) -> None:
    """Refuse names that are not printable: they become keys, and appear in tables and messages."""
    if not name.isprintable():
        raise DataError(str(where), f"the name {name!r:.80}", "printable UTF-8 names", "rename it")


def _label(shard: Path, name: str, text: bytes, n_classes: int) -> int:
    stripped = text.removeprefix(codecs.BOM_UTF8).strip(b" \t\r\n")
    expected = f"an integer from 0 to {n_classes - 1}"
    if not re.fullmatch(rb"[0-9]{1,9}", stripped):
        raise DataError(f"{shard}, {name}.cls", f"label {text.decode('latin-1')!r}", expected, AGAIN)
    value = int(stripped)
    if value >= n_classes:
        do = "check that the folder belongs to this dataset"
        raise DataError(f"{shard}, {name}.cls", f"label {value} is outside the class list", expected, do)
    return value


def _opened(shard: Path) -> BinaryIO:
    """A shard that is a regular file, opened.

    Raises:
        DataError: it is another kind of file, or cannot be read.
    """
    try:
        return text_files.open_regular(shard)
    except OSError as error:
        raise DataError(str(shard), f"cannot be read ({error.strerror})", "a tar archive", AGAIN) from None


class _BoundedHeader(tarfile.TarInfo):
    """A member whose PAX or GNU headers are refused before they are read where they are too large."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in EXTENDED and self.size > LARGEST_HEADER:
            raise tarfile.ReadError(f"an extended header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]


def _members(shard: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed archive that is complete up to its end-of-archive marker.

    `tarfile` ends without an error at a cut between members and at a damaged header, so the end is checked
    here: two zero blocks where the next header would be, and nothing but zeros behind them.
    """
    descriptor = file.fileno()
    size = os.fstat(descriptor).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_BoundedHeader) as archive:
            last = -1
            while (member := archive.next()) is not None:
                # with a negative size in a hostile header, tarfile would loop for ever
                if member.offset <= last or member.size < 0 or member.offset_data + member.size > size:
                    raise DataError(str(shard), f"truncated in {member.name!r:.80}", "a whole archive", AGAIN)
                last = member.offset
                archive.members.clear()  # type: ignore[attr-defined]  # a header object for each file
                yield member
            end = archive.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        head = os.pread(descriptor, 64, 0)
        pointer = head.startswith(b"version https://git-lfs")
        found = "a git-lfs pointer" if pointer else f"no whole tar archive ({error or type(error).__name__})"
        raise DataError(str(shard), found, "an uncompressed tar archive", AGAIN) from None
    marker = os.pread(descriptor, 2 * BLOCK, end)
    if len(marker) < 2 * BLOCK:
        raise DataError(str(shard), "truncated: no end-of-archive mark", "a whole archive", AGAIN)
    if any(marker):
        raise DataError(str(shard), f"damaged header at byte {end}", "a whole archive", AGAIN)
    for start in range(end + 2 * BLOCK, size, 2**20):
        if any(os.pread(descriptor, 2**20, start)):
            found = "data behind the end-of-archive mark (two archives glued together?)"
            raise DataError(str(shard), found, "one archive", AGAIN)
