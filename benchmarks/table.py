"""The table of a run: counts, times, and what of the attainable ratio is reached."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from subject import ROWS

Line = dict[str, Any]

COLUMNS = (
    "robust at radius", "attack", "engine", "robust", "forwards: rows", "calls", "backwards: rows", "calls",
    "wall s", "CPU s", "peak MiB", "over floor", "rows in use", "CPU / ours", "wall / ours", "attainable",
    "reached",
)  # fmt: skip
SWITCHES = ("freeze_reference", "graphs", "compiled")
NOTES = """\
- *Rows* are images that went through the model, *calls* the batches in which they did; a forward that is
  differentiated counts as a forward and a backward. Ours calls with {rows} rows, and with fewer where
  few images are left and bits are the same; the references with what is still alive of a batch of {rows}.
- *Peak* is what the process held at most beyond the loaded model (resident memory; on a GPU allocated
  memory). Each line is a process of its own.
- *Over floor* is the CPU time of ours over that of bare calls of the counted number, kind and shape. Every
  {every}th call is made once more bare, inside the same run, timed by itself and taken out of the times.
  It holds for a model of this cost: {bare}. What the engine takes beside
  the model does not depend on the model. So the ratio is larger where a call is cheaper: 1.1 to 3.3 was
  measured on eight small models at 16 px. [overhead.md](overhead.md) has the milliseconds of an iteration.
- *Rows in use* is the share of these calls, by time, that the findings account for: rows of later
  trajectories that run ahead, queries beyond an accepted proposal, and padding are the rest.
- *Attainable* is the CPU time of the reference over bare calls for just the rows that the findings account
  for, without any idle row. *Reached* is the part of it that ours reaches: rows in use / over floor.
- *autoattack* and *torchattacks* attack {state}; *frozen*: parameters without
  gradients. torchattacks is given {steps} steps, {targets} targets and the schedule of the reference, where
  its own are 10, all classes and a stretched one.
