"""Attacks and defenses by name: `get("defenses", "mmt-ard")` is `plugin` in `defenses/mmt_ard.py`.

The folder is the registry: every module in it that defines `plugin` is found. A plug-in is a frozen
dataclass whose fields are its configuration. Other packages add theirs by entry points of the groups
`robustbench_vlm.defenses` and `robustbench_vlm.attacks`; a class that is not registered is named
`module:Name`.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from robustbench_vlm.errors import CardError, nearest


def names(kind: str) -> list[str]:
    """Names of all plug-ins of a kind: files or folders with a line `plugin = ...`, and entry points.

    Their source is searched and nothing is imported, so that a mistyped name is answered without torch.
    """
    folder = Path(__file__).parents[1] / kind
    files = {path.stem: path for path in folder.glob("*.py")}
    files |= {path.parent.name: path for path in folder.glob("*/__init__.py")}
    own = [
        stem.replace("_", "-")
        for stem, path in files.items()
        if re.search(r"^plugin\b.*=", path.read_text("utf-8"), re.MULTILINE)
    ]
    return sorted({*own, *(point.name for point in entry_points(group=f"robustbench_vlm.{kind}"))})


def get(kind: str, name: str) -> type:
    """The plug-in class called `name`, or the one at `module:Name`.

    Raises:
        CardError: nothing of that name; the message gives the nearest and all known names.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            found: type = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise CardError(f"{kind} {name!r}", str(error), "module:Name of an importable class") from None
        return found
    for point in entry_points(group=f"robustbench_vlm.{kind}", name=name):
        loaded: type = point.load()
        return loaded
    known = names(kind)
    if name not in known:
        raise CardError(
            f"unknown {kind.removesuffix('s')} {name!r}", "no such plug-in", do=nearest(name, known)
        )
    module_name = f"robustbench_vlm.{kind}.{name.replace('-', '_')}"
    own: type = importlib.import_module(module_name).plugin
    return own


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
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CardError(where, f"{name}.{place}: {first['msg']} (found {first['input']!r:.80})") from None
