"""A training step of MMT-ARD compared with the released code and with the bare passes: `make bench-train`.

One process takes a step in each way in turn, so that all share the same conditions. Then each way runs in a
process of its own for its peak memory, unless that of the one process is enough (`--one-process`).
`--arch ViT-B-32 --teacher ViT-L-14 --device cuda` measures the paper's sizes with random weights. The images
are generated; every way gets the same ones. Every measurement is appended to the .jsonl file at once, and a
run that was killed goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from process import alone, begun
from training_table import WAYS, render
from watch import memory

from robustbench_vlm import store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.data import loader, miniature
from robustbench_vlm.defenses.losses import kl, kl_terms, of_label
from robustbench_vlm.models import openclip
from robustbench_vlm.models.clip import InBf16, frozen
from robustbench_vlm.training import cost
from robustbench_vlm.training.prepare import prepare
from robustbench_vlm.training.setup import Setup
from robustbench_vlm.training.state import TrainingState, resumed
from robustbench_vlm.training.step import train_step
from robustbench_vlm.types import Batch, Encoder

HERE = Path(__file__).parent
CLOCKS = ("wall", "cpu")
BATCHES = 2  # distinct batches, used in turn

Line = dict[str, Any]


def released(setup: Setup, state: TrainingState, batch: Batch, origin: Encoder) -> None:
    """One step as the released code does it: three teachers, one forward for each use, no cache.

    As in that code, the weights of the student are not frozen while the attack differentiates it with respect
    to the images. The numbers of the log and the probe are left out.
    """
    roles, inner, defense = setup.training_roles(batch), setup.recipe.inner, setup.defense
    x, labels, eps, alpha = batch.images, batch.labels, float(inner.threat.eps), float(inner.step)
    student = partial(roles.logits, "student")
    setup.model.visual.eval()
    with torch.no_grad():
        z_clean = roles.logits("clean", x)
        z_origin = origin.logit_scale * roles.cosines("clean", origin(x))
    d = torch.empty_like(x).uniform_(-eps, eps)
    for _ in range(inner.steps):
        d.requires_grad_()
        loss = kl(z_clean, student(x + d)).mean()
        (gradient,) = torch.autograd.grad(loss, d)
        with torch.no_grad():
            d = (d + alpha * gradient.sign()).clamp(-eps, eps)
            d = (x + d).clamp(0, 1) - x
    adv = (x + d).detach()
    setup.model.visual.train()
    on_x = student(x)
    on_adv = student(adv)
    with torch.no_grad():
        z_robust = roles.logits("robust", adv)
    scales = roles.teachers["robust"].logit_scale, roles.teachers["clean"].logit_scale
    c_robust, c_clean = of_label(z_robust, labels) / scales[0], of_label(z_clean, labels) / scales[1]
    terms = defense.robust_weight * c_robust[:, None] * kl_terms(z_robust, on_adv)
    terms = terms + defense.clean_weight * c_clean[:, None] * kl_terms(z_clean, on_x)
    kl(z_origin, on_x).mean()  # computed there in every step, and left out of the loss
    state.optimiser.zero_grad()
    terms.mean().backward()
    state.optimiser.step()
    setup.model.visual.eval()


def floor(setup: Setup, batch: Batch) -> None:
    """Only the passes that every way needs: the attack, the robust teacher on x', the outer one."""
    roles, x = setup.training_roles(batch), batch.images
    with frozen(setup.model):
        for _ in range(setup.recipe.inner.steps):
            leaf = x.detach().requires_grad_()
            torch.autograd.grad(roles.student(leaf).sum(), leaf)
    with torch.no_grad():
        roles.teachers["robust"](x)
    for parameter in setup.parameters().values():
        parameter.grad = None
    setup.model.visual.train()
    roles.student(torch.cat([x, x])).sum().backward()
    setup.model.visual.eval()


def ways(what: argparse.Namespace, recipe: Recipe, root: Path) -> dict[str, Callable[[int], None]]:
    """Every way to take step t; all share models, optimiser and images."""
    device = torch.device(what.device)
    with_cache = prepare(recipe, root, device, root / "embeddings")
    without = dataclasses.replace(with_cache, caches={})
    origin: Encoder = copy.deepcopy(with_cache.teachers["clean"].model)
    if recipe.compute.precision == "bf16":
        origin = InBf16(origin)
    stream = loader.batches(
        with_cache.split, recipe.optim.batch_size, 0, 0, BATCHES, with_cache.model.image_size
    )
    batches = [batch.to(device) for batch in stream]
    state = resumed(with_cache, root / "no checkpoint")
    return {
        "ours": lambda t: train_step(with_cache, state, batches[t % BATCHES]) and None,
        "ours, no cache": lambda t: train_step(without, state, batches[t % BATCHES]) and None,
        "released": lambda t: released(without, state, batches[t % BATCHES], origin),
        "floor": lambda t: floor(without, batches[t % BATCHES]),
    }


