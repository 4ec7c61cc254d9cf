"""What every record that is read from TOML has in common."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializationInfo, SerializerFunctionWrapHandler, model_serializer

PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
"""A name that can become part of a path."""


class Card(BaseModel):
    """Base of every record read from TOML: frozen, and no key goes unread."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Grown(Card):
    """A record that got fields after runs had been made with it.

    At their defaults they are left out when it is written, so the fingerprint of an old run stands; written
    with `context={"all": True}`, it is whole.
    """

    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _known_then(self, write: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        table: dict[str, Any] = write(self)
        if (info.context or {}).get("all"):
            return table
        usual = {name: type(self).model_fields[name].default for name in self.later}
        usual = {n: v.model_dump(mode="json") if isinstance(v, BaseModel) else v for n, v in usual.items()}
        return {key: value for key, value in table.items() if key not in usual or value != usual[key]}
