"""Which attack packages are installed; nothing of them and not even torch is imported to find out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence

PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "autoattack": (("autoattack", "pyautoattack"), "pip install 'robustbench-vlm[autoattack]'"),
    "torchattacks": (
        ("torchattacks",),
        "pip install --no-deps torchattacks (its wheel also carries files of a package named robustbench)",
    ),
}
"""By name of the backend: modules that it can use, the original before its fork, and how to install one."""


def installed(names: Sequence[str]) -> str | None:
    """The first of these modules that is installed."""
    return next((name for name in names if importlib.util.find_spec(name) is not None), None)


def version(name: str) -> str:
    """Name and version of an installed package, as results state them."""
    try:
        return f"{name}-{importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name}-unversioned"  # a folder on the path
