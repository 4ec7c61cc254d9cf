"""Pixels are those the field computes, and what is no image is an error before it costs memory."""

import io
import struct
import zlib

import numpy as np
import open_clip
import pytest
import torch
from folders import encode, noise
from PIL import Image, ImageFile
from torch.nn.functional import interpolate

from robustbench_vlm.data import pixels
from robustbench_vlm.errors import DataError


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def textured(width, height, mode="RGB"):
    y, x = np.mgrid[0:height, 0:width]
    channels = [np.sin(x / 3) + np.cos(y / 5), np.sin(x * y / 90), ((x // 4 + y // 4) % 2) * 2 - 1]
    array = (127 * (np.clip(np.stack(channels, -1), -1, 1) + 1)).astype(np.uint8)
    return Image.fromarray(array).convert(mode)


def of_open_clip(content, px):
    transform = open_clip.image_transform(px, is_train=False)
    transform.transforms = [t for t in transform.transforms if type(t).__name__ != "Normalize"]
    return (transform(Image.open(io.BytesIO(content)).convert("RGB")) * 255).round().byte().permute(1, 2, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("width", "height"), [(64, 64), (50, 37), (37, 50), (31, 90), (224, 225), (225, 224), (33, 32), (20, 20)]
)
@pytest.mark.parametrize("px", [32, 33])
def test_model_canvas_is_open_clips(kind, width, height, px):
    content = saved(textured(width, height), kind)
    found = pixels.model(content, px, "here")
    assert found.dtype == np.uint8
    assert found.shape == (px, px, 3)
    assert np.array_equal(found, of_open_clip(content, px).numpy())


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK"])
def test_other_modes_as_the_field_converts_them(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    content = saved(textured(40, 48, mode), kind)
    assert np.array_equal(pixels.model(content, 32, "here"), of_open_clip(content, 32).numpy())


def test_palette_with_transparency_and_animation_and_rotation():
    palette = textured(8, 8).quantize(16)
    content = saved(palette, transparency=bytes([0, 128] + [255] * 14))
    assert np.array_equal(pixels.native(content, 8, "here"), np.asarray(palette.convert("RGB")))

    frames = [textured(8, 8), Image.fromarray(noise(1))]
    moving = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(pixels.native(moving, 8, "here"), np.asarray(frames[0]))

    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees": the field does not
    assert np.array_equal(
        pixels.native(saved(frames[0], exif=exif.tobytes()), 8, "here"), np.asarray(frames[0])
    )


def test_sixteen_bit_colour_loses_its_low_byte():
    deep = np.random.default_rng(0).integers(0, 65536, (6, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)

    def chunk(kind, content):
        whole = kind + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(np.asarray(pixels.rgb(content, "here")), (deep >> 8).astype(np.uint8))


def test_grey_and_cmyk_and_animated_gif_by_hand():
    grey = np.array([[0, 7], [200, 255]], dtype=np.uint8)
    found = pixels.native(saved(Image.fromarray(grey)), 2, "here")
    assert np.array_equal(found, np.repeat(grey[..., None], 3, axis=2))
    flat = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # full cyan ink
    red, green, blue = pixels.native(saved(flat, "JPEG", quality=100), 8, "here")[4, 4]
    assert red < 8
    assert green > 247
    assert blue > 247
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    moving = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels.native(moving, 4, "here") == (255, 0, 0)).all()


@pytest.mark.parametrize("side", [32, 96])
def test_the_resize_in_the_graph_is_as_far_from_pillow_as_is_stated(side):
    def distance(array, antialias):
        small = torch.from_numpy(array.transpose(2, 0, 1).copy())[None].float() / 255
        large = interpolate(small, size=(224, 224), mode="bicubic", antialias=antialias)[0] * 255
        pillow = pixels.model(saved(Image.fromarray(array)), 224, "here")
        return np.abs(large.permute(1, 2, 0).numpy() - pillow)

    rough = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    y, x = np.mgrid[:side, :side] / side
    smooth = (127 + 60 * np.stack([np.sin(3 * x), np.cos(4 * y), np.sin(2 * x * y)], -1)).astype(np.uint8)
    assert distance(rough, True).mean() < 0.45
    assert distance(rough, True).max() < 50
    assert distance(smooth, True).mean() < 0.3
    assert distance(smooth, True).max() < 1.1
    assert 3.5 < distance(rough, False).mean() < 4.5


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    found = pixels.native(saved(Image.fromarray(grey)), 8, "here")
    assert np.array_equal(found[..., 0], (grey / 257).round().astype(np.uint8))
    assert found.min() == 0
    assert found.max() == 255


def test_native_refuses_another_size():
    content = encode(noise(0, 9))
    assert np.array_equal(pixels.native(content, 9, "here"), noise(0, 9))
    with pytest.raises(DataError, match="here: 9 x 9 pixels; expected 8 x 8"):
        pixels.native(content, 8, "here")


def png_claiming(width, height):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_001, 12_000, 60_000, 2**31 - 1])
def test_a_header_that_claims_too_much(side):
    with pytest.raises(DataError, match="at most 64000000 pixels"):
        pixels.rgb(png_claiming(side, side), "here")


@pytest.mark.parametrize(("size", "left"), [((1, 100), "0 x 32"), ((100, 1), "32 x 0")])
def test_an_image_of_which_the_longest_side_leaves_nothing_is_named(size, left):
    with pytest.raises(DataError, match=rf"here: \d+ x \d+ pixels, resized to {left}"):
        pixels.model(saved(Image.new("RGB", size)), 32, "here", "bicubic-longest")


def test_a_thin_image_is_not_blown_up():
    with pytest.raises(DataError, match="resized to 224 x 4480000"):
        pixels.model(saved(Image.new("RGB", (1, 20_000))), 224, "here")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_images(kind):
    content = saved(Image.fromarray(noise(3, 64)), kind)
    last = len(content) - 64  # a PNG whose final checksum alone is cut off still has all its pixels
    for cut in [*range(0, last, max(1, len(content) // 40)), last]:
        with pytest.raises(DataError) as caught:
            pixels.rgb(content[:cut], "shard, key")
        assert str(caught.value).startswith("shard, key: ")
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)  # addresses would make messages differ from run to run


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>sign in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "a git-lfs pointer"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a whole image"),
        (b"P6 2 2 255 " + bytes(12), "not a whole image"),  # Pillow reads it; the layout does not have it
    ],
)
def test_what_is_no_image(content, message):
    with pytest.raises(DataError, match=message):
        pixels.rgb(content, "here")


def test_float_images_and_lenient_decoding_are_refused(monkeypatch):
    monkeypatch.setattr(pixels, "FORMATS", ("TIFF",))
    with pytest.raises(DataError, match="32 bits a channel"):
        pixels.rgb(saved(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"), "here")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match="LOAD_TRUNCATED_IMAGES"):
        pixels.rgb(encode(noise(0)), "here")
