"""What few images cost beside the reference; writes `few_images.md`, with the command that made it.

Each measurement is a process of its own, which attacks once: by the public call, checks of the model
included, and by pyautoattack (PGD: by torchattacks, since pyautoattack has none). Both get the same images,
which the model classifies correctly, in one batch.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import open_clip
import torch
from process import Line, about, alone
from torch import Tensor, nn
from torch.nn import functional

from robustbench_vlm import attack
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.models import zoo
from robustbench_vlm.models.clip import Classifier
from robustbench_vlm.models.text_bank import render, text_bank

MOST = 1.3  # times the reference
NOISE = {"mib": 8.0}  # that does not count: allocators round
EPS = ("1/2550", "4/255")  # that break nothing, and everything at once
KINDS = ("apgd", "pgd", "chain")
BACKWARD = 1.2  # of a backward pass, in forward passes
APGD = """
[[stage]]
name = "apgd-{loss}"
attack = "apgd"
loss = "{loss}"
steps = {steps}
rho = 0.75
restarts = 1
targets = {targets}
"""
PGD = """
[[stage]]
name = "pgd"
attack = "pgd"
loss = "ce"
steps = {steps}
step_size = "1/255"
restarts = 1
random_start = true
"""
REST = """
[[stage]]
name = "fab-t"
attack = "fab"
steps = {steps}
targets = {targets}
restarts = 1
alpha_max = 0.1
eta = 1.05
beta = 0.9

[[stage]]
name = "square"
attack = "square"
queries = {queries}
p = 0.8
restarts = 1
"""
TARGETS = 3


def stages(kind: str, steps: int, queries: int) -> str:
    """The stages of an attack of ours, as a card has them."""
    if kind == "pgd":
        return PGD.format(steps=steps)
    first = APGD.format(loss="ce", steps=steps, targets=0)
    if kind == "apgd":
        return first
    second = APGD.format(loss="targeted-dlr", steps=steps, targets=TARGETS)
    return first + second + REST.format(steps=steps, targets=TARGETS, queries=queries)


@dataclass
class Work:
    """Rows that went through a model."""

    forward: int = 0
    backward: int = 0

    @property
    def units(self) -> float:
        """In forward passes of one image."""
        return self.forward + BACKWARD * self.backward


class Counted(nn.Module):
    """A classifier that counts the rows of its calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.work = model, Work()

    def forward(self, images: Tensor) -> Tensor:
        self.work.forward += len(images)
        logits: Tensor = self.model(images)
        if logits.requires_grad:
            logits.register_hook(self._note)
        return logits

    def _note(self, gradient: Tensor) -> None:
        self.work.backward += len(gradient)


class Cut(nn.Module):
    """An image tower like that of ViT-B-32, cut to two layers, with random weights and 100 random classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        settings = open_clip.get_model_config("ViT-B-32")
        settings["vision_cfg"]["layers"], settings["text_cfg"]["layers"] = 2, 1
        self.tower = open_clip.model.CLIP(**settings).visual
        self.register_buffer("bank", functional.normalize(torch.randn(100, 512), dim=1))

    def forward(self, images: Tensor) -> Tensor:
        bank: Any = self.bank
        return 100 * functional.normalize(self.tower(images), dim=1) @ bank.T


def subject(name: str, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A frozen model, and n images with the labels that it gives them."""
    model: nn.Module
    if name == "vit-b-32-cut":
        model, side = Cut(), 224
    else:
        card, loaded = reader.read("datasets", "tiny-colours", DatasetCard), zoo.load(name)
        bank = text_bank(loaded.model, render(card.names, card.templates))
        model, side = Classifier(loaded.model, bank), 32
    model = model.eval().requires_grad_(False)
    images = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))
    images = functional.avg_pool2d(functional.pad(images, (2, 2, 2, 2), mode="reflect"), 5, 1)
    with torch.no_grad():
        return model, images, model(images).argmax(1)


