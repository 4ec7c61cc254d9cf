"""Weights that other programs wrote: built here in each foreign layout from a real model, and read back."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from worlds import tilted

from robustbench_vlm.errors import InputError, WeightsError
from robustbench_vlm.models import checkpoint, convert, lora, openclip, zoo
from robustbench_vlm.models.foreign import naming, weights_file

ARCH = "vlmrob-tiny:random"


def images(n=2, side=32):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(4))


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert error.value.exit_code == 2
    return text


@pytest.fixture(scope="module")
def source():
    """The model whose weights are written in every layout; its text tower and scale are its own."""
    model = tilted("vlmrob-tiny", 5, scale=33.0)
    noise = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.language.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=noise)
    return model


def tower_of(model):
    return {name: value.clone() for name, value in model.visual.state_dict().items()}


def whole_of(model):
    state = {f"visual.{name}": value for name, value in tower_of(model).items()}
    state |= {name.removeprefix("net."): value for name, value in model.language.state_dict().items()}
    return state | {"logit_scale": torch.tensor(model.logit_scale).log()}


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


TOWERS = {
    "tower": lambda m: tower_of(m),
    "data parallel": lambda m: prefixed(tower_of(m), "module."),
    "wrapped": lambda m: prefixed(tower_of(m), "module.vision_text_model.visual."),
    "tecoa": lambda m: {
        "epoch": 9,
        "state_dict": {},
        "add_prompter": {"module.prompt": torch.zeros(1, 0, 768)},
        "vision_encoder_state_dict": tower_of(m),
        "best_acc1": 41.5,
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 1e-5}]},
    },
    "tecoa, data parallel": lambda m: {"vision_encoder_state_dict": prefixed(tower_of(m), "module.")},
    "state_dict": lambda m: {"epoch": 1, "state_dict": tower_of(m)},
}


@pytest.mark.parametrize("layout", TOWERS)
def test_an_image_tower_comes_back_bit_for_bit_on_the_text_tower_of_its_base(source, tmp_path, layout):
    path = tmp_path / ("w.pth.tar" if "tecoa" in layout else "w.pt")
    torch.save(TOWERS[layout](source), path)
    found = zoo.load(str(path), arch=ARCH)
    base = zoo.load(ARCH).model
    with torch.no_grad():
        assert torch.equal(found.model(images()), source(images()))
        assert not torch.equal(found.model(images()), base(images()))
    assert torch.equal(found.model.text(["a red square"]), base.text(["a red square"]))
    assert found.model.logit_scale == base.logit_scale
    assert (found.card.text_from, found.card.trained_on, found.card.name) == (ARCH, None, "w")
    assert found.card.training == {"scheme": "image tower"}


WHOLES = {
    "open_clip": whole_of,
    "openai package": lambda m: (
        whole_of(m)
        | {
            k: torch.tensor(v)
            for k, v in (("input_resolution", 32), ("context_length", 20), ("vocab_size", 9))
        }
    ),
    "data parallel": lambda m: {"state_dict": prefixed(whole_of(m), "module.")},
}


@pytest.mark.parametrize("layout", WHOLES)
def test_a_whole_model_brings_its_text_tower_and_scale(source, tmp_path, layout):
    torch.save(WHOLES[layout](source), tmp_path / "w.pt")
    found = zoo.load(str(tmp_path / "w.pt"), arch=ARCH)
    with torch.no_grad():
        assert torch.equal(found.model(images()), source(images()))
    assert torch.equal(found.model.text(["a red square"]), source.text(["a red square"]))
    assert found.model.logit_scale == pytest.approx(33.0, rel=1e-6)
    assert found.card.training == {"scheme": "whole model"}


def test_a_safetensors_tower_and_half_precision_are_read_too(source, tmp_path):
    halves = {name: value.half() for name, value in tower_of(source).items()}
    save_file(halves, tmp_path / "w.safetensors")
    found = zoo.load(str(tmp_path / "w.safetensors"), arch=ARCH)
    assert all(torch.equal(value, halves[name].float()) for name, value in tower_of(found.model).items())


# MMT-ARD adapters


def adapted(model, r=16):
    """The student of the released script: plain attention, peft with its numbers, moved."""
    visual = tilted("vlmrob-tiny", 5).visual if model is None else model.visual
    for name, module in list(visual.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            visual.get_submodule(name.rpartition(".")[0]).attn = lora.Attention(module)
    config = LoraConfig(r=r, lora_alpha=16, target_modules=["qkv", "proj"], lora_dropout=0.1, bias="none")
    tuned = get_peft_model(visual, config)
    noise = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    return tuned.eval()


def test_an_mmt_ard_student_is_merged_as_peft_merges_it(tmp_path):
    tuned = adapted(None)
    state = tuned.state_dict()
    assert "base_model.model.transformer.resblocks.0.attn.qkv.lora_A.default.weight" in state
    torch.save(state, tmp_path / "final.pt")
    found = zoo.load(str(tmp_path / "final.pt"), arch=ARCH)
    x = (images() - found.model.mean) / found.model.std
    with torch.no_grad():
        torch.testing.assert_close(found.model(images()), tuned(x), rtol=0, atol=1e-5)
    merged = tuned.merge_and_unload().state_dict()
    own = tower_of(found.model)
    for block in range(3):
        place = f"transformer.resblocks.{block}.attn."
        assert torch.equal(own[place + "in_proj_weight"], merged[place + "qkv.weight"])
        assert torch.equal(own[place + "out_proj.weight"], merged[place + "proj.weight"])
    assert found.card.training == {"scheme": "MMT-ARD adapters"}


def test_adapters_of_another_rank_are_refused(tmp_path):
    torch.save(adapted(None, r=8).state_dict(), tmp_path / "final.pt")
    with pytest.raises(WeightsError, match="read as MMT-ARD adapters") as error:
        zoo.load(str(tmp_path / "final.pt"), arch=ARCH)
    one_line(error)


def test_the_released_student_of_vit_b_32_is_read_exactly():
    model = openclip.build("ViT-B-32", quick_gelu=True)
    names = set(model.visual.state_dict())
    named = naming.read(adapted(model).state_dict(), names, set(), "student")
    assert named.scheme == "MMT-ARD adapters"
    shapes = {name: value.shape for name, value in openclip.build("ViT-B-32").visual.state_dict().items()}
    assert {name: value.shape for name, value in named.image.items()} == shapes


# transformers


CLIP_CONFIG = {
    "projection_dim": 64,
    "vision_config": {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 160,
        "hidden_act": "gelu",
    },
    "text_config": {
        "max_position_embeddings": 20,
        "vocab_size": 49408,
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        "hidden_act": "gelu",
    },
}


def theirs(act="gelu"):
    transformers = pytest.importorskip("transformers")
    table = json.loads(json.dumps(CLIP_CONFIG).replace('"gelu"', f'"{act}"'))
    torch.manual_seed(3)
    model = transformers.CLIPModel(transformers.CLIPConfig(**table)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
        model.logit_scale.fill_(3.0)
    return model


def pooled(output):
    return getattr(output, "pooler_output", output)


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_a_clip_model_of_transformers_gives_the_same_embeddings(tmp_path, monkeypatch, act):
    model = theirs(act)
    model.save_pretrained(tmp_path / "leaf")
    monkeypatch.chdir(tmp_path)
    found = zoo.load("leaf")
    own, x = found.model, images()
    tokens = own.tokenize(["a red square", "three green dots"])
    with torch.no_grad():
        seen = pooled(model.get_image_features(pixel_values=(x - own.mean) / own.std))
        torch.testing.assert_close(own(x), seen, rtol=0, atol=1e-5)
        read = pooled(model.get_text_features(input_ids=tokens))
        torch.testing.assert_close(own.language(tokens), read, rtol=0, atol=1e-5)
    assert own.logit_scale == pytest.approx(20.0855, rel=1e-5)
    assert (own.facts.arch, own.facts.quick_gelu) == ("vlmrob-tiny", act == "quick_gelu")
    assert found.card.text_from == str((tmp_path / "leaf").resolve())


def as_transformers(model):
    """open_clip's names to those of transformers, from the documented names, not from our table."""
    state = {}
    whole = {k: v for k, v in whole_of(model).items() if k != "logit_scale"}
    for name, value in whole.items():
        tower, inner = ("vision_model", name[7:]) if name.startswith("visual.") else ("text_model", name)
        if found := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", inner):
            layer, part = f"{tower}.encoder.layers.{found[1]}.", found[2]
            if part.startswith("attn.in_proj_"):
                for letter, third in zip("qkv", value.chunk(3), strict=True):
                    state[f"{layer}self_attn.{letter}_proj.{part[13:]}"] = third.contiguous()
                continue
            for ours, other in (
                ("ln_", "layer_norm"),
                ("attn.", "self_attn."),
                ("c_fc", "fc1"),
                ("c_proj", "fc2"),
            ):
                part = part.replace(ours, other)
            state[layer + part] = value
        elif inner in ("proj", "text_projection"):
            state["visual_projection.weight" if inner == "proj" else "text_projection.weight"] = (
                value.T.contiguous()
            )
        else:
            words = {
                "class_embedding": "embeddings.class_embedding",
                "positional_embedding": "embeddings.position_embedding.weight",
                "conv1.weight": "embeddings.patch_embedding.weight",
                "token_embedding.weight": "embeddings.token_embedding.weight",
            }
            stem = inner.replace("ln_pre", "pre_layrnorm").replace("ln_post", "post_layernorm")
            state[f"{tower}.{words.get(inner, stem.replace('ln_final', 'final_layer_norm'))}"] = value
    return state | {"logit_scale": torch.tensor(model.logit_scale).log()}


