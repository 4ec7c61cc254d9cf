"""What a model states of its preprocessing happens, in the encoder and on the canvas, or it is refused."""

import io
import json

import numpy as np
import open_clip
import pytest
import torch
import toys
from PIL import Image

from robustbench_vlm.data import pixels
from robustbench_vlm.data.canvas_images import resized_as
from robustbench_vlm.data.dataset import open_split
from robustbench_vlm.data.loader import as_float
from robustbench_vlm.errors import WeightsError
from robustbench_vlm.evaluation.cells import Subject
from robustbench_vlm.models.preprocess import CANVAS, Preprocess, of_open_clip, of_transformers

PLAIN = Preprocess(32, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
STATED = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
SIZES = [(32, 32), (70, 110), (96, 64), (20, 31), (33, 200), (32, 47)]


def picture(height, width):
    """A smooth image with edges, as a PNG file."""
    y, x = np.mgrid[0:height, 0:width] / 20
    planes = 127 + 90 * np.stack([np.sin(x), np.cos(y), np.sign(np.sin(x + y))], -1)
    file = io.BytesIO()
    Image.fromarray(planes.astype(np.uint8)).save(file, "png")
    return file.getvalue()


# On the canvas


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("kernel", "mode"), CANVAS)
def test_files_are_brought_to_the_canvas_as_open_clip_does(kernel, mode, height, width):
    whole = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": kernel, "resize_mode": mode}
    own = open_clip.image_transform(32, is_train=False, **whole)
    content = picture(height, width)
    theirs = own(Image.open(io.BytesIO(content)))
    ours = pixels.model(content, 32, "here", CANVAS[kernel, mode])
    assert torch.equal(as_float(ours[None])[0], theirs)


def test_an_evaluation_reads_files_as_the_model_states(tmp_path):
    card = toys.dataset_card(canvas="model", native_px=48)
    root = toys.write(card, tmp_path, labels=[0] * 12)
    split, loaded = open_split(card, root, "test"), toys.loaded()
    usual = Subject.of(loaded, card, split)
    assert "resize" not in usual.facts
    stated = Preprocess(32, PLAIN.mean, PLAIN.std, interpolation="bilinear", resize_mode="squash")
    other = toys.Loaded("squash", loaded.model.replaced(preprocess=stated), loaded.card)
    found = Subject.of(other, card, split)
    assert found.facts["resize"] == "bilinear-squash"
    content = split.entries[0].sample.read()
    expected = pixels.model(content, 32, "here", "bilinear-squash")
    assert torch.equal(found.images.floats([0]), as_float(expected[None]))
    fixed = resized_as(split, "bilinear-squash")
    assert resized_as(fixed, "bicubic").card.resize == "bilinear-squash"  # a rule of its own goes first
    native = open_split(toys.dataset_card(canvas="native", native_px=48), root, "test")
    assert resized_as(native, "bilinear-squash").card.resize == "model"


# In the encoder


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("kernel", "mode"), CANVAS)
def test_the_encoder_resizes_tensors_by_the_same_rule(kernel, mode, height, width):
    rule = Preprocess(32, PLAIN.mean, PLAIN.std, interpolation=kernel, resize_mode=mode)
    content = picture(height, width)
    whole = as_float(np.array(Image.open(io.BytesIO(content)))[None]).requires_grad_()
    found = rule.resized(whole)
    on_canvas = as_float(pixels.model(content, 32, "here", rule.canvas_resize)[None])
    assert found.shape == on_canvas.shape
    assert float((found.detach().clamp(0, 1) - on_canvas).abs().mean()) < 2 / 255
    (gradient,) = torch.autograd.grad(found.sum(), whole)
    assert gradient.abs().sum() > 0


# As open_clip states it


def test_open_clips_statement_is_followed():
    found = of_open_clip({**STATED, "size": [32, 32], "mode": "RGB", "interpolation": "bilinear"}, 32, "here")
    assert found == Preprocess(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), interpolation="bilinear")
    found = of_open_clip(
        {"mean": 0.5, "std": 0.5, "interpolation": "random", "resize_mode": "squash"}, 32, ""
    )
    assert found == Preprocess(32, (0.5,) * 3, (0.5,) * 3, resize_mode="squash")


@pytest.mark.parametrize(
    "stated",
    [
        {"size": 48},
        {"size": [32, 64]},
        {"size": "large"},
        {"mode": "L"},
        {"interpolation": "nearest"},
        {"resize_mode": "crop"},
        {"resize_mode": ["squash"]},
        {"resize_mode": "longest", "fill_color": 128},
        {"mean": [0.5]},
        {"mean": [0.5, float("nan"), 0.5]},
        {"std": [0.5, 0.0, 0.5]},
        {"mean": [127.5] * 3, "std": [127.5] * 3},
        {"mean": [-0.1, 0.5, 0.5]},
        {"std": "imagenet"},
        {"crop_pct": 0.9},
    ],
    ids=str,
)
def test_what_open_clip_states_and_cannot_be_followed_is_refused(stated):
    with pytest.raises(WeightsError, match="here") as error:
        of_open_clip({**STATED, **stated}, 32, "here")
    assert "\n" not in str(error.value)


# As transformers states it


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        {"resample": 2},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
        {"size": {"height": 32, "width": 32}, "resample": 2, "do_normalize": False},
    ],
    ids=str,
)
def test_the_statement_of_transformers_is_followed(stated):
    transformers = pytest.importorskip("transformers")
    whole = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3} | stated
    own = transformers.CLIPImageProcessor(**whole)
    facts = json.loads(own.to_json_string()) | stated
    found = of_transformers(facts, PLAIN, "here")
    content = picture(70, 110)
    theirs = own(Image.open(io.BytesIO(content)), return_tensors="pt")["pixel_values"].float()
    canvas = as_float(pixels.model(content, 32, "here", found.canvas_resize)[None])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (found.mean, found.std))
    ours = (canvas - mean) / std
    scale = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) < 0.03 * scale  # its resize may be torchvision's, not Pillow's
    assert float((ours - theirs).abs().mean()) < 0.002 * scale


def test_plain_statements_of_transformers_keep_mean_and_std_as_they_are_written():
    facts = {
        "size": 32,
        "crop_size": 32,
        "image_mean": [0.1, 0.2, 0.3],
        "rescale_factor": 0.00392156862745098,
    }
    found = of_transformers(facts, PLAIN, "here")
    assert found == Preprocess(32, (0.1, 0.2, 0.3), PLAIN.std)


@pytest.mark.parametrize(
    "stated",
    [
        {"do_resize": False},
        {"do_center_crop": False},
        {"do_pad": True},
        {"do_flip_channel_order": True},
        {"resample": 0},
        {"resample": True},
        {"size": {"shortest_edge": 48}},
        {"size": {"longest_edge": 32}},
        {"size": {"height": 32, "width": 48}},
        {"size": 48, "crop_size": 32},
        {"crop_size": {"height": 32, "width": 48}},
        {"rescale_factor": 0},
        {"rescale_factor": "1/255"},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0.5, 0]},
        {"image_mean": [127.5] * 3, "image_std": [127.5] * 3},
        {"image_processor_type": "SiglipImageProcessor"},
    ],
    ids=str,
)
def test_what_transformers_states_and_cannot_be_followed_is_refused(stated):
    with pytest.raises(WeightsError, match="here") as error:
        of_transformers(stated, PLAIN, "here")
    assert "\n" not in str(error.value)
