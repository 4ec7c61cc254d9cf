"""Cells -> rows -> CSV and Markdown: a view, rendered from verdict counts alone; same cells, same bytes.

Rows stand in one column only when suite, subset, threat and attack are provably the same: every such field
is in the row, and cells that disagree about a dataset's images are refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import pandas as pd

from robustbench_vlm import store
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import DataError
from robustbench_vlm.results import stats, verdicts
from robustbench_vlm.results.result_file import Cell, _place, of_suite, read
from robustbench_vlm.threat import Threat

SCHEMA = "vlmrob-leaderboard/1"
MISSED = 0.002  # share of images that PGD broke and a stronger chain did not, from which a row is flagged


Row = dict[str, Any]


def table(cells: Sequence[Cell], suite: Suite) -> pd.DataFrame:
    """One row a cell and one a mean, as text exactly as the CSV has it; suite order, models by name."""
    stages = list(
        dict.fromkeys(name for cell in sorted(cells, key=lambda c: c.contest) for name in cell.stages)
    )
    pgd_only = _pgd_only(cells)
    rows: list[Row] = [_row(cell, suite, stages, pgd_only.get(cell.path)) for cell in cells]
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.contest, cell.model), []).append(cell)
    for group in groups.values():
        rows += _means(group, suite, stages)
    order = {name: i for i, name in enumerate([*suite.datasets, "mean"])}

    def place(row: Row) -> tuple[Any, ...]:
        eps = float(row["eps"])
        dataset = (order.get(row["dataset"], len(order)), row["dataset"])
        return (
            row["protocol"],
            row["norm"],
            row["attack"],
            eps,
            row["n_requested"],
            row["engine"],
            row["precision"],
            row["model_id"],
            row["checkpoint_sha256"],
            dataset,
        )

    columns = _row_names(stages)
    rows.sort(key=place)
    return pd.DataFrame(rows, columns=columns, dtype=object).fillna("")


def _row_names(stages: Sequence[str]) -> list[str]:
    """Columns of the CSV; what is the same for a whole contest stands left, what was measured right."""
    model = "model_id checkpoint_sha256 defense arch params_m train_norm train_eps"
    data = "dataset exposure split n n_requested n_classes subset_sha256 threat_space canvas_px protocol"
    attack = "attack attack_version attack_config_sha256 engine norm eps eps_ladder precision seed metric"
    clean = "clean clean_ci_low clean_ci_high"
    after = " ".join(f"robust_{stage}" for stage in stages)
    final = "robust ci_low ci_high chance pgd_only flag samples_sha256 cell_sha256 status"
    return f"schema_version suite suite_version {model} {data} {attack} {clean} {after} {final}".split()


def _row(cell: Cell, suite: Suite, stages: Sequence[str], pgd_only: int | None) -> Row:
    """One cell as text."""
    outcome, config = cell.outcome, cell.config
    n, robust = outcome["n"], outcome["robust"]
    final = robust[cell.stages[-1]]
    clean_interval, interval = stats.wilson(outcome["clean_correct"], n), stats.wilson(final, n)
    flags = set(outcome["flags"]) | ({"pgd-beats-chain"} if pgd_only and pgd_only > MISSED * n else set())
    return {
        **_shared(cell, suite),
        "dataset": config["dataset"],
        "exposure": outcome["exposure"],
        "n": n,
        "n_classes": outcome["n_classes"],
        "subset_sha256": config["subset_sha256"],
        "canvas_px": config["canvas_px"],
        "threat_space": config["canvas"],
        "clean": _percent(outcome["clean_correct"] / n),
        "clean_ci_low": _percent(clean_interval.low),
        "clean_ci_high": _percent(clean_interval.high),
        **{f"robust_{s}": _percent(robust[s] / n) if s in robust else "" for s in stages},
        "robust": _percent(final / n),
        "ci_low": _percent(interval.low),
        "ci_high": _percent(interval.high),
        "chance": _percent(outcome["majority"]),
        "pgd_only": "" if pgd_only is None else pgd_only,
        "flag": ";".join(sorted(flags)),
        "samples_sha256": outcome["verdicts_sha256"],
        "cell_sha256": cell.content["sha256"],
    }


def _shared(cell: Cell, suite: Suite) -> Row:
    """The fields that a cell's row and the mean over its group have in common."""
    config, model = cell.config, cell.content["model"]
    ladder = [Threat(config["norm"], Fraction(eps)).column for eps in config["eps_ladder"]]
    return {
        "schema_version": SCHEMA,
        "suite": suite.name,
        "suite_version": suite.version,
        "model_id": model["id"],
        "checkpoint_sha256": config["model_sha256"],
        "defense": model["defense"],
        "arch": model["arch"],
        "params_m": f"{model['parameters'] / 1e6:.3f}",
        "train_norm": model["train_norm"],
        "train_eps": model["train_eps"],
        "split": config["split"],
        "n_requested": config["n_requested"],
        "protocol": config.get("protocol", ""),
        "attack": config["attack"],
        "attack_version": config["attack_version"],
        "attack_config_sha256": config["attack_sha256"],
        "engine": config["engine"],
        "norm": config["norm"],
        "eps": cell.threat.column,
        "eps_ladder": " ".join(ladder),
        "precision": config["precision"],
        "seed": config["seed"],
        "metric": "top1",
        "status": "measured",
    }


