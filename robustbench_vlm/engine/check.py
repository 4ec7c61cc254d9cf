"""What a check of a model found, and the findings of all checks together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["pass", "warn", "fail"]

SEVERITY: dict[Level, int] = {"pass": 0, "warn": 1, "fail": 2}


@dataclass(frozen=True)
class Check:
    """The finding of one check.

    Attributes:
        name: never changes; a failed check stands by this name among the flags of a result.
        level: `fail`, the robust accuracy does not mean what it says; `warn`, it has to be read with care.
        value: the measured number; None where nothing could be measured.
        bound: the value above which the check fails or warns.
        sentence: what was found.
    """

    name: str
    level: Level
    value: float | None
    bound: float
    sentence: str


def check(name: str, level: Level, value: float | None, bound: float, sentence: str) -> Check:
    """A check whose numbers have three digits, which are the same on every machine; later ones are not."""
    short = None if value is None else float(f"{value:.3g}")
    return Check(name, level, short, float(f"{bound:.3g}"), sentence)


@dataclass(frozen=True)
class Examined:
    """The findings about one model on one data set, and the model calls that those before the attack took."""

    checks: tuple[Check, ...]
    forwards: int = 0
    gradients: int = 0

    @property
    def failed(self) -> list[str]:
        """Names of the failed checks."""
        return [check.name for check in self.checks if check.level == "fail"]

    @property
    def record(self) -> dict[str, Any]:
        """The findings as plain values."""
        return asdict(self)

    def joined(self, later: Iterable[Check]) -> Examined:
        """These findings and later ones; of two with one name the worse stands, the earlier one if equal."""
        found = {check.name: check for check in self.checks}
        for check in later:
            known = found.get(check.name)
            if known is None or SEVERITY[check.level] > SEVERITY[known.level]:
                found[check.name] = check
        return Examined(tuple(found.values()), self.forwards, self.gradients)
