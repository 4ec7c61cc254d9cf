"""What an examination of a model found, as a record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["pass", "warn", "fail"]

SEVERITY: dict[Level, int] = {"pass": 0, "warn": 1, "fail": 2}


@dataclass(frozen=True)
class Check:
    """The result of one examination.

    Attributes:
        name: never changes between versions; the name of a failed check is a flag of the result.
        level: `fail`: the robust accuracy does not mean what it claims; `warn`: it needs care.
        value: the measured number; None where it could not be measured.
        bound: the number with which the value is compared.
        sentence: what the value means.
    """

    name: str
    level: Level
    value: float | None
    bound: float
    sentence: str


@dataclass(frozen=True)
class Examined:
    """All checks of a model on one dataset, and the model calls that those before the attack made."""

    checks: tuple[Check, ...]
    forwards: int = 0
    gradients: int = 0

    @property
    def failed(self) -> list[str]:
        """Names of the failed checks."""
        return [check.name for check in self.checks if check.level == "fail"]

    @property
    def record(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)

    def joined(self, later: Iterable[Check]) -> Examined:
        """These checks and later ones; of two with one name the worse stands, the earlier one if equal."""
        found = {check.name: check for check in self.checks}
        for check in later:
            known = found.get(check.name)
            if known is None or SEVERITY[check.level] > SEVERITY[known.level]:
                found[check.name] = check
        return Examined(tuple(found.values()), self.forwards, self.gradients)


def check(name: str, level: Level, value: float | None, bound: float, sentence: str) -> Check:
    """A record with three digits, which are the same on every machine where the last bits are not."""
    return Check(
        name, level, None if value is None else float(f"{value:.3g}"), float(f"{bound:.3g}"), sentence
    )
