"""What the processes of one training exchange: rows of model outputs, gradients, and whether to stop.

Every process computes the loss of the whole batch from the gathered outputs of all processes, so the loss,
its weights and its running statistics are those of one process whatever their formula is. Gradients are
summed by one reduction a step. `DistributedDataParallel` is not used: it starts its reductions in the one
forward and backward of a wrapped module, where a step here runs the student several times, in the attack
without gradients of weights, through `tokens`, and beside teachers with prompts that learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from robustbench_vlm.errors import Incomplete, InputError, TrainingError
from robustbench_vlm.training.world import World

PATIENCE = timedelta(hours=6)  # for process 0, which probes and writes while the others wait
BUCKET = 2**24  # numbers of gradients that are copied into one buffer: 64 MiB of fp32


@contextmanager
def joined(world: World, device: torch.device) -> Iterator[None]:
    """Inside, the processes can exchange tensors: over gloo on the CPU, over nccl between GPUs."""
    if world.size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with others_needed():
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        # torchrun's store outlives the processes, and a name in it may lead to one of an earlier attempt
        own = dist.PrefixStore(f"attempt {world.attempt}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=PATIENCE)
    yield
    dist.destroy_process_group()  # not after an error: nccl would wait for processes that are gone


@contextmanager
def others_needed() -> Iterator[None]:
    """Inside, a failed exchange is one line.

    Raises:
        Incomplete: another process has ended, so this one cannot go on.
    """
    try:
        yield
    except RuntimeError as error:
        if not (
            isinstance(error, dist.DistError) or "gloo/transport" in str(error)
        ):  # gloo has no type for it
            raise
        reason = (str(error).splitlines() or [""])[0]
        again = "type the same command again, and it goes on from the last checkpoint"
        raise Incomplete(f"another process of this training ended ({reason:.120}); {again}") from None


class _Gather(torch.autograd.Function):
    """Rows (n, ...) of every process as (size, n, ...), with the gradient of a mean over the processes.

    Every process computes the same loss from the gathered rows, so the gradient of its own rows is known
    without an exchange. It is multiplied by the number of processes because `average` divides by it, which
    counts once what every process computes in full, such as text embeddings of learned prompts.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World) -> Tensor:  # noqa: ANN401 - torch's own record
        ctx.world = world
        return gathered(rows, world)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - torch's own record
        return gradients[0][ctx.world.rank] * ctx.world.size, None


def gathered(rows: Tensor, world: World) -> Tensor:
    """Rows (n, ...) of every process, in the order of the processes: (size, n, ...), without gradient."""
    whole = rows.new_empty((world.size, *rows.shape))
    with others_needed():
        dist.all_gather(list(whole.unbind(0)), rows.detach().contiguous())
    return whole


def all_rows(rows: Tensor, blocks: int, world: World) -> Tensor:
    """The rows of the whole batch from those of every process, with gradient.

    Args:
        rows: (blocks * n, ...), this process's rows of each of several equally large blocks, one after the
            other, such as adversarial and clean images.
        blocks: how many there are.
        world: the processes.

    Returns:
        (blocks * size * n, ...): every block whole, its rows in the order of the processes.
    """
    if world.size == 1:
        return rows
    whole: Tensor = _Gather.apply(rows, world)
    one = rows.shape[1:]
    by_block = whole.reshape(world.size, blocks, len(rows) // blocks, *one).transpose(0, 1)
    return by_block.reshape(world.size * len(rows), *one)


def average(gradients: Sequence[Tensor], world: World) -> None:
    """Replace each gradient by its mean over the processes, which have the same ones in the same order."""
    if world.size == 1:
        return
    waiting: list[Tensor] = []
    for position, gradient in enumerate(gradients, 1):
        waiting.append(gradient)
        if position == len(gradients) or sum(g.numel() for g in waiting) >= BUCKET:
            flat = torch.cat([g.flatten() for g in waiting])
            with others_needed():
                dist.all_reduce(flat)
            means = torch.split(flat / world.size, [g.numel() for g in waiting])
            for g, mean in zip(waiting, means, strict=True):
                g.copy_(mean.view_as(g))
            waiting = []


def any_of(flag: bool, world: World) -> bool:
    """Whether the flag is set in any process; every process gets the same answer at the same step."""
    if world.size == 1:
        return flag
    value = torch.tensor(float(flag))
    with others_needed():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value > 0)


def wait(world: World) -> None:
    """Return when every process is here."""
    any_of(False, world)


def require_same_step(step: int, world: World) -> None:
    """Refuse processes that would go on from different steps.

    Raises:
        InputError: their output folders are not one folder.
    """
    if world.size == 1:
        return
    steps = sorted(set(gathered(torch.tensor([step]), world).flatten().tolist()))
    if len(steps) > 1:
        found = f"the processes find checkpoints of different steps: {steps}"
        raise InputError("--out", found, "one folder on a disk that all machines share")


def require_same_weights(weights: Sequence[Tensor], step: int, world: World) -> None:
    """Check that the processes still have equal weights, as each of them takes the same updates.

    Raises:
        TrainingError: they have not, so their kernels or versions differ.
    """
    if world.size == 1:
        return
    sums = torch.stack([w.detach().double().sum() for w in weights]).cpu()
    if not all(torch.equal(other, sums) for other in gathered(sums, world)):
        raise TrainingError(f"step {step}: the processes have different weights; use equal GPUs and versions")
