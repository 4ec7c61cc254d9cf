"""Cells -> rows -> CSV and Markdown: a view, rendered from verdict counts alone; same cells, same bytes.

Rows stand in one column only when suite, subset, threat and attack are provably the same: every such field
is in the row, and cells that disagree about a dataset's images are refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import pandas as pd

from robustbench_vlm import stats, store, verdicts
from robustbench_vlm.cards import Suite
from robustbench_vlm.errors import DataError
from robustbench_vlm.threat import Threat

SCHEMA = "vlmrob-leaderboard/1"
CELL = "vlmrob-cell/1"
MISSED = 0.002  # share of images that PGD broke and a stronger chain did not, from which a row is flagged

HASHED = frozenset({"config", "outcome", "model", "stages"})  # what the fingerprint of a cell is taken of

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One result file."""

    path: Path
    content: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        """What decided the outcome."""
        config: Mapping[str, Any] = self.content["config"]
        return config

    @property
    def outcome(self) -> Mapping[str, Any]:
        """Counts of verdicts."""
        outcome: Mapping[str, Any] = self.content["outcome"]
        return outcome

    @property
    def contest(self) -> tuple[str, ...]:
        """What two cells must share to be compared: attack, threat, images drawn, precision."""
        c = self.config
        shared = (
            "attack",
            "attack_sha256",
            "norm",
            "eps",
            "n_requested",
            "seed",
            "split",
            "precision",
            "engine",
        )
        marks = (str(c.get("protocol", "")), str(c.get("subset", "")))
        return (*(str(c[name]) for name in shared), ",".join(c["eps_ladder"]), *marks)

    @property
    def model(self) -> tuple[str, str]:
        """Name and fingerprint."""
        return self.config["model"], self.config["model_sha256"]

    @property
    def stages(self) -> list[str]:
        """Names of the chain's stages, in order."""
        return [stage["name"] for stage in self.content["stages"]]

    @property
    def threat(self) -> Threat:
        """The ball."""
        return Threat(self.config["norm"], Fraction(self.config["eps"]))

    def verdicts(self) -> pd.DataFrame:
        """The verdict table beside the cell, held to the fingerprint in it.

        Raises:
            DataError: the file is missing, or is not the one that the cell was counted from.
        """
        path = self.path.with_suffix(".parquet")
        do = f"delete {self.path} and run the same eval again"
        try:
            found = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise DataError(str(path), f"unreadable ({error})", "the verdicts of the cell", do) from None
        if verdicts.sha256(found) != self.outcome["verdicts_sha256"]:
            raise DataError(str(path), "other verdicts than the cell was counted from", do=do)
        return found


def read(results: Path) -> list[Cell]:
    """Every cell below `results`, in order of path.

    Raises:
        DataError: a JSON file there is no cell, or its content is not what its fingerprint says.
    """
    return [_read(path) for path in sorted((results / "cells").rglob("*.json"))]


def _read(path: Path) -> Cell:
    content = store.read_json(path)
    if not isinstance(content, dict) or content.get("schema") != CELL or not content.keys() >= HASHED:
        raise DataError(str(path), "not a result cell", CELL, "move it out of the results folder")
    if content.get("sha256") != store.fingerprint({name: content[name] for name in HASHED}):
        do = "delete it and run the same eval again"
        raise DataError(str(path), "its content does not match its fingerprint", "it as it was written", do)
    return Cell(path, content)


def of_suite(cells: Iterable[Cell], suite: Suite) -> list[Cell]:
    """The cells that belong to `suite`, by its datasets, split and seed; in the order of its datasets.

    Raises:
        DataError: two cells of one contest saw different images of a dataset.
    """
    chosen = [
        cell
        for cell in cells
        if cell.config["dataset"] in suite.datasets
        and (cell.config["split"], cell.config["seed"]) == (suite.split, suite.seed)
        and cell.config.get("subset", "") == (suite.subset and (suite.subset_sha256 or suite.subset))
    ]
    chosen.sort(key=lambda cell: suite.datasets.index(cell.config["dataset"]))
    drawn: dict[tuple[Any, ...], Cell] = {}
    for cell in chosen:
        same = ("subset_sha256", "images_sha256", "names_sha256", "templates_sha256")
        first = drawn.setdefault((cell.contest, cell.config["dataset"]), cell)
        for name in same:
            if first.config[name] != cell.config[name]:
                raise DataError(
                    str(cell.path),
                    f"{name} is {cell.config[name][:12]}",
                    f"{first.config[name][:12]} as in {first.path}",
                    "results on different data cannot share a table: keep one of them",
                )
    return chosen


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


def _place(cell: Cell) -> tuple[Any, ...]:
    """What two attacks must have in common to have seen the same images and the same model."""
    fields = ("dataset", "norm", "eps", "n_requested", "seed", "split", "precision", "engine")
    marks = ("protocol", "subset")  # with other sentences, or on another canvas
    return cell.model, *(cell.config[name] for name in fields), *(cell.config.get(name, "") for name in marks)


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
