"""The files of a frontier study: CSV, Markdown, HTML and SVG, from its outcomes alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from robustbench_vlm import safe_text, store
from robustbench_vlm.cards.study import Study
from robustbench_vlm.results import leaderboard
from robustbench_vlm.studies.frontier import choice, outcomes, plot
from robustbench_vlm.studies.frontier.compared import compared
from robustbench_vlm.studies.frontier.outcomes import KINDS, SEEN, UNSEEN
from robustbench_vlm.studies.frontier.parts import COMMAND, Section
from robustbench_vlm.studies.frontier.perform import Places
from robustbench_vlm.studies.frontier.report import Report
from robustbench_vlm.studies.frontier.sections import sections


def write(study: Study, places: Places) -> list[Path]:
    """Write `<study>.csv`, `<study>-comparisons.csv`, `<study>.md`, `<study>.html` and `<study>.svg`.

    The same outcomes give the same bytes (of the SVG, with one version of matplotlib).
    """
    known = outcomes.read(outcomes.ledger(places.tables, study.name))
    report = Report(study, places.out, known)
    name, told, picture = store.file_name(study.name), list(sections(report)), plot.svg(report)
    content = {
        f"{name}.csv": leaderboard.csv(points(report)),
        f"{name}-comparisons.csv": leaderboard.csv(comparisons(report)),
        f"{name}.svg": picture,
        f"{name}.md": markdown(study, told),
        f"{name}.html": html(study, told, picture),
    }
    for file, text in content.items():
        store.write(places.tables / file, text)
    return [places.tables / file for file in content]


def points(report: Report) -> pd.DataFrame:
    """A row for each trial and interpolation; test accuracies stand in the rows of chosen ones."""
    rows = []
    for one in report.tried:
        front = choice.on_front(one)
        for index, found in enumerate(one.candidates):
            picked = report.made.get(one.method.name) == found
            row = {
                "method": one.method.name,
                "trial": str(found.trial.number),
                "hyperparameters": " ".join(found.trial.settings),
                "interpolation": f"{found.share:g}",
                "val_clean": f"{found.clean:.2f}",
                "val_robust": f"{found.robust:.2f}",
                "front": "yes" if index in front else "no",
                "chosen": "yes" if picked else "no",
                "seeds": "1",
            }
            row |= {f"{part}_{kind}": "" for part in (SEEN, UNSEEN) for kind in KINDS}
            if picked and report.test is not None:
                row["seeds"] = str(len(report.seeds([found], report.test)) or 1)
                for part in (SEEN, UNSEEN):
                    models = report.of_chosen(one.method.name, report.test, part)
                    values = models.points()[0] if models is not None else ()
                    row |= {f"{part}_{k}": f"{v:.2f}" for k, v in zip(KINDS, values, strict=False)}
            rows.append({**row, "recipe_sha256": found.trial.sha256})
    return pd.DataFrame(rows, dtype=object)


def comparisons(report: Report) -> pd.DataFrame:
    """A row for each statement of each comparison."""
    rows = []
    for comparison in report.study.comparison:
        pair = compared(report, comparison)
        for statement in pair.statements if pair is not None else ():
            assert pair is not None
            found = statement.estimate
            rows.append(
                {
                    "comparison": comparison.title,
                    "a": pair.a,
                    "b": pair.b,
                    "seeds": str(statement.seeds),
                    "images": str(statement.images),
                    "sets": statement.part,
                    "difference_of": statement.what,
                    "difference": f"{found.value:.3f}",
                    "low": f"{found.low:.3f}",
                    "high": f"{found.high:.3f}",
                    "p": f"{found.p:.4g}",
                }
            )
    columns = (
        "comparison",
        "a",
        "b",
        "seeds",
        "images",
        "sets",
        "difference_of",
        "difference",
        "low",
        "high",
        "p",
    )
    return pd.DataFrame(rows, columns=columns, dtype=object)


def markdown(study: Study, told: Sequence[Section]) -> bytes:
    """The page as Markdown, without the commands, which are long."""
    lines, file = [f"# {safe_text.markdown(study.title)}", ""], store.file_name(study.name)
    lines += [
        f"Made by {safe_text.code(f'vlmrob study {study.name}')}; the numbers are in `{file}.csv` and "
        f"`{file}-comparisons.csv`, and every verdict in `{file}-outcomes.jsonl`.",
        "",
    ]
    for section in told:
        lines += [f"## {safe_text.markdown(section.title)}", ""]
        for sentence in section.sentences:
            lines += [safe_text.markdown(sentence), ""]
        if section.picture:
            lines += [f"![fronts]({section.picture})", ""]
        shown = [i for i, column in enumerate(section.columns) if column != COMMAND]
        if section.columns:
            lines += ["| " + " | ".join(safe_text.markdown(section.columns[i]) for i in shown) + " |"]
            lines += ["|---" * len(shown) + "|"]
            lines += [
                "| " + " | ".join(safe_text.markdown(row[i].text) for i in shown) + " |"
                for row in section.rows
            ]
            lines += [""]
    lines += [f"- {safe_text.markdown(note)}" for note in study.notes]
    return ("\n".join(lines).rstrip() + "\n").encode()


def html(study: Study, told: Sequence[Section], picture: bytes) -> bytes:
    """The page as one HTML file; every text is escaped by the template."""
    environment = Environment(
        loader=PackageLoader("robustbench_vlm.studies.frontier"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = picture.decode()
    page = environment.get_template("frontier.html").render(
        title=safe_text.line(study.title),
        name=safe_text.line(study.name),
        sections=told,
        notes=[safe_text.line(note) for note in study.notes],
        picture=Markup(drawn[drawn.index("<svg") :]),  # noqa: S704 - matplotlib escapes its texts
    )
    return page.encode()
