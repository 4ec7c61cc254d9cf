"""Encoders, text banks, checkpoints, LoRA and open_clip names: real networks, small ones where it can be."""

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F  # noqa: N812 - the customary name
from worlds import NAMES, describe, tilted, tokens_of, twin, with_mean_rows

import robustbench_vlm
from robustbench_vlm import devices, store, tensor_files
from robustbench_vlm.errors import CardError, InputError, WeightsError
from robustbench_vlm.models import checkpoint, checkpoint_card, lora, openclip, zoo
from robustbench_vlm.models.clip import Classifier, Clip, frozen
from robustbench_vlm.models.preprocess import Preprocess
from robustbench_vlm.models.text_bank import calls, render, text_bank
from robustbench_vlm.store import cache_folder


@pytest.fixture(scope="module")
def model(world):
    return zoo.load(world.student).model


def images(n=3, side=32, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert error.value.exit_code == 2
    return text


# Pixels


def test_normalisation_happens_inside_by_hand(model):
    x = images()
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (model.preprocess.mean, model.preprocess.std))
    by_hand = torch.tensor((x.numpy() - mean) / std, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.visual(by_hand), rtol=0, atol=1e-5)
        assert not torch.allclose(model(x), model.visual(x), atol=1e-2)


@pytest.mark.parametrize("antialias", [True, False])
def test_another_resolution_is_resized_bicubically_inside(model, antialias):
    facts = Preprocess(32, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), antialias)
    other = Clip(model.visual, model.language, model.tokenize, facts, 10.0, model.facts)
    x = images(side=48)
    small = F.interpolate(x, size=(32, 32), mode="bicubic", align_corners=False, antialias=antialias)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (facts.mean, facts.std))
    with torch.no_grad():
        torch.testing.assert_close(other(x), model.visual((small - mean) / std), rtol=0, atol=1e-5)


def test_an_image_of_the_models_own_size_is_not_resampled(model):
    x = images(1)
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    assert "Upsample" not in str(model(leaf).grad_fn.next_functions)
    with torch.no_grad():
        assert torch.equal(model(x), model(x.clone()))


# Text


def test_a_text_bank_is_normalise_average_normalise_by_hand(model):
    sentences = render(NAMES, ["a photo of a {c} square", "a {c} picture"])
    assert sentences[1] == ["a photo of a green square", "a green picture"]
    with torch.no_grad():
        rows = model.language(model.tokenize([s for group in sentences for s in group])).double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    bank = rows.reshape(4, 2, -1).mean(1)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    np.testing.assert_allclose(text_bank(model, sentences), bank, atol=1e-6)


def test_text_rows_are_unit_and_do_not_depend_on_their_neighbours(model):
    sentences = [f"a photo of a {name} number {i}" for i in range(20) for name in NAMES]
    rows = model.text(sentences)
    assert rows.shape == (80, 64)
    np.testing.assert_allclose(rows.norm(dim=1), 1, atol=1e-6)
    assert torch.equal(model.text(sentences[70:]), rows[70:])
    assert torch.equal(model.text(sentences[::-1]), rows.flip(0))
    assert not rows.requires_grad


def test_the_text_tower_is_called_with_one_shape_only(model):
    shapes = set()
    with model.language.register_forward_hook(lambda _, inputs, __: shapes.add(tuple(inputs[0].shape))):
        for n in (1, 63, 64, 65):
            assert model.text(["a photo"] * n).shape == (n, 64)
    assert shapes == {(64, 20)}


