"""The patch embedding of an image tower as a matrix product, on a CPU.

The first layer of a vision transformer is a convolution whose windows neither overlap nor leave gaps. It is
one matrix product over patches. Torch's CPU convolution (oneDNN) takes about three to five times as long with
its gradient at the pixels, which every step of an attack needs (benchmarks/patches.md).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the customary name

CHANNELS = 3
"""Input channels of a layer that reads pixels. Deeper convolutions are left to torch."""


class PatchEmbedding(nn.Conv2d):
    """A convolution with the stride of its kernel; on a CPU a matrix product, equal up to rounding.

    Parameters and their names are those of the convolution that it is made from.
    """

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) floats -> (N, D, H / K, W / K) for a kernel of K x K pixels."""
        count, channels, height, width = images.shape
        tall, wide = self.kernel_size
        if images.device.type != "cpu" or height % tall or width % wide:
            return super().forward(images)
        rows, columns = height // tall, width // wide
        cut = images.reshape(count, channels, rows, tall, columns, wide).permute(0, 2, 4, 1, 3, 5)
        patches = cut.reshape(count, rows * columns, channels * tall * wide)
        embedded = F.linear(patches, self.weight.flatten(1), self.bias)
        return embedded.transpose(1, 2).reshape(count, -1, rows, columns)


def by_matrix(tower: nn.Module) -> None:
    """Make every patch embedding in `tower` a `PatchEmbedding`, in place; parameters stay what they are."""
    for parent in [*tower.modules()]:
        for name, layer in [*parent.named_children()]:
            if type(layer) is nn.Conv2d and _embeds_patches(layer):
                setattr(parent, name, _made_from(layer))


def _embeds_patches(layer: nn.Conv2d) -> bool:
    return (
        layer.in_channels == CHANNELS
        and layer.groups == 1
        and layer.stride == layer.kernel_size
        and layer.dilation == (1, 1)
        and layer.padding in ((0, 0), "valid")
    )


def _made_from(layer: nn.Conv2d) -> PatchEmbedding:
    made = PatchEmbedding(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        bias=layer.bias is not None,
        device="meta",  # its parameters are replaced
    )
    made.weight, made.bias = layer.weight, layer.bias
    return made.train(layer.training)
