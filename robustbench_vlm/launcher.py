"""How a launcher such as torchrun names the processes of one training; nothing is imported for it."""

from __future__ import annotations

import os
from collections.abc import Mapping

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that a launcher sets for every process, by which the processes find each other."""


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process."""
    return all(environment.get(name) for name in NEEDED)