"""
UNFROZEN = "the model as a user loads it, parameters with gradients"


def brief(line: Line) -> str:
    """A line of progress."""
    where = f"{line['eps255']:g}/255 {line['attack']} {line['engine']}"
    return f"{where}: {line['robust']} robust, {line['cpu']:.1f} s CPU, {line['wall']:.1f} s"


def render(lines: Sequence[Line]) -> str:
    """The whole file from all lines of a run."""
    head = lines[0]
    found = [line for line in lines if "engine" in line]
    settings = head["settings"]
    model = settings["arch"] or settings["model"]
    out = [
        "# Attacks: ours and the references",
        "",
        f"`{command(settings)}`",
        "",
        f"{model} at {settings['px']} px, {settings['n']} correctly classified images of tiny-seen,"
        f" {settings.get('norm', 'linf').capitalize()},"
        f" batch {ROWS}, fp32; {settings['steps']} steps, {settings['queries']} queries,"
        f" {settings['targets']} targets.",
        f"Commit {head['commit']}; torch {head['torch']}, Python {head['python']}; {head['cpu']},"
        f" {settings['threads']} thread{'s' * (settings['threads'] > 1)}; device {head['device']}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "|".join([" --- "] * 3 + [" ---: "] * (len(COLUMNS) - 3)) + "|",
    ]
    base = {(line["share"], line["attack"]): line for line in found if line["engine"] == "ours"}
    rows = (_cells(line, base.get((line["share"], line["attack"]))) for line in found)
    out += ["| " + " | ".join(cells) + " |" for cells in rows]
    state = "frozen parameters" if settings["freeze_reference"] else UNFROZEN
    notes = {key: settings[key] for key in ("every", "steps", "targets")}
    out += ["", NOTES.format(rows=ROWS, state=state, bare=_bare_calls(base.values()), **notes)]
    out += _disagreements(found, base)
    return "\n".join(out).rstrip() + "\n"


def command(settings: Line) -> str:
    """What was typed, defaults included."""
    words = ["python", "benchmarks/attacks.py"]
    for key, value in settings.items():
        name = "--" + key.replace("_", "-")
        if key in SWITCHES:
            words += [name] * bool(value)
        elif value not in ("", []):
            words += [name, *(str(one) for one in (value if isinstance(value, list) else [value]))]
    return shlex.join(words)


def bare(line: Line, clock: str) -> dict[tuple[str, int], float]:
    """Seconds of one bare call in the process of a line, by kind and rows."""
    return {(kind, rows): took for kind, rows, took in line["bare"][clock]}


def counted(line: Line, clock: str) -> float:
    """Seconds of bare calls of the number, kind and shape that a line made."""
    each = bare(line, clock)
    return float(sum(count * each[kind, rows] for kind, rows, count in line["calls"]))


def needed(line: Line, ours: Line, clock: str) -> float:
    """Seconds, in the process of a line, of full bare calls for the rows that our findings account for."""
    each = bare(line, clock)
    full, rows = line.get("rows", ROWS), dict(zip(("forward", "gradient"), ours["needed"], strict=True))
    return sum(count / full * each[kind, full] for kind, count in rows.items() if count)


def _cells(line: Line, ours: Line | None) -> list[str]:
    over, used, cpu, wall, attainable, reached = [""] * 6
    measured = bool(line["bare"]["cpu"])
    if line["needed"] is not None and measured:
        over = f"{line['cpu'] / counted(line, 'cpu'):.3f}"
        used = _share(needed(line, line, "cpu") / counted(line, "cpu"))
    if ours is not None and line is not ours:
        cpu, wall = (f"{line[clock] / ours[clock]:.2f}" for clock in ("cpu", "wall"))
    if ours is not None and line["needed"] is None and measured:
        attainable = f"{line['cpu'] / needed(line, ours, 'cpu'):.2f}"
        reached = _share(needed(ours, ours, "cpu") / ours["cpu"])
    return [
        f"{100 * line['share']:.0f} % at {line['eps255']:g}/255", line["attack"], line["engine"],
        str(line["robust"]), str(line["forward_rows"]), str(line["forward_calls"]),
        str(line["backward_rows"]), str(line["backward_calls"]), f"{line['wall']:.2f}", f"{line['cpu']:.2f}",
        f"{line['mib']:.0f}", over, used, cpu, wall, attainable, reached,
    ]  # fmt: skip


def _bare_calls(ours: Iterable[Line]) -> str:
    """What bare calls of full size took on the processor, the median over the measurements of ours."""
    parts = []
    for kind, name in (("forward", "without"), ("gradient", "with")):
        found = [bare(line, "cpu").get((kind, line.get("rows", ROWS))) for line in ours]
        took = [seconds for seconds in found if seconds is not None]
        if took:
            parts.append(f"{1e3 * statistics.median(took):.0f} ms {name} gradient")
    return f"a bare call of {ROWS} rows takes {', '.join(parts)}" if parts else "bare calls were not timed"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _disagreements(found: Sequence[Line], base: dict[Any, Line]) -> list[str]:
    """Images whose verdict is another one than ours, by engine."""
    out = ["Images whose verdict differs from that of ours (broken by ours only, broken by it only):", ""]
    for line in found:
        ours = base.get((line["share"], line["attack"]))
        if ours is None or line is ours:
            continue
        pairs = list(zip(ours["broken"], line["broken"], strict=True))
        only = pairs.count(("1", "0")), pairs.count(("0", "1"))
        extra = f"; {line['unconfirmed']} successes not confirmed in fp32" if line["unconfirmed"] else ""
        if any(only) or extra or line["engine"].startswith("ours"):
            where = f"{100 * line['share']:.0f} %, {line['attack']}, {line['engine']}"
            out.append(f"- {where}: {only[0]}, {only[1]} of {len(pairs)}{extra}")
    return [*out, *([] if len(out) > 2 else ["- none"])]
