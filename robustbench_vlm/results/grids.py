"""Leaderboard rows for people: one grid a contest, and the Markdown page made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pandas as pd

from robustbench_vlm import safe_text
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.results import contest, flags

RANK = "rank"
"""Column of a grid with rank set and tie groups."""


def grids(rows: pd.DataFrame, intervals: str = "") -> Iterator[tuple[str, pd.DataFrame]]:
    """Title and grid of each contest: models down, means and then datasets across.

    Each entry is `clean / robust` in percent; `!` marks a number of which a check failed. The models stand in
    one order in all grids, the one with the largest average robust accuracy first. Where there are
    several, the first column has the rank set and the tie groups of each model, by the mean over the suite or
    the only dataset.

    Args:
        rows: of a leaderboard.
        intervals: beginning of the names of the datasets whose entries get the 95 % interval of robust
            accuracy; by default every entry has one.
    """
    if rows.empty:
        return
    columns = list(contest.COLUMNS)
    kinds = rows[columns].drop_duplicates()
    alike = Counter(kinds[list(contest.TITLE)].itertuples(index=False, name=None))
    names = _names(rows)
    strength = rows.robust.astype(float).groupby(names).mean().sort_values(ascending=False, kind="stable")
    for values, part in rows.groupby(columns, sort=False):
        shared = dict(zip(columns, values, strict=True))
        ambiguous = alike[tuple(shared[name] for name in contest.TITLE)] > 1
        title = contest.table_title(shared, n=_drawn(part), ambiguous=ambiguous)
        yield title, _grid(part, list(strength.index), intervals)


def _names(rows: pd.DataFrame) -> pd.Series[str]:
    return rows.model_id + rows.checkpoint_sha256.map(lambda sha: f" ({sha[:6]})")


def _drawn(rows: pd.DataFrame) -> str:
    """Number of images of a dataset as drawn, and what was asked for where that is more."""
    requested = int(rows.n_requested.iloc[0])
    sizes = sorted({int(n) for n in rows.n[rows.cell_sha256 != ""]})
    if not sizes:
        return str(requested or "all")
    drawn = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    if not requested:
        return f"{drawn} (all)"
    return drawn if sizes == [requested] else f"{drawn} (of {requested} asked for)"


def _grid(rows: pd.DataFrame, order: list[str], intervals: str) -> pd.DataFrame:
    """The rows of one contest as a grid, the models in a given order."""
    flagged = rows.flag.map(lambda flag: " !" if flags.failed(flag) else "")
    limits = (" [" + rows.ci_low + ", " + rows.ci_high + "]").where(
        rows.dataset.str.startswith(intervals), ""
    )
    rows = rows.assign(entry=rows.clean + " / " + rows.robust + limits + flagged, row=_names(rows))
    grid = rows.pivot_table(index="row", columns="dataset", values="entry", aggfunc="first", sort=False)
    means_first = sorted(grid.columns, key=lambda name: not is_mean(name))
    grid = grid.loc[[name for name in order if name in grid.index], means_first].fillna("")
    ranks = _ranks(rows)
    if len(ranks):
        grid.insert(0, RANK, ranks.reindex(grid.index).fillna(""))
    return grid


def _ranks(rows: pd.DataFrame) -> pd.Series[str]:
    """The rank of each row's model, by the mean or else by the only dataset; empty where there is none."""
    names = set(rows.dataset)
    by = "mean" if "mean" in names else names.pop() if len(names) == 1 else ""
    ranked = rows[(rows.dataset == by) & (rows.rank_low != "")]
    return pd.Series(
        [
            (f"{low}" if low == high else f"{low} to {high}") + f", {group}"
            for low, high, group in zip(ranked.rank_low, ranked.rank_high, ranked.tie_group, strict=True)
        ],
        index=ranked.row,
        dtype=object,
    )


def is_mean(dataset: str) -> bool:
    """Whether the entry `dataset` of a row is the name of a mean over datasets."""
    return dataset == "mean" or dataset.startswith("mean:")