def test_a_folder_of_transformers_written_from_our_model_comes_back_bit_for_bit(source, tmp_path):
    state = as_transformers(source) | {"text_model.embeddings.position_ids": torch.arange(20)[None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"} | CLIP_CONFIG))
    names = sorted(state)
    shards = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    mean = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.6, 0.7],
        "crop_size": {"height": 32, "width": 32},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(mean))
    found = zoo.load(str(tmp_path)).model
    shifted = (images() - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)) / torch.tensor(
        [0.5, 0.6, 0.7]
    ).view(1, 3, 1, 1)
    with torch.no_grad():
        assert torch.equal(found(images()), source.visual(shifted))
    assert torch.equal(found.text(["a red square"]), source.text(["a red square"]))


def test_the_names_of_transformers_for_real_sizes_fit_open_clip_exactly():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        state = transformers.CLIPModel(transformers.CLIPConfig()).state_dict()  # its defaults are ViT-B/32
    real = openclip.build("ViT-B-32", quick_gelu=True)
    shapes = {k: v.shape for part in (real.visual, real.language) for k, v in part.state_dict().items()}
    state["logit_scale"] = torch.tensor(1.0)
    named = naming.read(state, set(real.visual.state_dict()), set(real.language.state_dict()), "B/32")
    assert {k: v.shape for k, v in (named.image | named.text).items()} == shapes
    sizes = {"model_type": "clip", "projection_dim": 768}
    sizes["vision_config"] = {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14}
    sizes["vision_config"] |= {"num_attention_heads": 16, "intermediate_size": 4096}
    sizes["text_config"] = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    assert weights_file._architecture(sizes, "LEAF") == ("ViT-L-14", True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "siglip"}, "a model of kind 'siglip'"),
        (
            {"text_config": CLIP_CONFIG["text_config"] | {"hidden_act": "quick_gelu"}},
            "activation gelu and quick_gelu",
        ),
        ({"projection_dim": 65}, "no open_clip architecture has these sizes"),
        ({"text_config": CLIP_CONFIG["text_config"] | {"eos_token_id": 7}}, "eos_token_id is 7"),
        ({"vision_config": CLIP_CONFIG["vision_config"] | {"layer_norm_eps": 1e-6}}, "layer_norm_eps"),
    ],
)
def test_another_kind_of_folder_is_one_line(tmp_path, change, words):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"} | CLIP_CONFIG | change))
    with pytest.raises(WeightsError, match=words) as error:
        zoo.load(str(tmp_path))
    one_line(error)


