"""A model's fingerprint is its function: equal for one function anywhere, another for every other one."""

import json
import shutil
import socket
import sys
import time
from pathlib import Path

import open_clip
import pytest
import small_clips
import torch
from safetensors.torch import load_file, save_file
from worlds import describe

from robustbench_vlm import store
from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models import checkpoint, configuration, convert, downloads, model_ids, openclip, zoo
from robustbench_vlm.models.checkpoint_card import EARLIER, SCHEMA, CheckpointCard
from robustbench_vlm.models.clip import Clip
from robustbench_vlm.models.text_bank import render, text_bank

SENTENCES = render(["red", "blue", "green"], ["a photo of a {c} object"])


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def images(n=2):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def state_of(model: Clip) -> dict:
    """The packaged tiny model under the names of open_clip."""
    state = {f"visual.{k}": v for k, v in model.visual.state_dict().items()}
    state |= {k.removeprefix("net."): v for k, v in model.language.state_dict().items()}
    state["logit_scale"] = torch.tensor(model.logit_scale).log()
    return {name: value.contiguous().clone() for name, value in state.items()}


@pytest.fixture(scope="module")
def tiny():
    return zoo.load("tiny").model


@pytest.fixture
def written(tiny, tmp_path):
    """Write a folder of open_clip with the weights of the tiny model and a changed configuration."""

    def write(name, change=lambda config: None, **preprocess):
        config = openclip.config("vlmrob-tiny")
        change(config)
        folder = tmp_path / name
        folder.mkdir()
        table = {"model_cfg": config, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(table))
        save_file(state_of(tiny), folder / "open_clip_model.safetensors")
        return folder

    return write


# One function, one fingerprint


def test_one_model_has_one_fingerprint_wherever_it_lies_and_however_it_is_named(
    written, tmp_path, monkeypatch
):
    first = written("first")
    second = shutil.copytree(first, tmp_path / "deep" / "second")
    monkeypatch.chdir(tmp_path)
    names = [f"local-dir:{first}", f"local-dir:{second}", "local-dir:first", str(first), "first"]
    loaded = [zoo.load(name) for name in names]
    assert {found.card.sha256 for found in loaded} == {zoo.load("tiny").card.sha256}
    assert [found.card.name for found in loaded] == ["first", "second", "first", "first", "first"]
    assert zoo.load("vlmrob-tiny:random").card.sha256 not in {found.card.sha256 for found in loaded}


def test_stating_a_default_changes_no_fingerprint(written):
    def explicit(config):
        config["quick_gelu"] = False
        config["vision_cfg"] |= {"pool_type": "tok", "image_size": [32, 32], "timm_model_pretrained": False}
        config["text_cfg"] |= {"no_causal_mask": False, "tokenizer_kwargs": {"clean": "lower"}}

    stated = written("stated", explicit, interpolation="bicubic", resize_mode="shortest", size=32)
    assert zoo.load(str(stated)).card.sha256 == zoo.load(str(written("plain"))).card.sha256


CHANGES = {
    "heads of the image tower": lambda c: c["vision_cfg"].update(head_width=16),
    "pooling": lambda c: c["vision_cfg"].update(pool_type="avg"),
    "heads of the text tower": lambda c: c["text_cfg"].update(heads=8),
    "causal mask": lambda c: c["text_cfg"].update(no_causal_mask=True),
    "text pooling": lambda c: c["text_cfg"].update(pool_type="first"),
    "activation": lambda c: c.update(quick_gelu=True),
    "arguments of the activation": lambda c: c["text_cfg"].update(act_kwargs={"approximate": "tanh"}),
    "epsilon of the norms": lambda c: c["text_cfg"].update(norm_kwargs={"eps": 1e-2}),
    "tokenizer": lambda c: c["text_cfg"].update(tokenizer_kwargs={"clean": "canonicalize"}),
}
STATED = {
    "mean": {"mean": [0.5, 0.4, 0.3]},
    "std": {"std": [0.5, 0.4, 0.3]},
    "kernel": {"interpolation": "bilinear"},
    "resize mode": {"resize_mode": "squash"},
}