def markdown(rows: pd.DataFrame, suite: Suite) -> bytes:
    """The page of a suite."""
    code = suite.name.replace("`", "'")
    lines = [
        f"# {safe_text.markdown(suite.title)}",
        "",
        f"Suite `{safe_text.line(code)}` version {suite.version}. Each entry: clean / robust, %; of a mean "
        f"with the 95 % interval of robust accuracy. `{safe_text.line(code)}.csv` has every interval.",
        *_rank_note(rows),
        *_stratified_note(suite),
        *_per_class_note(rows),
        *_flag_note(rows),
    ]
    for title, grid in grids(rows, "mean"):
        columns = [safe_text.markdown(str(column)) for column in grid.columns]
        lines += ["", f"## {safe_text.markdown(title)}", "", "| model | " + " | ".join(columns) + " |"]
        lines += ["|---|" + "---|" * len(grid.columns)]
        lines += [
            f"| {safe_text.markdown(str(model))} | " + " | ".join(entries) + " |"
            for model, entries in grid.T.to_dict("list").items()
        ]
    lines += [f"\n{safe_text.markdown(note)}." for note in ladder_notes(rows)]
    return ("\n".join(lines) + "\n").encode()


def _rank_note(rows: pd.DataFrame) -> list[str]:
    """How ranks are meant, where there are any."""
    if not (rows.rank_low != "").any():
        return []
    return [
        "",
        f"`{RANK}`: the ranks that a model may have, from paired tests of all pairs of the table together "
        "(Holm, 5 %), and its tie groups. Models that share a letter are tied; their order in the table "
        "says nothing about them.",
    ]


def _stratified_note(suite: Suite) -> list[str]:
    """That intervals are wider than need be where images are drawn class by class."""
    if suite.sample != "stratified":
        return []
    return [
        "",
        "Images are drawn class by class in turn. Intervals and tests take them for drawn at random, "
        "which makes them wider and more cautious than they need to be.",
    ]


def ladder_notes(rows: pd.DataFrame) -> Iterator[str]:
    """A sentence for each attack and radius with several tables because of smaller radii before it."""
    others = [name for name in contest.COLUMNS if name != "eps_ladder"]
    for values, part in rows.groupby(others, sort=False) if not rows.empty else ():
        ladders = list(dict.fromkeys(part.eps_ladder))
        if len(ladders) > 1:
            shared = dict(zip(others, values, strict=True))
            tables = " and ".join(f"({ladder.replace(' ', ', ')})" for ladder in ladders)
            name = f"{shared['attack']} at {shared['norm']} {shared['eps']}"
            yield (
                f"{name} has {len(ladders)} tables, for the radii {tables}: an image that is broken at a "
                "smaller radius counts as broken at a larger one, so radii in a row are another attack than "
                "the last one alone, even where the verdicts agree"
            )


def _flag_note(rows: pd.DataFrame) -> list[str]:
    """What the flags say, where there are any: failed checks, then facts."""
    failed = [f"- {line}" for line in flags.legend(rows, "failed")]
    facts = [f"- {line}" for line in flags.legend(rows, "fact")]
    note = [
        "",
        "`!` marks a number of which a check failed, so that it may be wrong:",
        "",
        *failed,
    ]
    known = ["", "Facts about what was measured:", "", *facts]
    return [*(note if failed else []), *(known if facts else [])]


def _per_class_note(rows: pd.DataFrame) -> list[str]:
    """A line that names the datasets whose makers report the mean over classes."""
    names = list(dict.fromkeys(rows.dataset[rows.clean_per_class != ""]))
    if not names:
        return []
    listed = safe_text.markdown(", ".join(names))
    where = "columns `clean_per_class` and `robust_per_class` of the CSV"
    return [
        "",
        f"All numbers are top-1. The makers of {listed} report the mean over classes: {where}.",
    ]
