"""What `vlmrob plan` expects against what the evaluation then takes: `python benchmarks/plan.py`.

Five evaluations on datasets of the tiny suite, each in a process of its own with empty caches. The forecast
is made as the command makes it, its pilot included; then the evaluation runs. All times are processor seconds
of one thread, those that the forecast is made of too, since other programs were running on the machine.
"""

import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import process
from prices import Case, planned, run

from robustbench_vlm.evaluation import estimate, forecast, pilot, planning

OUT = Path(__file__).parent / "plan.md"
WITHIN = 0.2  # of the measured seconds; what the forecast is meant to reach

CASES = (
    Case("tiny-robust-teacher", "tiny-colours,tiny-digits", "pgd20", 100, "4"),
    Case("tiny", "tiny-colours,tiny-textures", "aa2", 100, "4"),
    Case("tiny-robust-teacher", "tiny-colours", "aa2", 32, "4"),
    Case("tiny-robust-teacher", "tiny-counts,tiny-digits", "short", 64, "2"),
    Case("tiny-robust-teacher", "tiny-textures", "short", 100, "2,4"),
)


def measure(case: Case, root: Path) -> process.Line:
    """Forecast and seconds of one case."""
    plan = planned(case, root)
    began = time.process_time()
    clock = SimpleNamespace(perf_counter=time.process_time)
    with mock.patch.object(estimate, "time", clock), mock.patch.object(pilot, "time", clock):
        found = forecast.forecast(plan, lambda *_: None)
    started = time.process_time()
    paths = planning.perform(plan, lambda *_: None)
    seconds = time.process_time() - started
    rows = planning.rows(plan, paths)
    rows = rows[rows.cell_sha256 != ""]
    robust = [share for shares in found.found.shares.values() for share in shares]
    return {
        **{
            "model": case.model,
            "datasets": case.dataset,
            "attack": case.attack,
            "n": case.n,
            "eps": case.eps,
        },
        "robust": rows.robust.astype(float).mean(),
        "pilot_robust": 100 * sum(robust) / len(robust) if robust else None,
        "pilot_images": found.found.images,
        "pilot_over_price": found.found.factor,
        "least": found.here.least,
        "expected": found.here.typical,
        "most": found.here.worst,
        "seconds": seconds,
        "forecast_seconds": started - began,
    }


ABOUT = """# Forecasts

`vlmrob plan` says what an evaluation takes before it begins. This page compares what it expects with what
the evaluation then took, in {number} cases on datasets of the tiny suite. {within} of them are within
{percent} %.

All times are processor seconds of one thread, those that the forecast is made of too: the machine was
running other programs, and by the clock both sides would be longer by what those took at the time. `pilot
robust` and `robust` are accuracies in %, in the few images that the forecast attacked (by the first stage
alone) and in the evaluation. `forecast` is what the forecast itself took.

Made by `python benchmarks/plan.py` on {cpu}, torch {torch}, commit {commit}. The chain `short` has
the four attacks of AutoAttack with 5 to 10 steps and 100 queries.

| model | datasets | attack | n | eps | pilot robust | robust | least, s | expected, s | most, s | measured, s | expected / measured | forecast, s |
|---|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|
"""  # noqa: E501 - a line of a table


def page(lines: list[process.Line], about: process.Line) -> str:
    """The table."""
    ratios = [line["expected"] / line["seconds"] for line in lines]
    rows = [
        f"| {line['model']} | {line['datasets'].replace(',', ', ')} | {line['attack']} | {line['n']} "
        f"| {line['eps']} | {'' if line['pilot_robust'] is None else format(line['pilot_robust'], '.0f')} "
        f"| {line['robust']:.0f} | {line['least']:.1f} | {line['expected']:.1f} | {line['most']:.1f} "
        f"| {line['seconds']:.1f} | {ratio:.2f} | {line['forecast_seconds']:.1f} |\n"
        for line, ratio in zip(lines, ratios, strict=True)
    ]
    within = sum(abs(ratio - 1) <= WITHIN for ratio in ratios)
    head = {"number": len(lines), "within": within, "percent": round(100 * WITHIN)}
    return ABOUT.format(**head, **about) + "".join(rows)


if __name__ == "__main__":
    run(CASES, measure, page, __doc__, OUT)