def _means(group: Sequence[Cell], suite: Suite, stages: Sequence[str]) -> Iterable[Row]:
    """Unweighted means, only over whole sets: all of the suite, its named parts, the unseen datasets."""
    by_dataset = {cell.config["dataset"]: cell for cell in group}
    parts: dict[str, Sequence[str]] = {"mean": suite.datasets}
    parts |= {f"mean:{name}": members for name, members in suite.means.items()}
    if all(name in by_dataset for name in suite.datasets):
        unseen = [name for name in suite.datasets if by_dataset[name].outcome["exposure"] == "unseen"]
        if unseen and len(unseen) < len(suite.datasets):
            parts["mean:unseen"] = unseen
    for name, members in parts.items():
        if any(member not in by_dataset for member in members):
            continue  # a mean over a hole would be a mean over another suite
        chosen = [by_dataset[member] for member in members]
        outcomes = [cell.outcome for cell in chosen]
        clean = [o["clean_correct"] / o["n"] for o in outcomes]
        after = {s: [o["robust"][s] / o["n"] for o in outcomes] for s in chosen[0].stages}
        last = chosen[0].stages[-1]
        interval = stats.wilson_mean([(o["robust"][last], o["n"]) for o in outcomes])
        clean_interval = stats.wilson_mean([(o["clean_correct"], o["n"]) for o in outcomes])
        yield {
            **_shared(chosen[0], suite),
            "dataset": name,
            "n": sum(o["n"] for o in outcomes),
            "clean": _percent(sum(clean) / len(clean)),
            "clean_ci_low": _percent(clean_interval.low),
            "clean_ci_high": _percent(clean_interval.high),
            **{f"robust_{s}": _percent(sum(after[s]) / len(after[s])) if s in after else "" for s in stages},
            "robust": _percent(sum(after[last]) / len(after[last])),
            "ci_low": _percent(interval.low),
            "ci_high": _percent(interval.high),
            "chance": _percent(sum(o["majority"] for o in outcomes) / len(outcomes)),
            "flag": ";".join(sorted({flag for o in outcomes for flag in o["flags"]})),
        }


def _pgd_only(cells: Sequence[Cell]) -> dict[Path, int]:
    """For each cell of a chain: how many of its images a PGD cell of the same threat broke and it did not."""
    pgd: dict[tuple[Any, ...], set[str]] = {}
    for cell in cells:
        if cell.config["attack"].startswith("pgd"):
            place = _place(cell)
            found = cell.verdicts()
            pgd.setdefault(place, set()).update(found.key[found.broken_at_eps != ""])
    missed = {}
    for cell in cells:
        place = _place(cell)
        if not cell.config["attack"].startswith("pgd") and place in pgd:
            found = cell.verdicts()
            missed[cell.path] = int(found.key[verdicts.standing(found)].isin(pgd[place]).sum())
    return missed


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def csv(rows: pd.DataFrame) -> bytes:
    """The CSV: fixed columns, two decimals, LF."""
    return rows.to_csv(index=False, lineterminator="\n").encode()


def markdown(rows: pd.DataFrame, suite: Suite) -> bytes:
    """The rows for people: one table a contest, models down, datasets across, `clean / robust` in percent."""
    lines = [
        f"# {suite.title}",
        "",
        f"Suite `{suite.name}` version {suite.version}. Each entry: clean / robust, %.",
    ]
    for title, grid in grids(rows):
        lines += ["", f"## {title}", "", "| model | " + " | ".join(grid.columns) + " |"]
        lines += ["|---|" + "---|" * len(grid.columns)]
        lines += [
            f"| {model} | " + " | ".join(entries) + " |" for model, entries in grid.T.to_dict("list").items()
        ]
    return ("\n".join(lines) + "\n").encode()


def grids(rows: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame]]:
    """(title, models x datasets grid of `clean / robust`) of each contest, most robust model first."""
    if rows.empty:
        return
    names = ["protocol", "norm", "eps", "attack", "n_requested"]
    exact = ["split", "seed", "precision", "engine", "attack_config_sha256", "eps_ladder"]
    kinds = rows[[*names, *exact]].drop_duplicates().itertuples(index=False, name=None)
    alike = Counter(kind[: len(names)] for kind in kinds)
    for kind, part in rows.groupby([*names, *exact], sort=False):
        protocol, norm, eps, attack, n, _, _, precision, engine, sha, ladder = cast("tuple[str, ...]", kind)
        remark = f" · chain {sha[:6]}, radii {ladder}" if alike[kind[: len(names)]] > 1 else ""
        if not engine.startswith("native/") or precision != "fp32":
            remark += f" · {engine}, {precision}"
        remark += f" · protocol {protocol}" if protocol else ""
        entries = part.assign(
            entry=part.clean + " / " + part.robust + part.flag.map(lambda flag: " !" if flag else ""),
            row=part.model_id + part.checkpoint_sha256.map(lambda sha: f" ({sha[:6]})"),
        )
        grid = entries.pivot_table(
            index="row", columns="dataset", values="entry", aggfunc="first", sort=False
        )
        strength = part.assign(row=entries.row, value=part.robust.astype(float)).groupby("row").value.mean()
        grid = grid.loc[strength.sort_values(ascending=False, kind="stable").index].fillna("")
        radius = f"{eps}/255" if norm == "linf" else eps
        yield f"{attack} · {norm} {radius} · n = {n or 'all'}{remark}", grid


def render(results: Path, suite: Suite, out: Path) -> tuple[pd.DataFrame, list[Path]]:
    """Write `<out>/<suite>.csv` and `.md` from the cells below `results`; returns the rows and the files.

    Raises:
        DataError: nothing to render, or cells that cannot share a table.
    """
    cells = of_suite(read(results), suite)
    if not cells:
        do = f"run vlmrob eval --suite {suite.name}"
        raise DataError(str(results), f"no results of suite {suite.name}", "at least one cell", do)
    rows = table(cells, suite)
    files = {out / f"{suite.name}.csv": csv(rows), out / f"{suite.name}.md": markdown(rows, suite)}
    for path, content in files.items():
        store.write(path, content)
    return rows, list(files)
