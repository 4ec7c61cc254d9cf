"""The patch embedding as a matrix product computes what the convolution computes."""

from __future__ import annotations

import open_clip
import pytest
import small_clips
import torch
from torch import nn

from robustbench_vlm.models import openclip, patches, zoo
from robustbench_vlm.models.patches import PatchEmbedding


@pytest.mark.parametrize("bias", [False, True])
def test_embeddings_and_all_gradients_are_those_of_the_convolution(bias):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, (4, 2), (4, 2), bias=bias)).double()
    expected_of = nn.Conv2d(3, 5, (4, 2), (4, 2), bias=bias).double()
    expected_of.load_state_dict(net[0].state_dict())
    patches.by_matrix(net)
    assert isinstance(net[0], PatchEmbedding)
    images = torch.rand(3, 3, 12, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 5, 3, 4, dtype=torch.float64)
    found, expected = net(images), expected_of(images)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    ours = torch.autograd.grad((found * weights).sum(), [images, *net.parameters()])
    theirs = torch.autograd.grad((expected * weights).sum(), [images, *expected_of.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-11)


def test_parameters_stay_the_same_objects_with_the_same_names():
    net = nn.Sequential(nn.Conv2d(3, 5, 4, 4))
    before = dict(net.named_parameters())
    net.eval().requires_grad_(False)
    patches.by_matrix(net)
    after = dict(net.named_parameters())
    assert list(after) == list(before) == ["0.weight", "0.bias"]
    assert all(after[name] is before[name] for name in before)
    assert not net[0].training


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 4, 2),
        nn.Conv2d(3, 4, 4, 4, padding=1),
        nn.Conv2d(3, 3, 4, 4, groups=3),
        nn.Conv2d(3, 4, 4, 4, dilation=2),
        nn.Conv2d(8, 4, 2, 2),
    ],
    ids=["overlap", "padding", "groups", "dilation", "no pixels"],
)
def test_other_convolutions_are_left_alone(layer):
    net = nn.Sequential(layer)
    patches.by_matrix(net)
    assert net[0] is layer


def test_an_image_that_is_no_whole_number_of_patches_is_cut_as_the_convolution_cuts_it():
    net = nn.Sequential(nn.Conv2d(3, 5, 4, 4))
    images = torch.rand(2, 3, 11, 9)
    expected = net(images)
    patches.by_matrix(net)
    assert torch.equal(net(images), expected)


def test_a_tower_embeds_as_that_of_open_clip_does():
    ours = zoo.load("tiny").model
    theirs = open_clip.create_model("vlmrob-tiny").visual.eval()
    theirs.load_state_dict(ours.visual.state_dict())
    assert isinstance(ours.visual.conv1, PatchEmbedding)
    assert type(theirs.conv1) is nn.Conv2d
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert (ours.visual(images) - theirs(images)).abs().max() < 1e-5


def test_towers_of_timm_are_found_too(tmp_path, monkeypatch):
    with small_clips.shallow_timm(monkeypatch):
        small_clips.write(tmp_path, small_clips.shrunk(openclip.config("ViT-B-16-SigLIP")), {})
        tower = zoo.load(f"local-dir:{tmp_path}").model.visual
    assert isinstance(tower.trunk.patch_embed.proj, PatchEmbedding)