def test_a_text_bank_is_read_from_disk_the_second_time(model, tmp_path, monkeypatch):
    monkeypatch.setenv("VLMROB_CACHE", str(tmp_path))
    sentences = render(NAMES, ["a {c}"])
    first = text_bank(model, sentences)
    (path,) = (tmp_path / "text").glob("*.safetensors")
    key = tensor_files.read(path).facts["key"]
    tensor_files.write(path, {"bank": first + 1}, {"key": key})  # the stored bank is the one that is used
    assert torch.equal(text_bank(model, sentences), first + 1)
    save_file({"bank": first + 2}, path)  # without a checksum it is not
    assert torch.equal(text_bank(model, sentences), first)
    text_bank(model, render(NAMES, ["the {c}"]))
    assert len(list((tmp_path / "text").glob("*.safetensors"))) == 2


def test_a_text_bank_follows_the_order_of_the_classes(model, tmp_path, monkeypatch):
    monkeypatch.setenv("VLMROB_CACHE", str(tmp_path))
    sentences = render(NAMES, ["a photo of a {c}", "a {c} picture"])
    assert torch.equal(text_bank(model, sentences[::-1]), text_bank(model, sentences).flip(0))


@pytest.mark.parametrize("other", [{"kernels": "another GPU"}, {"torch": "another version"}])
def test_other_kernels_have_another_text_bank(model, tmp_path, monkeypatch, other):
    """So the bits of a bank do not depend on which machine's bank was stored first."""
    monkeypatch.setenv("VLMROB_CACHE", str(tmp_path))
    sentences = [["a red circle"], ["a blue square"]]
    text_bank(model, sentences)
    assert calls(model, sentences) == 0
    here = devices.kernels(model.device)
    monkeypatch.setattr(devices, "kernels", lambda device: here | other)
    assert calls(model, sentences) == 1


def test_another_text_tower_has_another_text_bank(model, tmp_path, monkeypatch):
    monkeypatch.setenv("VLMROB_CACHE", str(tmp_path))
    sentences = render(NAMES, ["a {c}"])
    before = text_bank(model, sentences)
    other = openclip.build("vlmrob-tiny")
    with torch.no_grad():
        other.language.net.text_projection.mul_(-1)
    assert not torch.allclose(text_bank(other, sentences), before)


@pytest.mark.parametrize("damage", ["truncated", "other tensor"])
def test_a_damaged_text_bank_is_made_again(model, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("VLMROB_CACHE", str(tmp_path))
    sentences = render(NAMES, ["a {c}"])
    first = text_bank(model, sentences)
    (path,) = (tmp_path / "text").glob("*.safetensors")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:50])
    else:
        save_file({"rows": first}, path)
    assert torch.equal(text_bank(model, sentences), first)
    assert torch.equal(load_file(path)["bank"], first)


