"""Carry out a planned evaluation: what `vlmrob eval` and `robustbench_vlm.evaluate` have in common."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pandas as pd

from robustbench_vlm import one_writer, store
from robustbench_vlm.data.tiny import write
from robustbench_vlm.evaluation import estimate, planning, ray_settings, sequential
from robustbench_vlm.evaluation.executor import THIS_PROCESS, Executor
from robustbench_vlm.evaluation.planning import Plan
from robustbench_vlm.evaluation.stages import Report
from robustbench_vlm.results import flags


def run_plan(plan: Plan, report: Report, remark: Callable[[str], None]) -> pd.DataFrame:
    """Evaluate every cell of a plan that is not finished yet, and return the rows of all of them.

    Datasets of the tiny world that are not below the data root are rendered first.

    Args:
        plan: models, datasets, attacks and radii.
        report: called with (what, done, total).
        remark: called with each line about costs, notes of datasets and protocols, and what is left out.

    Raises:
        DataError: datasets are missing and `skip_missing` was not asked for.
        InputError: another process writes to the folder of the results.
    """
    one_writer.require_free(plan.settings.results)
    present = prepared(plan, report, remark)
    until = plan.request.until
    with one_writer.locked(plan.settings.results), _executor(present, remark) as executor:
        if until is None:
            paths = planning.perform(present, report, remark, executor)
        else:
            paths = sequential.until(present, until, report, remark, executor)
    return planning.rows(present, paths)


def _executor(plan: Plan, remark: Callable[[str], None]) -> AbstractContextManager[Executor]:
    """Those who do the model work, from the time at which there is work to do."""
    workers = plan.request.workers
    if not workers:
        return nullcontext(THIS_PROCESS)
    ray_settings.prepare(workers)
    from robustbench_vlm.evaluation.workers import executor  # Ray is an extra, and slow to import

    states = (loaded.model.state_dict().values() for loaded in plan.models)
    size = sum(tensor.numel() * tensor.element_size() for state in states for tensor in state)
    return executor(workers, plan.settings.device, size, remark)


def prepared(plan: Plan, report: Report, remark: Callable[[str], None]) -> Plan:
    """The plan over the datasets that are there, after its price was said; see `run_plan`."""
    root = plan.request.data_root
    if write.make_missing(root, report, [card.name for card in plan.datasets]):
        remark(f"rendered the tiny world into {root}")
    for line in plan.protocol.differs if plan.protocol else ():
        remark(f"note: protocol {plan.protocol.name if plan.protocol else ''}: {line}")
    present = planning.require_data(plan)
    for card in plan.datasets:
        if card not in present.datasets:
            remark(f"left out: {card.name} is not below {root}")
    store.require_writable(plan.settings.results, "--out")
    for line in estimate.price(present):
        remark(line)
    return present


def flagged(rows: pd.DataFrame, kind: flags.Severity) -> list[str]:
    """`MODEL on DATASET: FLAG;FLAG` of every result with flags of one severity (`results.flags`); sorted."""
    found: dict[str, list[str]] = {}
    for flag, place in flags.places(rows, kind):
        names = found.setdefault(place, [])
        if flag not in names:
            names.append(flag)
    return sorted(f"{place}: {';'.join(names)}" for place, names in found.items())