# What does not fit


def refused(tmp_path, state, arch=ARCH, name="w.pt"):
    torch.save(state, tmp_path / name)
    with pytest.raises(WeightsError) as error:
        zoo.load(str(tmp_path / name), arch=arch)
    return one_line(error)


def test_missing_and_left_over_tensors_are_counted_and_named(source, tmp_path):
    state = tower_of(source)
    del state["proj"], state["ln_pre.bias"]
    text = refused(tmp_path, state | {"head.weight": torch.zeros(2)})
    assert (
        "read as image tower: tensors 2 missing (first 'ln_pre.bias'), 1 left over (first 'head.weight')"
        in text
    )
    assert "whole model, transformers CLIPModel, MMT-ARD adapters" in text
    short = whole_of(source)
    del short["text_projection"]
    assert "read as whole model: tensors 1 missing (first 'net.text_projection')" in refused(tmp_path, short)


def test_names_of_no_known_scheme_are_said_so(tmp_path):
    text = refused(tmp_path, {"blocks.0.attn.q.weight": torch.zeros(2), "cls_token": torch.zeros(1)})
    assert "no known naming scheme ('blocks.0.attn.q.weight', 'cls_token' ...)" in text


def test_a_tower_of_another_architecture_or_with_values_that_are_not_finite_is_refused(source, tmp_path):
    other = tower_of(tilted("vlmrob-tiny-teacher", 1))
    assert "1 left over" not in refused(tmp_path, {k: v for k, v in other.items() if "resblocks.3" not in k})
    assert "another architecture" in refused(
        tmp_path, {k: v for k, v in other.items() if "resblocks.3" not in k}
    )
    for bad in (float("nan"), float("inf")):
        state = tower_of(source)
        state["proj"][0, 0] = bad
        assert "tensor 'proj' has values that are not finite" in refused(tmp_path, state)


