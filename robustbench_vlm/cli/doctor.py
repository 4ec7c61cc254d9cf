"""`vlmrob doctor`."""

from __future__ import annotations

from pathlib import Path

from robustbench_vlm import console
from robustbench_vlm.cli.options import AsJson, DataRoot


def doctor(data_root: DataRoot = Path("data"), as_json: AsJson = False) -> None:
    """Print what this machine can do, and what is missing."""
    from robustbench_vlm import catalogue

    rows = catalogue.doctor(data_root)
    if as_json:
        console.result_json([{"what": what, "found": found, "do": do} for what, found, do in rows])
    else:
        console.show("doctor", ["what", "found", "what to do"], [list(row) for row in rows])
