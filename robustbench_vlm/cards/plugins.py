"""Attacks and defenses by name: `get("defenses", "mmt-ard")` is `plugin` in `defenses/mmt_ard.py`.

The folder is the registry: every module in it that defines `plugin` is found. A plug-in is a frozen
dataclass whose fields are its configuration. Other packages add theirs by entry points of the groups
`robustbench_vlm.defenses` and `robustbench_vlm.attacks`; a class that is not registered is named
`module:Name`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from robustbench_vlm.cards.strict import wrong_value
from robustbench_vlm.errors import CardError, InputError, nearest
from robustbench_vlm.store import file_sha256

_code_allowed = False  # state of the process, set by `allow_code`


def allow_code(allowed: bool = True) -> None:
    """Let cards that are read from files name code as `module:Name`, for the rest of this process.

    A chain or recipe file that names code runs it as soon as the file is used, so allow it for files that you
    trust. A checkpoint's card never runs code, allowed or not. A name that is typed as an argument needs no
    permission. The option `--allow-code` of the command line does the same.

    A new process starts without it, so worker processes are handed `code_allowed()` and call this first.

    Args:
        allowed: whether files may name code from now on.

    Example:
        >>> from robustbench_vlm import allow_code
        >>> allow_code()
        >>> allow_code(False)  # as at the beginning
    """
    global _code_allowed
    _code_allowed = allowed


def code_allowed() -> bool:
    """Whether files may name code."""
    return _code_allowed


def require_allowed(name: str, where: str) -> None:
    """Refuse code that a file names, unless it was allowed; nothing is imported.

    Args:
        name: of a plug-in, as the file has it.
        where: the file and the key, for the message.

    Raises:
        CardError: the name is `module:Name`, and `allow_code` was not called.
    """
    if ":" in name and not _code_allowed:
        found = (
            f"it names {name!r:.80}, so Python would import {name.partition(':')[0]!r:.60} and run its code"
        )
        do = "type --allow-code (in Python: robustbench_vlm.allow_code()) if you trust that code"
        raise CardError(where, found, "a registered name", do)


def names(kind: str) -> list[str]:
    """Names of all plug-ins of a kind: files that assign `plugin`, and entry points; nothing is imported."""
    points = _points(kind)
    return sorted({*_own(kind), *(point.name for point in points)})


def titles(kind: str) -> dict[str, str]:
    """The first line of each plug-in's file by name; only entry points of other packages are imported."""
    own = _own(kind)
    return {name: own[name] if name in own else _title(get(kind, name)) for name in names(kind)}


@cache
def _points(kind: str) -> tuple[EntryPoint, ...]:
    """Entry points of a kind; finding them reads the metadata of every installed package."""
    return tuple(entry_points(group=f"robustbench_vlm.{kind}"))


@cache
def _own(kind: str) -> Mapping[str, str]:
    """Name and first docstring line of the package's files of a kind, read without running them."""
    found = {}
    folder = Path(__file__).parents[1] / kind
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/__init__.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.parent.name if path.stem == "__init__" else path.stem
        if any(_binds_plugin(node) for node in tree.body):
            found[name.replace("_", "-")] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def _binds_plugin(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return any((alias.asname or alias.name) == "plugin" for alias in node.names)
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]  # with or without a type
    return any(isinstance(target, ast.Name) and target.id == "plugin" for target in targets)


def _title(plugin: type) -> str:
    doc = inspect.getdoc(inspect.getmodule(plugin)) or inspect.getdoc(plugin) or ""
    return doc.partition("\n")[0]


def get(kind: str, name: str) -> type:
    """The plug-in class called `name`, or the one at `module:Name`.

    Raises:
        CardError: nothing of that name; the message gives the nearest and all known names. Or several of
            that name, or one of another package that cannot be imported.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), attribute)):
            expected = "module:Name of an importable class"
            raise CardError(f"{kind} {name!r:.80}", "not the name of a module and a class in it", expected)
        try:
            found: type = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise CardError(f"{kind} {name!r}", str(error), "module:Name of an importable class") from None
        return found
    one, known = kind.removesuffix("s"), names(kind)
    if name not in known:
        raise CardError(f"unknown {one} {name!r}", "no such plug-in", do=nearest(name, known))
    module_name = f"robustbench_vlm.{kind}.{name.replace('-', '_')}"
    points = [point for point in _points(kind) if point.name == name]
    origins = [*([module_name] if name in _own(kind) else []), *(point.value for point in points)]
    if len(origins) > 1:  # which of them a card means would depend on what is installed
        several, do = f"{len(origins)} plug-ins: {', '.join(origins)}", "uninstall, or rename, all but one"
        raise CardError(f"{one} {name!r}", several, "one of that name", do)
    if not points:
        own: type = importlib.import_module(module_name).plugin
        return own
    try:
        loaded: type = points[0].load()
    except Exception as error:  # whatever the code of another package raises
        why = f"{points[0].value} cannot be imported ({type(error).__name__}: {error!s:.120})"
        raise CardError(f"{one} {name!r}", why, do="mend or uninstall that package") from error
    return loaded


def code_sha256(plugin: type) -> str:
    """SHA-256 of the file that defines a plug-in, in hex; empty for plug-ins of this package.

    The package raises the version of its engine when one of its attacks changes. Code outside has no version,
    so its file is part of what a result or a training run is recognised by.
    """
    if plugin.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return ""
    return file_sha256(Path(inspect.getfile(plugin)))


def build(kind: str, name: str, fields: Mapping[str, Any], where: str) -> Any:  # noqa: ANN401 - the plug-in's type
    """The plug-in called `name` with its fields set, read as strictly as any card.

    Raises:
        CardError: unknown plug-in, unknown field, or a value of the wrong kind.
    """
    plugin = get(kind, name)
    if not dataclasses.is_dataclass(plugin):
        raise CardError(where, f"{name} is a {type(plugin).__name__}", "a frozen dataclass")
    known = [field.name for field in dataclasses.fields(plugin) if field.init]
    for key in fields:
        if key not in known:
            raise CardError(where, f"unknown key {key!r} for {name}", do=nearest(key, known))
    try:
        return TypeAdapter(plugin).validate_python(dict(fields))
    except ValidationError as error:
        raise wrong_value(error, f"{where}, {name}") from None
    except InputError as error:  # of the plug-in's own checks, which do not know the card
        raise CardError(where, str(error)) from None
