"""What an iteration moves and takes beside the model: `python benchmarks/overhead.py --label NAME`.

Kernels and bytes are counted on tensors without memory (`traffic`), where the engine takes the branches of a
GPU and steps rows several times between two looks. Processor time is that of one thread, measured with a
near-free model (`profile_attacks`). The figures of a label go to FILE.jsonl in place of earlier ones of that
label; the page compares the labels `before` and `after`.
"""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from engines import Size, stages
from process import about
from profile_attacks import Linear, iterations, rows_of
from traffic import Traffic, free

from robustbench_vlm import store
from robustbench_vlm.engine.interface import Attack
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.threat import Norm, Threat

HERE = Path(__file__).parent
ROWS, COUNTED = 64, 8  # rows, and iterations that are counted
BALLS: dict[Norm, Threat] = {
    "linf": Threat("linf", Fraction(1, 12750)),
    "l1": Threat("l1", Fraction(1, 1000)),
}  # nothing breaks
NAMES = ("apgd-t", "fab-t", "square")
TIMES = {32: 40, 224: 12}  # timed iterations
DEAREST = 5

Line = dict[str, Any]


def counted(attack: Attack, ball: Threat, px: int) -> Line:
    """Kernels, bytes and image passes of an iteration, as on a GPU; and what moves most."""
    images = torch.empty(ROWS, 3, px, px, device="meta")
    labels = torch.zeros(ROWS, dtype=torch.int64, device="meta")
    oracle = Oracle(free)
    state = attack.step(attack.start(rows_of(images, labels), ball), oracle)
    with Traffic() as traffic:
        for _ in range(COUNTED):
            state = attack.step(state, oracle)
    batch = images.numel() * images.element_size() * COUNTED
    dearest = [[name, moved / batch] for name, moved in traffic.moved.most_common(DEAREST)]
    moved = sum(traffic.moved.values())
    kernels = sum(traffic.kernels.values()) / COUNTED
    return {"kernels": kernels, "gb": moved / COUNTED / 1e9, "passes": moved / batch, "dearest": dearest}


def timed(attack: Attack, ball: Threat, px: int) -> float:
    """Milliseconds of the processor that an iteration takes beside its model calls."""
    make = torch.Generator().manual_seed(0)
    images = torch.rand(ROWS, 3, px, px, generator=make)
    model = Linear(px)
    labels = model(images).argmax(1)
    step, calls, _ = iterations(attack, model, ball, images, labels, TIMES[px])
    return step - calls


def measure(label: str, norms: list[Norm]) -> list[Line]:
    """Every attack in every norm at both sizes."""
    found = []
    for norm in norms:
        for name, attack in stages(NAMES, Size(), norm):
            for px in TIMES:
                line = {"label": label, "norm": norm, "attack": name, "px": px}
                line |= counted(attack, BALLS[norm], px) | {"cpu_ms": timed(attack, BALLS[norm], px)}
                print(json.dumps(line), flush=True)
                found.append(line)
    return found


def render(heads: list[Line], found: list[Line]) -> str:
    """The two tables."""
    told = {head["label"]: head for head in heads}
    by = {(line["label"], line["norm"], line["attack"], line["px"]): line for line in found}
    keys = [key[1:] for key in by if key[0] == "after" and ("before", *key[1:]) in by]
    columns = ["norm", "attack", "px", "kernels", "GB", "image passes", "part", "CPU ms", "part"]
    out = [f"| {' | '.join(columns)} |", "|" + " --- |" * 2 + " ---: |" * (len(columns) - 2)]
    for key in keys:
        before, after = by["before", *key], by["after", *key]
        cells = [*map(str, key)]
        for field, digits in (("kernels", 0), ("gb", 3), ("passes", 1)):
            cells.append(f"{before[field]:.{digits}f} -> {after[field]:.{digits}f}")
        cells.append(f"{after['passes'] / before['passes']:.2f}")
        cells.append(f"{before['cpu_ms']:.1f} -> {after['cpu_ms']:.1f}")
        cells.append(f"{after['cpu_ms'] / before['cpu_ms']:.2f}")
        out.append(f"| {' | '.join(cells)} |")
    out += ["", "What moves most after, in image passes:", ""]
    for norm, attack, px in keys:
        if px == max(TIMES):
            dearest = by["after", norm, attack, px]["dearest"]
            parts = ", ".join(f"`{name}` {passes:.1f}" for name, passes in dearest)
            out.append(f"- {norm} {attack}: {parts}")
    commits = ", ".join(f"{label} is commit {head['commit']}" for label, head in told.items())
    facts = f"{commits}; torch {told['after']['torch']}, {told['after']['cpu']}, one thread."
    return "\n".join([facts, "", *out]) + "\n"


def main() -> None:
    """Measure under a label, and write the tables once both labels are there."""
    asked = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    asked.add_argument("--label", choices=("before", "after"), required=True)
    asked.add_argument("--norms", nargs="+", default=list(BALLS), choices=list(BALLS))
    asked.add_argument("--out", type=Path, default=HERE / "overhead.jsonl")
    what = asked.parse_args()
    what.device = "cpu"
    torch.set_num_threads(1)
    head = about(what) | {"label": what.label}
    known = list(store.records(what.out)) if what.out.exists() else []
    kept = [line for line in known if line["label"] != what.label]
    lines = [*kept, head, *measure(what.label, what.norms)]
    what.out.unlink(missing_ok=True)
    for line in lines:
        store.append(what.out, line)
    heads = [line for line in lines if "commit" in line]
    if len(heads) == 2:
        print(render(heads, [line for line in lines if "attack" in line]))


if __name__ == "__main__":
    main()
