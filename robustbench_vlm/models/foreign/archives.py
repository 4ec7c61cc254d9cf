"""Files of `torch.save` -> safetensors: the program that `sandbox` runs with limits on memory and time.

`python -m robustbench_vlm.models.foreign.archives FILE OUT MEMORY SECONDS`, where MEMORY is in bytes of
address space and SECONDS are of the processor. It prints JSON: the names of the tensors, or why the file is
refused.
"""

from __future__ import annotations

import errno
import json
import math
import resource
import signal
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from robustbench_vlm.models.foreign.pickled import Machine, RefusedError, Storage, View, count_of, tensors

MEMBERS = 100_000  # files in one archive
REASON = 200  # characters of a reason that is quoted
DAMAGE = (zipfile.BadZipFile, EOFError, KeyError, ValueError, OSError, struct.error, RuntimeError, zlib.error)
MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file written by PyTorch before 1.6


def content(view: View, raw: bytes) -> bytes:
    """The bytes of a tensor in row-major order, taken from its storage."""
    shape, width, count = view.shape, view.storage.width, math.prod(view.shape)
    if len(shape) != len(view.stride):
        raise RefusedError("a tensor whose shape and stride disagree")
    last = view.offset + sum((n - 1) * s for n, s in zip(shape, view.stride, strict=True) if n)
    if count and (last >= len(raw) // width or count > len(raw) // width):
        raise RefusedError(f"a tensor of shape {shape} that is larger than its storage")
    expected, step = [], 1
    for n in reversed(shape):
        expected.append(step)
        step *= n
    rows = all(n == 1 or s == e for n, s, e in zip(shape, view.stride, expected[::-1], strict=True))
    if rows or not count:
        return raw[view.offset * width : (view.offset + count) * width]
    import numpy as np  # only where a tensor is stored in another order

    flat = np.frombuffer(raw, dtype=f"u{width}", offset=view.offset * width)
    strides = tuple(s * width for s in view.stride)
    return np.lib.stride_tricks.as_strided(flat, shape, strides).tobytes()


def open_archive(path: Path) -> tuple[Machine, Any, Callable[[Storage], bytes]]:
    """The unpickled value of a zip archive, and a function that reads the bytes of a storage."""
    archive = zipfile.ZipFile(path)
    members = {info.filename: info for info in archive.infolist()}
    if len(members) != len(archive.infolist()) or len(members) > MEMBERS:
        raise RefusedError("an archive with too many members, or two of one name")
    if any("/code/" in f"/{name}" or name.endswith("constants.pkl") for name in members):
        raise RefusedError("a TorchScript or exported program, which carries code; save its state dict")
    if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
        raise RefusedError("a compressed archive, which torch.save never writes")
    if sum(info.file_size for info in members.values()) > path.stat().st_size:
        raise RefusedError("an archive whose members are larger than itself")
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("data.pkl")]
    if len(roots) != 1:
        raise RefusedError("a zip archive without data.pkl: not written by torch.save")
    order = f"{roots[0]}byteorder"
    if order in members and archive.read(order).strip() != b"little":
        raise RefusedError("written on a big-endian machine")
    machine = Machine()
    with archive.open(f"{roots[0]}data.pkl") as file:
        value = machine.run(file)  # type: ignore[arg-type]
    return machine, value, lambda storage: archive.read(f"{roots[0]}data/{storage.key}")


def open_old(path: Path) -> tuple[Machine, Any, Callable[[Storage], bytes]]:
    """`open_archive` for a file of PyTorch before 1.6: consecutive pickles, then the raw storages."""
    machine = Machine(old={"the file format of PyTorch before 1.6"})
    offsets: dict[str, int] = {}
    with path.open("rb") as file:
        if machine.run(file) != MAGIC:
            raise RefusedError("a bare pickle: not written by torch.save")
        for _ in ("protocol", "system"):
            Machine().run(file)
        value = machine.run(file)
        keys = Machine().run(file)
        if not isinstance(keys, list) or set(map(str, keys)) != machine.storages.keys():
            raise RefusedError("a list of storages that is not that of its tensors")
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            offsets[key] = file.tell()
            file.seek(count_of(count) * machine.storages[key].width, 1)

    def read(storage: Storage) -> bytes:
        with path.open("rb") as file:
            file.seek(offsets[storage.key])
            return file.read(storage.count * storage.width)

    return machine, value, read


def write(views: dict[str, View], read: Callable[[Storage], bytes], out: BinaryIO) -> None:
    """Write a safetensors file, one storage in memory at a time."""
    head: dict[str, Any] = {}
    end = 0
    for name, view in views.items():
        start, end = end, end + math.prod(view.shape) * view.storage.width
        head[name] = {"dtype": view.storage.dtype, "shape": list(view.shape), "data_offsets": [start, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    storage: tuple[str, bytes] = ("", b"")
    for view in views.values():
        if storage[0] != view.storage.key:
            storage = (view.storage.key, read(view.storage))
        out.write(content(view, storage[1]))


def convert(path: Path, out: Path) -> dict[str, list[str]]:
    """Write the tensors of `path` to `out`.

    Returns:
        `names` of the tensors, and `old`: what only files of old programs have.
    """
    try:
        machine, value, read = open_archive(path) if zipfile.is_zipfile(path) else open_old(path)
        found = list(tensors(value))
        views = dict(found)
        if len(views) != len(found):
            raise RefusedError("two tensors of one name")
        if not views:
            raise RefusedError("no tensor below text keys: not a state dict")
        limit = path.stat().st_size
        if any(math.prod(v.shape) * v.storage.width > limit for v in views.values()):
            raise RefusedError("a tensor that is larger than the file")
        with out.open("wb") as file:
            write(views, read, file)
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise  # of the disk that is written to, not of the file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RefusedError(f"damaged or cut short ({reason[:REASON]})") from None
    return {"names": list(views), "old": sorted(machine.old)}


def main() -> None:
    """Set the limits, read the file, print the answer."""
    path, out, memory, seconds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * path.stat().st_size + 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        answer: dict[str, Any] = dict(convert(path, out))
    except RefusedError as error:
        answer = {"refused": str(error)}
    except MemoryError:
        answer = {"refused": f"needs more than {memory / 2**30:.1f} GiB of memory to read"}
    except RecursionError:
        answer = {"refused": "nested too deep"}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