def test_a_cache_that_cannot_be_written_costs_time_only(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VLMROB_CACHE", str(tmp_path / "file"))
    assert text_bank(model, render(NAMES, ["a {c}"])).shape == (4, 64)


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("VLMROB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "vlmrob"


def test_zero_shot_logits_are_scaled_cosines_and_the_model_is_frozen(world):
    fresh = zoo.load(world.student).model
    bank = text_bank(fresh, render(NAMES, ["a {c}"]))
    classifier = Classifier(fresh, bank)
    with torch.no_grad():
        z = fresh(images()).double().numpy()
    cosines = z @ bank.double().numpy().T / np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(classifier(images()), 20.0 * cosines, atol=1e-4)
    assert not any(p.requires_grad for p in classifier.parameters())
    assert not any(part.training for part in classifier.model.modules())


def test_untrained_words_are_named_when_the_trained_ones_are_known(model):
    assert model.untrained_words(["a photo of a red square", "a red walrus"]) == ["a red walrus"]
    assert openclip.build("vlmrob-tiny").untrained_words(["a red walrus"]) == []


# Modes


def test_a_replaced_model_shares_its_towers_and_changes_nothing_else(model):
    model.train()
    other = model.replaced(preprocess=replace(model.preprocess, mean=(0.0, 0.0, 0.0)), logit_scale=7.0)
    model.eval()
    assert (other.visual, other.language, other.facts) == (model.visual, model.language, model.facts)
    assert (other.logit_scale, other.training, model.logit_scale != 7.0) == (7.0, True, True)
    assert torch.equal(other.mean, torch.zeros(1, 3, 1, 1))
    with torch.no_grad():
        x = images()
        torch.testing.assert_close(other.eval()(x), model(x + model.mean))
    with pytest.raises(TypeError, match="antialias"):
        model.replaced(antialias=False)


def test_no_code_assigns_to_a_model_that_is_built():
    """What a `Clip` was built with stands in its buffers too; `Clip.replaced` makes another one."""
    package = Path(robustbench_vlm.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                if isinstance(target, ast.Attribute) and target.attr in ("preprocess", "language", "facts"):
                    assert ast.unparse(target.value) == "self", f"{path}: {ast.unparse(node)}"


@pytest.mark.parametrize("fails", [False, True])
def test_frozen_restores_every_mode_and_flag(model, fails):
    own = twin(model)
    own.visual.train()
    own.visual.transformer.resblocks[1].eval()
    own.visual.requires_grad_(True)
    own.visual.proj.requires_grad_(False)
    modes = [part.training for part in own.modules()]
    flags = [p.requires_grad for p in own.parameters()]
    assert len(set(modes)) == len(set(flags)) == 2
    try:
        with frozen(own):
            assert not any(part.training for part in own.modules())
            assert not any(p.requires_grad for p in own.parameters())
            if fails:
                raise RuntimeError("inside")
    except RuntimeError:
        assert fails
    assert [part.training for part in own.modules()] == modes
    assert [p.requires_grad for p in own.parameters()] == flags


# Checkpoints


@pytest.fixture
def folder(world, tmp_path):
    """A copy of the student's folder, to be damaged."""
    return shutil.copytree(world.student, tmp_path / "own")


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    made, ids = with_mean_rows(tilted("vlmrob-tiny", 9, scale=17.5))
    card = describe(made, "nine", trained_on=("a", "b"), training={"x": [1, 2]})
    checkpoint.save_folder(tmp_path, made, card, trained_tokens=ids)
    found = zoo.load(str(tmp_path))
    assert found.card == checkpoint.with_canary(made, card)
    for own, other in ((made.visual, found.model.visual), (made.language, found.model.language)):
        stated = own.state_dict()
        assert stated.keys() == other.state_dict().keys()
        assert all(torch.equal(value, stated[name]) for name, value in other.state_dict().items())
    assert found.model.logit_scale == 17.5
    with torch.no_grad():
        assert torch.equal(found.model(images()), made(images()))
    assert found.card.parameters == sum(p.numel() for p in made.visual.parameters())


def test_the_text_tower_is_stored_with_its_trained_rows_only_and_the_rest_is_their_mean(world, model):
    stored = load_file(f"{world.student}/text.safetensors")
    ids = stored["token_ids"].tolist()
    assert ids == sorted(tokens_of(model))
    assert stored[checkpoint.TOKENS].shape == (len(ids), 96)
    table = model.language.net.token_embedding.weight
    assert torch.equal(table[ids], stored[checkpoint.TOKENS])
    strangers = [i for i in range(400) if i not in ids]
    mean = stored[checkpoint.TOKENS].double().mean(0).float()
    torch.testing.assert_close(table[strangers], mean.expand(len(strangers), -1), rtol=0, atol=1e-6)
    assert model.facts.trained_tokens == frozenset(ids)


def test_a_checkpoint_without_text_borrows_the_tower_that_its_card_names(world, model):
    teacher = zoo.load(world.robust).model
    sentences = ["a photo of a red square"]
    assert torch.equal(teacher.text(sentences), model.text(sentences))
    assert teacher.untrained_words(["a walrus"]) == ["a walrus"]


def test_weights_saved_anew_have_the_same_bytes(world, tmp_path):
    found = zoo.load(world.clean)
    checkpoint.save_folder(tmp_path, found.model, found.card)
    for name in ("image.safetensors", "card.json"):
        assert (tmp_path / name).read_bytes() == (world.root / "clean" / name).read_bytes()


def rewrite_card(folder, **changes):
    path = folder / "card.json"
    store.write_json(path, {**store.read_json(path), **changes})


def test_weights_of_another_architecture_are_refused(world, folder):
    shutil.copy(f"{world.robust}/image.safetensors", folder / "image.safetensors")
    with pytest.raises(WeightsError, match=r"not of this architecture|another architecture") as error:
        zoo.load(str(folder))
    assert "image.safetensors" in one_line(error)


def test_a_card_of_another_architecture_is_refused(folder):
    rewrite_card(folder, arch="vlmrob-tiny-teacher")
    with pytest.raises(WeightsError, match="architecture") as error:
        zoo.load(str(folder))
    one_line(error)


def test_a_tensor_of_another_shape_is_refused(folder):
    state = load_file(folder / "image.safetensors")
    save_file(state | {"proj": state["proj"][:, :32].contiguous()}, folder / "image.safetensors")
    with pytest.raises(
        WeightsError, match=r"tensor 'proj' has shape \(80, 32\); expected \(80, 64\)"
    ) as error:
        zoo.load(str(folder))
    one_line(error)


def test_a_missing_tensor_is_named(folder):
    state = load_file(folder / "image.safetensors")
    del state["proj"], state["transformer.resblocks.0.ln_1.bias"]
    save_file(state, folder / "image.safetensors")
    with pytest.raises(WeightsError, match="tensor 'proj' is missing") as error:
        zoo.load(str(folder))
    one_line(error)


@pytest.mark.parametrize("part", ["image", "text"])
def test_a_changed_byte_is_noticed(folder, part):
    path = folder / f"{part}.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"{part} fingerprint is .* as in card.json") as error:
        zoo.load(str(folder))
    one_line(error)


@pytest.mark.parametrize(
    "change",
    [
        {"logit_scale": 21.0},
        {
            "preprocess": {
                "image_size": 32,
                "mean": [0.5, 0.5, 0.5],
                "std": [0.5, 0.5, 0.5],
                "antialias": True,
            }
        },
    ],
    ids=["logit_scale", "preprocess"],
)
def test_a_changed_fact_is_noticed(folder, change):
    rewrite_card(folder, **change)
    with pytest.raises(WeightsError, match="model fingerprint is") as error:
        zoo.load(str(folder))
    one_line(error)


def test_another_input_size_is_refused(folder):
    facts = store.read_json(folder / "card.json")["preprocess"]
    rewrite_card(folder, preprocess={**facts, "image_size": 64})
    with pytest.raises(WeightsError, match=r"preprocess\.image_size is 64; expected 32") as error:
        zoo.load(str(folder))
    one_line(error)


@pytest.mark.parametrize("keep", [4, 60, -40])
def test_truncated_weights_are_one_line(folder, keep):
    path = folder / "image.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="not a whole safetensors file") as error:
        zoo.load(str(folder))
    one_line(error)


@pytest.mark.parametrize("name", ["image.safetensors", "text.safetensors"])
def test_missing_weights_are_one_line(folder, name):
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=f"{name}: no such file") as error:
        zoo.load(str(folder))
    one_line(error)


@pytest.mark.parametrize("bad", [49_408, -1])
def test_a_token_id_outside_the_vocabulary_is_one_line(folder, bad):
    state = load_file(folder / "text.safetensors")
    state["token_ids"][0] = bad
    save_file(state, folder / "text.safetensors")
    with pytest.raises(WeightsError, match="outside the vocabulary") as error:
        zoo.load(str(folder))
    one_line(error)


def test_a_text_tower_without_ids_is_one_line(folder):
    state = load_file(folder / "text.safetensors")
    del state["token_ids"]
    save_file(state, folder / "text.safetensors")
    with pytest.raises(WeightsError, match="no token table with ids") as error:
        zoo.load(str(folder))
    one_line(error)


def test_a_folder_without_a_card_is_one_line(folder):
    (folder / "card.json").unlink()
    with pytest.raises(WeightsError, match=r"no card\.json") as error:
        zoo.load(str(folder))
    one_line(error)
    with pytest.raises(WeightsError, match=r"no card\.json") as error:
        checkpoint_card.read_card(folder)
    one_line(error)


def test_an_unknown_key_of_a_card_is_named_with_the_near_one(folder):
    rewrite_card(folder, logit_scales=3)
    with pytest.raises(CardError, match="unknown key 'logit_scales'; did you mean 'logit_scale'") as error:
        zoo.load(str(folder))
    one_line(error)


def test_a_card_of_another_schema_or_none_is_one_line(folder):
    rewrite_card(folder, schema_version="vlmrob-checkpoint/9")
    with pytest.raises(WeightsError, match="vlmrob-checkpoint/1") as error:
        zoo.load(str(folder))
    one_line(error)
    for content in ("[]", "{", '"text"'):
        (folder / "card.json").write_text(content)
        with pytest.raises(InputError) as error:
            zoo.load(str(folder))
        one_line(error)


def test_an_unknown_architecture_in_a_card_is_given_its_near_name(folder):
    rewrite_card(folder, arch="vlmrob-tinny")
    with pytest.raises(WeightsError, match="did you mean 'vlmrob-tiny'") as error:
        zoo.load(str(folder))
    one_line(error)


def test_an_unknown_model_names_what_is_known(tmp_path):
    with pytest.raises(WeightsError, match="no such model or folder") as error:
        zoo.load("tinny")
    assert "known: " in one_line(error)
    with pytest.raises(WeightsError, match=r"no card\.json in it") as error:
        zoo.load(str(tmp_path))
    one_line(error)


# LoRA


def nudge(model, seed=0):
    """Give every adapter a delta, as training would."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.visual.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=noise)


def effective(visual, name):
    """W + (alpha / r) B A of one adapted linear layer, by hand."""
    layer = visual.get_submodule(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return (layer.base_layer.weight.double() + 2.0 * b.double() @ a.double()).float()


@pytest.fixture
def adapted(model):
    own = twin(model)
    return own, lora.attach(own, 4, 8, ("attn",))


def test_fresh_adapters_change_nothing_but_rounding(model, adapted):
    own, _ = adapted
    with torch.no_grad():
        torch.testing.assert_close(own(images()), model(images()), rtol=0, atol=1e-5)


def test_merged_adapters_are_w_plus_scaled_ba_in_the_original_architecture(model, adapted):
    own, adapters = adapted
    nudge(own)
    merged = adapters.merged(own)
    state, before = merged.visual.state_dict(), model.visual.state_dict()
    assert state.keys() == before.keys()
    changed = set()
    for block in range(3):
        place = f"transformer.resblocks.{block}.attn"
        for part, name in (("qkv", f"{place}.in_proj_weight"), ("proj", f"{place}.out_proj.weight")):
            torch.testing.assert_close(
                state[name], effective(own.visual, f"{place}.{part}"), rtol=0, atol=1e-6
            )
            assert not torch.allclose(state[name], before[name], atol=1e-3)
            changed.add(name)
    assert all(torch.equal(state[name], before[name]) for name in state.keys() - changed)
    with torch.no_grad():
        torch.testing.assert_close(merged(images()), own(images()), rtol=0, atol=1e-5)
        assert not torch.allclose(own(images()), model(images()), atol=1e-2)
    assert not any(part.training for part in merged.visual.modules())
    assert adapters.merged(own).fingerprints() == merged.fingerprints()  # merging leaves the adapters alone


def test_the_gradient_of_an_adapter_is_that_of_its_effect(adapted):
    """Central differences; peft's own fused attention fails this by a factor of two."""
    own, _ = adapted
    nudge(own)
    x = images()
    own(x).square().sum().backward()
    for name, parameter in own.visual.named_parameters():
        if "resblocks.1" not in name or "lora_B" not in name:
            continue
        way, step = parameter.grad / parameter.grad.norm(), 2e-3
        with torch.no_grad():
            parameter += step * way
            above = own(x).double().square().sum()
            parameter -= 2 * step * way
            below = own(x).double().square().sum()
            parameter += step * way
        assert ((above - below) / (2 * step)).item() == pytest.approx(parameter.grad.norm().item(), rel=0.01)


def test_frozen_weights_stay_bit_equal_through_training_steps(model):
    own = twin(model)
    lora.attach(own, 4, 8, ("attn", "c_fc"), dropout=0.2)
    frozen = {n: p.detach().clone() for n, p in own.visual.named_parameters() if not p.requires_grad}
    trained = [p for p in own.visual.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    own.visual.train()
    for step in range(3):
        own(images(seed=step)).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    after = dict(own.visual.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all("lora_" not in name for name in frozen)
    assert sum(float(p.detach().abs().sum()) for n, p in after.items() if "lora_B" in n) > 0


def test_adapter_dropout_acts_in_train_mode_only(model):
    own = twin(model)
    lora.attach(own, 4, 8, ("attn",), dropout=0.5)
    nudge(own)
    with torch.no_grad():
        assert torch.equal(own(images()), own(images()))
        own.visual.train()
        assert not torch.equal(own(images()), own(images()))


def test_adapters_are_a_function_of_the_model_and_leave_the_global_generator_alone(model):
    before = torch.random.get_rng_state()
    first, second = twin(model), twin(model)
    adapters = [lora.attach(own, 4, 8, ("attn",)) for own in (first, second)]
    adapters[0].merged(first)
    assert torch.equal(torch.random.get_rng_state(), before)
    state, other = first.visual.state_dict(), second.visual.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (("attention",), "has no such module"),
        (("mlp",), "transformer.resblocks.0.mlp of vlmrob-tiny is a Sequential"),
        (("out_proj",), r"attn\.out_proj is never run as a layer by vlmrob-tiny"),
    ],
)
def test_adapters_where_none_can_be_are_one_line(model, targets, found):
    with pytest.raises(WeightsError, match=found) as error:
        lora.attach(twin(model), 4, 8, targets)
    assert "leave [lora] out to train the whole tower" in one_line(error)


# open_clip: names, tags, local folders


RESNET = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
SHAPE = {"size": [32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder as open_clip writes it: its config, and the weights of a small ResNet CLIP."""
    folder = tmp_path_factory.mktemp("local")
    config = {"model_cfg": RESNET | {"quick_gelu": True}, "preprocess_cfg": SHAPE}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        net = open_clip.CLIP(**RESNET, quick_gelu=True)
    with torch.no_grad():
        net.logit_scale.fill_(3.0)
    save_file(net.state_dict(), folder / "open_clip_model.safetensors")
    return folder, net.eval()


def test_a_local_folder_in_open_clips_layout(local):
    folder, net = local
    found = zoo.load(f"local-dir:{folder}")
    assert found.model.preprocess == Preprocess(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert found.model.logit_scale == pytest.approx(np.exp(3.0))
    assert found.model.facts.quick_gelu is True
    assert found.card.trained_on is None
    x = images()
    shifted = (x - torch.tensor(SHAPE["mean"]).view(1, 3, 1, 1)) / torch.tensor(SHAPE["std"]).view(1, 3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), net.encode_image(shifted), rtol=0, atol=1e-6)
        tokens = found.model.tokenize(["a red square"])
        torch.testing.assert_close(
            found.model.text(["a red square"]),
            F.normalize(net.encode_text(tokens), dim=-1),
            atol=1e-5,
            rtol=0,
        )


def test_a_checkpoint_made_from_a_local_folder_loads_again(local, tmp_path):
    folder, _ = local
    start = zoo.load(f"local-dir:{folder}")
    with torch.no_grad():
        start.model.visual.conv1.weight.mul_(1.5)
    card = describe(start.model, "tuned", text_from=start.id, trained_on=None)
    checkpoint.save_folder(tmp_path, start.model, card)
    again = zoo.load(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again.model(images()), start.model(images()))
    assert again.model.text(["red"]).equal(start.model.text(["red"]))


@pytest.mark.parametrize("targets", [("attn",), ("c_proj",)])
def test_lora_on_a_resnet_says_what_to_do(local, targets):
    with pytest.raises(WeightsError, match=r"no such module|never run as a layer") as error:
        lora.attach(zoo.load(f"local-dir:{local[0]}").model, 4, 4, targets)
    assert "leave [lora] out to train the whole tower" in one_line(error)


@pytest.mark.parametrize(
    "damage", ["truncated", "no weights", "no config", "not json", "a list", "no folder"]
)
def test_a_broken_local_folder_is_one_line(local, tmp_path, damage):
    own = shutil.copytree(local[0], tmp_path / "own")
    config, weights = own / "open_clip_config.json", own / "open_clip_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        config.unlink()
    elif damage == "no folder":
        own = tmp_path / "nowhere"
    else:
        config.write_text("{" if damage == "not json" else "[]")
    with pytest.raises(WeightsError) as error:
        zoo.load(f"local-dir:{own}")
    one_line(error)


def test_a_name_without_weights_lists_the_tags():
    with pytest.raises(WeightsError, match="an architecture without weights; expected ARCH:TAG") as error:
        zoo.load("ViT-B-32")
    assert "openai" in one_line(error)


def test_an_unknown_architecture_or_tag_is_given_its_near_name():
    with pytest.raises(WeightsError, match=r"did you mean .*'ViT-B-32'") as error:
        zoo.load("ViT-B32:openai")
    one_line(error)
    with pytest.raises(
        WeightsError, match="no weights tagged 'opanai' for ViT-B-32; did you mean 'openai'"
    ) as error:
        zoo.load("ViT-B-32:opanai")
    one_line(error)


def test_random_weights_are_fixed_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first = zoo.load("vlmrob-tiny:random")
    torch.rand(7)
    second = zoo.load("vlmrob-tiny:random")
    torch.random.set_rng_state(before)
    third = zoo.load("vlmrob-tiny:random")
    assert first.card.sha256 == second.card.sha256 == third.card.sha256
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.card.trained_on is None
    assert first.card.text_from == "vlmrob-tiny:random"


@pytest.fixture(scope="module")
def b32(tmp_path_factory):
    """`ViT-B-32:openai` with the download replaced by nothing: the weights are random, the rest is real."""
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        patch.setattr(
            open_clip.factory,
            "download_pretrained",
            lambda cfg, **_: asked.append(cfg) or "weights.safetensors",
        )
        patch.setattr(open_clip.factory, "load_checkpoint", lambda *_, **__: {})
        found = openclip.load("ViT-B-32:openai")
    assert len(asked) == 1
    return found


def test_openai_weights_are_run_with_quick_gelu(b32):
    assert (b32.facts.arch, b32.facts.quick_gelu) == ("ViT-B-32", True)
    kinds = {type(part).__name__ for part in b32.modules()}
    assert "QuickGELU" in kinds
    assert "GELU" not in kinds
    assert b32.preprocess.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert b32.image_size == 224


def test_rank_16_on_the_attention_of_vit_b_32_has_the_released_number_of_weights(b32):
    lora.attach(b32, 16, 16, ("attn",), dropout=0.1)
    trained = {n: p.numel() for n, p in b32.visual.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == 884_736 == 12 * 16 * (768 + 2304 + 768 + 768)
    assert len(trained) == 12 * 2 * 2
