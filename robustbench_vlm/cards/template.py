"""Write a card to start from: every key of a record with its meaning, and values that work."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from robustbench_vlm.cards.fields import Field, fields

WIDTH = 100  # columns of a comment


@dataclass(frozen=True)
class Template:
    """A card to start from.

    Attributes:
        record: what the card will be read into.
        values: at least its required keys; nested mappings for nested tables, lists of them for lists of
            tables. Keys that are not of the record (the fields of an attack or a defense) are written out.
        meanings: sentences about such keys, by key.
    """

    record: type[BaseModel]
    values: Mapping[str, Any]
    meanings: Mapping[str, str] = field(default_factory=dict)

    def render(self, heading: str) -> str:
        """The card as TOML: keys with a value, and the others in comments with their defaults.

        Raises:
            KeyError: a required key has no value.
        """
        lines = [*_comment(heading), *self._table(self.record, self.values, "", active=True)]
        return "\n".join(lines).rstrip() + "\n"

    def _table(
        self, record: type[BaseModel], values: Mapping[str, Any], path: str, *, active: bool
    ) -> list[str]:
        """The lines of one table: its plain keys, then the tables inside it, as TOML wants them."""
        plain, tables = [], []
        known = fields(record)
        for one in known:
            value = values[one.key] if one.required else values.get(one.key)
            if one.record is not None:
                tables += self._nested(one, value, path, active=active)
            elif isinstance(value, Mapping) and one.type_text.startswith("table of anything"):
                tables += ["", *_comment(_meaning(one)), f"[{path}{one.key}]", *self._extra(value)]
            else:
                plain += ["", *_comment(_meaning(one)), _line(one, value, active=active)]
        listed = {one.key for one in known}
        plain += self._extra({key: value for key, value in values.items() if key not in listed})
        return plain + tables

    def _extra(self, values: Mapping[str, Any]) -> list[str]:
        lines = []
        for key, value in values.items():
            meaning = self.meanings.get(key)
            lines += [*(["", *_comment(_sentence(meaning))] if meaning else []), f"{key} = {toml(value)}"]
        return lines

    def _nested(self, one: Field, value: Any, path: str, *, active: bool) -> list[str]:  # noqa: ANN401 - TOML
        assert one.record is not None
        active = active and value is not None
        many = isinstance(value, list | tuple)
        lines = ["", *_comment(_meaning(one))]
        for entry in value if many else [value or _types(one.record)]:
            head = f"[[{path}{one.key}]]" if many else f"[{path}{one.key}]"
            lines.append(head if active else f"# {head}")
            lines += self._table(one.record, entry, f"{path}{one.key}.", active=active)
        return lines


def _types(record: type[BaseModel]) -> dict[str, Any]:
    """What stands for the required keys of a table that is left out: their types."""
    return {one.key: f"<{one.type_text}>" for one in fields(record) if one.required}


def _meaning(one: Field) -> str:
    need = "required" if one.required else "optional"
    return f"{_sentence(one.meaning)} ({one.type_text}; {need})".strip()


def _sentence(text: str) -> str:
    """The text as the beginning of a comment."""
    return f"{text[:1].upper()}{text[1:]}".rstrip(".")


def _line(one: Field, value: Any, *, active: bool) -> str:  # noqa: ANN401 - any TOML value
    if value is not None and active:
        return f"{one.key} = {toml(value)}"
    return f"# {one.key} = {toml(one.default if value is None else value)}"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH)]


def toml(value: Any) -> str:  # noqa: ANN401 - any TOML value
    """A value as TOML writes it on one line."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping):
        entries = ", ".join(f"{key} = {toml(entry)}" for key, entry in value.items())
        return f"{{ {entries} }}" if entries else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(entry) for entry in value) + "]"
    return json.dumps(value, ensure_ascii=False)
