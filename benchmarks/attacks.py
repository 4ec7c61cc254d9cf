"""Our AutoAttack beside the references: `make bench-attacks`, or `python benchmarks/attacks.py --out T.md`.

One run, one model, one set of images: for radii that leave about 0, 30 and 60 % of them robust, every attack
of the standard chain alone and the chain as a whole, by ours, pyautoattack and torchattacks. Each measurement
is a process of its own. What is measured is appended to T.jsonl at once: a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import table
import torch
from engines import CARDS, CHAIN, PACKAGES, REFERENCES, Size, judged, ours
from process import alone, begun
from subject import Subject, load, radii, threat
from watch import KINDS, Clock, Counts, Probe, Watched, bare, memory

from robustbench_vlm import store
from robustbench_vlm.engine import attacked_view, canonical
from robustbench_vlm.engine.job import Model

HERE = Path(__file__).parent
WHOLE = "chain"
CLOCKS = ("wall", "cpu")
SHARES = (0.0, 0.3, 0.6)
CANDIDATES = 4  # images that are looked at for each that is wanted, since some are misclassified

Line = dict[str, Any]


def measure(plan: Line, who: Subject) -> Line:
    """One engine on one attack at one radius; peak memory is that of the process since its start."""
    device, ball, size = who.images.device, threat(plan["eps255"], plan["norm"]), Size(**plan["size"])
    names = CHAIN if plan["attack"] == WHOLE else (plan["attack"],)
    engine, _, mode = plan["engine"].partition(" ")
    probe = Probe(canonical.padded(who.images[: who.rows], who.rows), plan["every"], whole=engine != "ours")
    counts, clock = Counts(), Clock()
    if engine in PACKAGES:
        importlib.import_module(PACKAGES[engine])
    before, _ = memory(device)
    for kind in KINDS:  # a kernel is chosen at its first call
        bare(who.model, probe.images, kind)
    run: Callable[[], Any]
    if engine == "ours":
        precision = attacked_view.Precision(**plan["precision"]) if mode else attacked_view.PLAIN
        view = attacked_view.build(who.model, precision, probe.images, who.lower)
        watched = Watched(who.model, counts, probe)
        model = Model(watched, None if view is None else Watched(view, counts, probe))
        run = partial(ours, who, model, ball, names, size)
        with attacked_view.numerics(tf32=precision.tf32):
            outcome = clock.time(run, device)
    else:
        _same_precision(tf32=plan["precision"].get("tf32", False))
        who.model.requires_grad_(mode != "frozen")
        run = partial(REFERENCES[engine], who, Watched(who.model, counts, probe), ball, names, size)
        adv = clock.time(run, device)
    _, most = memory(device)
    if engine != "ours":
        who.model.requires_grad_(False)
        outcome = judged(who, adv)
    wall, cpu = probe.spent
    return {
        **{key: plan[key] for key in ("share", "eps255", "attack", "engine")},
        "rows": who.rows,
        **asdict(counts),
        "wall": clock.wall - wall,
        "cpu": clock.cpu - cpu,
        "mib": most - before,
        "calls": [[*call, count] for call, count in probe.met.items()],
        "bare": {clock: [[*call, took] for call, took in probe.seconds(clock).items()] for clock in CLOCKS},
        "robust": outcome.broken.count(False),
        "broken": "".join("01"[lost] for lost in outcome.broken),
        "needed": outcome.needed,
        "unconfirmed": outcome.unconfirmed,
    }


def _same_precision(*, tf32: bool) -> None:
    """What ours works in: fp32 in full, or products that round to TF32."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    matmul.fp32_precision = conv.fp32_precision = "tf32" if tf32 else "ieee"


def _measure(plan: Line, what: argparse.Namespace, index: list[int], labels: list[int]) -> Line:
    """As `measure`, where the model must be loaded first."""
    torch.set_num_threads(what.threads)
    return measure(plan, load(what, index, labels))


