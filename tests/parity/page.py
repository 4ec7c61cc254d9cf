"""The page of the full grid, from its records."""

from __future__ import annotations

import textwrap
from typing import Any

Record = dict[str, Any]
NORMS = {"linf": "Linf", "l2": "L2"}
ORDER = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")

HEAD = """# Verdicts of the reference and ours

Every attack of AutoAttack against the reference implementation (as packaged in `pyautoattack`, driven
as a black box), with full budgets: 100 steps, 9 targets, 5000 queries. Three models: a plain CNN and an
adversarially trained one on generated images (16 px, 10 classes), and the packaged robust CLIP with its
zero-shot head on the seen tiny world (32 px, 40 classes). {n} images a model, all right when clean;
radii at which about 30, 60 and 0 % survive a short APGD. Both sides call the model with {rows} rows.
The page is written by `make parity-full` from `parity.jsonl` beside it; a run that is killed goes on
where it was.
"""
SAME = """## The same noise

APGD starts where ours starts; FAB draws nothing; Square is given our proposals, windows shared by the
batch as the reference shares them. APGD returns the last misclassified iterate on both sides, FAB the
nearest point, Square its best one. `flips` are images on which the verdicts differ; `equal` are
adversarial images that are equal bit for bit, of those that both sides broke; `apart` is the largest
difference of a pixel between them.

| model | norm | radius | attack | n | robust, ours | robust, reference | flips | equal | apart |
|---|---|---|---|---:|---:|---:|---:|---:|---:|
"""
SEEDS = """## The whole chain, with seeds of each side's own

Robust images at each seed. `flips`: images on which ours and the reference differ at each seed. The
last two columns count images whose verdict changes with the seed, for the reference against itself and
for ours.

| model | norm | radius | n | robust, ours | robust, reference | flips | reference, itself | ours, itself |
|---|---|---|---:|---|---|---|---:|---:|
"""
FLIPS = """## Every disagreement

`ours` and `reference` are the margins of correctness of the image that each side ended with (at most 0
is broken; where nothing was found, that of the image that it returned); `seeds` says with how many of
its seeds each side breaks the image, ours first; `boundary` is the smallest share of the radius, of
{percent} %, at which ours breaks it by APGD on cross-entropy (3 restarts) or targeted DLR.

| image | norm | radius | seed | broken by | in | ours | reference | seeds | boundary | explanation |
|---|---|---|---:|---|---|---:|---:|---|---:|---|
"""
WIDTH = 110
PERCENT = (94, 97, 98, 99, 100, 101, 102, 103, 106)  # of the radius, at which the boundary is sought


def broken(records: list[Record]) -> list[str]:
    """Promises that the records do not keep, a line each."""
    found = []
    for one in records:
        if one["attack"] == "chain":
            if abs(one["ours"] - one["theirs"]) > max(1, 0.007 * one["n"]):
                found.append(f"{one['unit']}: {one['ours']} and {one['theirs']} broken of {one['n']}")
            continue
        exact = one["norm"] == "linf"
        few = one["attack"] == "square" and not exact and len(one["flips"]) <= max(1, 0.007 * one["n"])
        unlike = {
            "flips": [] if few else one["flips"],
            "another verdict at the first success": one.get("otherwise at the first success"),
            "another number of queries": one.get("other queries") if exact else [],
            "another end": one.get("other ends") if exact else [],
            "images not equal": one["both"] - one["equal"] if exact and one["equal"] is not None else 0,
        }
        found += [f"{one['unit']}: {name}: {what}" for name, what in unlike.items() if what]
    return found


