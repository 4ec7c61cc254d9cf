"""How long the threads of torch wait for each other before they give their core away.

An operation of torch is cut into pieces for several threads, and threads that are ready wait for the last
one in a loop that keeps their cores busy. GNU's OpenMP, which torch's Linux wheels bundle, takes 300,000
turns of that loop (about 10 ms) by default. Where other processes want the cores, the last thread may not
be running at all, and the others keep the very core from it: a training falls to a fifth of its speed. With
1,000 turns they let it go in time, and on a quiet machine the next operation still finds them awake
(docs/training-many.md has the measurement). Fewer threads would help, too, but bits depend on their number.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

TURNS = "1000"
CHOSEN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Variables by which a user decides how threads wait."""


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set how long threads wait, unless the user has; it counts for libraries that are loaded later.

    Args:
        environment: variables of this process, which those that it starts inherit.
    """
    if not any(name in environment for name in CHOSEN):
        environment["GOMP_SPINCOUNT"] = TURNS


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
