"""The files of a study: tables, page and plot."""

from __future__ import annotations

from pathlib import Path

from robustbench_vlm import store
from robustbench_vlm.studies import page, plot, tables
from robustbench_vlm.studies.findings import Findings


def write(findings: Findings, out: Path) -> list[Path]:
    """Write the tables, the plot and the page of a study into `out`; returns the files.

    Without curves, `<study>.csv` has a row an arm. With curves it has a row a probe, and beside it stand
    `<study>-summary.csv` with a row an arm, `<study>-seconds.csv`, and the plot `<study>.svg`.
    """
    name, summary = store.file_name(findings.study.name), tables.csv(tables.summary(findings))
    files = {f"{name}.csv": summary}
    if findings.study.curves:
        files = {
            f"{name}.csv": tables.csv(tables.curve(findings)),
            f"{name}-summary.csv": summary,
            f"{name}-seconds.csv": tables.csv(tables.seconds(findings)),
            f"{name}.svg": plot.svg(findings),
        }
    files[f"{name}.md"] = page.markdown(findings)
    for file, content in files.items():
        store.write(out / file, content)
    return [out / file for file in files]
