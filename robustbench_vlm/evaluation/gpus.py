"""Seconds of model calls on a GPU that is not here: counted operations over the peak rate of its data sheet.

The operations are those of matrix products, convolutions and attention, as
`torch.utils.flop_counter.FlopCounterMode` counts them; a multiplication with its addition is two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from robustbench_vlm.errors import InputError, nearest
from robustbench_vlm.evaluation.estimate import Line, Speed
from robustbench_vlm.models.clip import Clip
from robustbench_vlm.models.text_bank import TEXT_ROWS

UTILISATION = 0.4
"""Share of the peak rate that model calls reach. An assumption: nothing was measured on a GPU for it."""


@dataclass(frozen=True)
class Gpu:
    """A GPU in numbers.

    Attributes:
        gib: memory in GiB, as sold.
        fp32: peak of products in full fp32, in TFLOP/s.
        tf32: peak of fp32 products that round to TF32; 0 where there is none.
        bf16: peak of bf16 products that are summed in fp32; 0 where there is none.
    """

    gib: float
    fp32: float
    tf32: float
    bf16: float

    def rates(self) -> dict[str, float]:
        """Peak rates by precision, in operations a second."""
        rates = {"fp32": self.fp32, "tf32": self.tf32, "bf16": self.bf16}
        return {name: 1e12 * rate for name, rate in rates.items() if rate}


GPUS = {
    "T4": Gpu(16, 8.1, 0.0, 0.0),
    "V100": Gpu(32, 15.7, 0.0, 0.0),
    "A100": Gpu(80, 19.5, 156.0, 312.0),
    "L4": Gpu(24, 30.3, 60.0, 121.0),
    "L40S": Gpu(48, 91.6, 183.0, 362.0),
    "RTX-4090": Gpu(24, 82.6, 82.6, 165.2),
    "H100": Gpu(80, 67.0, 494.7, 989.4),
    "H200": Gpu(141, 67.0, 494.7, 989.4),
}
"""GPUs by name: NVIDIA's data sheets, without sparsity (they print twice as much for TF32 and bf16 with it).

A100, H100 and H200 are the SXM versions, A100 with 80 GB, V100 the SXM2 version with 32 GB; the RTX 4090 is
that of the Ada whitepaper.
"""


def named(name: str) -> Gpu:
    """The GPU of that name; capitals do not count.

    Raises:
        InputError: not in `GPUS`.
    """
    found = {known.lower(): gpu for known, gpu in GPUS.items()}.get(name.lower())
    if found is None:
        raise InputError(f"--gpu {name}", "no rates known for it", "a GPU of the table", nearest(name, GPUS))
    return found


@dataclass(frozen=True)
class Operations:
    """Operations of a model.

    Attributes:
        forward: of one image, without gradient.
        gradient: of one image with the gradient to its pixels, the forward pass included.
        text: of one call of the text tower, which is `TEXT_ROWS` sentences.
    """

    forward: int
    gradient: int
    text: int

    def speed(self, rate: float) -> Speed:
        """Seconds of calls at a rate in operations a second."""
        forward, gradient = (Line(0.0, count / rate) for count in (self.forward, self.gradient))
        return Speed(forward, gradient, self.text / rate)


def operations(model: Clip, side: int) -> Operations:
    """Count the operations of one forward pass, of one with its backward pass, and of the text tower.

    Attention is computed by plain matrix products, with a gradient to follow: torch has fused operators for
    it on CPUs that the counter does not know.

    Args:
        model: on any device.
        side: H and W of the images.
    """
    image = torch.full((1, 3, side, side), 0.5, device=model.device, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        with torch.enable_grad(), FlopCounterMode(display=False) as forward:
            total = model(image).sum()
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(total, image)
        with torch.no_grad(), FlopCounterMode(display=False) as text:
            model.language(model.tokenize([""]).to(model.device))
    made = forward.get_total_flops()
    return Operations(made, made + backward.get_total_flops(), TEXT_ROWS * text.get_total_flops())


def saved_bytes(model: Clip, side: int) -> int:
    """Bytes that a forward pass of one image keeps for its backward pass, the weights left out.

    Args:
        model: on any device.
        side: H and W of the images.
    """
    constants = (*model.parameters(), *model.buffers())
    weights = {tensor.untyped_storage().data_ptr() for tensor in constants}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    image = torch.full((1, 3, side, side), 0.5, device=model.device, requires_grad=True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = model(image)  # held until all are noted, so that no storage is used twice
    del held
    return sum(kept.values())
