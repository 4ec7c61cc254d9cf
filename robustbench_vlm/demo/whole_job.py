"""The demo: make the tiny world's data, train two defenses, attack three models, write the table, compare.

The `full` demo draws 500 images of every dataset and adds the models that make the comparison fair: a TeCoA
student and both teachers. Its table is the committed `leaderboards/tiny.csv`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from robustbench_vlm import one_writer
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.data.tiny import write
from robustbench_vlm.evaluation import planning
from robustbench_vlm.results import compare, leaderboard, result_file
from robustbench_vlm.training import loop
from robustbench_vlm.training.run import Meter, reporting

OURS = "tiny-mmt-ard"
BASELINE = "tiny-single-teacher"
UNDEFENDED = "tiny"
TECOA = "tiny-tecoa"
TEACHERS = ("tiny-clean-teacher", "tiny-robust-teacher")
ATTACKS = (  # chains, and the datasets that they are run on; no names: all of the suite
    (("pgd20", "aa2"), ()),
    (("autoattack",), ("tiny-seen", "tiny-digits")),
)
FULL_N = 500

Remark = Callable[[str], None]
"""Called with a line of log."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo ends with.

    Attributes:
        rows: of the leaderboard.
        paired: lines of the comparison of the two defenses.
        seconds: time of each phase, by name.
        files: tables that were written.
    """

    rows: pd.DataFrame
    paired: list[compare.Comparison]
    seconds: dict[str, float]
    files: list[Path]


@dataclass(frozen=True)
class Work:
    """Where and with what the demo works.

    Attributes:
        out: gets `models/`, `teachers/` (teacher outputs on clean images), `results/` and `leaderboards/`.
        data_root: the tiny world is rendered into it.
        device: where to train and attack.
        meter: for progress.
        remark: for the log.
        seconds: time of each phase so far, by name.
    """

    out: Path
    data_root: Path
    device: torch.device
    meter: Meter
    remark: Remark
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce a phase, and take its time."""
        self.remark(f"{name} ...")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def model(self, recipe: str) -> str:
        """The checkpoint folder of a recipe."""
        return str(self.out / "models" / recipe)


def run(
    out: Path, data_root: Path, device: torch.device, meter: Meter, remark: Remark, *, full: bool
) -> DemoResult:
    """Do the whole job below `out`. What is finished there is not done again, so a stopped demo goes on.

    Args:
        out: folder of everything that is made.
        data_root: the tiny world is rendered into it.
        device: where to train and attack.
        meter: for progress.
        remark: for the log.
        full: 500 images a dataset, and three further models.

    Raises:
        InputError: another process writes into `out`.
    """
    with one_writer.locked(out):
        return _run(Work(out, data_root, device, meter, remark), full=full)


def _run(work: Work, *, full: bool) -> DemoResult:
    with work.phase("render the tiny world"):
        write.make_missing(work.data_root, work.meter)
    for name in (BASELINE, OURS, *((TECOA,) if full else ())):
        _train(work, name)
    n = FULL_N if full else None
    _attack(work, "", (UNDEFENDED, work.model(BASELINE), work.model(OURS)), n)
    if full:
        _attack(work, "further models, ", (work.model(TECOA), *TEACHERS), n)
    suite, results = reader.read("suites", "tiny", Suite), work.out / "results"
    with work.phase("leaderboard"):
        rows, files = leaderboard.render(results, suite, work.out / "leaderboards")
        found = result_file.of_suite(result_file.read(results), suite)
        paired = compare.compare(found, OURS, BASELINE)
    return DemoResult(rows, paired, work.seconds | {"together": sum(work.seconds.values())}, files)


def _train(work: Work, name: str) -> None:
    recipe = reader.read("recipes", name, Recipe)
    report = reporting(recipe, work.meter, work.remark)
    with work.phase(f"train {name}"):
        folder, teachers = Path(work.model(name)), work.out / "teachers"
        loop.run(recipe, folder, work.data_root, work.device, report, teachers)


def _attack(work: Work, label: str, models: tuple[str, ...], n: int | None) -> None:
    """Evaluate some models with every chain of `ATTACKS`.

    Args:
        work: where.
        label: beginning of the phases' names.
        models: names or folders.
        n: images of every dataset; None for the suite's number.
    """
    results = work.out / "results"
    for attacks, datasets in ATTACKS:
        request = planning.EvalRequest(models, attacks, "tiny", results, work.data_root, datasets, n=n)
        with work.phase(f"{label}attack with {' and '.join(attacks)}"):
            planning.perform(planning.require_data(planning.plan(request, work.device)), work.meter)
