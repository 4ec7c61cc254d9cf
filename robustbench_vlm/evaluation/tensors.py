"""A classifier, images and labels handed over as tensors: refused if they cannot be attacked, and named."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustbench_vlm.errors import InputError
from robustbench_vlm.types import Classify, Encoder

MAKE_ONE = "type robustbench_vlm.load_model(ID).classifier(class_names)"


def require_classifier(model: Classify) -> None:
    """Refuse what does not map pixels to logits.

    Raises:
        InputError: an encoder, whose embeddings would be taken for logits; or nothing that can be called.
    """
    expected = "a classifier: pixels (B, 3, H, W) -> logits (B, classes)"
    if isinstance(model, Encoder):
        found = "an encoder: pixels -> embeddings"
        raise InputError("model", found, expected, "type encoder.classifier(class_names)")
    if not callable(model):
        raise InputError("model", f"a {type(model).__name__}", expected, MAKE_ONE)


def require_tensors(model: Classify, images: Tensor, labels: Tensor) -> None:
    """Refuse images and labels that cannot be attacked.

    Raises:
        InputError: no dense tensors of real numbers, tensors on another device than the model, a model
            through which no gradient flows, pixels outside [0, 1], or labels that are no class indices.
    """
    for name, given in (("images", images), ("labels", labels)):
        if not isinstance(given, Tensor):
            raise InputError(name, f"a {type(given).__name__}", "a torch.Tensor")
        if given.layout != torch.strided or given.is_complex():
            found = f"a tensor of {given.layout} with numbers of {given.dtype}"
            raise InputError(name, found, "a dense tensor of real numbers")
    if labels.device != images.device:
        raise InputError("labels", f"on {labels.device}", f"on {images.device}, where the images are")
    state = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    if any(tensor.is_inference() for tensor in state):
        found = "weights that were made inside torch.inference_mode, through which no gradient flows"
        raise InputError("model", found, "a model that was made outside", "make or load it again there")
    if state and all(tensor.device != images.device for tensor in state):
        device = str(state[0].device)
        do = f"move them with images.to({device!r})"
        raise InputError("images", f"on {images.device}", f"on {device}, where the model is", do)
    _require_pixels(images)
    if labels.shape != (len(images),) or labels.dtype != torch.int64 or int(labels.min()) < 0:
        found = f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}"
        raise InputError("labels", found, f"int64 class indices of shape ({len(images)},)")


def _require_pixels(images: Tensor) -> None:
    if images.ndim != 4 or not images.numel():
        raise InputError("images", f"shape {tuple(images.shape)}", "(N, channels, H, W) with N of at least 1")
    low, high = (float(limit) for limit in images.detach().aminmax())
    if images.dtype != torch.float32 or low < 0 or high > 1 or not math.isfinite(low + high):
        found = f"{str(images.dtype).removeprefix('torch.')} in [{low:.4g}, {high:.4g}]"
        do = "give unnormalised pixels and let the model normalise them"
        raise InputError("images", found, "float32 pixels in [0, 1]", do)


def sha256_of_images(images: Tensor) -> list[str]:
    """SHA-256 of the bytes of each of N images, in hex."""
    return [
        hashlib.sha256(image.detach().cpu().contiguous().numpy().tobytes()).hexdigest() for image in images
    ]


def distinct_keys(keys: Sequence[str] | None, sha256: Sequence[str], labels: Tensor) -> list[str]:
    """The keys of N images; by default `<sha256>/<label>`, with a count where a pair occurs again.

    Raises:
        InputError: another number of keys than images, or a key that occurs twice.
    """
    if keys is not None:
        if len(keys) != len(sha256) or len(set(keys)) != len(keys):
            found = f"{len(keys)} keys, {len(set(keys))} of them distinct"
            raise InputError("keys", found, f"{len(sha256)} distinct names, one an image")
        return list(keys)
    count: dict[str, int] = {}
    names = []
    for sha, label in zip(sha256, labels.tolist(), strict=True):
        name = f"{sha}/{label}"
        count[name] = count.get(name, 0) + 1
        names.append(name if count[name] == 1 else f"{name}/{count[name]}")
    return names
