"""Training steps with sharded weights, compared with those of one process that has all of them.

A script under torchrun: every process takes both kinds of steps of the cases that it is given, and trains the
runs that it is given. The first process writes what all of them found.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from shared_steps import furthest
from test_train import LORA, PAPER, PROBE
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import INNER, World

from robustbench_vlm.cards import reader
from robustbench_vlm.data import loader
from robustbench_vlm.errors import Incomplete
from robustbench_vlm.training import exchange, fsdp, loop
from robustbench_vlm.training import step as step_module
from robustbench_vlm.training.prepare import prepare
from robustbench_vlm.training.probe import probe
from robustbench_vlm.training.state import initial
from robustbench_vlm.training.step import train_step
from robustbench_vlm.training.world import ALONE, launched

CPU = torch.device("cpu")
RUNS = {"adapters": {}, "tower": {"lora": None, "interpolation": 1.0, "inner": INNER | {"steps": 1}}}
OPTIM = {"lr": 0.1, "steps": 3, "batch_size": 8, "algorithm": "sgd", "grad_clip": 0.1}
ADAMW = OPTIM | {"algorithm": "adamw", "lr": 1e-3}
PARTS = {"optim": OPTIM | {"accumulate": 2}}
ATTACKED_IN_TRAIN_MODE = {"inner": INNER | {"mode": "train"}}
CASES = {
    "tecoa": ("tecoa", (), ATTACKED_IN_TRAIN_MODE),
    "tecoa, adamw": ("tecoa", (), {"optim": ADAMW}),
    "tecoa, fused adamw": ("tecoa", (), {"optim": ADAMW, "compute": {"fused_adamw": True}}),
    "tecoa, bf16": ("tecoa", (), {"compute": {"precision": "bf16"}}),
    "no attack": ("clean", (), {"inner": None}),
    "two forwards, two teachers, in parts": ("mmt-ard", ("robust", "clean"), PARTS),
    "patch tokens": ("tga-zsr", ("anchor",), {}),
    "patch tokens, in parts": ("tga-zsr", ("anchor",), PARTS),
    "adapters with dropout": ("tecoa", (), {"lora": LORA}),
    "adapters with dropout, in parts": ("tecoa", (), {"lora": LORA, **PARTS}),
}


def setup_of(world, case, processes):
    """The setup of a case, sharded where there are several processes."""
    defense, roles, changes = CASES[case]
    compute = changes.get("compute", {}) | ({"fsdp": True} if processes.size > 1 else {})
    table = {"optim": OPTIM, "probe": {"every": 2, "n": 8, "steps": 1}} | changes | {"compute": compute}
    return prepare(world.recipe(defense, *roles, **table), world.data, CPU, world=processes)


def steps(setup):
    """All weights, moments and log lines after the steps of the recipe, and a probe."""
    state, lines, optim = initial(setup), [], setup.recipe.optim
    rows = setup.share.rows(optim.batch_size)
    for batch in loader.batches(setup.split, optim.batch_size, setup.recipe.seed, 0, optim.steps, 32, rows):
        lines.append(train_step(setup, state, batch))
    weights = {name: fsdp.whole(p.detach()) for name, p in setup.parameters().items()}
    return weights, lines, probe(setup), state


def sizes(setup, state):
    """Bytes of this process's weights, gradients and moments, each as a share of the whole ones."""
    parameters = list(setup.parameters().values())
    moments = [m for p in parameters for m in state.optimiser.state[p].values() if m is not None and m.ndim]
    weights = list(setup.model.visual.parameters())
    kinds = {"weights": weights, "gradients": [p.grad for p in parameters], "moments": moments}
    return {kind: stored(tensors) for kind, tensors in kinds.items()}


def stored(tensors):
    """Bytes in memory behind sharded tensors, as a share of those of the whole tensors."""
    storages = [tensor.to_local().untyped_storage() for tensor in tensors]
    own = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    return own / sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Collectives(TorchDispatchMode):
    """How often the collectives of FSDP are called inside."""

    def __init__(self):
        super().__init__()
        self.calls = {"allgather_base": 0, "reduce_scatter_base": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for name in self.calls:
            self.calls[name] += name in str(func)
        return func(*args, **(kwargs or {}))


def exchanges(setup):
    """Collectives of one attack, and of one whole step."""
    state, found = initial(setup), {}
    rows = setup.share.rows(8)
    (batch, *_) = loader.batches(setup.split, 8, setup.recipe.seed, 0, 1, 32, rows)
    with Collectives() as during, fsdp.gathered_once(setup.model.visual):
        step_module._attacked(setup, 0, batch)
        found["attack"] = during.calls
    with Collectives() as during:
        train_step(setup, state, batch)
        found["step"] = during.calls
    return found | {"groups": 1 + len(fsdp.blocks(setup.model.visual))}


def compared(world, case, processes):
    """What one case gives in one process and in all, and what FSDP did for it."""
    alone, shared = setup_of(world, case, ALONE), setup_of(world, case, processes)
    start = {name: p.detach().clone() for name, p in alone.parameters().items()}
    (one, lines, probed, _), (other, theirs, also, state) = steps(alone), steps(shared)
    return {
        "moved": furthest(one, start),
        "weights": furthest(one, other),
        "lines": [lines, theirs],
        "probes": [probed, also],
        "sizes": sizes(shared, state),
        "exchanges": exchanges(shared),
    }


def run_recipe(world, changes):
    """The recipe of the whole runs."""
    optim = {"lr": 1e-3, "steps": 4, "warmup": 1, "batch_size": 8}
    table = {"optim": optim, "defense": PAPER, "lora": LORA, "probe": PROBE, "interpolation": 0.5}
    return world.recipe("mmt-ard", "robust", "clean", **table | {"compute": {"fsdp": True}} | changes)


def run(world, out, processes, changes, stop=0):
    """A whole run, or one that gets a signal after step `stop`; returns what is said where it is stopped."""

    def report(line):
        if "loss" in line and line["step"] == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        loop.run(run_recipe(world, changes), out, world.data, CPU, report, world=processes)
    except Incomplete as error:
        return str(error)
    return "finished"


def runs(world, folder, processes, name):
    """How runs end: a whole one, one with a signal to the first process, and the same again."""
    finished, stopped, again = (folder / f"{name}-{end}" for end in ("finished", "stopped", "again"))
    found = [run(world, finished, processes, RUNS[name]), run(world, stopped, processes, RUNS[name], 3)]
    if processes.first:
        shutil.copytree(stopped, again)
    exchange.wait(processes)
    return [*found, run(world, again, processes, RUNS[name])]


def main(made, out, words):
    torch.set_num_threads(1)
    paths = {name: Path(made[name]) for name in ("root", "data", "cards")}
    world, processes = World(**made | paths), launched()
    reader.include([world.cards])
    with exchange.joined(processes, CPU):
        found = {case: compared(world, case, processes) for case in words if case in CASES}
        found |= {name: runs(world, out.parent, processes, name) for name in words if name in RUNS}
        ranks = [None] * processes.size
        dist.all_gather_object(ranks, found)
    if processes.first:
        out.write_text(json.dumps(ranks))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