def test_every_change_of_the_function_is_another_fingerprint(written, tiny):
    prints = {"plain": zoo.load(str(written("plain"))).card.sha256}
    for i, (name, change) in enumerate(CHANGES.items()):
        prints[name] = zoo.load(str(written(f"changed{i}", change))).card.sha256
    for i, (name, stated) in enumerate(STATED.items()):
        prints[name] = zoo.load(str(written(f"stated{i}", **stated))).card.sha256
    prints["scale"] = tiny.replaced(logit_scale=21.0).fingerprints()["model"]
    prints["bias"] = tiny.replaced(logit_bias=-10.0).fingerprints()["model"]
    weights = zoo.load("tiny").model
    with torch.no_grad():
        weights.visual.proj[0, 0] += 1
    prints["weights"] = weights.fingerprints()["model"]
    assert len(set(prints.values())) == len(prints), prints


@pytest.mark.parametrize(
    "name", [name for name in CHANGES if CHANGES[name].__code__.co_consts[1] != "vision_cfg"]
)
def test_models_with_the_same_text_weights_have_their_own_text_bank(name, written, tmp_path, monkeypatch):
    monkeypatch.setenv("VLMROB_CACHE", str(tmp_path / "cache"))
    first = zoo.load(str(written("first"))).model
    other = zoo.load(str(written("other", CHANGES[name]))).model
    text_bank(first, SENTENCES)
    own = other.text([group[0] for group in SENTENCES])
    torch.testing.assert_close(text_bank(other, SENTENCES), own, rtol=0, atol=1e-5)
    assert len(list((tmp_path / "cache" / "text").glob("*.safetensors"))) == 2


# Checkpoints


def test_a_checkpoint_made_from_a_folder_needs_the_folder_no_more(written, tmp_path):
    start = written("start", lambda c: c["vision_cfg"].update(head_width=16), resize_mode="squash")
    found = zoo.load(str(start))
    card = describe(found.model, "own")
    rows = frozenset(range(49408))
    checkpoint.save_folder(tmp_path / "own", found.model, card, trained_tokens=rows)
    shutil.rmtree(start)
    again = zoo.load(str(tmp_path / "own"))
    assert again.card.sha256 == found.card.sha256
    assert again.model.preprocess.resize_mode == "squash"
    with torch.no_grad():
        assert torch.equal(again.model(images()), found.model(images()))


def test_a_sigmoid_model_is_stored_with_its_bias_and_tokenizer(tmp_path, monkeypatch):
    config = small_clips.shrunk(openclip.config("ViT-B-32-SigLIP2-256"))
    with small_clips.shallow_timm(monkeypatch):
        small_clips.write(tmp_path / "from", config, small_clips.preprocess_of("ViT-B-32-SigLIP2-256"))
        found = zoo.load(str(tmp_path / "from")).model
        rows = frozenset(range(small_clips.VOCABULARY))
        checkpoint.save_folder(tmp_path / "own", found, describe(found, "own"), trained_tokens=rows)
        shutil.rmtree(tmp_path / "from")
        again = zoo.load(str(tmp_path / "own")).model
    assert again.logit_bias == found.logit_bias == -10
    assert found.preprocess.canvas_resize == "bicubic-squash"
    assert again.fingerprints() == found.fingerprints()
    assert torch.equal(again.text(["a red square"]), found.text(["a red square"]))
    assert again.tokenize(["a red square"]).shape == (1, 64)


def earlier(folder, tiny):
    """The packaged tiny checkpoint as version 1 wrote it."""
    shutil.copytree(model_ids.PACKAGED / "tiny", folder)
    table = store.read_json(folder / "card.json")
    for name in ("logit_bias", "config"):
        del table[name]
    for name in ("interpolation", "resize_mode"):
        del table["preprocess"][name]
    known = "adaeb4c56eee44a87c86df695efff2f9d92cdb47d43097f94a7e87d1b90e6b4c"  # as it was released
    return table | {"schema_version": EARLIER, "sha256": known}


