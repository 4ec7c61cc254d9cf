"""The keys of a record and what each means, read from the record itself: for templates and the reference."""

from __future__ import annotations

import inspect
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from robustbench_vlm.cards.card import Card

COMMON = {
    "name": "what the card is called; its file is NAME.toml, and commands take the name",
    "title": "one line that `vlmrob list` prints",
    "version": "raised whenever the meaning of the card changes",
    "notes": "sentences for readers of the card",
}
"""Meanings of keys that most cards share, where a docstring says nothing else."""

ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*): (?P<text>.*)")


@dataclass(frozen=True)
class Field:
    """One key of a record.

    Attributes:
        key: its name in the TOML file.
        type_text: its type in words, for example `text`, `list of text`, `one of "native", "model"`.
        required: whether a card without it is refused.
        default: value of a card without it; `None` when it is required.
        meaning: sentence of the record's docstring; empty if the docstring has none.
        record: the record of a nested table, or of the entries of a list of tables.
    """

    key: str
    type_text: str
    required: bool
    default: Any
    meaning: str
    record: type[BaseModel] | None


def fields(record: type[BaseModel]) -> list[Field]:
    """Every key of a record, in the order in which the record states them."""
    meanings = (COMMON if issubclass(record, Card) else {}) | attributes(record)
    listed = []
    for key, info in record.model_fields.items():
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        nested = nested_record(info.annotation)
        listed.append(
            Field(key, describe_type(info), info.is_required(), default, meanings.get(key, ""), nested)
        )
    return listed


def attributes(record: type) -> dict[str, str]:
    """The attributes that the docstrings of a class and its base classes describe: name -> sentence."""
    found: dict[str, str] = {}
    for base in reversed(record.__mro__):
        found |= described(base.__dict__.get("__doc__") or "")
    return found


def described(docstring: str) -> dict[str, str]:
    """The `Attributes:` section of a docstring: name -> sentence."""
    _, _, section = inspect.cleandoc(docstring).partition("Attributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.split("\n"):
        if line and not line.startswith("    "):
            break
        entry = ENTRY.fullmatch(line.strip())
        if entry and not line.startswith("     "):
            names = entry["names"].split(", ")
            found |= dict.fromkeys(names, entry["text"])
        else:
            found |= {name: f"{found[name]} {line.strip()}".rstrip() for name in names}
    return found


def nested_record(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401 - any annotation
    """The record inside an annotation such as `Inner | None` or `tuple[Stage, ...]`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (nested_record(part) for part in get_args(annotation) if part is not ...)
    return next((record for record in found if record is not None), None)


def describe_type(info: FieldInfo) -> str:
    """The type of a key in words, with the bounds that it states."""
    bounds = [
        f"{words} {value}"
        for constraint in info.metadata
        for name, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
        if (value := getattr(constraint, name, None)) is not None
    ]
    return ", ".join([words(info.annotation), *bounds])


def words(annotation: Any) -> str:  # noqa: ANN401 - any annotation
    """A type as a person who writes TOML would name it."""
    plain = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}
    if annotation in plain:
        return plain[annotation]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(f'"{value}"' for value in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words(part) for part in parts if part is not type(None))
    if origin is typing.Annotated:
        return words(parts[0])
    if origin in (tuple, list):
        return f"list of {_plural(words(parts[0]))}"
    if origin is dict:
        return f"table of {_plural(words(parts[1]))} by name"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"table {annotation.__name__}"
    return str(annotation)


def _plural(words: str) -> str:
    return {"whole number": "whole numbers", "number": "numbers"}.get(
        words, words.replace("table ", "tables ")
    )
