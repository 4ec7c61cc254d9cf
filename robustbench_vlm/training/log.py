"""The log of a training run: one JSON line a step or probe; no line that was written is ever lost."""

from __future__ import annotations

from pathlib import Path

from robustbench_vlm import store

NAME = "log.jsonl"

TIMES = frozenset({"images_per_second", "data_seconds"})
"""Entries of a line that depend on the machine; all others are equal in every run of a recipe."""


def continue_at(out: Path, step: int) -> Path | None:
    """Make `log.jsonl` end at `step`, from which a run goes on.

    Steps after it will be logged again. If the log has lines of such steps, the whole log is renamed to
    `log-1.jsonl`, or the next free number, before the shortened one is written.

    Returns:
        The renamed log, if there is one.
    """
    log = out / NAME
    if not log.exists():
        return None
    valid = [line for line in store.records(log) if step and line["step"] <= step]
    content = b"".join(store.sealed(line, log.name) for line in valid)
    if content == log.read_bytes():
        return None
    number = 1
    while (aside := out / f"log-{number}.jsonl").exists():
        number += 1
    store.write(aside, log.read_bytes())  # first the copy: a kill between the two loses no line
    if valid:
        store.write(log, content)
    else:
        log.unlink()
    return aside