def plans(what: argparse.Namespace, found: list[float]) -> Iterator[Line]:
    """Everything to be measured, engines next to each other so that they meet the same machine."""
    precision = {"format": what.precision, "graphs": what.graphs, "compiled": what.compiled}
    lower = "ours " + attacked_view.Precision(**precision).label
    for share, eps255 in zip(what.shares, found, strict=True):
        for attack in what.attacks:
            for engine in what.engines:
                names = [engine]
                if engine == "ours" and (what.precision != "fp32" or what.graphs or what.compiled):
                    names.append(lower + "+graphs" * what.graphs)
                if engine == "autoattack" and what.freeze_reference:
                    names = ["autoattack frozen"]
                elif engine == "autoattack" and attack == "fab-t":
                    names.append("autoattack frozen")
                for name in names:
                    yield {
                        "share": share, "norm": what.norm, "eps255": eps255, "attack": attack, "engine": name,
                        "precision": precision,
                        "size": {"steps": what.steps, "queries": what.queries, "targets": what.targets},
                        "every": what.every,
                    }  # fmt: skip


def parsed(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    asked = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = asked.add_argument
    add("--out", type=Path, default=HERE / "attacks.md", help="the table; FILE.jsonl beside it goes on")
    add("--model", default="tiny-robust-teacher")
    add("--arch", default="", help="an open_clip architecture with random weights, instead of --model")
    add("--px", type=int, default=32)
    add("--norm", default="linf", choices=tuple(CARDS), help="of the ball; torchattacks has no l1")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="bf16 adds ours, finding in bf16")
    add("--compiled", action="store_true", help="adds ours, finding through torch.compile")
    add("--graphs", action="store_true", help="adds ours, finding by CUDA graphs")
    add("--n", type=int, default=96, help="images, all classified correctly")
    add("--steps", type=int, default=100, help="of APGD and FAB")
    add("--queries", type=int, default=1000, help="of Square; the standard is 5000")
    add("--targets", type=int, default=9)
    add("--shares", type=float, nargs="+", default=SHARES, help="of images that stay robust")
    add("--radii", type=float, nargs="+", default=[], help="in 255ths, one a share; looked for if none")
    add("--attacks", nargs="+", default=[*CHAIN, WHOLE], choices=[*CHAIN, WHOLE])
    add("--engines", nargs="+", default=["ours", *REFERENCES], choices=["ours", *REFERENCES])
    add("--freeze-reference", action="store_true", help="the reference on frozen parameters throughout")
    add("--every", type=int, default=8, help="model calls between two bare ones, 0 for none")
    add("--threads", type=int, default=1)
    what = asked.parse_args(words)
    if what.radii and len(what.radii) != len(what.shares):
        asked.error(f"{len(what.radii)} --radii for {len(what.shares)} --shares")
    if what.norm == "l1" and "torchattacks" in what.engines:
        asked.error("torchattacks has no attack in L1; choose other --engines")
    if what.graphs and what.device != "cuda":
        asked.error("--graphs needs --device cuda")
    for engine in what.engines:
        if engine in PACKAGES and importlib.util.find_spec(PACKAGES[engine]) is None:
            asked.error(f"{PACKAGES[engine]} is not installed; `make bench-attacks` installs it")
    return what


def main(words: list[str] | None = None) -> None:
    """Measure what is missing, then write the table."""
    what = parsed(words)
    torch.set_num_threads(what.threads)
    lines = what.out.with_suffix(".jsonl")
    known = begun(lines, what)
    subject = load(what, range(CANDIDATES * what.n)).first(what.n)
    if len(subject.keys) < what.n:
        raise SystemExit(f"only {len(subject.keys)} of {CANDIDATES * what.n} images are right; lower --n")
    found = next((line["radii"] for line in known[1:] if "radii" in line), None)
    copied = what.device == "cpu"
    for engine in set(what.engines) & set(PACKAGES):  # in memory for all, so that none is charged for it
        importlib.import_module(PACKAGES[engine])
    if found is None:
        search = partial(radii, subject, what.shares, what.norm)
        found = what.radii or (alone(search, copied=True) if copied else search())
        store.append(lines, {"radii": found})
    done = {_name(line) for line in known[1:] if "engine" in line}
    ahead = [plan for plan in plans(what, found) if _name(plan) not in done]
    index, labels = list(subject.index), subject.labels.tolist()
    for number, plan in enumerate(ahead, 1):
        call = partial(measure, plan, subject) if copied else partial(_measure, plan, what, index, labels)
        line = alone(call, copied=copied)
        store.append(lines, line)
        print(f"{number}/{len(ahead)} {table.brief(line)}", file=sys.stderr, flush=True)
    text = table.render(list(store.records(lines)))
    store.write(what.out, text.encode())
    print(text)


def _name(line: Line) -> tuple[Any, ...]:
    return line["share"], line["attack"], line["engine"]


if __name__ == "__main__":
    main()
