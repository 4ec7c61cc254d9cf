"""The pickle of a `torch.save` file, read as data: nothing that it names is imported, built or called.

A small stack machine that knows plain containers and the few names that stand for tensors; it needs no torch.
"""

from __future__ import annotations

import pickletools
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

STEPS = 20_000_000  # opcodes of one pickle
DEPTH = 8  # tables inside tables
NAME = 200  # characters of a name in an error
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, struct.error)

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
    """The reason why a file is not read, in one line."""


@dataclass(frozen=True)
class Name:
    """A global that the pickle names; never looked up."""

    text: str


@dataclass(frozen=True)
class Token:
    """A stand-in for an object that is no tensor and no plain value."""

    text: str


@dataclass(frozen=True)
class Storage:
    """A block of bytes that tensors are views of."""

    key: str
    dtype: str
    width: int
    count: int


@dataclass(frozen=True)
class View:
    """A tensor as a view of its storage; offset and stride in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


MARK = Token("mark")


@dataclass
class Machine:
    """The state of a stack machine that reads one pickle; `old` lists features of old files."""

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
                if PUSHES.fullmatch(opcode.name):
                    self.stack.append(argument)
                elif (make := CONSTANTS.get(opcode.name)) is not None:
                    self.stack.append(make())
                elif (act := ACTS.get(opcode.name)) is not None:
                    act(self, argument)
                else:
                    raise RefusedError(f"pickle opcode {opcode.name}, which no tensor needs")
        except DAMAGE as error:
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
    return View(storage, count_of(offset), tuple(map(count_of, shape)), tuple(map(count_of, stride)))


def count_of(value: object) -> int:
    """A count of elements; refused if it is none."""
    if type(value) is not int or not 0 <= value < 2**60:
        raise RefusedError("a tensor whose offset or shape is no count")
    return value


def _persistent(machine: Machine, _: object) -> None:
    kind, cls, key, _, count = machine.stack.pop()[:5]
    text = cls.text.removeprefix("torch.") if isinstance(cls, Name) else ""
    if kind != "storage" or text not in STORAGES or not isinstance(key, str):
        raise RefusedError("a storage of an unknown kind")
    storage = Storage(key, *STORAGES[text], count_of(count))
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


def _set_items(machine: Machine, items: list[Any], fresh: bool = False) -> None:
    if fresh:
        machine.stack.append({})
    top = machine.stack[-1]
    if not isinstance(top, dict):
        raise RefusedError("entries of something that is no plain table")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | bytes | bool | None):
            raise RefusedError("a table whose keys are no plain values")
        top[key] = value


def _extend(machine: Machine, items: list[Any]) -> None:
    if not isinstance(machine.stack[-1], list):
        raise RefusedError("entries of something that is no plain list")
    machine.stack[-1].extend(items)


def _put(machine: Machine, at: Any) -> None:  # noqa: ANN401 - an index, or None for the next one
    machine.memo[len(machine.memo) if at is None else int(at)] = machine.stack[-1]


PUSHES = re.compile(
    r"BININT[12]?|INT|LONG[14]?|(BIN)?FLOAT|STRING|(SHORT_)?BINSTRING|(SHORT_)?BINBYTES8?|UNICODE|"
    r"(SHORT_)?BINUNICODE8?"
)
CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": lambda: MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,  # read as a list: no tensor lies in a set
}
ACTS: dict[str, Callable[[Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda _m, _a: None),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, at: m.stack.append(m.memo[int(at)])),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda m, _: _extend(m, m.since_mark())),
    **{f"TUPLE{n}": _tuple(n) for n in (1, 2, 3)},
    "POP": lambda m, _: m.stack.pop() and None,
    "POP_MARK": lambda m, _: m.since_mark().clear(),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "LIST": lambda m, _: m.stack.append(m.since_mark()),
    "DICT": lambda m, _: _set_items(m, m.since_mark(), fresh=True),
    "APPEND": lambda m, _: _extend(m, [m.stack.pop()]),
    "SETITEM": lambda m, _: _set_items(m, [m.stack.pop(), m.stack.pop()][::-1]),
    "SETITEMS": lambda m, _: _set_items(m, m.since_mark()),
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
