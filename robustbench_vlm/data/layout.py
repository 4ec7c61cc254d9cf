"""Write the clip-benchmark webdataset layout, the only layout that this package writes.

```
<folder>/classnames.txt                        one class per line, line number = label
<folder>/zeroshot_classification_templates.txt   one sentence per line, with {c}
<folder>/<split>/0.tar 1.tar ... nshards.txt   members KEY.<ext> and KEY.cls, of an export KEY.key too
<folder>/<split>/flags.txt                     of an export: flags of the folder that it was made of, if any
```

The same samples give the same bytes. A split appears on disk as a whole; a finished split is left alone, and
no existing file is overwritten.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from robustbench_vlm import store, text_files
from robustbench_vlm.cards.toml_tables import CONTROL, LARGEST_STRING
from robustbench_vlm.data.image_files import SUFFIXES
from robustbench_vlm.errors import DataError

Sample = tuple[str, bytes, str, int] | tuple[str, bytes, str, int, str]
"""Key (member name without extension), encoded image, its extension (`png`, `jpg`, ...), label >= 0, and
the original name of the image, if that is to be its key."""

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
NSHARDS = "nshards.txt"
FLAGS = "flags.txt"
EXTENSIONS = tuple(sorted(SUFFIXES))


def write_texts(folder: Path, names: Sequence[str], templates: Sequence[str]) -> None:
    """Write class names in label order and sentence templates, one a line; blank names are legal.

    Raises:
        DataError: an entry contains a line break, which would move every label after it, or what no card
            may contain; or the folder already has other names or templates, so that another dataset lies
            there. Nothing is written then.
    """
    texts = {folder / CLASSNAMES: names, folder / TEMPLATES: templates}
    for path, lines in texts.items():
        for line in lines:
            if "\n" in line or "\r" in line:
                raise DataError(str(path), f"{line!r:.80} contains a line break", "one entry a line")
            if CONTROL.search(line):
                raise DataError(str(path), f"{line!r:.80} contains a control character", "printable text")
            if len(line) > LARGEST_STRING:
                raise DataError(str(path), f"an entry of {len(line)} characters", f"at most {LARGEST_STRING}")
        if path.exists() and not _has_lines(path, lines):
            raise DataError(str(path), "another list is there", "no other dataset", "choose another folder")
    for path, lines in texts.items():
        if not path.exists():
            store.write(path, "".join(f"{line}\n" for line in lines).encode())


def _has_lines(path: Path, lines: Sequence[str]) -> bool:
    """Whether a text file has these lines, whatever their ends are and blank lines behind them."""
    try:
        return text_files.read_text(path).rstrip("\n") == "\n".join(lines).rstrip("\n")
    except UnicodeDecodeError:
        return False


def is_finished(folder: Path, split: str) -> bool:
    """Whether `<folder>/<split>/` is there and whole, by its number of shards."""
    return store.file_name(split) == split and (folder / split / NSHARDS).is_file()


def write_split(
    folder: Path, split: str, samples: Iterable[Sample], per_shard: int, flags: Sequence[str] = ()
) -> int:
    """Write `<folder>/<split>/` with at most `per_shard` samples a tar; a finished split is left alone.

    Samples are taken one at a time, in the given order, so a generator of any length works. They are
    written below a temporary name; a folder that appears under the split's own name is whole. Of several
    commands that write one split, the first to finish wins. `flags` are written beside the shards.

    Returns:
        The number of shards of the split.

    Raises:
        DataError: a key that occurs twice or is no plain member name, an unknown extension, a negative label,
            no samples at all, or a folder in the way that has no `nshards.txt` or no number in it.
    """
    if store.file_name(split) != split:
        raise DataError(f"split {split!r:.80}", "not the name of a folder", "letters, digits and . _ -")
    final = folder / split
    if is_finished(folder, split):
        return _shards_of(final)
    if final.exists():
        do = "finish that download, or choose another folder"
        raise DataError(str(final), f"files without {NSHARDS}", "a finished split or none", do)
    folder.mkdir(parents=True, exist_ok=True)
    stream, shards = _checked(samples, str(final)), 0
    with TemporaryDirectory(dir=folder, prefix=f".{split}.", suffix=".part") as temporary:
        part = Path(temporary) / split  # a plain mkdir, so that the usual permissions apply
        part.mkdir()
        while (first := next(stream, None)) is not None:
            with (part / f"{shards}.tar").open("xb") as file:
                _write_tar(file, chain([first], islice(stream, per_shard - 1)))
                file.flush()
                os.fsync(file.fileno())
            shards += 1
        if not shards:
            raise DataError(str(final), "no samples", "at least one")
        if flags:
            store.write(part / FLAGS, "".join(f"{flag}\n" for flag in flags).encode())
        store.write(part / NSHARDS, f"{shards}\n".encode())
        try:
            part.rename(final)
        except OSError:
            if not is_finished(folder, split):
                raise
            return _shards_of(final)  # of another command, which has finished meanwhile
    return shards


def _shards_of(split: Path) -> int:
    """The number of shards that a finished split states."""
    try:
        return int(text_files.read_text(split / NSHARDS))
    except ValueError:  # undecodable bytes, too
        raise DataError(str(split / NSHARDS), "no number", "the number of shards", "write it again") from None


def _checked(samples: Iterable[Sample], where: str) -> Iterator[Sample]:
    seen: set[str] = set()
    for sample in samples:
        key, _, extension, label = sample[:4]
        if key in seen:
            raise DataError(where, f"key {key!r} occurs twice", "one sample a key")
        if not key or "." in key or "/" in key:
            raise DataError(where, f"key {key!r}", "a member name without dot and slash, such as s0000000")
        if extension not in EXTENSIONS:
            raise DataError(where, f"extension {extension!r} of {key}", f"one of {', '.join(EXTENSIONS)}")
        if label < 0:
            raise DataError(where, f"label {label} of {key}", "a class index from 0")
        seen.add(key)
        yield sample


def _write_tar(file: BinaryIO, samples: Iterable[Sample]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, extension, label, *original in samples:
            fields = [(extension, image), ("cls", str(label).encode())]
            for suffix, content in [*fields, *(("key", name.encode()) for name in original)]:
                member = tarfile.TarInfo(f"{key}.{suffix}")  # TarInfo's own defaults: mtime, uid and gid 0
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
