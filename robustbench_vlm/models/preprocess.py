"""What happens to pixels before the image tower: resize and normalisation, as the model's own files state it.

A statement that this package cannot follow is refused when the model is loaded, since a resize or scale that
differs from that of training changes logits without an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the customary name

from robustbench_vlm.cards.protocol import Interpolation, Resize, ResizeMode
from robustbench_vlm.errors import WeightsError

CANVAS: dict[tuple[Interpolation, ResizeMode], Resize] = {
    ("bicubic", "shortest"): "bicubic",
    ("bicubic", "squash"): "bicubic-squash",
    ("bicubic", "longest"): "bicubic-longest",
    ("bilinear", "shortest"): "bilinear",
    ("bilinear", "squash"): "bilinear-squash",
    ("bilinear", "longest"): "bilinear-longest",
}
KERNELS: dict[object, Interpolation] = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
RGB_MAX = 255.0
Channels = tuple[float, float, float]

# Keys of open_clip's `preprocess_cfg`. The others in this list name weights or activation, not preprocessing.
OPEN_CLIP_KEYS = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}
OPEN_CLIP_OTHER = {"url", "hf_hub", "quick_gelu", "file", "sha256"}
PROCESSORS = {"CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor", "CLIPProcessor"}


@dataclass(frozen=True)
class Preprocess:
    """What happens to pixels inside the encoder, in order: resize, then (x - mean) / std.

    Attributes:
        image_size: side of the square input of the tower, pixels.
        mean: per channel, in [0, 1] units.
        std: per channel, in [0, 1] units.
        antialias: whether the in-graph resize is antialiased; with `True` it is closest to PIL's.
        interpolation: kernel of the resize.
        resize_mode: `shortest`, the shorter side to `image_size` and a centre crop; `longest`, the longer
            side to it and black borders; `squash`, both sides. They are equal for square images.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    antialias: bool = True
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "shortest"

    @property
    def canvas_resize(self) -> Resize:
        """How image files are brought to the model's canvas, in the words of dataset cards."""
        return CANVAS[self.interpolation, self.resize_mode]

    def resized(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, S, S), S = `image_size`; images of that size are not resampled."""
        side = self.image_size
        height, width = images.shape[-2:]
        if (height, width) == (side, side):
            return images
        if self.resize_mode == "squash" or height == width:
            size = (side, side)
        elif self.resize_mode == "longest":
            size = round(height * side / max(height, width)), round(width * side / max(height, width))
        else:
            short = min(height, width)
            size = int(side * height / short), int(side * width / short)
        images = F.interpolate(
            images, size=size, mode=self.interpolation, align_corners=False, antialias=self.antialias
        )
        return _cropped_or_padded(images, side)


def _cropped_or_padded(images: Tensor, side: int) -> Tensor:
    """The centre (side x side) of images, with black borders where they are smaller."""
    height, width = images.shape[-2:]
    below, beside = max(side - height, 0), max(side - width, 0)
    if below or beside:
        images = F.pad(images, (beside // 2, (beside + 1) // 2, below // 2, (below + 1) // 2))
    top, left = (round((found - side) / 2.0) for found in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def of_open_clip(stated: Mapping[str, Any], side: int, where: str) -> Preprocess:
    """The preprocessing of an open_clip `preprocess_cfg` for a tower with input `side`.

    At inference open_clip reads the interpolation `random` as bicubic, and so does this.

    Raises:
        WeightsError: a key or value that cannot be followed.
    """
    for key in sorted(stated.keys() - OPEN_CLIP_KEYS - OPEN_CLIP_OTHER):
        raise WeightsError(where, f"preprocess_cfg has {key!r}", f"only {', '.join(sorted(OPEN_CLIP_KEYS))}")
    size = stated.get("size")
    if size is not None and _sides(size) != (side, side):
        raise WeightsError(where, f"preprocess_cfg.size is {size!r:.40}", f"{side}, the input of the tower")
    if stated.get("mode") not in (None, "RGB"):
        raise WeightsError(where, f"preprocess_cfg.mode is {stated['mode']!r:.40}", "'RGB'")
    kernel: Any = stated.get("interpolation") or "bicubic"
    kernel = "bicubic" if kernel == "random" else kernel
    mode: Any = stated.get("resize_mode") or "shortest"
    if (kernel, mode) not in list(CANVAS):  # a value may be no name at all
        found = f"interpolation {kernel!r:.40} with resize_mode {mode!r:.40}"
        expected = "bicubic or bilinear (or random), with shortest, longest or squash"
        raise WeightsError(where, found, expected)
    if mode == "longest" and stated.get("fill_color"):
        found = f"resize_mode 'longest' with fill_color {stated['fill_color']!r:.40}"
        raise WeightsError(where, found, "fill_color 0 (black borders)")
    mean, std = (_channels(stated[key], f"{where}, preprocess_cfg.{key}") for key in ("mean", "std"))
    _require_of_pixels(mean, std, where)
    return Preprocess(side, mean, std, interpolation=kernel, resize_mode=mode)


def of_transformers(stated: Mapping[str, Any], own: Preprocess, where: str) -> Preprocess:
    """The preprocessing of a CLIPImageProcessor, from its `preprocessor_config.json`.

    Normalisation takes pixels from 0 to 255 times `rescale_factor`. Here pixels are in [0, 1], so a factor f
    other than 1/255 divides mean and std by 255 f. Without `do_normalize`, mean is 0 and std is 1.

    Args:
        stated: the table of the file.
        own: input size of the tower, and mean and std where the file states none.
        where: of messages.

    Raises:
        WeightsError: a statement that cannot be followed.
    """
    kind = stated.get("image_processor_type", stated.get("feature_extractor_type", "CLIPImageProcessor"))
    if kind not in PROCESSORS:
        raise WeightsError(where, f"a processor of kind {kind!r:.60}", "a CLIPImageProcessor")
    steps = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
    for key in sorted(key for key in stated if key.startswith("do_") and key not in steps):
        if stated[key]:
            raise WeightsError(where, f"{key} is {stated[key]!r:.40}", f"only {', '.join(sorted(steps))}")
    if not stated.get("do_resize", True):
        raise WeightsError(where, "do_resize is false", "images that are resized to the input of the tower")
    kernel = stated.get("resample", 3)
    if isinstance(kernel, bool) or not isinstance(kernel, int) or kernel not in KERNELS:
        raise WeightsError(where, f"resample is {kernel!r:.40}", "2 (bilinear) or 3 (bicubic)")
    mode = _transformers_mode(stated, own.image_size, where)
    factor = stated.get("rescale_factor", 1 / RGB_MAX) if stated.get("do_rescale", True) else 1.0
    if not _is_number(factor) or factor <= 0:
        raise WeightsError(where, f"rescale_factor is {factor!r:.40}", "a positive number such as 1/255")
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if stated.get("do_normalize", True):
        mean = _channels(stated.get("image_mean", own.mean), f"{where}, image_mean")
        std = _channels(stated.get("image_std", own.std), f"{where}, image_std")
    scale = 1.0 if math.isclose(factor * RGB_MAX, 1.0, rel_tol=1e-9) else factor * RGB_MAX
    mean = mean[0] / scale, mean[1] / scale, mean[2] / scale
    std = std[0] / scale, std[1] / scale, std[2] / scale
    _require_of_pixels(mean, std, where)
    return Preprocess(own.image_size, mean, std, own.antialias, KERNELS[kernel], mode)


def _transformers_mode(stated: Mapping[str, Any], side: int, where: str) -> ResizeMode:
    """How `size`, `do_center_crop` and `crop_size` bring an image to a square of `side` pixels."""
    crops = bool(stated.get("do_center_crop", True))
    crop = stated.get("crop_size", side)
    if crops and _sides(crop) != (side, side):
        raise WeightsError(where, f"crop_size is {crop!r:.60}", f"{side}, the input of the tower")
    size = stated.get("size", side)
    if isinstance(size, dict) and set(size) == {"height", "width"} and _sides(size) == (side, side):
        return "squash"
    shorter = size.get("shortest_edge") if isinstance(size, dict) and set(size) == {"shortest_edge"} else size
    if isinstance(shorter, bool) or shorter != side:
        raise WeightsError(where, f"size is {size!r:.60}", f"{side}, the input of the tower")
    if not crops:
        found = "do_center_crop is false, and size is that of the shorter side"
        raise WeightsError(where, found, "a square input: do_center_crop, or height and width")
    return "shortest"


def _sides(size: object) -> tuple[object, object]:
    """Height and width of a size in any of its spellings."""
    if isinstance(size, dict):
        both = size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))
        return both if size.keys() <= {"height", "width", "shortest_edge"} else (None, None)
    if isinstance(size, list | tuple):
        return (size[0], size[-1]) if len(size) in (1, 2) else (None, None)
    return size, size


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _channels(stated: object, where: str) -> Channels:
    """Three numbers from a list of three, or from one number for all channels."""
    values = list(stated) if isinstance(stated, list | tuple) else [stated] * 3
    numbers = [float(value) for value in values if _is_number(value)]
    if len(values) != 3 or len(numbers) != 3:
        raise WeightsError(where, f"{stated!r:.60}", "three finite numbers")
    return numbers[0], numbers[1], numbers[2]


def _require_of_pixels(mean: Channels, std: Channels, where: str) -> None:
    """Refuse a normalisation that is no mean and deviation of pixels in [0, 1], such as that of 0 to 255."""
    if not all(0 <= m <= 1 and 0 < s <= 1 for m, s in zip(mean, std, strict=True)):
        expected = "of pixels in [0, 1]: means from 0 to 1, deviations above 0 and at most 1"
        raise WeightsError(where, f"mean {mean} and std {std}", expected, "divide those of 0 to 255 by 255")