def timed(what: argparse.Namespace, recipe: Recipe, root: Path) -> Line:
    """Seconds of one step of every way, medians over rounds in which each takes one, and memory."""
    torch.set_num_threads(what.threads)
    _in_full()
    calls, device = ways(what, recipe, root), torch.device(what.device)
    before, _ = memory(device)
    mib = dict.fromkeys(calls, 0.0)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for t in range(-what.warm * BATCHES, what.rounds):  # kernels are chosen, files filled before the count
        for name, call in calls.items():
            _settle(what.device)
            if what.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            wall, cpu = time.perf_counter(), time.process_time()
            call(t)
            _settle(what.device)
            if t >= 0:
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
                mib[name] = max(mib[name], memory(device)[1] - before)
    seconds = {
        name: {clock: float(np.median([s[i] for s in spent])) for i, clock in enumerate(CLOCKS)}
        for name, spent in found.items()
    }
    return {"seconds": seconds, "mib": mib}


def peak_mib(what: argparse.Namespace, recipe: Recipe, root: Path, way: str) -> float:
    """Peak memory of the process of one way beyond the loaded models, in MiB."""
    torch.set_num_threads(what.threads)
    _in_full()
    call = ways(what, recipe, root)[way]
    before, _ = memory(torch.device(what.device))
    if what.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for t in range(2 * BATCHES):
        call(t)
    return memory(torch.device(what.device))[1] - before


def _in_full() -> None:
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def flops(what: argparse.Namespace, recipe: Recipe) -> dict[str, float]:
    """Operations of a step and image of each way, by the cost model of `robustbench_vlm.training.cost`."""
    openclip.architectures()  # registers ours
    student, teacher = (cost.tower(open_clip.get_model_config(name)).flops for name in archs(what))
    backward = 2 if recipe.lora is None else 1
    attack, outer = student * 2 * recipe.inner.steps, student * 2 * (1 + backward)
    ours = attack + outer + teacher
    return {
        "ours": ours,
        "ours, no cache": ours + teacher,
        "released": ours + 2 * teacher,
        "floor": ours,
    }


def archs(what: argparse.Namespace) -> tuple[str, str]:
    if what.arch:
        return what.arch, what.teacher
    return "vlmrob-tiny", "vlmrob-tiny-teacher"


def recipe_of(what: argparse.Namespace, batch_size: int, precision: str) -> Recipe:
    """The tiny recipe, or the paper's at the sizes asked for; without its probe."""
    table = reader.toml(reader.path("recipes", "paper-mmt-ard" if what.arch else "tiny-mmt-ard"))
    table["optim"]["batch_size"] = batch_size
    table["inner"]["steps"] = what.steps
    table["compute"] = {"precision": precision, "compile": what.compiled}
    del table["probe"]
    if what.arch:
        table |= {"student": f"{what.arch}:random"}
        table["teachers"] = dict.fromkeys(("robust", "clean"), f"{what.teacher}:random")
        if what.full:
            del table["lora"]
    return reader.parse(table, Recipe, "the benchmark's recipe")


def parsed(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    asked = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = asked.add_argument
    add("--out", type=Path, default=HERE / "training.md", help="the table; FILE.jsonl beside it goes on")
    add("--arch", default="", help="student with random weights; by default the tiny world's models")
    add("--teacher", default="ViT-L-14", help="both teachers, beside --arch")
    add("--full", action="store_true", help="with --arch: train the whole tower, not adapters")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--batch", type=int, nargs="+", default=[128])
    add("--precision", nargs="+", default=["fp32"], choices=("fp32", "bf16"))
    add("--compiled", action="store_true", help="our side through torch.compile")
    add("--steps", type=int, default=5, help="attack steps; 10 in the paper")
    add("--rounds", type=int, default=30, help="steps of every way that are timed")
    add("--warm", type=int, default=2, help="times that every way takes every batch before")
    add("--one-process", action="store_true", help="peak memory of each way from the process of all")
    add("--peak", type=float, nargs="*", default=[], help="TFLOP/s of the matrix units, one a precision")
    add("--threads", type=int, default=1)
    what = asked.parse_args(words)
    if what.peak and len(what.peak) != len(what.precision):
        asked.error(f"{len(what.peak)} --peak for {len(what.precision)} --precision")
    return what


def main(words: list[str] | None = None) -> None:
    """Measure what is missing, then write the table."""
    what = parsed(words)
    lines = what.out.with_suffix(".jsonl")
    known = begun(lines, what)
    done = {(line["batch"], line["precision"]) for line in known[1:]}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for batch_size in what.batch:
            for precision in what.precision:
                if (batch_size, precision) in done:
                    continue
                recipe = recipe_of(what, batch_size, precision)
                place = root / f"{batch_size}"
                card = reader.read("datasets", recipe.data.dataset, DatasetCard)
                miniature.make(card, place, n=BATCHES * batch_size, split=recipe.data.split)
                line = {"batch": batch_size, "precision": precision, "flops": flops(what, recipe)}
                line |= alone(partial(timed, what, recipe, place))
                if not what.one_process:
                    line["mib"] = {way: alone(partial(peak_mib, what, recipe, place, way)) for way in WAYS}
                store.append(lines, line)
                print(f"batch {batch_size}, {precision}: {line['seconds']}", file=sys.stderr, flush=True)
    text = render(list(store.records(lines)))
    store.write(what.out, text.encode())
    print(text)


if __name__ == "__main__":
    main()
