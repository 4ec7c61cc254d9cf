"""Writes the clip-benchmark webdataset layout: the one spelling that everything of ours puts on disk.

```
<folder>/classnames.txt                        one class per line, line number = label
<folder>/zeroshot_classification_templates.txt   one sentence per line, with {c}
<folder>/<split>/0.tar 1.tar ... nshards.txt   members KEY.<ext> and KEY.cls
```

The same samples give the same bytes. Every file appears whole or not at all, and `nshards.txt` appears last:
a split that has one is finished and is left alone.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from robustbench_vlm import store
from robustbench_vlm.errors import DataError

Sample = tuple[str, bytes, str, int]
"""Key (member name without extension), encoded image, its extension (`png`, `jpg`, `webp`), label >= 0."""

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
NSHARDS = "nshards.txt"
EXTENSIONS = ("webp", "png", "jpg", "jpeg")


def write_texts(folder: Path, names: Sequence[str], templates: Sequence[str]) -> None:
    """Write class names in label order and sentence templates, one a line; blank names are kept.

    Raises:
        DataError: an entry holds a line break, which would move every label after it.
    """
    for file, lines in ((CLASSNAMES, names), (TEMPLATES, templates)):
        for line in lines:
            if "\n" in line or "\r" in line:
                raise DataError(str(folder / file), f"{line!r} holds a line break", "one entry a line")
        store.write(folder / file, "".join(f"{line}\n" for line in lines).encode())


def write_split(folder: Path, split: str, samples: Iterable[Sample], per_shard: int) -> int:
    """Write `<folder>/<split>/` with at most `per_shard` samples a tar; a finished split is left alone.

    Samples are taken one at a time, in the order given, so a generator of any length will do.

    Returns:
        The number of shards of the split.

    Raises:
        DataError: a key that occurs twice or is no plain member name, an unknown extension, a negative label,
            or no samples at all.
    """
    done = folder / split / NSHARDS
    if done.is_file():
        return int(done.read_text(encoding="ascii"))
    (folder / split).mkdir(parents=True, exist_ok=True)
    stream, shards = _checked(samples, str(folder / split)), 0
    while (first := next(stream, None)) is not None:
        with _whole(folder / split / f"{shards}.tar") as file:
            _write_tar(file, chain([first], islice(stream, per_shard - 1)))
        shards += 1
    if not shards:
        raise DataError(str(folder / split), "no samples", "at least one")
    store.write(done, f"{shards}\n".encode())
    return shards


def _checked(samples: Iterable[Sample], where: str) -> Iterator[Sample]:
    seen: set[str] = set()
    for key, image, extension, label in samples:
        if key in seen:
            raise DataError(where, f"key {key!r} occurs twice", "one sample a key")
        if not key or "." in key or "/" in key:
            raise DataError(where, f"key {key!r}", "a member name without dot and slash, such as s0000000")
        if extension not in EXTENSIONS:
            raise DataError(where, f"extension {extension!r} of {key}", f"one of {', '.join(EXTENSIONS)}")
        if label < 0:
            raise DataError(where, f"label {label} of {key}", "a class index from 0")
        seen.add(key)
        yield key, image, extension, label


def _write_tar(file: BinaryIO, samples: Iterable[Sample]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, extension, label in samples:
            for suffix, content in ((extension, image), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")  # TarInfo's own defaults: mtime, uid and gid 0
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name `path` only when everything has been written and flushed to disk."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
