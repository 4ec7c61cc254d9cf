"""The full grid against the reference: full budgets, three models, two norms, three radii; hours of a core.

Every comparison is appended to `benchmarks/parity.jsonl` as soon as it is made, so a killed run goes on where
it was, and `benchmarks/parity.md` is written from what is there. Cheap and telling parts come first.
Exit code 1 if a promise is broken. Type `make parity-full`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compare
import page
import torch
from subjects import NAMES, Subject, radius, subject

from robustbench_vlm import store
from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.threat import Threat

REPOSITORY = Path(__file__).parents[2]
RECORDS = REPOSITORY / "benchmarks" / "parity.jsonl"
SHARES = (0.3, 0.6, 0.0)  # of images left by a short APGD: the radii
STEPS, TARGETS, QUERIES, SEEDS = 100, 9, 5000, (0, 1, 2)
N = 144
ROWS = 48  # of every model call
CLIP_SQUARE = 48  # images of the CLIP in Square alone: the reference takes 5000 calls for each 48 rows
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")


@dataclass(frozen=True)
class Unit:
    """One comparison; its name is the key of its record."""

    model: str
    norm: str
    share: float
    attack: str
    seed: int = -1

    @property
    def name(self) -> str:
        seed = f"/{self.seed}" if self.seed >= 0 else ""
        return f"{self.model}/{self.norm}/{self.share}/{self.attack}{seed}"


def units() -> Iterator[Unit]:
    """All comparisons, in the order in which they are made."""
    small = [name for name in NAMES if name != "clip"]
    short = ("apgd-ce", "apgd-t", "fab-t")
    first, *others = SHARES

    def cells(shares: Sequence[float]) -> list[tuple[str, str, float]]:
        return [(model, norm, share) for share in shares for norm in ("linf", "l2") for model in small]

    gradient, searches = ATTACKS[:3], ATTACKS[3:]
    yield from (Unit(*cell, attack) for cell in cells([first]) for attack in gradient)
    yield Unit("clip", "linf", first, "apgd-ce")
    yield from (Unit(*cell, attack) for attack in reversed(searches) for cell in cells([first]))
    yield from (Unit(*cell, attack) for cell in cells(others) for attack in gradient)
    yield Unit("clip", "linf", first, "apgd-t")
    yield from (Unit(*cell, "chain", seed) for cell in cells([first]) for seed in SEEDS)
    yield Unit("clip", "linf", first, "fab-t")
    yield from (Unit("clip", "l2", first, attack) for attack in short)
    yield from (Unit(*cell, attack) for cell in cells(others) for attack in searches)
    yield from (Unit("clip", "linf", first, "chain", seed) for seed in SEEDS)
    yield from (
        Unit("clip", n, share, attack) for share in others for n in ("linf", "l2") for attack in short
    )
    yield from (Unit("clip", norm, first, a) for norm in ("linf", "l2") for a in ("apgd-dlr", "square"))
    yield from (Unit(*cell, "chain", seed) for cell in cells(others) for seed in SEEDS)


def compared(unit: Unit, who: Subject, threat: Threat) -> dict[str, Any]:
    """The record of one comparison."""
    if unit.attack == "chain":
        return chained(who, threat, unit.seed)
    if unit.attack == "square":
        if unit.model == "clip":
            who = who.only(list(range(CLIP_SQUARE)))
        told, counted, ends = compare.square_fed(who, threat, QUERIES)
        return {**told.as_record(), "other queries": counted, "other ends": ends}
    if unit.attack == "fab-t":
        return compare.fab_t(who, threat, STEPS, TARGETS, stop="last").as_record()
    targets = TARGETS if unit.attack == "apgd-t" else 0
    loss = unit.attack.removeprefix("apgd-")
    told = compare.apgd(who, threat, loss, STEPS, targets)
    shipped = who.attack(Apgd("targeted-dlr" if targets else loss, STEPS, 0.75, 1, targets), threat)
    ends = [f.key for f, wrong in zip(shipped, told.broken, strict=True) if f.broken != wrong]
    return {**told.as_record(), "otherwise at the first success": ends}


def chained(who: Subject, threat: Threat, seed: int) -> dict[str, Any]:
    """Both chains with seeds of their own: what broke each image, and flips with their boundary."""
    found = compare.ours_chain(who, threat, "autoattack", STEPS, QUERIES, seed)
    adv, by = compare.their_chain(who, threat, "autoattack", STEPS, QUERIES, seed)
    told = compare.outcome(who, found, adv, images=False).as_record()
    told["ours by"] = [f.stage if f.broken else "" for f in found]
    told["theirs by"] = by
    for flip in told["flips"]:
        index = who.keys.index(flip["key"])
        flip["stage"] = found[index].stage if found[index].broken else by[index]
        flip["boundary"] = boundary(who.only([index]), threat)
    return told


def boundary(one: Subject, threat: Threat) -> int | None:
    """The smallest of some shares of the radius, in percent, at which a gradient attack breaks an image."""
    attacks = (Apgd("ce", STEPS, 0.75, 3, 0), Apgd("targeted-dlr", STEPS, 0.75, 1, TARGETS))
    for percent in page.PERCENT:
        ball = Threat(threat.norm, threat.eps * percent / 100)
        if any(one.attack(attack, ball)[0].broken for attack in attacks):
            return percent
    return None


def about() -> dict[str, Any]:
    """Where the numbers come from."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pyautoattack")}
    return {
        "commit": commit.strip(),
        "attacks": attacks_sha256(),
        "versions": {"python": platform.python_version(), **versions},
        "machine": f"{platform.machine()}, one thread, fp32",
    }


def attacks_sha256() -> str:
    """Of the files whose change could change a number."""
    files = sorted((REPOSITORY / "robustbench_vlm" / "attacks").glob("*.py"))
    files.append(REPOSITORY / "robustbench_vlm" / "rng.py")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def main() -> int:
    """Make what is missing, then the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="only write the page from what is there")
    parser.add_argument("--records", type=Path, default=RECORDS)
    typed = parser.parse_args()
    if not typed.page:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        make(typed.records)
    records = list(store.records(typed.records))
    broken = page.broken(records)
    text = page.rendered(records, [unit.name for unit in units()])
    store.write(typed.records.with_suffix(".md"), text.encode())
    sys.stdout.write("".join(f"{line}\n" for line in broken or ["all promises hold"]))
    return 1 if broken else 0


def make(path: Path) -> None:
    """Append the record of every comparison that is not there yet."""
    source = about()
    if path.exists():
        store.mend(path)
    there = {record["unit"] for record in (store.records(path) if path.exists() else ())}
    for unit in units():
        if unit.name in there:
            continue
        began = time.monotonic()
        who = subject(unit.model, N, ROWS)
        threat = radius(unit.model, N, unit.norm, unit.share, ROWS)
        record = compared(unit, who, threat)
        where = {"unit": unit.name, "eps": f"{float(threat.eps):.5g}", "from": source}
        store.append(path, {**where, **vars(unit), **record})
        spent = time.monotonic() - began
        sys.stdout.write(f"{unit.name}: {record['ours']} and {record['theirs']} broken of {record['n']}, ")
        sys.stdout.write(f"{len(record['flips'])} flips, {spent:.0f} s\n")
        sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
