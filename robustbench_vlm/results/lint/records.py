"""Numbers that papers printed, one record a number, with what is known about how it was measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from functools import cache

from robustbench_vlm.results import published
from robustbench_vlm.results.lint import names, settings

NOT_STATED = {"", "not stated", "none"}
TRAINED_ON = re.compile(r"(\w+)-trained")


@dataclass(frozen=True)
class Record:
    """One printed number.

    Attributes:
        model: as `published.csv` names it.
        method: its name without architecture and brackets (`names.method`).
        arch: in the spelling of `names.architecture`; empty where it is not stated.
        dataset: a card's name, or the name of an average.
        field: `clean` or `robust`.
        value: percent, as printed.
        attack: as printed without brackets and steps; empty for a clean number or where it is not stated.
        steps: of PGD; empty where they are not stated.
        eps, norm: of the ball; empty for a clean number.
        split: empty where it is not stated.
        trained_on: empty where it is not stated.
        source: with everything that is noted about it.
        paper: the part of `source` that names the document.
        facts: how it was measured.
    """

    model: str
    method: str
    arch: str
    dataset: str
    field: str
    value: Decimal
    attack: str
    steps: str
    eps: str
    norm: str
    split: str
    trained_on: str
    source: str
    paper: str
    facts: settings.Facts

    @property
    def is_mean(self) -> bool:
        """Whether it is an average over datasets."""
        return self.dataset.startswith("avg") or self.dataset.endswith("average")

    @property
    def data(self) -> str:
        """The dataset without the list of its images: `imagenet` of `imagenet_rb5000_first1000`."""
        return self.dataset.partition("_rb5000")[0]

    @property
    def attacked_by(self) -> str:
        """Attack with its steps, or empty."""
        return f"{self.attack}{'-' + self.steps if self.steps else ''}"

    @property
    def shown(self) -> str:
        """Where the number is from, in words."""
        attack = f", {self.attacked_by} at {self.eps}" if self.attack else ""
        return f"{self.model}, {self.dataset} {self.field}{attack}: {self.source}"


@cache
def read() -> tuple[Record, ...]:
    """All printed numbers of `published.csv`."""
    found = []
    for row in published.read().to_dict("records"):
        for field in ("clean", "robust"):
            if row[field]:
                found.append(_record({str(key): str(value) for key, value in row.items()}, field))
    return tuple(dict.fromkeys(found))


def _record(row: dict[str, str], field: str) -> Record:
    robust = field == "robust"
    attack = re.sub(r"\([^)]*\)| step \S+| \d+it", "", row["attack"]).strip()
    trained = TRAINED_ON.search(row["model_id"])
    return Record(
        model=row["model_id"],
        method=names.method(row["model_id"]),
        arch=names.architecture(row["arch"]),
        dataset=row["dataset"],
        field=field,
        value=Decimal(row[field]),
        attack="" if not robust or attack in NOT_STATED else re.sub(r"^pgd-\d+$", "pgd", attack),
        steps=names.steps(attack) if robust else "",
        eps=row["eps"] if robust else "",
        norm=row["norm"] if robust else "",
        split=row["split"],
        trained_on=trained[1] if trained and names.method(row["model_id"]) != "clip" else "",
        source=row["source"],
        paper=paper(row["source"]),
        facts=settings.facts(row["source"], row["protocol"], row["dataset"], field),
    )


def paper(source: str) -> str:
    """The document that a source names, without tables and remarks.

    Example:
        >>> paper("arXiv:2410.21802 Table 6 (PGD average over eps 1,2,4), public transcription")
        'arXiv:2410.21802'
    """
    return re.split(r" \(| Tables? |[,;]", source)[0]
