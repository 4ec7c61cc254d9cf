"""Adversarial images packed into few bytes, given the clean image that they were made from.

`corners` has one bit a value: the image lies in a corner of the ball, `clip(x +- eps)` everywhere. `steps`
has the image on the grid of 8-bit pixels, as its difference from the clean one. `exact` has every bit of it.
The last two are coded by the entropy coder of zlib.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from robustbench_vlm.threat import Threat

Kind = Literal["corners", "steps", "exact"]
KINDS: tuple[str, ...] = get_args(Kind)
"""From the smallest to the largest."""

RAW_DEFLATE = -15  # zlib's own number for a stream without header
WORD = np.dtype("<u4")


@dataclass(frozen=True)
class Packed:
    """One packed image.

    Attributes:
        kind: how it is packed.
        content: the bytes.
    """

    kind: Kind
    content: bytes


def pack(kind: Kind, adv: np.ndarray, clean: np.ndarray) -> Packed:
    """Pack an image; `corners` and `steps` may change it, so that `unpack` says what was really stored.

    Args:
        kind: how.
        adv: (3, H, W) float32 in [0, 1].
        clean: (3, H, W) float32, the image that it was made from.
    """
    if kind == "corners":
        upwards = (adv > clean) | ((adv == clean) & (clean >= 0.5))  # at a limit of the box either is exact
        return Packed(kind, np.packbits(upwards).tobytes())
    if kind == "steps":
        return Packed(kind, _coded((_bytes(adv) - _bytes(clean)).tobytes()))
    changed = _words(adv) ^ _words(clean)
    planes = changed.view(np.uint8).reshape(-1, WORD.itemsize).T  # equal bytes stand together
    return Packed(kind, _coded(np.ascontiguousarray(planes).tobytes()))


def unpack(packed: Packed, clean: np.ndarray, threat: Threat) -> np.ndarray:
    """The image, (3, H, W) float32.

    Args:
        packed: of `pack`.
        clean: (3, H, W) float32, the image that it was made from.
        threat: the ball of whose corners `corners` speaks.

    Raises:
        ValueError: the bytes are not those of an image of this shape.
    """
    if packed.kind == "corners":
        if len(packed.content) != -(-clean.size // 8):
            raise ValueError(f"{len(packed.content)} bytes, expected {-(-clean.size // 8)}")
        bits = np.unpackbits(np.frombuffer(packed.content, np.uint8), count=clean.size)
        eps = np.float32(threat.eps)
        moved = np.where(bits.reshape(clean.shape) == 1, clean + eps, clean - eps)
        return np.clip(moved, np.float32(0), np.float32(1))
    if packed.kind == "steps":
        difference = np.frombuffer(_decoded(packed.content, clean.size), np.uint8).reshape(clean.shape)
        stepped: np.ndarray = (_bytes(clean) + difference).astype(np.float32) / np.float32(255)
        return stepped
    size = clean.size * WORD.itemsize
    planes = np.frombuffer(_decoded(packed.content, size), np.uint8).reshape(WORD.itemsize, -1)
    changed = np.ascontiguousarray(planes.T).view(WORD).reshape(clean.shape)
    exact: np.ndarray = (changed ^ _words(clean)).view("<f4").astype(np.float32)
    return exact


def _bytes(image: np.ndarray) -> np.ndarray:
    """The nearest 8-bit image; differences of such images are taken modulo 256."""
    return np.rint(image * np.float32(255)).astype(np.uint8)


def _words(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image, dtype="<f4").view(WORD)


def _coded(content: bytes) -> bytes:
    """The shorter of Huffman codes alone, which suit noise, and of deflate, which suits runs of zeros."""
    found = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
        coder = zlib.compressobj(6, zlib.DEFLATED, RAW_DEFLATE, zlib.DEF_MEM_LEVEL, strategy)
        found.append(coder.compress(content) + coder.flush())
    return min(found, key=len)


def _decoded(content: bytes, size: int) -> bytes:
    """The `size` bytes that were coded; nothing longer is ever made of them."""
    decoder = zlib.decompressobj(RAW_DEFLATE)
    try:
        found = decoder.decompress(content, size + 1)
    except zlib.error as error:
        raise ValueError(f"not a stream of zlib ({error})") from None
    if len(found) != size or not decoder.eof or decoder.unused_data:
        raise ValueError(f"not a stream of {size} bytes")
    return found
