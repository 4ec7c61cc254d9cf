"""What a model id names, decided without torch, is what open_clip and the loader say."""

import pytest

from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models import model_ids, openclip


def test_architectures_are_those_of_open_clip():
    assert model_ids.architectures() == set(openclip.architectures())


@pytest.mark.parametrize(
    "name",
    ["tiny", "ViT-B-32", "ViT-B-32:openai", "hf-hub:a/b", "fare2-vit-l-14", "x/y.pth.tar", "Z.SAFETENSORS"],
)
def test_ids_that_may_be_loaded(name):
    model_ids.require(name)


@pytest.mark.parametrize("name", ["tyni", "runs/none", "ViT-B-23", "."])
def test_ids_that_name_nothing(name):
    with pytest.raises(WeightsError, match=r"expected .*; (did you mean|known|see vlmrob list models)"):
        model_ids.require(name)