def test_a_card_of_version_1_is_checked_by_its_own_rule_and_read_as_one_of_today(tiny, tmp_path):
    table = earlier(tmp_path / "old", tiny)
    store.write_json(tmp_path / "old" / "card.json", table)
    found = zoo.load(str(tmp_path / "old"))
    today = zoo.load("tiny").card
    assert (found.card.schema_version, found.card.sha256) == (SCHEMA, today.sha256)
    store.write_json(tmp_path / "old" / "card.json", table | {"logit_scale": 20.0})
    with pytest.raises(WeightsError, match="model fingerprint is"):
        zoo.load(str(tmp_path / "old"))
    store.write_json(tmp_path / "old" / "card.json", table | {"schema_version": "vlmrob-checkpoint/9"})
    with pytest.raises(WeightsError, match="expected vlmrob-checkpoint/2 or vlmrob-checkpoint/1"):
        zoo.load(str(tmp_path / "old"))


# Local files ask no network, run nothing and end


@pytest.fixture
def no_network(monkeypatch):
    asked = []

    def refuse(*address, **options):
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert asked == []


def edited(folder, source="tiny-robust-teacher", **changes):
    shutil.copytree(model_ids.PACKAGED / source, folder)
    table = store.read_json(folder / "card.json")
    store.write_json(folder / "card.json", table | changes)
    return str(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"text_from": "hf-hub:nobody/nothing"},
        {"text_from": "ViT-B-32:openai"},
        {"text_from": "ViT-B-32:laion400m_e31"},
        {"text_from": "fare2-vit-l-14"},
        {"text_from": "local-dir:nowhere"},
        {"text_from": "weights.pt"},
        {"arch": "hf-hub:nobody/nothing"},
        {"arch": "local-dir:/nowhere"},
        {"arch": "roberta-ViT-B-32"},
        {"config": {"embed_dim": 64, "vision_cfg": {"timm_model_name": "hf-hub:a/b"}, "text_cfg": {}}},
        {"config": {"embed_dim": 64, "vision_cfg": {}, "text_cfg": {"hf_model_name": "roberta-base"}}},
        {"config": {"text_cfg": []}},
    ],
    ids=str,
)
def test_a_card_that_names_a_download_is_one_line(changes, tmp_path, no_network):
    started = time.perf_counter()
    with pytest.raises(WeightsError) as error:
        zoo.load(edited(tmp_path / "own", **changes))
    assert len(one_line(error)) < 700
    assert time.perf_counter() - started < 60


