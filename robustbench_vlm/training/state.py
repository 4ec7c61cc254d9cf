"""The state of a training run, and the checkpoint files from which a stopped run goes on with equal bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from robustbench_vlm import tensor_files
from robustbench_vlm.errors import InputError
from robustbench_vlm.models import checkpoint
from robustbench_vlm.training import fsdp
from robustbench_vlm.training.setup import Setup

CPU = torch.device("cpu")


@dataclass
class TrainingState:
    """What changes from step to step, beside the weights.

    Attributes:
        step: steps taken; the next step has this 0-based number.
        optimiser: with its moments.
        carry: tensors that the defense hands to its next step.
    """

    step: int
    optimiser: torch.optim.Optimizer
    carry: Mapping[str, Tensor]


def initial(setup: Setup) -> TrainingState:
    """The state before the first step."""
    return TrainingState(0, _optimiser(setup), {})


def _optimiser(setup: Setup) -> torch.optim.Optimizer:
    optim, parameters = setup.recipe.optim, list(setup.parameters().values())
    if optim.algorithm == "sgd":
        return torch.optim.SGD(parameters, optim.lr, optim.momentum, weight_decay=optim.weight_decay)
    fused = setup.recipe.compute.fused_adamw
    return torch.optim.AdamW(parameters, lr=optim.lr, weight_decay=optim.weight_decay, fused=fused)


def resumed(setup: Setup, out: Path) -> TrainingState:
    """The state of the newest checkpoint file of `out`, or the initial one.

    The weights of the checkpoint are loaded into the models of `setup`.

    Raises:
        InputError: a checkpoint of another recipe or version, or a damaged one.
    """
    state = initial(setup)
    files = checkpoint_files(out)
    if not files:
        return state
    found = _read(files[-1], setup)
    tensors = found.tensors  # on the CPU: a device may have no memory for all of them
    _require_known(tensors, setup, files[-1])
    _load_weights(tensors, setup, str(files[-1]))
    _load_moments(tensors, setup, state.optimiser)
    carried = {k.removeprefix("carry."): v for k, v in tensors.items() if k.startswith("carry.")}
    state.carry = {name: value.to(setup.device) for name, value in carried.items()}
    state.step = int(found.facts["step"])
    return state


FACTS = {"step", "recipe"}
"""What a checkpoint file says beside its tensors."""


def _read(path: Path, setup: Setup) -> tensor_files.TensorFile:
    """A checkpoint file of this recipe, which is as it was written.

    Raises:
        InputError: another recipe, other content than the checksum says, or a step that cannot be.
    """
    do = f"delete {path}, and training goes on from the checkpoint before it"
    found = tensor_files.read(path, do)
    if found.facts.keys() != FACTS:  # also where damage hit the name of the checksum
        raise InputError(str(path), f"facts {sorted(found.facts)}", str(sorted(FACTS)), do)
    if found.facts["recipe"] != setup.recipe.fingerprint:
        raise InputError(str(path), "a checkpoint of another recipe", setup.recipe.fingerprint[:12])
    wanted = path.stem.removeprefix("step_").lstrip("0") or "0"
    if found.facts["step"] != wanted or int(wanted) > setup.recipe.optim.steps:
        expected = f"{wanted}, at most {setup.recipe.optim.steps}"
        raise InputError(str(path), f"step {found.facts['step']!r:.20}", expected, do)
    return found


def _require_known(tensors: Mapping[str, Tensor], setup: Setup, path: Path) -> None:
    """Refuse a checkpoint with tensors that this version does not read, such as moments under other names."""
    parameters = setup.parameters()
    for name in tensors:
        if name not in parameters and not name.startswith(("student.", "optim.", "carry.")):
            raise InputError(
                str(path),
                f"tensor {name!r}, which this version does not read",
                "a checkpoint of this version",
                f"finish it with the old one, or delete {path.parents[1]}",
            )


def _load_weights(tensors: Mapping[str, Tensor], setup: Setup, where: str) -> None:
    """Fill the student's image tower, and prompts of any tower, from a checkpoint."""
    own = setup.model.visual.state_dict()
    student = {k.removeprefix("student."): v for k, v in tensors.items() if k.startswith("student.")}
    student = {k: fsdp.part_of(v, own[k]) if k in own else v for k, v in student.items()}
    checkpoint.fill(setup.model.visual, student, where)
    for name, parameter in setup.parameters().items():
        if name in tensors and not name.startswith("student."):  # a prompt outside that tower
            parameter.data.copy_(tensors[name])


def _load_moments(tensors: Mapping[str, Tensor], setup: Setup, optimiser: torch.optim.Optimizer) -> None:
    """Fill the state of the optimiser; parameters that never got a gradient have none.

    A moment is laid out in memory as its parameter is. The fused kernels walk through memory, so with another
    layout (`channels_last`) a resumed run would have other bits.
    """
    step_device = setup.device if setup.recipe.compute.fused_adamw else CPU  # where AdamW counts its steps
    for index, parameter in enumerate(setup.parameters().values()):
        prefix = f"optim.{index}."
        saved = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if saved:
            optimiser.state[parameter] = {
                k: v.to(step_device)
                if k == "step"
                else torch.empty_like(parameter, requires_grad=False).copy_(
                    fsdp.part_of(v.to(setup.device), parameter)
                )
                for k, v in saved.items()
            }


def save_state(out: Path, setup: Setup, state: TrainingState) -> None:
    """Write one checkpoint file below `out`, whole or not at all.

    All processes call it, and the first one writes. The file is the same one whether the weights are sharded
    or not, so a run goes on from it with any number of processes.
    """
    first = setup.share.world.first
    if not (first or setup.sharded):
        return
    tensors = {f"student.{name}": value for name, value in setup.model.visual.state_dict().items()}
    tensors |= {f"carry.{name}": value for name, value in state.carry.items()}
    for index, (name, parameter) in enumerate(setup.parameters().items()):
        tensors |= {name: parameter} if name not in tensors else {}
        moments = state.optimiser.state.get(parameter, {})
        tensors |= {f"optim.{index}.{k}": v for k, v in moments.items() if v is not None}
    tensors = fsdp.on_first(tensors, first)
    facts = {"step": str(state.step), "recipe": setup.recipe.fingerprint}
    if first:
        tensor_files.write(_path(out, state.step), tensors, facts)


def checkpoint_files(out: Path) -> list[Path]:
    """The checkpoint files of a run, oldest first."""
    return sorted((out / "checkpoints").glob("step_*.safetensors"))


def saved_step(out: Path) -> int:
    """The step from which a run would go on: that of its newest checkpoint file, 0 without one."""
    files = checkpoint_files(out)
    return int(files[-1].stem.removeprefix("step_")) if files else 0


def remove_unscheduled(out: Path, every: int, last: int) -> None:
    """Remove the checkpoint files that only a stop of the run caused, so its folder is as without the stop.

    Half-written ones are removed, too, which a kill leaves behind.

    Args:
        out: folder of a finished run.
        every: steps between checkpoints; 0 if none were asked for.
        last: number of the last step.
    """
    scheduled = {_path(out, step) for step in (*range(every, last, every), last)} if every else set()
    for path in [*checkpoint_files(out), *(out / "checkpoints").glob(".step_*.part")]:
        if path not in scheduled:
            path.unlink()
    if not scheduled and (out / "checkpoints").is_dir():
        (out / "checkpoints").rmdir()


def _path(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step_{step:07d}.safetensors"