def test_a_learned_prompt_beside_the_tower_is_refused(source, tmp_path):
    state = {
        "vision_encoder_state_dict": tower_of(source),
        "state_dict": {"pad_up": torch.zeros(1, 3, 30, 224)},
    }
    assert "'state_dict.pad_up' stands beside vision_encoder_state_dict" in refused(tmp_path, state)


def test_a_weights_file_needs_its_architecture(source, tmp_path):
    torch.save(tower_of(source), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="expected --arch ARCH:TAG") as error:
        zoo.load(str(tmp_path / "w.pt"))
    one_line(error)


# Converting


def test_an_old_pickle_is_converted_and_then_loads_without_its_architecture(source, tmp_path):
    import argparse

    import numpy as np

    state = {
        "vision_encoder_state_dict": tower_of(source),
        "best_acc1": np.float64(3),
        "a": argparse.Namespace(x=1),
    }
    assert "vlmrob convert FILE" in refused(tmp_path, state, name="old.pth.tar")
    card = convert.unlisted("mine", ARCH, "TeCoA", ("imagenet", "unknown"))
    made = convert.convert(tmp_path / "old.pth.tar", tmp_path / "out", card)
    assert {"argparse.Namespace", "numpy.dtype"} <= set(made.training["left_out"])
    found = zoo.load(str(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(found.model(images()), source(images()))
    assert (found.card.name, found.card.defense, found.card.text_from) == ("mine", "TeCoA", ARCH)
    assert found.card.trained_on == ("imagenet", "unknown")
    assert found.card.parents[0].trained_on is None
    assert found.card.canary is not None
    assert not list((tmp_path / "out").glob("*.pt"))
    with pytest.raises(InputError, match="a checkpoint is there already"):
        convert.convert(tmp_path / "old.pth.tar", tmp_path / "out", card)


def test_the_file_format_of_old_torch_is_converted_too(source, tmp_path):
    torch.save(tower_of(source), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"an old pickle \(the file format of PyTorch before 1.6\)"):
        zoo.load(str(tmp_path / "w.pt"), arch=ARCH)
    convert.convert(tmp_path / "w.pt", tmp_path / "out", convert.unlisted("w", ARCH, "none", ()))
    with torch.no_grad():
        assert torch.equal(zoo.load(str(tmp_path / "out")).model(images()), source(images()))


def test_a_converted_whole_model_keeps_its_own_text_tower(source, tmp_path):
    torch.save(whole_of(source), tmp_path / "w.pt")
    convert.convert(tmp_path / "w.pt", tmp_path / "out", convert.unlisted("w", ARCH, "none", ()))
    found = zoo.load(str(tmp_path / "out"))
    assert found.card.text_from == ""
    assert torch.equal(found.model.text(["a walrus"]), source.text(["a walrus"]))
    assert found.model.untrained_words(["a walrus"]) == []
    assert dict(found.model.language.named_parameters())[checkpoint.TOKENS].shape[0] == 49408


def test_a_learned_shape_in_another_order_is_written_in_row_order(source, tmp_path):
    state = tower_of(source)
    state["proj"] = state["proj"].T.contiguous().T
    state["conv1.weight"] = state["conv1.weight"].to(memory_format=torch.channels_last)
    torch.save(state, tmp_path / "w.pt")
    with torch.no_grad():
        assert torch.equal(zoo.load(str(tmp_path / "w.pt"), arch=ARCH).model(images()), source(images()))
