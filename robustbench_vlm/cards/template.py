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
        for key_field in known:
            value = values[key_field.key] if key_field.required else values.get(key_field.key)
            if key_field.record is not None:
                tables += self._nested(key_field, value, path, active=active)
            elif isinstance(value, Mapping) and key_field.type_text.startswith("table of anything"):
                tables += [
                    "",
                    *_comment(_meaning(key_field)),
                    f"[{path}{key_field.key}]",
                    *self._extra(value),
                ]
            else:
                plain += ["", *_comment(_meaning(key_field)), _line(key_field, value, active=active)]
        listed = {key_field.key for key_field in known}
        plain += self._extra({key: value for key, value in values.items() if key not in listed})
        return plain + tables

    def _extra(self, values: Mapping[str, Any]) -> list[str]:
        lines = []
        for key, value in values.items():
            meaning = self.meanings.get(key)
            lines += [*(["", *_comment(_sentence(meaning))] if meaning else []), f"{key} = {toml(value)}"]
        return lines

    def _nested(self, key_field: Field, value: Any, path: str, *, active: bool) -> list[str]:  # noqa: ANN401 - TOML
        assert key_field.record is not None
        active = active and value is not None
        many = isinstance(value, list | tuple)
        lines = ["", *_comment(_meaning(key_field))]
        for item in value if many else [value or _types(key_field.record)]:
            head = f"[[{path}{key_field.key}]]" if many else f"[{path}{key_field.key}]"
            lines.append(head if active else f"# {head}")
            lines += self._table(key_field.record, item, f"{path}{key_field.key}.", active=active)
        return lines


def _types(record: type[BaseModel]) -> dict[str, Any]:
    """What stands for the required keys of a table that is left out: their types."""
    return {key_field.key: f"<{key_field.type_text}>" for key_field in fields(record) if key_field.required}


def _meaning(key_field: Field) -> str:
    need = "required" if key_field.required else "optional"
    return f"{_sentence(key_field.meaning)} ({key_field.type_text}; {need})".strip()


def _sentence(text: str) -> str:
    """The text as the beginning of a comment."""
    return f"{text[:1].upper()}{text[1:]}".rstrip(".")


def _line(key_field: Field, value: Any, *, active: bool) -> str:  # noqa: ANN401 - any TOML value
    if value is not None and active:
        return f"{key_field.key} = {toml(value)}"
    return f"# {key_field.key} = {toml(key_field.default if value is None else value)}"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH)]


def toml(value: Any) -> str:  # noqa: ANN401 - any TOML value
    """A value as TOML writes it on one line."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping):
        items = ", ".join(f"{key} = {toml(item)}" for key, item in value.items())
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)
