"""A table into a strict record: whatever does not fit is one line with the key and what is expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from robustbench_vlm.cards.card import Card
from robustbench_vlm.cards.fields import fields, nested_record
from robustbench_vlm.errors import CardError, nearest

C = TypeVar("C", bound=Card)


def parse(table: Mapping[str, Any], record: type[C], where: str) -> C:
    """A strict record from a table.

    Raises:
        CardError: an unknown or missing key or a value of the wrong kind; the message names `where`, the key,
            what was found and what is expected.
    """
    try:
        return record.model_validate(table)
    except ValidationError as error:
        unknown = [e for e in error.errors() if e["type"] == "extra_forbidden"]
        first = (unknown or error.errors())[0]  # a mistyped key is missing under its right name, too
        missing = [e for e in error.errors() if e["type"] == first["type"] == "missing"]
        keys = [_one_line(".".join(str(part) for part in e["loc"])) for e in missing or [first]]
        key, inner = f"{', '.join(keys):.400}", _record_at(record, first["loc"][:-1])
        if unknown:
            do = nearest(str(first["loc"][-1]), inner.model_fields)
            raise CardError(where, f"unknown key {key!r:.80}", do=do) from None
        if missing:
            last, alone = first["loc"][-1], len(missing) == 1
            facts = next((one for one in fields(inner) if alone and one.key == last), None)
            expected = f"{facts.type_text}: {facts.meaning}".rstrip(".") if facts else "all of them"
            do = "vlmrob new KIND NAME writes a card with every key"
            raise CardError(where, f"no key {key}", expected, do) from None
        raise wrong_value(error, where) from None


def wrong_value(error: ValidationError, where: str) -> CardError:
    """The first finding of pydantic about a value, as `where: key = value; expected ...`."""
    first = error.errors()[0]
    key = _one_line(".".join(str(part) for part in first["loc"]))
    message = _one_line(first["msg"]).removeprefix("Value error, ")
    if not key or not message.startswith("Input should be "):
        return CardError(where, f"{key}: {message}" if key else message)
    return CardError(where, f"{key} = {first['input']!r:.80}", message.removeprefix("Input should be "))


def _one_line(text: str) -> str:
    """The text as it is when it can be printed in a line, else quoted."""
    return f"{text:.400}" if text.isprintable() else f"{text!r:.200}"


def _record_at(record: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The record of the table at `path` inside `record`."""
    for part in path:
        field = record.model_fields.get(str(part))
        if field is not None:  # otherwise an index into a list of tables
            record = nested_record(field.annotation) or record
    return record
