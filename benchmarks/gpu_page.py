"""The page of `gpu.sh`, from the lines that its parts have written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import table
import training_table

from robustbench_vlm import store

Line = dict[str, Any]

HEAD = """# On a GPU

`bash benchmarks/gpu.sh` measures what this page is about in at most seven minutes on one large GPU: the tests
that need one; our AutoAttack beside pyautoattack and torchattacks on a {arch} at {px} px, in fp32, TF32 and
bf16, with {rows} rows; a training step of MMT-ARD of a {arch} from two {teacher}.
"""
NONE = """
**No GPU was at hand**: nothing below was measured on one. The script itself was tried with
`DEVICE=cpu bash benchmarks/gpu.sh`, which takes the smallest sizes, and the tests do the same.
"""
ATTACKS = """
The chain of AutoAttack with {steps} steps, {queries} queries and {targets} targets (its own are 100, 5,000
and 9), random weights, Linf, on images that are labelled with the model's own predictions. *Share* is how
many of {looked} images a short attack leaves at the radius. All measurements are made in one process, one
after the other. *Over floor* is the time of ours over that of bare model calls of the same number, kind and
shape.
*It / ours* compares times with ours of the same rows, share and precision. Ours in bf16 finds in bf16 and
computes verdicts in fp32; it is compared with ours in fp32.

| rows | precision | share | images | engine | robust | wall s | images/s | it / ours | over floor | MiB |
| ---: | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def file_of(folder: Path, part: str) -> Path:
    """The file to which a part appends its lines."""
    return folder / f"gpu-{part}.jsonl"


def render(folder: Path, size: Line, planned: Mapping[tuple[Any, ...], Line]) -> str:
    """The whole page.

    Args:
        folder: of the parts' files; one that is not there was not measured.
        size: of the benchmark.
        planned: what the part `attacks` measures, by rows, share and engine.
    """
    parts = {name: _lines(folder, name) for name in ("tests", "attacks", "training")}
    heads = [lines[0] for lines in parts.values() if lines]
    on_gpu = any(head["device"] != "cpu" for head in heads)
    rows = ", ".join(map(str, sorted(size["rows"])))
    out = [HEAD.format(arch=size["arch"], px=size["px"], rows=rows, teacher=size["teacher"])]
    out += [] if on_gpu else [NONE]
    if heads:
        head = heads[0]
        out += [
            f"\nCommit {head['commit']}; torch {head['torch']}; {head['cpu']}; device {head['device']}.\n"
        ]
    if parts["tests"]:
        line = parts["tests"][1]
        out += [f"\n## Tests\n\n`pytest -m gpu`: {line['said']} (exit {line['exit']}).\n"]
    if parts["attacks"]:
        out += ["\n## Attacks\n", *_attacks(parts["attacks"], size, planned)]
    if len(parts["training"]) > 1:
        text = training_table.render(parts["training"])
        out += ["\n## A training step\n", text.partition("\n")[2]]
    return "".join(out).rstrip() + "\n"


def _lines(folder: Path, part: str) -> list[Line]:
    path = file_of(folder, part)
    return list(store.records(path)) if path.exists() else []


def _attacks(lines: list[Line], size: Line, planned: Mapping[tuple[Any, ...], Line]) -> list[str]:
    found = {(line["rows"], line["share"], line["engine"]): line for line in lines if "engine" in line}
    out = [ATTACKS.format(**size["size"], looked=size["looked"])]
    for (rows, share, engine), line in found.items():
        name, _, _ = engine.partition(" ")
        mode = "" if line["precision"] in ("fp32", "bf16") else f" {line['precision']}"
        ours = found.get((rows, share, f"ours{mode}"))
        over = ratio = ""
        if name == "ours" and line["bare"]["wall"]:
            over = f"{line['wall'] / table.counted(line, 'wall'):.2f}"
        if ours is not None and line is not ours:
            ratio = f"{line['wall'] / ours['wall']:.2f}"
        cells = [rows, line["precision"], f"{100 * share:.0f} %", line["n"], name, line["robust"]]
        cells += [f"{line['wall']:.2f}", f"{line['n'] / line['wall']:.1f}", ratio, over, f"{line['mib']:.0f}"]
        out.append(f"| {' | '.join(map(str, cells))} |\n")
    missing = [f"{rows} rows {100 * share:.0f} % {engine}" for rows, share, engine in planned.keys() - found]
    if missing:
        out.append(f"\nNot measured, for lack of time: {', '.join(sorted(missing))}.\n")
    return out