def test_text_from_that_leads_back_ends_at_once(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    edited(first, text_from=str(first))
    with pytest.raises(WeightsError, match="leads back to this folder") as error:
        zoo.load(str(first))
    one_line(error)
    edited(second, text_from=str(tmp_path / "third"))
    edited(tmp_path / "third", text_from=str(second))
    with pytest.raises(WeightsError, match="leads back to this folder"):
        zoo.load(str(second))


def test_the_defense_in_a_card_is_text(tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("raise SystemExit('this file was run')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    name = edited(
        tmp_path / "own", defense="planted:Defense", recipe={"defense": {"name": "planted:Defense"}}
    )
    assert zoo.load(name).card.defense == "planted:Defense"
    assert "planted" not in sys.modules


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["text_cfg"].update(hf_model_name="roberta-base"),
        lambda c: c["text_cfg"].update(tokenizer_kwargs={"trust_remote_code": True}),
        lambda c: c["text_cfg"].update(tokenizer_kwargs={"bpe_path": "/etc/passwd"}),
        lambda c: c["text_cfg"].update(tokenizer_kwargs={"reduction_mask": "syntax"}),
        lambda c: c["text_cfg"].update(hf_tokenizer_name="timm/ViT-B-16-SigLIP"),
        lambda c: c["vision_cfg"].update(timm_model_name="hf-hub:timm/resnet18"),
        lambda c: c["vision_cfg"].update(timm_model_name="local-dir:/tmp"),
        lambda c: c["vision_cfg"].update(image_size=[32, 64]),
        lambda c: c.pop("embed_dim"),
        lambda c: c.update(embed_dim=0),
        lambda c: c.update(embed_dim=True),
        lambda c: c["vision_cfg"].update(image_size=[32]),
        lambda c: c["vision_cfg"].update(image_size="32"),
        lambda c: c["vision_cfg"].update(image_size=0),
        lambda c: c["text_cfg"].update(context_length=None),
        lambda c: c.update(vision_cfg=7),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_line(change, written, no_network):
    with pytest.raises(WeightsError) as error:
        zoo.load(str(written("own", change)))
    one_line(error)


@pytest.mark.parametrize(
    ("part", "settings", "found"),
    [
        ("vision_cfg", {"pool_type": "none"}, "its image tower gives "),
        ("text_cfg", {"pool_type": "none"}, "its text tower gives (1, 20, 64) for one text"),
        ("text_cfg", {"proj_type": "none"}, "its text tower gives (1, 96) for one text; expected (1, 64)"),
        ("text_cfg", {"vocab_size": 10}, "its text tower fails for one text: index out of range"),
    ],
)
def test_towers_that_give_no_embeddings_are_refused(part, settings, found):
    config = openclip.config("vlmrob-tiny")
    config["custom_text"] = part == "text_cfg"
    config[part].update(settings)
    with pytest.raises(WeightsError) as error:
        openclip.build("vlmrob-tiny", stated=config)
    assert found in one_line(error)


def test_the_embedding_is_taken_where_a_text_tower_gives_its_tokens_too():
    config = openclip.config("vlmrob-tiny") | {"custom_text": True}
    plain = openclip.build("vlmrob-tiny", stated=config).text(["a red square"])
    config["text_cfg"]["output_tokens"] = True
    assert openclip.build("vlmrob-tiny", stated=config).text(["a red square"]).equal(plain)


def damaged(folder, change):
    """The folder with other tensors."""
    path = folder / "open_clip_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    return f"local-dir:{folder}"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda s: s.pop("visual.proj"), 'Missing key(s) in state_dict: "visual.proj"'),
        (lambda s: s.update({"visual.extra": torch.zeros(2)}), '"visual.extra"'),
        (lambda s: s.update({"visual.proj": torch.zeros(2, 2)}), "size mismatch for visual.proj"),
        (lambda s: s["visual.proj"].fill_(torch.nan), "tensor 'visual.proj' has values that are not finite"),
        (lambda s: s["ln_final.bias"].fill_(torch.inf), "tensor 'ln_final.bias' has values"),
        (lambda s: s["logit_scale"].fill_(torch.nan), "tensor 'logit_scale' has values"),
        (lambda s: s["logit_scale"].fill_(1e9), "logit_scale is 1e+09, whose exponential is not finite"),
    ],
)
def test_weights_that_do_not_fit_or_are_not_finite_are_named(written, change, found):
    with pytest.raises(WeightsError) as error:
        zoo.load(damaged(written("own"), change))
    assert found in one_line(error)


def test_a_folder_with_a_pickle_is_no_advice_to_run_it(written):
    folder = written("own")
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"a": Path("x")}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(WeightsError, match="a pickle of more than tensors, which is not run") as error:
        zoo.load(f"local-dir:{folder}")
    assert "weights_only" not in one_line(error)


