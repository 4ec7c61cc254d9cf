"""What a task of a study is, and what it is done with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Resources:
    """What a study is run with.

    Attributes:
        data_root: folder of the datasets.
        device: where to train and attack.
        workers: how many on this machine, or `ray` for those of a cluster; empty for this process alone.
    """

    data_root: Path
    device: str = "cpu"
    workers: str = ""


class Task(Protocol):
    """A piece of work that can be sent to another process. What it finished is not done again."""

    @property
    def name(self) -> str:
        """What progress lines and errors call it."""

    @property
    def folder(self) -> Path:
        """Where it works; no two tasks work in one folder at a time."""

    def perform(self, resources: Resources) -> Any:  # noqa: ANN401 - whatever the task is for
        """Do it, and return what the study wants to know, as plain values.

        Raises:
            VlmrobError: it cannot be done.
        """
