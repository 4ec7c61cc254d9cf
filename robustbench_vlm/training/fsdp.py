"""The student's image tower with its weights sharded over the processes, by torch's FSDP2 (`fully_shard`).

A process keeps its part of every parameter, and so of its gradient and its moments. A layer's parameters are
gathered before the layer is run, forwards or backwards, and freed after it; its gradient is summed over the
processes and cut into their parts. Everything outside a layer sees a parameter as a `DTensor`: whole to those
who ask for its shape, a part in memory. Teachers and text towers are not sharded: every process has them.

A step and its arithmetic are those of processes that all have the whole weights (`exchange.average`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import set_checkpoint_early_stop


def shard(tower: nn.Module, device: torch.device) -> None:
    """Shard the parameters of `tower`, on `device`, over the processes that have joined, in place.

    Each of `blocks` is gathered alone. All other parameters stay gathered from a forward to the end of its
    backward, since `Clip.tokens` uses some of them after the forward.
    """
    group = dist.group.WORLD
    assert group is not None  # `exchange.joined`
    mesh = DeviceMesh.from_group(group, device.type)
    for block in blocks(tower):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(tower, mesh=mesh, reshard_after_forward=False)
    for module in _sharded_modules(tower):
        module.set_force_sum_reduction_for_comms(True)  # gloo has no mean; sum / size is that of `average`


def blocks(tower: nn.Module) -> list[nn.Module]:
    """The repeated layers of a tower: the members of its outermost lists of modules of one class."""
    found, waiting = [], [tower]
    while waiting:
        module = waiting.pop()
        children = list(module.children())
        alike = len(children) > 1 and len({type(child) for child in children}) == 1
        if isinstance(module, nn.ModuleList | nn.Sequential) and alike and _all_have_parameters(children):
            found += children
        else:
            waiting += children
    return found


def _all_have_parameters(modules: list[nn.Module]) -> bool:
    return all(next(module.parameters(), None) is not None for module in modules)


def is_sharded(tower: nn.Module) -> bool:
    """Whether `shard` was applied to a tower."""
    return isinstance(tower, FSDPModule)


@contextmanager
def gathered_once(tower: nn.Module) -> Iterator[None]:
    """Inside, a layer is gathered by its first forward and not freed; at the end, all parameters are sharded.

    The inner maximisation runs the tower many times and changes no parameter. Recomputed forwards need this
    too: FSDP does not gather a layer again whose backward another part of the batch has already passed.
    Nothing happens for a tower that is not sharded.
    """
    if not isinstance(tower, FSDPModule):
        yield
        return
    tower.set_reshard_after_forward(False)
    tower.set_reshard_after_backward(False)
    try:
        with set_checkpoint_early_stop(False):  # a forward that is broken off would skip FSDP's hooks
            yield
    finally:
        tower.set_reshard_after_backward(True)
        tower.set_reshard_after_forward(True)
        tower.set_reshard_after_forward(False, recurse=False)  # as `shard` has it
        for module in _sharded_modules(tower):
            module.reshard()


def _sharded_modules(tower: nn.Module) -> list[FSDPModule]:
    return [module for module in tower.modules() if isinstance(module, FSDPModule)]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in full, which all processes must ask for together; other tensors as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_first(tensors: Mapping[str, Tensor], first: bool) -> dict[str, Tensor]:
    """Tensors, the sharded ones in full and on the CPU, in the first process; nothing in the others.

    Args:
        tensors: the same names in every process. All processes must call this together if one is sharded.
        first: whether this is the first process.
    """
    found = {}
    for name, tensor in tensors.items():  # one after the other, so that a device needs memory for one
        value = whole(tensor.detach())
        if first:
            found[name] = value.cpu() if isinstance(tensor, DTensor) else value
    return found


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `like`, of the same shape, is sharded; else the tensor.

    Every process has the whole tensor, so nothing is exchanged.
    """
    if not isinstance(like, DTensor):
        return tensor
    cut = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like, requires_grad=False).copy_(cut)  # `cut` may be a view of the whole tensor