def rendered(records: list[Record], names: list[str]) -> str:
    """The page; `names` are of all units."""
    if not records:
        return "Nothing was compared yet.\n"
    single = [one for one in records if one["attack"] != "chain"]
    chains = _cells([one for one in records if one["attack"] == "chain"])
    parts = [HEAD.format(n=max(one["n"] for one in records), rows=48), _verdict(records, chains), SAME]
    single.sort(key=lambda one: (*_place(one), ORDER.index(one["attack"])))
    parts[-1] += "".join(_line(_same(one)) for one in single) + "\n" + _l2(single)
    parts.append(SEEDS + "".join(_line(_seeds(cell)) for cell in chains))
    flips = [line for one in single for line in _fed_flips(one)]
    flips += [line for cell in chains for line in _flips(cell)]
    told = "".join(_line(flip) for flip in flips) if flips else ""
    head = FLIPS.format(percent=", ".join(map(str, PERCENT)))
    parts.append(head + told if flips else "## Every disagreement\n\nThere is none.\n")
    return "\n".join([*parts, _source(records, names)])


def _line(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def _place(one: Record) -> tuple[Any, ...]:
    return ("plain", "trained", "clip").index(one["model"]), list(NORMS).index(one["norm"]), float(one["eps"])


def _radius(one: Record) -> str:
    eps = float(one["eps"])
    return f"{eps * 255:.2f}/255" if one["norm"] == "linf" else f"{eps:.3g}"


def _cells(chains: list[Record]) -> list[list[Record]]:
    """Runs of the chain by cell, each in the order of seeds."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for one in sorted(chains, key=lambda one: (*_place(one), one["seed"])):
        found.setdefault(_place(one), []).append(one)
    return list(found.values())


def _same(one: Record) -> list[Any]:
    equal = "" if one["equal"] is None else f"{one['equal']} of {one['both']}"
    robust = [one["n"] - one["ours"], one["n"] - one["theirs"]]
    name = [one["model"], NORMS[one["norm"]], _radius(one), one["attack"]]
    return [*name, one["n"], *robust, len(one["flips"]), equal, f"{one['apart']:.1g}"]


def _unsteady(cell: list[Record], side: str) -> int:
    """Images that some seeds break and some do not."""
    verdicts = zip(*[[bool(by) for by in one[side]] for one in cell], strict=True)
    return sum(len(set(verdict)) > 1 for verdict in verdicts)


def _seeds(cell: list[Record]) -> list[Any]:
    first = cell[0]
    robust = [", ".join(str(one["n"] - one[side]) for one in cell) for side in ("ours", "theirs")]
    flips = ", ".join(str(len(one["flips"])) for one in cell)
    name = [first["model"], NORMS[first["norm"]], _radius(first), first["n"]]
    return [*name, *robust, flips, _unsteady(cell, "theirs by"), _unsteady(cell, "ours by")]


def _margins(flip: Record) -> list[str]:
    return [f"{flip['ours']:.3g}", f"{flip['theirs']:.3g}"]


def _fed_flips(one: Record) -> list[list[Any]]:
    """Disagreements with the same noise, which have no seed and one stage."""
    rounding = one["attack"] == "square" and one["norm"] == "l2"
    why = "rounding may do it (see above); not looked at by itself" if rounding else "not explained"
    name = [NORMS[one["norm"]], _radius(one), "same noise"]
    return [
        [flip["key"], *name, flip["broken by"], one["attack"], *_margins(flip), "", "", why]
        for flip in one["flips"]
    ]


def _flips(cell: list[Record]) -> list[list[Any]]:
    found = []
    for one in cell:
        for flip in one["flips"]:
            index = int(flip["key"].rsplit("/")[-1])
            ours, theirs = (sum(bool(run[side][index]) for run in cell) for side in ("ours by", "theirs by"))
            boundary = "" if flip["boundary"] is None else f"{flip['boundary']} %"
            if 0 < ours < len(cell) or 0 < theirs < len(cell):
                why = "at the boundary: the verdict of one side or both depends on the seed"
            elif flip["boundary"] is not None and 97 <= flip["boundary"] <= 103:
                why = "at the boundary: more restarts, or a little more radius, break it"
            else:
                why = "not explained"
            name = [flip["key"], NORMS[one["norm"]], _radius(one), one["seed"]]
            seeds = f"{ours} and {theirs} of {len(cell)}"
            found.append([*name, flip["broken by"], flip["stage"], *_margins(flip), seeds, boundary, why])
    return found


def _verdict(records: list[Record], chains: list[list[Record]]) -> str:
    """What holds, in numbers."""
    single = [one for one in records if one["attack"] != "chain"]
    runs = [one for cell in chains for one in cell]
    steady = [sum(_unsteady(cell, f"{side} by") for cell in chains) for side in ("theirs", "ours")]
    lines = [
        f"- The same noise: {_total(single, 'n')} verdicts in {len(single)} comparisons, "
        f"{_total(single, 'flips')} of them differ.",
        f"- Seeds of each side's own: {_total(runs, 'n')} verdicts of whole chains in {len(runs)} runs, "
        f"{_total(runs, 'flips')} of them differ; the number of robust images differs by at most "
        f"{max((abs(one['ours'] - one['theirs']) for one in runs), default=0)} "
        "(bound: 1 image or 0.7 %, whichever is more).",
        f"- Over its own seeds the reference changes {steady[0]} verdicts of "
        f"{sum(cell[0]['n'] for cell in chains)}, ours {steady[1]}.",
    ]
    unkept = broken(records)
    lines += [f"- NOT KEPT: {line}" for line in unkept] or ["- Every bound is kept."]
    return "\n".join(lines) + "\n"


def _total(records: list[Record], name: str) -> int:
    """Sum of a number, or of the lengths of a list."""
    return sum(len(one[name]) if isinstance(one[name], list) else one[name] for one in records)


def _l2(single: list[Record]) -> str:
    """What holds where bits cannot be equal."""
    apgd = [one for one in single if one["norm"] == "l2" and one["attack"].startswith("apgd")]
    squares = [one for one in single if one["norm"] == "l2" and one["attack"] == "square"]
    if not apgd:
        return ""
    largest = max(one["apart"] for one in apgd)
    told = f"""
        For Linf every operation of APGD and Square is on single pixels, so bits are equal. L2 takes norms:
        sums over another shape round differently in the last bits, and many steps may carry that apart. Of
        the {_total(apgd, "both")} images that both sides broke by L2 APGD {_total(apgd, "equal")} are equal
        bit for bit and the others differ by at most {largest:.1g} in a pixel; verdicts that differ:
        {_total(apgd, "flips")}. L2 Square: {_total(squares, "other ends")} of {_total(squares, "n")} images
        end more than 0.001 apart and {_total(squares, "other queries")} take another number of queries;
        verdicts that differ: {_total(squares, "flips")} (bound: 1 image or 0.7 %, whichever is more). Looked
        at proposal by proposal, such searches agree to some 1e-7 in a pixel until both windows fall on places
        without any change: the change that they are given then is the root of the rounding error of
        eps^2 - |delta|^2, some 1e-4, and one side finds it better by 3e-5 of margin where the other is given
        nothing. FAB projects exactly on both sides, by another algorithm, so its points differ in the last
        bits from the first iteration on."""
    return textwrap.fill(" ".join(told.split()), WIDTH) + "\n"


def _source(records: list[Record], names: list[str]) -> str:
    there = {one["unit"] for one in records}
    commits = sorted({one["from"]["commit"] for one in records})
    attacks = sorted({one["from"]["attacks"] for one in records})
    last = records[-1]["from"]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    told = (
        f"`make parity-full`; {versions}; {last['machine']}; commit {', '.join(commits)}, SHA-256 of the "
        f"attack files {', '.join(attacks)}. Square of the CLIP: 48 images, since the reference takes 5000 "
        "calls for each 48 rows. Chains of the CLIP: Linf at the radius where about 30 % survive."
        + (
            " Between these attack files lies what `git diff` of the commits shows."
            if len(attacks) > 1
            else ""
        )
    )
    lines = ["## How it was made\n", textwrap.fill(told, WIDTH)]
    missing: dict[str, list[str]] = {}
    for name in names:
        if name not in there:
            model, norm, share, attack = name.split("/", 3)
            missing.setdefault(f"{model} {NORMS[norm]} {float(share) * 100:.0f} %", []).append(attack)
    if missing:
        lines.append("\nNot compared yet (the same command goes on):\n")
        lines += [f"- {cell}: {', '.join(attacks)}" for cell, attacks in missing.items()]
    return "\n".join(lines) + "\n"
