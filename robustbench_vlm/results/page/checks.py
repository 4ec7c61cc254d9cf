"""The checks of a model as the page shows them: of each, the worst of a row's datasets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from robustbench_vlm import store
from robustbench_vlm.errors import DataError
from robustbench_vlm.results.result_file import Result

LEVELS = ("pass", "warn", "fail")


class Check(BaseModel):
    """One check of a result file."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    name: str
    level: Literal["pass", "warn", "fail"]
    value: float | None
    bound: float
    sentence: str


def of_result(result: Result) -> list[Check]:
    """The checks beside a result; none in results of before there were checks.

    Raises:
        DataError: the block is not one that an evaluation writes.
    """
    block = store.read_json(result.path).get("checks", {})
    try:
        return [Check.model_validate(entry) for entry in block.get("checks", [])]
    except (ValidationError, AttributeError, TypeError):
        do = "delete it and run the same eval again"
        raise DataError(str(result.path), "checks of another kind", "those of an evaluation", do) from None


def worst(results: Sequence[Result]) -> list[list[str]]:
    """Of each check [name, level, value, bound, sentence, dataset], on the first dataset where it was worst.

    Args:
        results: of one model in one contest.
    """
    found: dict[str, tuple[int, list[str]]] = {}
    for result in results:
        for check in of_result(result):
            level = LEVELS.index(check.level)
            if check.name not in found or level > found[check.name][0]:
                value = "" if check.value is None else f"{check.value:.3g}"
                line = [check.name, check.level, value, f"{check.bound:.3g}", check.sentence, result.dataset]
                found[check.name] = level, line
    return [line for _, line in found.values()]
