"""What makes results comparable: attack, threat, drawn images, engine and precision, in one record.

Every test of comparability is made from `Contest`: which results are paired, which share a table and a mean,
how rows are sorted, and what stands above a table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from robustbench_vlm.threat import Norm, Threat, eps_text

OTHER_COLUMN = {"attack_sha256": "attack_config_sha256", "ladder": "eps_ladder"}
"""Fields of a contest whose column in the leaderboard has another name."""

NO_COLUMN = {"subset"}  # every row of a suite has the suite's own
TITLE = ("protocol", "norm", "eps", "attack", "n_requested")
"""Columns that every table title names; the others are named where a title alone would be ambiguous."""


@dataclass(frozen=True, order=True)
class Contest:
    """Two results can be compared when their contests are equal and they are on the same dataset.

    Attributes:
        attack: name of the chain.
        attack_sha256: fingerprint of the chain.
        norm: of the ball.
        eps: radius, exact.
        ladder: the radii that were attacked in ascending order, `eps` being the last of them. An image that
            is broken at a smaller radius counts as broken at the larger ones, so results of different ladders
            are not comparable.
        n_requested: images asked for of every dataset; 0 means all.
        seed: of the subset and of the attack's noise.
        split: of the datasets.
        engine: what ran the attack, with its version.
        precision: of the model as the attack saw it.
        protocol: name and version of the evaluation protocol; empty without one.
        subset: fingerprint of the suite's list of images; empty without one.
        stop_rule: the rule that ended the evaluation before all images, as `StopRule.text` writes it; empty
            for a number of images that was fixed before.
    """

    attack: str
    attack_sha256: str
    norm: Norm
    eps: Fraction
    ladder: tuple[Fraction, ...]
    n_requested: int
    seed: int
    split: str
    engine: str
    precision: str
    protocol: str = ""
    subset: str = ""
    stop_rule: str = ""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Contest:
        """The contest of a result, from its configuration; radii may be spelled in any way that was used."""
        return cls(
            attack=config["attack"],
            attack_sha256=config["attack_sha256"],
            norm=config["norm"],
            eps=Fraction(config["eps"]),
            ladder=tuple(Fraction(eps) for eps in config["eps_ladder"]),
            n_requested=config["n_requested"],
            seed=config["seed"],
            split=config["split"],
            engine=config["engine"],
            precision=config["precision"],
            protocol=config.get("protocol", ""),
            subset=config.get("subset", ""),
            stop_rule=config.get("stop_rule", ""),
        )

    @property
    def threat(self) -> Threat:
        """The ball."""
        return Threat(self.norm, self.eps)

    @property
    def radii(self) -> list[str]:
        """The ladder as text."""
        return [eps_text(self.norm, eps) for eps in self.ladder]

    @property
    def columns(self) -> dict[str, Any]:
        """The contest in the columns `COLUMNS` of a leaderboard row."""
        spelled = {"eps": eps_text(self.norm, self.eps), "ladder": " ".join(self.radii)}
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | spelled
        return {column(name): value for name, value in values.items() if name not in NO_COLUMN}

    @property
    def position(self) -> tuple[Any, ...]:
        """Sort key: in which order the contests of a leaderboard follow each other."""
        shown = (self.protocol, self.norm, self.attack, self.eps, self.n_requested)
        return (*shown, self.engine, self.precision, self.stop_rule)

    @property
    def title(self) -> str:
        """One line for people: chain, threat, smaller radii of the ladder, number of images, protocol."""
        after = f" after {', '.join(self.radii[:-1])}" if len(self.ladder) > 1 else ""
        protocol = f" protocol={self.protocol}" if self.protocol else ""
        stop = f" stopped by {self.stop_rule}" if self.stop_rule else ""
        return f"{self.attack} {self.threat}{after} n={self.n_requested or 'all'}{protocol}{stop}"

    @property
    def without_attack(self) -> Contest:
        """The contest with chain and ladder left open: equal for all chains that met the same images."""
        return dataclasses.replace(self, attack="", attack_sha256="", ladder=())


def column(field: str) -> str:
    """The leaderboard column of a field of `Contest`."""
    return OTHER_COLUMN.get(field, field)


COLUMNS = tuple(column(f.name) for f in dataclasses.fields(Contest) if f.name not in NO_COLUMN)
"""Columns of the leaderboard that are made from a contest."""


def table_title(columns: Mapping[str, Any], n: str, *, ambiguous: bool) -> str:
    """What stands above a table of one contest.

    Args:
        columns: the contest as `Contest.columns` writes it.
        n: number of images of a dataset, as text.
        ambiguous: whether another table has the same values in `TITLE`, so that the chain's fingerprint and
            the ladder have to be named too.
    """
    sha, radii = columns["attack_config_sha256"], columns["eps_ladder"]
    remark = f" · chain {sha[:6]}, radii {radii}" if ambiguous else ""
    if not columns["engine"].startswith("native/") or columns["precision"] != "fp32":
        remark += f" · {columns['engine']}, {columns['precision']}"
    remark += f" · protocol {columns['protocol']}" if columns["protocol"] else ""
    remark += f" · stopped by {columns['stop_rule']}" if columns["stop_rule"] else ""
    return f"{columns['attack']} · {columns['norm']} {columns['eps']} · n = {n}{remark}"
