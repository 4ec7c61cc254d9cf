"""The patch embedding as a matrix product beside torch's convolution, on a CPU; writes `patches.md`.

Both towers have the same weights. They take turns, a batch each, in this process and with one thread; the
time is the processor's. A gradient is one at the pixels, with frozen weights, as every step of an attack
needs it.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from process import about
from torch import Tensor, nn

from robustbench_vlm.models import openclip, patches

TOWERS = {"vlmrob-tiny": 64, "ViT-B-32": 8, "ViT-B-16": 4}
"""Rows of a call, by architecture."""

PAGE = """\
# The patch embedding as a matrix product

Made by `{command}` (commit {commit}, {cpu}, torch {torch}, one thread): processor milliseconds of a call,
median of {turns} turns. The towers have random weights. A gradient is one at the pixels and includes the
forward pass.

| tower | rows | part | convolution | matrix product | ratio |
|---|---|---|---|---|---|
{rows}

The largest difference of an embedding's number between the two ways was {gap:.1e}.
"""


def seconds(calls: Sequence[Callable[[], Tensor]], turns: int) -> list[float]:
    """Median processor time of each call; they take turns, after one turn that is not counted."""
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(turns + 1):
        for call, times in zip(calls, taken, strict=True):
            started = time.process_time()
            call()
            if turn:
                times.append(time.process_time() - started)
    return [statistics.median(times) for times in taken]


def gradient(of: nn.Module, images: Tensor) -> Tensor:
    """The gradient of the sum of `of`'s numbers at `images`."""
    leaf = images.detach().requires_grad_()
    found = torch.autograd.grad(of(leaf).sum(), leaf)[0]
    return found


def forward(of: nn.Module, images: Tensor) -> Tensor:
    """The numbers of `of`, without a graph."""
    with torch.no_grad():
        found: Tensor = of(images)
    return found


def measured(name: str, rows: int, turns: int) -> tuple[list[str], float]:
    """Rows of the table for one architecture, and the largest difference of an embedding's number."""
    built = openclip.build(name)
    side, ours = built.image_size, built.visual.requires_grad_(False)
    theirs: Any = open_clip.create_model(name)
    theirs = theirs.visual.eval().requires_grad_(False)
    theirs.load_state_dict(ours.state_dict())
    if not isinstance(ours.conv1, patches.PatchEmbedding):
        raise SystemExit(f"{name}: its first layer is no patch embedding")
    images = torch.rand(rows, 3, side, side)
    gap = float((forward(ours, images) - forward(theirs, images)).abs().max())
    lines = []
    for part, convolution, product in (
        ("patch embedding", theirs.conv1, ours.conv1),
        ("whole tower", theirs, ours),
    ):
        for what, call in (("forward", forward), ("gradient", gradient)):
            pair = [partial(call, of, images) for of in (convolution, product)]
            before, after = seconds(pair, turns)
            numbers = f"{1e3 * before:.2f} | {1e3 * after:.2f} | {before / after:.2f}"
            lines.append(f"| {name}, {side} px | {rows} | {part}, {what} | {numbers} |")
    return lines, gap


def main() -> None:
    """Measure every architecture and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--towers", nargs="+", default=list(TOWERS), choices=list(TOWERS))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "patches.md")
    what = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    facts = about(argparse.Namespace(device="cpu"))
    command = shlex.join(["python", "benchmarks/patches.py", *sys.argv[1:]])
    found = [measured(name, TOWERS[name], what.turns) for name in what.towers]
    page = PAGE.format(
        **facts,
        command=command,
        turns=what.turns,
        rows="\n".join(line for lines, _ in found for line in lines),
        gap=max(gap for _, gap in found),
    )
    what.out.write_text(page, "utf-8")
    print(page)


if __name__ == "__main__":
    main()
