"""The bytes of the page: a template, one stylesheet, one script, and the values as JSON between them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from robustbench_vlm import safe_text
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.results import grids
from robustbench_vlm.results.page.content import Content
from robustbench_vlm.results.page.gallery import Gallery
from robustbench_vlm.results.result_file import Result

SCRIPTS = (
    *("numbers.js", "ranking.js", "dom.js", "state.js", "table.js", "controls.js"),
    *("drawing.js", "figures.js", "compare.js", "model.js", "export.js", "start.js"),
)
"""Files of the script, in the order in which they are joined."""

QUOTING = re.compile(r"[\"'`/]")
BLANKS = re.compile(r" ?([=*<>?:,;{}()&|!]+) ?")

FIGURES = {
    "clean-robust": "Clean against robust accuracy, with 95 % intervals; dashed: the Pareto front",
    "robust-radius": "Robust accuracy against the radius",
    "by-attack": "Which attack broke how many images",
    "by-iteration": "Broken images by the iteration at which their stage succeeded",
}
"""Name and caption of each figure; the last one needs verdicts."""

MOST_BYTES = 8_000_000
"""A page whose verdicts would make it larger is written without them."""


def html(
    results: Sequence[Result],
    suite: Suite,
    table: pd.DataFrame,
    *,
    levels: Mapping[str, str] = MappingProxyType({}),
    with_bits: bool = True,
    gallery: Gallery | None = None,
) -> bytes:
    """The page of a suite; the same results give the same bytes.

    Args:
        results: of the suite, at least one; see `result_file.of_suite`.
        suite: the page's.
        table: the rows of the leaderboard of the same results.
        levels: how well results are supported; see `Content`.
        with_bits: include the verdict of every image, from which the page computes tests and ranks; they are
            left out all the same where they would make the page larger than `MOST_BYTES`.
        gallery: which pictures of broken images it has; None for none.
    """
    content = Content(suite, table, levels=levels, with_bits=with_bits, gallery=gallery).of(results)
    made = _page(content, suite, table)
    if with_bits and len(made) > MOST_BYTES:
        return html(results, suite, table, levels=levels, with_bits=False, gallery=gallery)
    return made


def _page(content: dict[str, Any], suite: Suite, table: pd.DataFrame) -> bytes:
    code = script()
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    complete = bool(content["bits"])
    shown = table if complete else table[table.dataset.map(grids.is_mean)]
    made = (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=safe_text.line(suite.title),
            suite=safe_text.line(suite.name),
            version=suite.version,
            complete=complete,
            figures=list(FIGURES.items())[: None if complete else -1],
            script=Markup(code),  # noqa: S704 - our own file
            script_sha256=digest,
            style=Markup(_file("style.css")),  # noqa: S704 - our own file
            data=Markup(_json(content)),  # noqa: S704 - JSON in which nothing can end the element
            grids=[(safe_text.line(title), _plain(grid)) for title, grid in grids.grids(shown, "mean")],
        )
    )
    return (made + "\n").encode()


def script() -> str:
    """The whole script of the page: its files without indentation, comment lines and needless blanks."""
    lines = (line.strip() for name in SCRIPTS for line in _file(name).split("\n"))
    return "\n".join(_tight(line) for line in lines if line and not line.startswith("//"))


def _tight(line: str) -> str:
    """A line without the blanks beside its signs; one with a text or a pattern in it stays as it is."""
    return line if QUOTING.search(line) else BLANKS.sub(r"\1", line)


@cache
def _environment() -> Environment:
    loader = PackageLoader("robustbench_vlm.results.page", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True, keep_trailing_newline=False)  # fmt: skip


def _file(name: str) -> str:
    loaded, _, _ = PackageLoader("robustbench_vlm.results.page", "templates").get_source(_environment(), name)
    return loaded.strip()


def _json(content: dict[str, Any]) -> str:
    """JSON that may stand inside a script element: `<` is written by its number."""
    safe = {key: value if key == "images" else _printable(value) for key, value in content.items()}
    text = json.dumps(safe, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _printable(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """The value with every text as `safe_text.line` writes it."""
    if isinstance(value, str):
        return safe_text.line(value)
    if isinstance(value, dict):
        return {safe_text.line(str(key)): _printable(entry) for key, entry in value.items()}
    return [_printable(entry) for entry in value] if isinstance(value, list | tuple) else value


def _plain(grid: pd.DataFrame) -> dict[str, Any]:
    """A grid as names of columns and rows of texts."""
    lines = [[safe_text.line(str(name)), *entries] for name, entries in grid.T.to_dict("list").items()]
    return {"columns": [safe_text.line(str(column)) for column in grid.columns], "rows": lines}
