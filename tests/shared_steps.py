"""The same training steps, computed by one process and by several, for every registered defense.

As a script under torchrun: compare both in every process, and write what the first one finds. `test_share`
uses the same steps with parts in place of processes.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from test_defenses import VARIANTS, build
from worlds import INNER, World

from robustbench_vlm.cards import reader
from robustbench_vlm.data import loader
from robustbench_vlm.training import exchange
from robustbench_vlm.training.prepare import prepare
from robustbench_vlm.training.share import Share
from robustbench_vlm.training.state import initial
from robustbench_vlm.training.step import train_step
from robustbench_vlm.training.world import ALONE, launched

CPU = torch.device("cpu")
ROLES = ("robust", "clean", "anchor", "first", "second")
B, STEPS = 8, 2
TRAINED = {
    "tower": {},
    "adapters with dropout": {"lora": {"r": 4, "alpha": 8, "dropout": 0.25}},
    "prompts": {"prompts": {"image": 1, "text": 1, "depth": 2}},
}
CASES = [
    *(("tower", name, fields) for name, fields in VARIANTS if name != "apd"),
    ("adapters with dropout", "tecoa", {}),
    ("adapters with dropout", "mmt-ard", {"weighting": "full"}),
    ("adapters with dropout", "tga-zsr", {}),
    ("adapters with dropout", "trades", {}),  # which runs the student in `targets`, in eval mode
    ("prompts", "apd", {}),
    ("prompts", "trades", {}),
]


def case_id(case):
    trained, name, fields = case
    return f"{trained}/{name}/{json.dumps(fields)}"


def recipe_of(world, trained):
    """A recipe whose setup has a teacher in every role. Its attack sees the student in train mode."""
    five = {
        "inputs": dict.fromkeys(ROLES, "adv"),
        "weights": dict.fromkeys(ROLES, 1.0),
        "attack_target": "label",
    }
    if trained == "prompts":
        defense, roles = {"name": "apd"}, ("clean",)
    else:
        defense, roles = {"name": "multi-teacher", **five}, ROLES
    optim = {"lr": 0.5, "steps": STEPS, "batch_size": B, "algorithm": "sgd", "grad_clip": 0.1}
    changes = {"defense": defense, "optim": optim, "inner": INNER | {"mode": "train", "steps": 1}}
    changes |= TRAINED[trained]
    if trained == "prompts":
        changes["teachers"] = world.teachers("clean")
    return world.recipe(defense["name"], *roles, **changes)


def setup_of(world, trained):
    """A setup whose student has left its start, which is a teacher, too."""
    setup = prepare(recipe_of(world, trained), world.data, CPU)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in setup.parameters().values():
            parameter += 0.01 * torch.randn(parameter.shape, generator=noise)
    if "second" in setup.roles.text:  # two teachers that disagree, so that AMMKD needs them both
        setup.roles.text["second"] = setup.roles.text["second"].roll(1, 0)
    return setup


def steps(setup, defense, share, parts=1):
    """Weights, carry and log lines after some steps from the weights of `setup`, which it keeps."""
    drops = setup.recipe.lora is not None
    recipe = setup.recipe if defense.adversarial else setup.recipe.model_copy(update={"inner": None})
    setup = replace(setup, recipe=recipe, defense=defense, share=Share(share, parts, drops))
    start = {name: p.detach().clone() for name, p in setup.parameters().items()}
    state, lines = initial(setup), []
    rows = setup.share.rows(B)
    for batch in loader.batches(setup.split, B, setup.recipe.seed, 0, STEPS, 32, rows):
        lines.append(train_step(setup, state, batch))
    moved = {name: p.detach().clone() for name, p in setup.parameters().items()}
    with torch.no_grad():
        for name, p in setup.parameters().items():
            p.copy_(start[name])
    return moved, dict(state.carry), lines


def furthest(one, other):
    assert one.keys() == other.keys()
    return max((float((one[name] - other[name]).abs().max()) for name in one), default=0.0)


def compared(setup, defense, processes=ALONE, parts=1):
    """How far shared steps are from whole ones."""
    start = {name: p.detach().clone() for name, p in setup.parameters().items()}
    weights, carry, lines = steps(setup, defense, ALONE)
    shared = steps(setup, defense, processes, parts)
    return {
        "moved": furthest(weights, start),
        "weights": furthest(weights, shared[0]),
        "carry": furthest(carry, shared[1]),
        "carried": sorted(carry),
        "lines": [lines, shared[2]],
    }


def main(made, out):
    """Compare every case in the processes that torchrun started."""
    torch.set_num_threads(1)
    paths = {name: Path(made[name]) for name in ("root", "data", "cards")}
    world, processes = World(**made | paths), launched()
    reader.include([world.cards])
    setups = {trained: setup_of(world, trained) for trained in TRAINED}
    with exchange.joined(processes, CPU):
        found = {
            case_id((trained, name, fields)): compared(setups[trained], build(name, fields), processes)
            for trained, name, fields in CASES
        }
    if processes.first:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