def ours(model: nn.Module, images: Tensor, labels: Tensor, what: argparse.Namespace, kind: str) -> None:
    """The public call."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "few.toml"
        own = stages(kind, what.steps, what.queries)
        stop = "last" if kind == "pgd" else "first"
        path.write_text(f'name = "few"\ntitle = "few"\nstop = "{stop}"\n{own}')
        attack(model, images, labels, what.eps, chain=str(path))


def reference(model: nn.Module, images: Tensor, labels: Tensor, what: argparse.Namespace, kind: str) -> None:
    """The same attacks by installed packages."""
    eps = float(Fraction(what.eps))
    if kind == "pgd":
        torchattacks = importlib.import_module("torchattacks")
        torchattacks.PGD(model, eps=eps, alpha=1 / 255, steps=what.steps, random_start=True)(images, labels)
        return
    package = importlib.import_module("pyautoattack")
    base = importlib.import_module("pyautoattack.autopgd_base")
    common = {"norm": "Linf", "eps": eps, "device": "cpu", "seed": 0}
    chain = package.AutoAttack(model, version="standard", **common)
    chain.logger.setLevel(logging.ERROR)
    more = {"n_iter": what.steps, "logger": chain.logger, **common}
    chain.apgd = base.APGDAttack(model, n_restarts=1, eot_iter=1, rho=0.75, **more)
    chain.apgd_targeted = base.APGDAttack_targeted(model, n_target_classes=TARGETS, **more)
    chain.fab.n_iter, chain.fab.n_target_classes = what.steps, TARGETS
    chain.square.n_queries = what.queries
    chain.attacks_to_run = ["apgd-ce"] if kind == "apgd" else ["apgd-ce", "apgd-t", "fab-t", "square"]
    chain.run_standard_evaluation(images, labels, batch_size=len(images))


Attacker = Callable[[nn.Module, Tensor, Tensor, argparse.Namespace, str], None]


def measured(attacker: Attacker, what: argparse.Namespace, name: str, kind: str, n: int) -> dict[str, float]:
    """Rows, processor seconds and memory of one attack; called in a process of its own."""
    torch.set_num_threads(1)
    for package in ("pandas", "pyautoattack", "torchattacks"):  # what is loaded later is no cost of an attack
        importlib.import_module(package)
    model, images, labels = subject(name, n)
    with torch.enable_grad():
        leaf = images[:1].clone().requires_grad_()
        torch.autograd.grad(model(leaf).sum(), leaf)
    counted = Counted(model).eval()
    before, started = _memory(), time.process_time()
    attacker(counted, images, labels, what, kind)
    spent = time.process_time() - started
    return {"units": counted.work.units, "cpu": spent, "mib": max(_memory() - before, 0.0)}


def _memory() -> float:
    """The largest memory of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def compared(what: argparse.Namespace, name: str, eps: str, kind: str, n: int) -> Line:
    """Ours beside the reference, turn and turn about; of the repeats the least counts."""
    own = argparse.Namespace(**{**vars(what), "eps": eps})
    made: dict[str, list[dict[str, float]]] = {"ours": [], "reference": []}
    for _ in range(what.repeats):
        for who, attacker in (("ours", ours), ("reference", reference)):
            made[who].append(alone(partial(measured, attacker, own, name, kind, n)))
    line: Line = {"model": name, "eps": eps, "attack": kind, "n": n, "steps": what.steps}
    for who, found in made.items():
        line |= {f"{who}_{of}": min(one[of] for one in found) for of in ("units", "cpu", "mib")}
    return line


def page(lines: list[Line], head: Line, command: str) -> str:
    """The table, and which targets are missed."""
    columns = ["model", "radius", "attack", "steps", "images"]
    columns += [f"{of}: {who}" for of in ("units", "CPU s", "MiB") for who in ("ours", "reference", "ratio")]
    rows, missed = [], []
    for line in lines:
        row = [line["model"], line["eps"], line["attack"], str(line["steps"]), str(line["n"])]
        for of, most, digits in (("units", MOST, 0), ("cpu", MOST, 2), ("mib", 1.0, 0)):
            own, other = line[f"ours_{of}"], line[f"reference_{of}"]
            ratio = own / other if other else float("inf")
            row += [f"{own:.{digits}f}", f"{other:.{digits}f}", f"{ratio:.2f}"]
            if ratio > most and own - other > NOISE.get(of, 0.0):
                where = f"{line['model']}, {line['eps']}, {line['attack']}, {line['n']} images"
                missed.append(f"- {where}: {of} {ratio:.2f} times the reference, at most {most} wanted")
        rows.append(row)
    said = "\n".join(missed) if missed else "None."
    return (
        f"# What few images cost\n\n{INTRODUCTION}\n\nMade by `{command}` at commit {head['commit']}, torch "
        f"{head['torch']}, {head['cpu']}, one thread.\n\n{grid(columns, rows)}\n\n"
        f"## Targets that are missed\n\n{said}\n"
    )


def grid(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


INTRODUCTION = f"""\
One public call, checks of the model included, beside the reference on the same images in one batch:
pyautoattack, and torchattacks for PGD. A unit is a forward pass of one image; a backward pass counts as
{BACKWARD}. MiB is by how much the process grew beyond what it had with the model loaded. Wanted: at most
{MOST} times the reference's units and CPU seconds, and no more memory. Images are smoothed noise with the
labels that the model gives them. At the smaller radius nothing is broken but the first image, by
APGD; at the larger one everything is, at once. So the line of PGD, which runs to its end, says what one
robust image costs. The memory of ours has a part that is the same for all lines of the small model; what it
is was not traced.

What is fixed in a call of ours: 16 rows of the clean pass, 16 of each deciding pass, some 24 units an image
for the checks of the model, and at least 4 rows a call, since products of one to three rows round otherwise
than those of a large evaluation."""


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny", "tiny-robust-teacher"])
    parser.add_argument("--attacks", nargs="+", default=[*KINDS], choices=KINDS)
    parser.add_argument("--n", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--eps", nargs="+", default=[*EPS])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--large", type=int, default=10, help="steps on ViT-B-32 cut to two layers; 0: none")
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(device="cpu")
    what = parser.parse_args()
    small = argparse.Namespace(**{**vars(what), "steps": what.large, "repeats": 1})
    cases = [
        (what, name, eps, kind, n)
        for name, eps, kind, n in product(what.models, what.eps, what.attacks, what.n)
    ]
    cases += [(small, "vit-b-32-cut", what.eps[0], kind, 8) for kind in ("apgd", "pgd") if what.large]
    head, lines = about(what), []
    with what.out.with_suffix(".jsonl").open("w", encoding="utf-8") as file:
        for case in cases:
            lines.append(compared(*case))
            file.write(json.dumps(lines[-1]) + "\n")
            file.flush()
    command = shlex.join(["python", "benchmarks/few_images.py", *sys.argv[1:]])
    what.out.write_text(page(lines, head, command), "utf-8")


if __name__ == "__main__":
    main()
