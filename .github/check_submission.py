"""Verify the submissions that a pull request adds, render their rows, and write the comment.

    python .github/check_submission.py FOLDER... --seed 7 --out comment.md

Exits with the highest exit code of `vlmrob verify`: 0, 3 where something claimed does not hold, 2 where it
cannot be checked here, for example because the weights are not at hand.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path, PurePosixPath

from robustbench_vlm import safe_text

PLACE = ("leaderboards", "submissions")
LARGEST = 60_000  # characters of a comment; GitHub takes 65,536
SHOWN = 20  # faults that are listed
CANNOT = 2


def main(words: list[str]) -> int:
    """Check every folder; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders of submissions")
    parser.add_argument("--changed", type=Path, help="file with the changed paths, separated by NUL")
    parser.add_argument("--root", type=Path, default=Path(), help="folder to which these paths are relative")
    parser.add_argument("--seed", required=True, help="by which survivors are drawn; any text")
    parser.add_argument("--share", default="2%", help="of the survivors that are attacked again")
    parser.add_argument("--out", type=Path, default=Path("comment.md"), help="where to write the comment")
    parser.add_argument("--model", action="append", default=[], help="as for vlmrob verify")
    parser.add_argument("--include", action="append", default=[], help="as for vlmrob")
    parser.add_argument("--data-root", default="data", help="as for vlmrob verify")
    options = parser.parse_args(words)
    folders, foreign = list(options.folders), []
    if options.changed:
        changed = [name for name in options.changed.read_text().split("\0") if name]
        folders += [options.root / name for name in submitted(changed)]
        foreign = [name for name in changed if PurePosixPath(name).parts[:2] != PLACE]
    parts, code = [], 0
    for folder in folders:
        text, result = check(folder, options)
        parts.append(text)
        code = max(code, result)
    if foreign:
        names = "\n".join(f"- {safe_text.code(name)}" for name in foreign[:SHOWN])
        parts.append(f"Beside submissions this changes {len(foreign)} files:\n\n{names}\n")
    if not folders:
        parts.append("No submission was found below `leaderboards/submissions/`.\n")
        code = max(code, CANNOT)
    options.out.write_text("\n".join(parts)[:LARGEST], encoding="utf-8")
    return code


def submitted(changed: list[str]) -> list[str]:
    """The folders `leaderboards/submissions/NAME` that have changed files."""
    parts = [PurePosixPath(name).parts for name in changed]
    return sorted({"/".join(p[:3]) for p in parts if p[:2] == PLACE and len(p) > 3 and ".." not in p})


def check(folder: Path, options: argparse.Namespace) -> tuple[str, int]:
    """Verify one submission: the part of the comment about it, and the exit code."""
    where = [word for folder in options.include for word in ("--include", folder)]
    models = [word for name in options.model for word in ("--model", name)]
    seed = str(int.from_bytes(options.seed.encode()) % 2**31)
    words = ["verify", str(folder), "--json", "--reattack", options.share, "--seed", seed]
    done = vlmrob(*words, *models, *where, "--data-root", options.data_root, "--device", "auto")
    title = f"## {safe_text.markdown(folder.name)}"
    try:
        report = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.strip().splitlines()[-1:] or ["no output"]
        advice = "A maintainer who has the weights can type: "
        return (
            f"{title}\n\n**Not checked.** {safe_text.code(said[0])}\n\n{advice}"
            f"{safe_text.code(f'vlmrob verify {folder} --model FOLDER')}\n",
            done.returncode or CANNOT,
        )
    lines = [title, "", "**Verified.**" if report["passed"] else "**Not accepted.**", ""]
    lines += [f"- {safe_text.code(fault)}" for fault in report["faults"][:SHOWN]]
    more = len(report["faults"]) - SHOWN
    lines += [f"- and {more} more"] if more > 0 else []
    lines += ["", *counted(report), *rendered(folder, where)]
    lines += ["", "Not shown by this check:", "", *[f"- {text}" for text in report["unknown"]], ""]
    return "\n".join(lines), done.returncode


def counted(report: dict) -> list[str]:
    """How many results have which status, and what a second attack would have found."""
    states = [cell["status"] for cell in report["cells"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted({*states}))
    lines = [f"{len(states)} results: {counts}."]
    drawn = report["reattack"]
    if drawn:
        chances = ", ".join(
            f"{float(share):.0%} forged: {chance:.0%}" for share, chance in drawn["detection"].items()
        )
        lines.append(
            f"{drawn['drawn']} of {drawn['survivors']} survivors were attacked again, seed {drawn['seed']}. "
            f"Chance of finding one of them forged, by share: {chances}."
        )
    return lines


def rendered(folder: Path, where: list[str]) -> list[str]:
    """The tables of the submission, rendered from its results."""
    lines: list[str] = []
    for csv in sorted(folder.glob("*.csv")):
        with tempfile.TemporaryDirectory() as out:
            words = ["leaderboard", "--results", str(folder), "--suite", csv.stem, "--out", out]
            done = vlmrob(*words, *where)
            made = Path(out) / f"{csv.stem}.md"
            if done.returncode == 0 and made.is_file():
                lines += ["", made.read_text(encoding="utf-8")]
            else:
                lines += ["", f"No table of {safe_text.code(csv.stem)}: {safe_text.code(done.stderr[-300:])}"]
    return lines


def vlmrob(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the package that is installed."""
    command = [sys.executable, "-m", "robustbench_vlm", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
