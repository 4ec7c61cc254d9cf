"""What an iteration costs beside the model: `python benchmarks/profile_attacks.py [--out FILE]`.

For one step of APGD-T, FAB-T and Square over 64 rows: processor time, that of the same model calls alone, and
the difference, which is bookkeeping; then the operators that take most of it. With a near-free model (one
matrix product) at 32 and at 224 pixels, and with the tiny CLIP. The last line of each block at 32 pixels is
the whole engine, with refilling and verdicts, per model call.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engines import Size, stages
from subject import ROWS, Subject, load, threat
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from watch import Clock, Counts, Probe, Watched, bare

from robustbench_vlm.engine import canonical, scheduler
from robustbench_vlm.engine.interface import Attack, Rows
from robustbench_vlm.engine.job import ImageBlock, Job, Model
from robustbench_vlm.engine.noise import Keyed
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.threat import Threat
from robustbench_vlm.types import Classify

STAGES = ("apgd-t", "fab-t", "square")
EPS = 0.02  # 255ths: small, so that no row is broken and all go on
WARM, STEPS, TRACED = 12, 40, 10
TOP = 15
WHOLE = Size(steps=100, queries=1000, targets=2)  # where the whole engine is timed
EVERY = 4  # calls between two bare ones


class Linear(nn.Module):
    """A near-free model: ten random directions. Its gradient is dense, as a network's is."""

    def __init__(self, px: int) -> None:
        super().__init__()
        draw = torch.randn(3 * px * px, 10, generator=torch.Generator().manual_seed(0))
        self.register_buffer("weight", draw / px)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 10)."""
        return images.flatten(1) @ self.weight


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call: of the processor, or until a GPU is done."""
    if device.type != "cuda":
        started = time.process_time()
        call()
        return 1e3 * (time.process_time() - started)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def rows_of(images: Tensor, labels: Tensor) -> Rows:
    """Rows of a targeted attack on images, each with noise of its own."""
    names = tuple(f"0/{i}/profile/0/0" for i in range(len(images)))
    return Rows(images, labels, (labels + 1) % 10, Keyed(names), (0,) * len(images))


def iterations(
    attack: Attack, classify: Classify, ball: Threat, images: Tensor, labels: Tensor, times: int = STEPS
) -> tuple[float, float, Callable[[], None]]:
    """What an iteration costs.

    Returns:
        Milliseconds of an iteration and of its model calls alone, and a function that makes one more
        iteration. They are medians, taken turn and turn about, so that a change of the machine's speed meets
        both.
    """
    oracle = Oracle(classify)
    state = attack.start(rows_of(images, labels), ball)
    for _ in range(WARM):
        state = attack.step(state, oracle)
    forwards, gradients = oracle.calls.forwards // WARM, oracle.calls.gradients // WARM
    spent: list[list[float]] = [[], []]

    def iterate() -> None:
        nonlocal state
        state = attack.step(state, oracle)

    def alone() -> None:
        for kind in ["forward"] * forwards + ["gradient"] * gradients:
            bare(classify, images, kind)

    for _ in range(times):
        spent[0].append(timed(iterate, images.device))
        spent[1].append(timed(alone, images.device))
    step, model = map(statistics.median, spent)
    return step, model, iterate


def steps(attack: Attack, classify: Classify, images: Tensor, labels: Tensor) -> list[str]:
    """A line with the costs of an iteration, then its dearest operators."""
    step, model, iterate = iterations(attack, classify, threat(EPS), images, labels)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + images.is_cuda]) as trace:
        for _ in range(TRACED):
            iterate()
    head = f"{step:8.2f} ms an iteration, model calls alone {model:.2f}, bookkeeping {step - model:.2f}"
    return [head, *operators(trace, cuda=images.is_cuda)]


def operators(trace: profile, *, cuda: bool) -> list[str]:
    """The dearest operators of an iteration, those of the model included."""
    kind = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = sorted(trace.key_averages(), key=lambda event: -getattr(event, kind))
    own = [event for event in found if not event.key.startswith(("ProfilerStep", "cudaDevice"))]
    lines = [
        f"{getattr(event, kind) / 1e3 / TRACED:10.3f} ms {event.count / TRACED:7.1f} x  {event.key[:60]}"
        for event in own[:TOP]
    ]
    total = sum(getattr(event, kind) for event in own) / 1e3 / TRACED
    count = sum(event.count for event in own) / TRACED
    return [*lines, f"{total:10.3f} ms {count:7.1f} x  all {len(own)} operators"]


def whole(name: str, classify: Classify, images: Tensor, labels: Tensor, n_classes: int) -> str:
    """Milliseconds of the engine for every model call that it makes, beside those of the calls alone."""
    counts, probe, clock = Counts(), Probe(images, EVERY), Clock()
    watched = Watched(classify, counts, probe)

    def run() -> None:
        keys = [str(i) for i in range(len(images))]
        job = Job(stages([name], WHOLE), threat(EPS), ROWS, n_classes, ROWS)
        scheduler.run(Model(watched), job, [ImageBlock(images, labels, keys)], lambda _: None)

    clock.time(run, images.device)
    took = clock.cpu - probe.spent[1]
    each = probe.seconds("cpu")
    alone = sum(count * each[call] for call, count in probe.met.items())
    calls = sum(probe.met.values())
    a_call = f"{1e3 * took / calls:8.2f} ms a call in the engine, {1e3 * alone / calls:.2f} alone"
    return f"{a_call}: {took / alone:.3f} of the floor ({calls} calls)"


def subjects(device: str) -> dict[str, tuple[Classify, Tensor, Tensor, int]]:
    """Name -> model, 64 images, the model's own predictions, and its number of classes."""
    found: dict[str, tuple[Classify, Tensor, Tensor, int]] = {}
    for px in (32, 224):
        what = argparse.Namespace(model="tiny-robust-teacher", arch="", px=px, device=device)
        subject: Subject = load(what, range(2 * ROWS)).first(ROWS)
        linear = Linear(px).to(device)
        said = canonical.logits(linear, subject.images, ROWS).argmax(1)
        found[f"near-free model, {px} px"] = (linear, subject.images, said, 10)
        if px == 32:
            found["tiny-robust-teacher, 32 px"] = (
                subject.model, subject.images, subject.labels, subject.n_classes,
            )  # fmt: skip
    return found


def main() -> None:
    """Print the profiles, and write them where asked."""
    asked = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    asked.add_argument("--out", type=Path, help="also write the text to this file")
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--device", default="cpu")
    asked.add_argument("--commit", default="", help="what the text calls the code that was measured")
    chosen = asked.parse_args()
    torch.set_num_threads(chosen.threads)
    facts = [f"torch {torch.__version__}", chosen.device, f"{chosen.threads} threads", chosen.commit]
    lines = [", ".join(fact for fact in facts if fact)]
    for name, (classify, images, labels, n_classes) in subjects(chosen.device).items():
        for stage, attack in stages(STAGES, Size()):
            block = ["", f"{stage}, {ROWS} rows, {name}", *steps(attack, classify, images, labels)]
            if "224" not in name:
                block.append(whole(stage, classify, images, labels, n_classes))
            lines += block
            print(block[1], block[2], block[-1], sep="\n", file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
