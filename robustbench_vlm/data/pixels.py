"""Encoded bytes -> (H, W, 3) uint8 on the canvas of a dataset.

The result equals that of the usual code (`convert("RGB")`, then resize and crop) to the bit:

- grey is repeated three times; black-and-white is 0 or 255
- a palette is looked up, its transparent colour like any other; alpha is dropped, not blended
- CMYK is inverted as Pillow does, without colour profile
- 16-bit grey is scaled by 1/257 (Pillow alone would clip it to white); 16-bit colour is Pillow's 8 bits
- 32-bit and float images are refused
- EXIF rotation is not applied
- of an animation, and of a TIFF of several pages, the first image counts

Side lengths are read from the header and compared with a limit before a pixel is decoded.

Images on native canvases are resized inside the encoder instead, neither rounded nor clipped. With bicubic
and antialias, from 32 and 96 to 224 px that differs by 0.4/255 from Pillow on the mean of uniform noise (the
worst case), and by up to 50/255 at single pixels, where Pillow clips what overshoots; on smooth images
0.3/255 and 1/255. Without antialias (the kernel of RobustVLM) it is 4/255 on the mean of noise.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from robustbench_vlm.cards.protocol import CardResize
from robustbench_vlm.errors import DataError

LARGEST = 64 * 10**6  # pixels, before decoding and after resizing: 192 MB as RGB
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
)  # by content; for other formats, Pillow may start programs
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def rgb(content: bytes, where: str) -> Image.Image:
    """The decoded image in mode RGB, at its own size.

    Args:
        content: an encoded JPEG, PNG, WebP, GIF, BMP or TIFF image.
        where: shard and key, for messages.

    Raises:
        DataError: not an image, truncated, more than 64 million pixels, or 32 bits a channel.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        found = "another package has set PIL.ImageFile.LOAD_TRUNCATED_IMAGES"
        raise DataError(where, found, "damaged images to be errors", "set it to False")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > LARGEST:
                raise _too_large(where, f"{image.width} x {image.height} pixels")
            if image.mode in ("I", "F"):
                raise DataError(where, f"32 bits a channel (mode {image.mode})", "8 or 16", "convert it")
            if image.mode.startswith("I;16"):
                scaled = (np.asarray(image, dtype=np.uint32) + 128) // 257
                return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
            image.load()
            image.info.pop("transparency", None)  # dropped anyway; Pillow warns about some spellings
            return image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(where, str(error).split(",")[0]) from None
    except UnidentifiedImageError:  # its own message contains a memory address
        raise _not_whole(where, content, "unknown format") from None
    except DAMAGED as error:
        raise _not_whole(where, content, str(error).partition("\n")[0] or "damaged") from None


def native(content: bytes, px: int, where: str) -> np.ndarray:
    """(px, px, 3) uint8: the image as stored.

    Raises:
        DataError: as `rgb`, or another size than px x px.
    """
    image = rgb(content, where)
    if image.size != (px, px):
        found, do = f"{image.width} x {image.height} pixels", "check that the folder belongs to this dataset"
        raise DataError(where, found, f"{px} x {px} (canvas = 'native')", do)
    return np.array(image)


def model(content: bytes, px: int, where: str, resize: CardResize = "bicubic") -> np.ndarray:
    """(px, px, 3) uint8: the image brought to a square canvas by Pillow's kernels, which are antialiased.

    The first word of `resize` is the kernel. `bicubic` or `bilinear` alone: the shorter side to `px`, centre
    crop. `-squash`: both sides to `px`. `-longest`: the longer side to `px`, black borders. These equal
    `open_clip.image_transform(px, is_train=False)` of that `resize_mode` bit for bit on the RGB image, up to
    its normalisation. `bilinear-256`: the shorter side to 256 for px = 224 (in that ratio for others), centre
    crop, as torchvision's `Resize(256)` and `CenterCrop(224)`. `model` is read as `bicubic`, for readers that
    know no model.

    Raises:
        DataError: as `rgb`, or an image so thin that nothing is left of its shorter side, or that its resized
            longer side passes 64 million pixels.
    """
    image = rgb(content, where)
    kernel, _, mode = ("bicubic" if resize == "model" else resize).partition("-")
    width, height = _resized_sides(image.width, image.height, px, mode)
    found = f"{image.width} x {image.height} pixels, resized to {width} x {height}"
    if width * height > LARGEST:
        raise _too_large(where, found)
    if not width * height:
        raise DataError(where, found, "an image that is not as thin", "remove or crop it")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling[kernel.upper()])
    left, top = (_offset(side, px) for side in image.size)
    return np.array(image.crop((left, top, left + px, top + px)))  # outside the image it is black


def _resized_sides(width: int, height: int, px: int, mode: str) -> tuple[int, int]:
    """Width and height after the resize, before the crop."""
    if mode == "squash":
        return px, px
    if mode == "longest":
        ratio = max(width / px, height / px)
        return round(width / ratio), round(height / ratio)
    shorter = round(px * 256 / 224) if mode == "256" else px
    longer = int(shorter * max(width, height) / min(width, height))
    return (shorter, longer) if width <= height else (longer, shorter)


def _offset(side: int, px: int) -> int:
    """Where the crop begins; negative for a border of (px - side) // 2 before the image."""
    return round((side - px) / 2.0) if side >= px else -((px - side) // 2)


def _too_large(where: str, found: str) -> DataError:
    return DataError(where, found, f"at most {LARGEST} pixels", "remove or shrink it")


def _not_whole(where: str, content: bytes, reason: str) -> DataError:
    """The error for bytes that do not decode; it says what they are instead, if that is visible."""
    start = content[:256].lstrip().lower()
    if not content:
        reason = "an empty file"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml")):
        reason = "a web page"
    elif start.startswith(b"version https://git-lfs"):
        reason = "a git-lfs pointer"
    return DataError(
        where, f"not a whole image ({reason})", "JPEG, PNG, WebP, GIF, BMP or TIFF", "fetch or write it again"
    )
