"""The command line that measures the rows of a contest again."""

from __future__ import annotations

import re
import shlex

from robustbench_vlm import safe_text
from robustbench_vlm.results.contest import Contest

UNTIL = re.compile(r"until (?P<points>[0-9.]+) points or (?P<n>\d+|all) images")
"""The rule of an evaluation with `--until`. That of a race names no models, so it cannot be typed again."""

REFERENCE = "native-reference"
"""Engine of rows that were measured with `--mode reference`."""


FLAGS = {"tf32": "--tf32", "compiled": "--compile"}
"""Options by what they add to the label of a precision."""


def parts(contest: Contest, suite: str) -> list[str]:
    """The words before the name of the model, and those after it."""
    if contest.protocol:
        after = ["--protocol", contest.protocol.partition("/")[0]]
    else:
        radii = ",".join(contest.radii)
        after = ["--attack", contest.attack, "--norm", contest.norm, "--eps", radii]
        stopped = UNTIL.match(contest.stop_rule)
        asked = str(contest.n_requested)  # where a rule stopped, that is what it left
        if stopped:
            after += ["--until", stopped["points"]]
            asked = stopped["n"].replace("all", "0")
        after += ["--n", asked]
    engine = contest.engine.partition("/")[0]
    if engine == REFERENCE:
        after += ["--mode", "reference"]
    elif engine != "native":
        after += ["--engine", engine]
    if contest.precision.startswith("bf16"):
        after += ["--precision", "bf16"]
    after += [flag for word, flag in FLAGS.items() if word in contest.precision.split("+")]
    return [quoted(["vlmrob", "eval", "--suite", suite, "--model"]), quoted(after)]


def quoted(words: list[str]) -> str:
    """Words as a shell reads them, on one line."""
    return safe_text.line(shlex.join(words))
