"""The whole job on the tiny world: make the data, train two defenses, attack, tabulate, compare.

`full` draws 500 images a dataset and adds the models that make the comparison fair, a TeCoA student and both
teachers; its table is the committed `leaderboards/tiny.csv`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.data.tiny import write
from robustbench_vlm.evaluation import planning
from robustbench_vlm.results import compare, leaderboard, result_file
from robustbench_vlm.training import loop

OURS = "tiny-mmt-ard"
BASELINE = "tiny-single-teacher"
UNDEFENDED = "tiny"
TECOA = "tiny-tecoa"
TEACHERS = ("tiny-clean-teacher", "tiny-robust-teacher")
SHORT = (("pgd20", "aa2"), ())  # chains, on which datasets (none named: all)
DEEP = (("autoattack",), ("tiny-seen", "tiny-digits"))
FULL_N = 500


@dataclass(frozen=True)
class Shown:
    """What the demo ends with."""

    rows: pd.DataFrame
    paired: list[list[str]]
    seconds: dict[str, float]
    files: list[Path]


def run(
    out: Path,
    data_root: Path,
    device: torch.device,
    meter: Callable[..., None],
    remark: Callable[[str], None],
    *,
    full: bool,
) -> Shown:
    """Do the whole job below `out`; what is there already is kept, so a stopped demo goes on.

    Args:
        out: gets `models/`, `teachers/` (what they say of clean images), `results/` and `leaderboards/`.
        data_root: the tiny world is rendered into it.
        device: where to train and attack.
        meter: progress, called with (what, done, total).
        remark: called with a line of log now and then.
        full: the larger edition.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        remark(f"{name} ...")
        started = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - started

    suite = reader.read("suites", "tiny", Suite)
    with phase("render the tiny world"):
        write.make_missing(data_root, meter)
    for name in (BASELINE, OURS, *((TECOA,) if full else ())):
        recipe = reader.read("recipes", name, Recipe)
        with phase(f"train {name}"):
            loop.run(
                recipe,
                out / "models" / name,
                data_root,
                device,
                _report(recipe, meter, remark),
                out / "teachers",
            )
    results, n = out / "results", FULL_N if full else None
    main = (UNDEFENDED, str(out / "models" / BASELINE), str(out / "models" / OURS))
    further = (str(out / "models" / TECOA), *TEACHERS)
    for who, models in (("", main), *((("further models, ", further),) if full else ())):
        for attacks, datasets in (SHORT, DEEP):
            request = planning.EvalRequest(models, attacks, "tiny", results, data_root, datasets, n=n)
            with phase(f"{who}attack with {' and '.join(attacks)}"):
                planning.perform(planning.require_data(planning.plan(request, device)), meter)
    with phase("leaderboard"):
        rows, files = leaderboard.render(results, suite, out / "leaderboards")
        found = result_file.of_suite(result_file.read(results), suite)
        paired = [line.texts for line in compare.compare(found, OURS, BASELINE)]
    seconds["together"] = sum(seconds.values())
    return Shown(rows, paired, seconds, files)


def _report(recipe: Recipe, meter: Callable[..., None], remark: Callable[[str], None]) -> loop.Report:
    def report(line: loop.Line) -> None:
        if "probe" in line:
            remark(f"{recipe.name}, step {line['step']}: probe {line['probe']}")
        else:
            meter(recipe.name, line["step"], recipe.optim.steps)

    return report
