"""`vlmrob doctor`."""

from __future__ import annotations

from robustbench_vlm import console
from robustbench_vlm.cli.options import AsJson


def doctor(as_json: AsJson = False) -> None:
    """Print what this machine can do, and what is missing."""
    from robustbench_vlm import catalogue

    rows = catalogue.doctor()
    if as_json:
        console.result_json([{"what": what, "found": found, "do": do} for what, found, do in rows])
    else:
        console.show("doctor", ["what", "found", "what to do"], [list(row) for row in rows])