def test_a_tokenizer_that_is_missing_says_what_to_put_where(written, no_network):
    def change(config):
        config["text_cfg"]["hf_tokenizer_name"] = "timm/ViT-B-16-SigLIP"

    folder = written("own", change)
    with pytest.raises(
        WeightsError, match="its tokenizer timm/ViT-B-16-SigLIP is not on this machine"
    ) as error:
        zoo.load(str(folder))
    assert "hf download timm/ViT-B-16-SigLIP tokenizer.json" in one_line(error)
    assert f"--local-dir {folder}" in str(error.value)


# What a newcomer types


@pytest.mark.parametrize("name", ["ViT-B-32:openai", "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"])
def test_without_a_network_one_error_names_what_to_do(name, monkeypatch):
    monkeypatch.setattr(downloads, "hub_is_reachable", lambda: False)
    started = time.perf_counter()
    with pytest.raises(WeightsError, match=r"not on this machine, and no network; .* local-dir:DIR") as error:
        zoo.load(name)
    assert "hf download" in one_line(error)
    assert time.perf_counter() - started < 10  # a second on an idle machine


def test_a_hub_that_does_not_answer_is_known_within_a_second(monkeypatch):
    monkeypatch.setattr(downloads, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", lambda *_: time.sleep(3) or socket.socket())
    started = time.perf_counter()
    assert not downloads.hub_is_reachable()
    assert time.perf_counter() - started < 2.5
    monkeypatch.setattr(socket, "create_connection", lambda *_: socket.socket())
    assert downloads.hub_is_reachable()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ViT-B/32", "did you mean 'ViT-B-32:openai'"),
        ("ViT-L/14@336px", "did you mean 'ViT-L-14-336:openai'"),
        ("openai/clip-vit-base-patch32", "type: hf download openai/clip-vit-base-patch32 --local-dir"),
    ],
)
def test_names_of_other_libraries_get_their_suggestion(name, meant):
    with pytest.raises(WeightsError) as error:
        zoo.load(name)
    assert meant in one_line(error)


def test_a_file_of_lightning_gets_its_suggestion(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"rename it to last\.pt") as error:
        zoo.load(str(tmp_path / "last.ckpt"))
    one_line(error)


@pytest.mark.parametrize("arch", ["vlmrob-tiny", "folder", "local-dir:folder"])
def test_a_file_with_both_towers_needs_no_other_weights(
    arch, tiny, written, tmp_path, monkeypatch, no_network
):
    monkeypatch.chdir(tmp_path)
    folder = written("folder")
    (folder / "open_clip_model.safetensors").unlink()
    torch.save(state_of(tiny), tmp_path / "whole.pt")
    found = zoo.load("whole.pt", arch=arch)
    assert found.card.sha256 == zoo.load("tiny").card.sha256
    assert found.card.text_from == ""
    card = convert.convert(tmp_path / "whole.pt", tmp_path / "out", convert.unlisted("m", arch, "none", ()))
    assert (card.sha256, card.parents) == (found.card.sha256, ())


def test_a_file_with_an_image_tower_alone_takes_the_text_tower_of_a_folder(tiny, written, tmp_path):
    folder = written("folder")
    torch.save(tiny.visual.state_dict(), tmp_path / "tower.pt")
    found = zoo.load(str(tmp_path / "tower.pt"), arch=f"local-dir:{folder}")
    assert found.card.sha256 == zoo.load("tiny").card.sha256
    assert found.card.text_from == f"local-dir:{folder}"


# Tokenizers


def test_a_tokenizer_is_known_by_its_content():
    plain = open_clip.SimpleTokenizer(context_length=20)
    same = open_clip.SimpleTokenizer(context_length=20)
    same(["a red square"])  # fills its cache
    others = [
        open_clip.SimpleTokenizer(context_length=21),
        open_clip.SimpleTokenizer(context_length=20, clean="whitespace"),
        open_clip.SimpleTokenizer(context_length=20, additional_special_tokens=["<x>"]),
    ]
    prints = [configuration.tokenizer_identity(found) for found in (plain, same, *others)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


def test_new_fields_of_the_card_have_defaults():
    assert CheckpointCard.model_fields["logit_bias"].default == 0.0
