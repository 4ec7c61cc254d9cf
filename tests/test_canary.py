"""The canary of a model: each kind of silent change is caught, and the line says what moved."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the customary name
from worlds import describe, tilted, twin, with_mean_rows

from robustbench_vlm import store
from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models import canary, checkpoint, checkpoint_card, convert, model_ids, openclip, zoo
from robustbench_vlm.models.clip import Clip


@pytest.fixture
def model():
    return tilted("vlmrob-tiny", 12)


def deep(model):
    """A copy with both towers of its own."""
    own = twin(model)
    own.language = copy.deepcopy(model.language)
    return own


def activation(model):
    for part in (model.visual, model.language):
        for module in list(part.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.GELU):
                    setattr(module, name, QuickGELU())


def mean(model):
    model.mean += 0.02


def std(model):
    model.std *= 1.03


def resize(model):
    model.preprocess = replace(model.preprocess, antialias=False)


def scale(model):
    model.logit_scale *= 1.01


def text_tower(model):
    with torch.no_grad():
        model.language.net.ln_final.weight[3] += 0.2


def tokenizer(model):
    inner = model.tokenize
    model.tokenize = lambda sentences: inner([s.replace("a", "e") for s in sentences])


def image_tower(model):
    with torch.no_grad():
        model.visual.ln_post.weight[3] += 0.2


MUTATIONS = {
    activation: "both towers: their activation (QuickGELU or GELU), or both their weights",
    mean: "mean or std of the normalisation",
    std: "mean or std of the normalisation",
    resize: "the resize kernel (bicubic, antialias)",
    scale: "the logit scale",
    text_tower: "the text tower or the tokenizer",
    tokenizer: "the text tower or the tokenizer",
    image_tower: "the image tower: its weights or its code",
}


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
def test_a_silent_change_is_caught_and_named(model, mutate):
    stated = canary.take(model)
    own = deep(model)
    canary.check_canary(own, stated, "own")  # the copy is the same model
    mutate(own)
    with pytest.raises(WeightsError, match="the canary moved") as error:
        canary.check_canary(own, stated, "own")
    text = str(error.value)
    assert "\n" not in text
    assert f": {MUTATIONS[mutate]}; expected" in text


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_another_interpolation_in_the_code_is_caught_on_load(tmp_path, monkeypatch, mode):
    """Hashes and facts of the card all hold here: only what the model does has changed."""
    made, ids = with_mean_rows(tilted("vlmrob-tiny", 4))
    checkpoint.save_folder(tmp_path, made, describe(made, "m"), trained_tokens=ids)
    true = F.interpolate

    def other(images, *, size, **_):
        return true(images, size=size, mode=mode)

    monkeypatch.setattr(F, "interpolate", other)
    with pytest.raises(WeightsError, match="the resize kernel"):
        zoo.load(str(tmp_path))


def test_an_activation_that_the_code_forgets_is_caught_on_load(tmp_path, monkeypatch):
    base = openclip.build("vlmrob-tiny", quick_gelu=True)
    made, ids = with_mean_rows(base.eval())
    checkpoint.save_folder(tmp_path, made, describe(made, "m"), trained_tokens=ids)
    assert zoo.load(str(tmp_path)).model.facts.quick_gelu is True

    def forgetful(arch, *, quick_gelu=False, **options):
        stated = BUILD(arch, quick_gelu=quick_gelu, **options)
        return BUILD(arch, **options).replaced(facts=stated.facts)  # not of the towers

    BUILD = openclip.build  # noqa: N806 - the true one
    monkeypatch.setattr(openclip, "build", forgetful)
    with pytest.raises(WeightsError, match="their activation"):
        zoo.load(str(tmp_path))


def test_a_canary_of_other_hardware_still_passes(model):
    """Ten times and more the rounding of fp32 stays inside the tolerance; the mutations are far outside."""
    stated = canary.take(model)
    own = deep(model)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter *= 1 + 1e-5 * torch.randn(parameter.shape, generator=noise)
    found = canary.take(own)
    assert found != stated
    assert canary.moved(stated, found) == []
    for mutate in MUTATIONS:
        own = deep(model)
        mutate(own)
        far = max(
            canary.distance(stated, canary.take(own), p)
            for p in ("tower", "pixels", "resized", "text", "logits")
        )
        assert far > 3 * checkpoint_card.CANARY_TOLERANCE, mutate.__name__


def test_the_fixed_images_are_fixed_and_in_range():
    images = canary.pictures(2, 32)
    assert images.shape == (2, 3, 32, 32)
    assert 0 <= images.min() < 0.1
    assert 0.9 < images.max() < 1
    # by hand: index 1 has noise ((2654435761 + 12345) % 2^32 * 40503 // 2^16) % 256 and ramp 3 * 256 // 256
    noise = ((2654435761 + 12345) % 2**32 * 40503 // 2**16) % 256
    assert images[0, 0, 0, 1].item() == (noise + 3) / 512
    assert images.std() > 0.15


def test_taking_a_canary_leaves_the_model_as_it_was(model):
    model.train()
    before = model.fingerprints()
    canary.take(model)
    assert model.training
    assert model.fingerprints() == before


def test_a_model_whose_embeddings_are_not_finite_has_no_canary(model):
    with torch.no_grad():
        model.visual.proj[0, 0] = float("nan")
    with pytest.raises(WeightsError, match="image embeddings that are zero or not finite"):
        canary.take(model)


def test_packaged_checkpoints_have_their_canary():
    for name in model_ids.packaged():
        card = zoo.load(name).card  # and it was checked
        assert card.canary is not None
        assert card.canary.tolerance == checkpoint_card.CANARY_TOLERANCE


def test_a_card_from_before_canaries_loads_and_gets_one(world, tmp_path):
    found = zoo.load(world.student)
    made, ids = with_mean_rows(tilted("vlmrob-tiny", 1))
    checkpoint.save_folder(tmp_path, made, describe(made, "old"), trained_tokens=ids)
    table = store.read_json(tmp_path / "card.json")
    whole = json.dumps(table.pop("canary"))
    store.write_json(tmp_path / "card.json", table)
    assert zoo.load(str(tmp_path)).card.canary is None
    convert.add_canary(str(tmp_path))
    assert json.dumps(store.read_json(tmp_path / "card.json")["canary"]) == whole
    assert zoo.load(str(tmp_path)).card.canary == found.card.canary
    with pytest.raises(WeightsError, match="no packaged checkpoint or folder"):
        convert.add_canary("ViT-B-32:openai")


def test_a_clip_with_its_facts_changed_has_another_canary(model):
    other = Clip(model.visual, model.language, model.tokenize, model.preprocess, 21.0, model.facts)
    assert canary.moved(canary.take(model), canary.take(other)) == ["logits"]
