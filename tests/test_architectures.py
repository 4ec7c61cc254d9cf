"""Every architecture that open_clip lists classifies as open_clip's own zero-shot code does, or is refused.

Each one is built small, once: `small_clips`. What is compared is the whole way from image files to logits.
"""

import io

import numpy as np
import open_clip
import pytest
import small_clips
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image
from torch.nn import functional as F  # noqa: N812 - the customary name

from robustbench_vlm.data import pixels
from robustbench_vlm.data.loader import as_float
from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models import openclip, zoo
from robustbench_vlm.models.clip import Classifier
from robustbench_vlm.models.text_bank import render, text_bank

NAMES, TEMPLATES = ["red", "green", "blue square"], ["a photo of a {c}", "the {c} picture"]
FEW = ["RN50", "ViT-B-32", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2-256", "coca_ViT-B-32", "ViT-H-14-CLIPA"]
TEXT_OF_TRANSFORMERS = [name for name in open_clip.list_models() if "hf_model" in str(openclip.config(name))]
OTHERS = [name for name in open_clip.list_models() if name not in TEXT_OF_TRANSFORMERS]


def files(n):
    """The first n of two images that are not square, as PNG files."""
    noise = np.random.default_rng(0)
    found = []
    for height, width in ((70, 110), (96, 64)):
        file = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "png")
        found.append(file.getvalue())
    return found[:n]


@torch.no_grad()
def expected(net, folder, n):
    """Logits of open_clip's own code."""
    stated = open_clip.get_model_preprocess_cfg(net)
    transform = open_clip.transform.image_transform_v2(PreprocessCfg(**stated), is_train=False)
    images = torch.stack([transform(Image.open(io.BytesIO(content))) for content in files(n)])
    templates = [t.replace("{c}", "{}") for t in TEMPLATES]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    weights = open_clip.build_zero_shot_classifier(net, tokenizer, NAMES, templates)
    logits = net.logit_scale.exp() * F.normalize(net.encode_image(images), dim=-1) @ weights
    return logits if net.logit_bias is None else logits + net.logit_bias


@torch.no_grad()
def found(folder, n):
    """Logits of this package."""
    model = zoo.load(f"local-dir:{folder}").model
    rule = model.preprocess.canvas_resize
    images = np.stack([pixels.model(content, model.image_size, "here", rule) for content in files(n)])
    return Classifier(model, text_bank(model, render(NAMES, TEMPLATES)))(as_float(images))


def require_equal(name, folder, monkeypatch, n):
    config = small_clips.shrunk(openclip.config(name))
    with small_clips.shallow_timm(monkeypatch):
        net = small_clips.write(folder, config, small_clips.preprocess_of(name))
        theirs = expected(net, folder, n)
        torch.testing.assert_close(found(folder, n), theirs, rtol=1e-4, atol=1e-4)
    assert theirs.std() > 0


@pytest.mark.parametrize("name", FEW)
def test_some_architectures_classify_as_open_clip_does(name, tmp_path, monkeypatch):
    require_equal(name, tmp_path, monkeypatch, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OTHERS if name not in FEW])
def test_every_architecture_classifies_as_open_clip_does(name, tmp_path, monkeypatch):
    require_equal(name, tmp_path, monkeypatch, 1)


@pytest.mark.parametrize("name", TEXT_OF_TRANSFORMERS)
def test_a_text_tower_that_would_be_downloaded_is_refused_in_one_line(name, tmp_path):
    small_clips.write(tmp_path, openclip.config(name), {})
    with pytest.raises(WeightsError, match=r"hf_model_name is .* would be downloaded") as error:
        zoo.load(f"local-dir:{tmp_path}")
    assert "\n" not in str(error.value)
