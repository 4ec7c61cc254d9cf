"""Base classes of the records that are read from TOML."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializationInfo, SerializerFunctionWrapHandler, model_serializer

PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
"""Names that can be part of a path."""


class Card(BaseModel):
    """Base of every record read from TOML: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Grown(Card):
    """A record that got fields after results had been made with it.

    Fields named in `later` are left out of `model_dump` while they have their default, so that fingerprints
    taken before those fields existed stay equal. `model_dump(context={"all": True})` has every field.
    """

    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _known_then(self, write: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        table: dict[str, Any] = write(self)
        if (info.context or {}).get("all"):
            return table
        known = type(self).model_fields
        usual = {name: known[name].get_default(call_default_factory=True) for name in self.later}
        usual = {n: v.model_dump(mode="json") if isinstance(v, BaseModel) else v for n, v in usual.items()}
        return {key: value for key, value in table.items() if key not in usual or value != usual[key]}
