"""Tensors of a `torch.save` file, read as data: nothing named in the file is imported, built or called.

Run as a program of its own by `sandbox`, with limits on memory and time: it steps through the pickle with a
small stack machine that knows plain containers and the few names that stand for tensors, and writes what it
found as safetensors. It imports nothing of this package, and torch not at all.
"""

from __future__ import annotations

import json
import math
import pickletools
import resource
import signal
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

MEMBERS = 100_000  # files in one archive
STEPS = 20_000_000  # opcodes of one pickle
DEPTH = 8  # tables inside tables
NAME = 200  # characters of a name in an error
MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file written by PyTorch before 1.6

# name of a storage class in torch -> (dtype in safetensors, bytes of an element)
STORAGES = {
    "DoubleStorage": ("F64", 8),
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
TENSORS = {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
}
TABLES = {"collections.OrderedDict"}
# Met in old training checkpoints beside the tensors (a best accuracy, the options of a run): an empty token
# stands for them, and the file counts as old.
TOKENS = {
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
    "torch.Size",
    "torch.device",
}


class RefusedError(Exception):
    """Why the file is not read; one line."""


@dataclass(frozen=True)
class Name:
    """A global that the pickle names; never looked up."""

    text: str


@dataclass(frozen=True)
class Token:
    """What stands for an object that is no tensor and no plain value."""

    text: str


@dataclass(frozen=True)
class Storage:
    """Bytes that tensors are views of."""

    key: str
    dtype: str
    width: int
    count: int


@dataclass(frozen=True)
class View:
    """A tensor: where it lies in its storage; offset and stride in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


MARK = Token("mark")


@dataclass
class Machine:
    """The stack of one pickle, and what it met that only old files have."""

    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    old: set[str] = field(default_factory=set)
    storages: dict[str, Storage] = field(default_factory=dict)

    def run(self, file: BinaryIO) -> Any:  # noqa: ANN401 - whatever was pickled
        """The value of the pickle that starts here."""
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
                if count > STEPS:
                    raise RefusedError(f"more than {STEPS} steps in its pickle")
                if opcode.name == "STOP":
                    return self.stack.pop()
                if opcode.name in PUSHES:
                    self.stack.append(argument)
                elif (act := ACTS.get(opcode.name)) is not None:
                    act(self, argument)
                else:
                    raise RefusedError(f"pickle opcode {opcode.name}, which no tensor needs")
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RefusedError(f"a damaged pickle ({reason[:NAME]})") from None
        raise RefusedError("a pickle without an end")

    def since_mark(self) -> list[Any]:
        """Everything above the last mark, which is removed."""
        at = len(self.stack) - 1
        while self.stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def pair(self, key: Any, value: Any) -> None:  # noqa: ANN401 - any plain value
        """Enter a key into the table on top."""
        if not isinstance(key, str | int | float | bytes | bool | None):
            raise RefusedError("a table whose keys are no plain values")
        top = self.stack[-1]
        if not isinstance(top, dict):
            raise RefusedError("entries of something that is no plain table")
        top[key] = value


def _name(machine: Machine, text: str) -> None:
    module, _, last = text.partition(" ")
    full = f"{module}.{last}".replace("__builtin__.", "builtins.")
    if full in TOKENS:
        machine.old.add(full)
    elif full not in TENSORS | TABLES and (module != "torch" or last not in STORAGES):
        raise RefusedError(f"asks for {full[:NAME]!r}, which is neither a tensor nor a plain container")
    machine.stack.append(Name(full))


def _stack_name(machine: Machine, _: object) -> None:
    last, module = machine.stack.pop(), machine.stack.pop()
    if not isinstance(last, str) or not isinstance(module, str):
        raise RefusedError("a name that is no text")
    _name(machine, f"{module} {last}")


def _reduce(machine: Machine, _: object) -> None:
    given, function = machine.stack.pop(), machine.stack.pop()
    if not isinstance(function, Name) or not isinstance(given, tuple):
        raise RefusedError("a call of something that is no name")
    machine.stack.append(_made(function.text, given))


def _made(function: str, given: tuple[Any, ...]) -> Any:  # noqa: ANN401 - a view, a table or a token
    if function in TABLES:
        if given not in ((), ([],)):
            raise RefusedError("a table with entries of an unknown form")
        return {}
    if function in TOKENS:
        return Token(function)
    if function == "torch._utils._rebuild_parameter":
        if not given or not isinstance(given[0], View):
            raise RefusedError("a parameter that is no tensor")
        return given[0]
    if function not in TENSORS:
        raise RefusedError(f"a call of {function}")
    storage, offset, shape, stride = given[:4]
    if not isinstance(storage, Storage):
        raise RefusedError("a tensor without a storage")
    return View(storage, _count(offset), tuple(map(_count, shape)), tuple(map(_count, stride)))


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**60:
        raise RefusedError("a tensor whose place or shape is no count")
    return value


def _persistent(machine: Machine, _: object) -> None:
    kind, cls, key, _, count = machine.stack.pop()[:5]
    text = cls.text.removeprefix("torch.") if isinstance(cls, Name) else ""
    if kind != "storage" or text not in STORAGES or not isinstance(key, str):
        raise RefusedError("a storage of an unknown kind")
    storage = Storage(key, *STORAGES[text], _count(count))
    if machine.storages.setdefault(key, storage) != storage:
        raise RefusedError("one storage of two kinds")
    machine.stack.append(storage)


def _build(machine: Machine, _: object) -> None:
    machine.stack.pop()  # attributes (the metadata of a state dict): nothing here has any
    if not isinstance(machine.stack[-1], dict | Token):
        raise RefusedError("attributes of something that has none")


def _new(machine: Machine, _: object) -> None:
    machine.stack.pop()
    made = machine.stack.pop()
    if not isinstance(made, Name) or made.text not in TOKENS | TABLES:
        raise RefusedError("an object of a class that is no plain container")
    machine.stack.append({} if made.text in TABLES else Token(made.text))


def _tuple(n: int) -> Callable[[Machine, object], None]:
    def act(machine: Machine, _: object) -> None:
        items = tuple(machine.stack[len(machine.stack) - n :])
        if len(items) != n or MARK in items:
            raise ValueError("too few values")
        del machine.stack[len(machine.stack) - n :]
        machine.stack.append(items)

    return act


def _set_items(machine: Machine, _: object) -> None:
    items = machine.since_mark()
    for key, value in zip(items[::2], items[1::2], strict=True):
        machine.pair(key, value)


def _set_item(machine: Machine, _: object) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.pair(key, value)


def _dict(machine: Machine, _: object) -> None:
    items = machine.since_mark()
    machine.stack.append({})
    for key, value in zip(items[::2], items[1::2], strict=True):
        machine.pair(key, value)


def _extend(machine: Machine, items: list[Any]) -> None:
    if not isinstance(machine.stack[-1], list):
        raise RefusedError("entries of something that is no plain list")
    machine.stack[-1].extend(items)


def _append(machine: Machine, _: object) -> None:
    item = machine.stack.pop()
    _extend(machine, [item])


def _put(machine: Machine, at: Any) -> None:  # noqa: ANN401 - an index, or None for the next one
    machine.memo[len(machine.memo) if at is None else int(at)] = machine.stack[-1]


PUSHES = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
ACTS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda _m, _a: None,
    "FRAME": lambda _m, _a: None,
    "MARK": lambda m, _: m.stack.append(MARK),
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "POP": lambda m, _: m.stack.pop() and None,
    "POP_MARK": lambda m, _: m.since_mark().clear(),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "EMPTY_SET": lambda m, _: m.stack.append([]),  # read as a list: no tensor lies in a set
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "LIST": lambda m, _: m.stack.append(m.since_mark()),
    "DICT": _dict,
    "APPEND": _append,
    "APPENDS": lambda m, _: _extend(m, m.since_mark()),
    "ADDITEMS": lambda m, _: _extend(m, m.since_mark()),
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": _put,
    "GET": lambda m, at: m.stack.append(m.memo[int(at)]),
    "BINGET": lambda m, at: m.stack.append(m.memo[at]),
    "LONG_BINGET": lambda m, at: m.stack.append(m.memo[at]),
    "GLOBAL": _name,
    "STACK_GLOBAL": _stack_name,
    "REDUCE": _reduce,
    "NEWOBJ": _new,
    "BUILD": _build,
    "BINPERSID": _persistent,
}


def tensors(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, View]]:  # noqa: ANN401 - unpickled
    """(dotted name, tensor) of every tensor that lies below text keys only.

    The state of an optimizer, whose keys are numbers, is no weight and stays out.
    """
    if isinstance(value, View):
        yield path, value
    elif isinstance(value, dict):
        if depth > DEPTH:
            raise RefusedError(f"tables more than {DEPTH} deep")
        for key, inner in value.items():
            if isinstance(key, str):
                yield from tensors(inner, f"{path}.{key}" if path else key, depth + 1)


def content(view: View, raw: bytes) -> bytes:
    """The bytes of a tensor in row order, cut out of its storage."""
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
    """The pickle of a zip archive, and how the bytes of a storage are had."""
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
    """The same of a file of PyTorch before 1.6: pickles one after another, then the raw storages."""
    machine = Machine(old={"the file format of PyTorch before 1.6"})
    places: dict[str, int] = {}
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
            places[key] = file.tell()
            file.seek(_count(count) * machine.storages[key].width, 1)

    def read(storage: Storage) -> bytes:
        with path.open("rb") as file:
            file.seek(places[storage.key])
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
    held: tuple[str, bytes] = ("", b"")
    for view in views.values():
        if held[0] != view.storage.key:
            held = (view.storage.key, read(view.storage))
        out.write(content(view, held[1]))


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
    except (zipfile.BadZipFile, EOFError, KeyError, struct.error, NotImplementedError, RuntimeError) as error:
        raise RefusedError(f"damaged or cut short ({str(error).splitlines()[0][:NAME]})") from None
    return {"names": list(views), "old": sorted(machine.old)}


def main() -> None:
    """`pickled.py FILE OUT MEMORY SECONDS`: bytes of memory and seconds of processor; JSON on stdout."""
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
