"""The leaderboard of a suite: results -> rows -> CSV and Markdown. The same results give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from robustbench_vlm import safe_text, store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.cards.dataset import DatasetCard, Metric
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import DataError
from robustbench_vlm.results import columns, grids, ranking, result_file, rows, verdicts, verification
from robustbench_vlm.results.contest import Contest
from robustbench_vlm.results.page import render as page
from robustbench_vlm.results.page.gallery import Gallery
from robustbench_vlm.results.result_file import Result


def table(results: Sequence[Result], suite: Suite) -> pd.DataFrame:
    """One row a result and one a mean, as text exactly as the CSV has them.

    Rows are sorted by contest, then by model, then by dataset in suite order.
    """
    metrics = {name: _metric(name) for name in suite.datasets}
    by_chain = sorted(results, key=lambda result: result.contest)
    stages = list(dict.fromkeys(stage for result in by_chain for stage in result.stages))
    pgd_only = _pgd_only(results)
    groups: dict[tuple[Contest, tuple[str, str]], list[Result]] = {}
    for result in results:
        groups.setdefault((result.contest, result.model), []).append(result)
    ranked = ranking.ranked(groups, suite)
    position = {name: number for number, name in enumerate([*suite.datasets, "mean"])}
    keyed: list[tuple[tuple[Any, ...], rows.Row]] = []
    for (contest, model), group in groups.items():
        found = [
            rows.of_result(result, suite, metrics[result.dataset], pgd_only.get(result.path))
            for result in group
        ]
        for row in [*found, *rows.of_means(group, suite)]:
            dataset = (position.get(row["dataset"], len(position)), row["dataset"])
            row |= ranked.get((contest, model, row["dataset"]), {})
            keyed.append(((*contest.position, *model, dataset, contest), row))
    keyed.sort(key=lambda pair: pair[0])
    names = columns.names(stages)
    return pd.DataFrame([row for _, row in keyed], columns=names, dtype=object).fillna("")


def _metric(dataset: str) -> Metric:
    """What the makers of a dataset report; top-1 of one whose card is not at hand."""
    known = reader.has("datasets", dataset)
    return reader.read("datasets", dataset, DatasetCard).metric if known else "top1"


def _plain_pgd(attack: str) -> bool:
    """Whether a chain is plain PGD, as its card says; a chain whose card is not at hand is not."""
    if not reader.has("attacks", attack):
        return False
    if reader.shown("attacks", attack) == attack:
        return reader.read("attacks", attack, AttackCard).plain_pgd
    packaged = reader.home() / "attacks" / f"{attack}.toml"  # not the included card of its name
    return packaged.is_file() and reader.read("attacks", str(packaged), AttackCard).plain_pgd


def _pgd_only(results: Sequence[Result]) -> dict[Path, int]:
    """By result of a chain: how many of its images were broken by PGD on the same images, and not by it."""
    plain = {name for name in {result.contest.attack for result in results} if _plain_pgd(name)}
    broken: dict[tuple[Any, ...], set[str]] = {}
    for result in results:
        if result.contest.attack in plain:
            found = result.verdicts()
            broken.setdefault(_images(result), set()).update(found.key[found.broken_at_eps != ""])
    counts = {}
    for result in results:
        if result.contest.attack not in plain and _images(result) in broken:
            found = result.verdicts()
            robust = found.key[verdicts.standing(found)]
            counts[result.path] = int(robust.isin(broken[_images(result)]).sum())
    return counts


def _images(result: Result) -> tuple[Any, ...]:
    """What two chains share that attacked the same images of the same model at the same radius."""
    return result.model, result.dataset, result.contest.without_attack


def rows_of(results: Path, suite: Suite) -> pd.DataFrame:
    """The table of the results below a folder.

    Raises:
        DataError: no results of the suite, or results that cannot share a table.
    """
    return table(_of_suite(results, suite), suite)


def _of_suite(results: Path, suite: Suite) -> list[Result]:
    found = result_file.of_suite(result_file.read(results), suite)
    if not found:
        do = f"run vlmrob eval --suite {suite.name}"
        raise DataError(str(results), f"no results of suite {suite.name}", "at least one", do)
    return found


def csv(table: pd.DataFrame) -> bytes:
    """The CSV: fixed columns, two decimals, line ends LF; no text in it can be run as a formula."""
    safe = table.map(lambda value: safe_text.csv(value) if isinstance(value, str) else value)
    safe.columns = [safe_text.csv(str(column)) for column in table.columns]
    return safe.to_csv(index=False, lineterminator="\n").encode()


def render(
    results: Path, suite: Suite, out: Path, *, with_bits: bool = True, gallery: Gallery | None = None
) -> tuple[pd.DataFrame, list[Path]]:
    """Write `<out>/<suite>.csv`, `.md` and `.html` from the results below a folder; returns rows and files.

    The page also says how well each result is supported, by the record of `vlmrob verify --record`.

    Args:
        results: folder of all results.
        suite: the table's.
        out: folder of the files.
        with_bits: let the HTML page hold the verdict of every image; see `page.render.html`.
        gallery: pictures that the HTML page has; None for none.

    Raises:
        DataError: nothing to render, or results that cannot share a table.
    """
    found = _of_suite(results, suite)
    made, levels = table(found, suite), verification.levels(results, found)
    options: Any = {"levels": levels, "with_bits": with_bits, "gallery": gallery}
    stem = store.file_name(suite.name)
    files = {
        out / f"{stem}.csv": csv(made),
        out / f"{stem}.md": grids.markdown(made, suite),
        out / f"{stem}.html": page.html(found, suite, made, **options),
    }
    for path, content in files.items():
        store.write(path, content)
    return made, list(files)
