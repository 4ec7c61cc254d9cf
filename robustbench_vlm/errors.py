"""Every error that a user can meet; the command line prints each as one line and exits with its code.

VlmrobError             exit 1: something failed while running
├── AttackError         an attack left the ball or the box, or produced a non-finite number
├── TrainingError       a loss is not finite, or training cannot go on
├── Incomplete          exit 75: stopped early, but the same command goes on where it stopped
└── InputError          exit 2: what was typed, or a file that was named, cannot be used
    ├── CardError       a TOML or JSON card: unknown key, wrong type, unknown name
    ├── DataError       a dataset: missing, truncated, mislabelled
    └── WeightsError    a checkpoint: other architecture, missing tensor, changed bytes

A command that examines something and finds a fault in it exits with `FAULT`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from robustbench_vlm import safe_text

FAULT = 3
"""Exit code of a command that did its work and found a fault: a flag, a claim that does not hold."""
SHOWN = 24  # known names in one line of error
FEW = 5  # names that `some` lists before it only counts


class VlmrobError(Exception):
    """A failure with a sentence for the user. Exit code 1."""

    exit_code = 1


class AttackError(VlmrobError):
    """An attack broke its contract: outside the ball or box, or a number that is not finite."""


class TrainingError(VlmrobError):
    """Training cannot go on; the message names step, term and image keys."""


class Incomplete(VlmrobError):  # noqa: N818 - not an error: the same command resumes
    """The work stopped before its end and is resumable by the same command. Exit code 75."""

    exit_code = 75


class InputError(VlmrobError):
    """What the user gave cannot be used. Exit code 2.

    Its message is one line: *where: what was found; expected what; what to do*.
    """

    exit_code = 2

    def __init__(self, where: str, found: str, expected: str = "", do: str = "") -> None:
        where, found, expected = (safe_text.line(part) for part in (where, found, expected))
        tail = [f"expected {expected}" if expected else "", safe_text.lines(do)]
        super().__init__("; ".join([f"{where}: {found}", *(part for part in tail if part)]))


class CardError(InputError):
    """A card or recipe has an unknown key, a value of the wrong kind, or names something unknown."""


class DataError(InputError):
    """A dataset folder is missing, incomplete, damaged or labelled outside its class list."""


class WeightsError(InputError):
    """A checkpoint does not belong to the architecture, or its bytes are not the ones its card names."""


class UntrustedResultWarning(UserWarning):
    """A number does not mean what it says: an examination of the model failed, or a result carries a flag."""


def some(names: Sequence[str]) -> str:
    """The first few of a list of names, and how many more there are."""
    more = len(names) - FEW
    return ", ".join(names[:FEW]) + (f" and {more} more" if more > 0 else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped `name`: the nearest known names, then the first of all known names.

    Returns:
        `did you mean 'x'? known: a, b, c` (the first half only when something is near).
    """
    names = sorted(known)
    by_lower = {known_name.lower(): known_name for known_name in names}
    near = [by_lower[n] for n in difflib.get_close_matches(name.lower(), by_lower, n=2, cutoff=0.5)]
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    shown = ", ".join(names[:SHOWN]) or "(none)"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{hint}known: {shown}{more}"
