"""Every recipe of the tiny world trains through the command line; the papers' recipes are what they say."""

import sys
import tomllib
from pathlib import Path

import pytest
import torch

from robustbench_vlm import cli, store
from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.data import layout
from robustbench_vlm.data.tiny import write
from robustbench_vlm.data.tiny.worlds import WORLDS
from robustbench_vlm.models import zoo

SHORT = ["optim.steps=2", "optim.warmup=1", "optim.batch_size=8", "probe.n=8", "probe.every=2"]
MADE = ("tiny-clean-teacher", "tiny-robust-teacher")  # from a start that `make tiny-weights` makes
TINY = [name for name in reader.names("recipes") if name.startswith("tiny-") and name not in MADE]
GOLDEN = Path(__file__).parent / "golden"
PAPER = [name for name in reader.names("recipes") if name.startswith("paper-")]


def recipe(name):
    return reader.read("recipes", name, Recipe)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A data root with a few images of `tiny-seen`."""
    root, world = tmp_path_factory.mktemp("data"), WORLDS["tiny-seen"]
    layout.write_texts(root / world.folder, list(world.classes), world.templates)
    for split in ("train", "val"):
        layout.write_split(root / world.folder, split, write.samples(world.name, split, 40), 40)
    return root


@pytest.mark.parametrize("name", TINY)
def test_every_tiny_recipe_trains_through_the_command_line(seen, tmp_path, monkeypatch, capsys, name):
    out = tmp_path / "out"
    settings = [part for setting in SHORT for part in ("--set", setting)]
    command = ["vlmrob", "train", name, *settings, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--data-root", str(seen), "--device", "cpu"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    assert stop.value.code in (0, None), said.err
    assert said.out == f"{out}\n"
    made = zoo.load(str(out))
    assert made.card.defense == recipe(name).defense["name"]
    assert made.card.trained_on == ("tiny-seen",)
    losses = [line for line in store.records(out / "log.jsonl") if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2]
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.equal(made.model(x), zoo.load("tiny").model(x))


def test_a_recipe_named_after_a_defense_trains_it_from_the_tiny_model():
    """A defense needs no recipe; but `train NAME` takes `tiny-NAME`, so that must be what it says."""
    named = [name for name in plugins.names("defenses") if f"tiny-{name}" in reader.names("recipes")]
    assert {"mmt-ard", "single-teacher", "tecoa", "trades", "mart"} <= set(named)
    for name in named:
        tiny = recipe(f"tiny-{name}")
        assert tiny.defense["name"] == name
        assert tiny.student == "tiny"


@pytest.mark.parametrize("name", PAPER)
def test_a_papers_recipe_names_what_it_needs(name):
    made = recipe(name)
    defense = plugins.get("defenses", made.defense["name"])
    assert set(made.teachers) == set(defense.teachers)
    assert (made.inner is not None) == defense.adversarial
    assert made.data.dataset == "imagenet"
    assert "needs a GPU" in made.title
    notes = " ".join(made.notes)
    for model in made.teachers.values():
        if model.startswith("runs/"):
            assert f"--recipe {model.removeprefix('runs/')} --out {model}" in notes
            assert recipe(model.removeprefix("runs/")).student == "ViT-L-14:openai"
        if model.startswith("hf-hub:"):
            assert "substitute" in notes


SETTING = {  # student, adapters, batch; all others as the released README: 5000 steps, eps 2/255, K = 10
    "paper-mmt-ard": ("ViT-B-32:openai", True, 32),
    "paper-mmt-ard-512": ("ViT-B-32:openai", True, 512),
    "paper-mmt-ard-eps3": ("ViT-B-32:openai", True, 32),
    "paper-mmt-ard-full": ("ViT-B-32:openai", False, 32),
    "paper-mmt-ard-rn50": ("RN50:openai", False, 32),
    "paper-mmt-ard-rn101": ("RN101:openai", False, 32),
    "paper-mmt-ard-pmg": ("ViT-B-32:openai", True, 32),
    "paper-mmt-ard-fare2": ("ViT-B-32:openai", True, 32),
    "paper-single-teacher": ("ViT-B-32:openai", False, 32),
    "paper-single-teacher-512": ("ViT-B-32:openai", False, 512),
    "paper-single-teacher-lora": ("ViT-B-32:openai", True, 32),
    "paper-single-teacher-rn50": ("RN50:openai", False, 32),
    "paper-single-teacher-rn101": ("RN101:openai", False, 32),
}


@pytest.mark.parametrize("name", SETTING)
def test_the_setting_of_mmt_ard(name):
    made, (student, adapters, batch) = recipe(name), SETTING[name]
    assert (made.student, made.lora is not None, made.optim.batch_size) == (student, adapters, batch)
    assert (made.optim.steps, made.optim.warmup, made.optim.lr) == (5000, 350, 2e-5)
    eps = "3/255" if name == "paper-mmt-ard-eps3" else "2/255"
    assert (made.inner.eps, made.inner.steps, made.inner.step_size) == (eps, 10, "1/255")
    if made.lora is not None:
        assert (made.lora.r, made.lora.alpha, made.lora.dropout, made.lora.targets) == (
            16,
            16,
            0.1,
            ("attn",),
        )


BEFORE = "9b989005e42327fdb20dbddbddf88b03816e204427d4f33d6d6030681232e9f1"


def test_new_fields_at_their_defaults_leave_old_fingerprints_alone():
    """Fingerprint of `tiny-tecoa` as it was before starts, modes, optimisers and prompts could be chosen."""
    untuned = Recipe.model_validate(tomllib.loads((GOLDEN / "tiny-tecoa-untuned.toml").read_text()))
    assert untuned.fingerprint == BEFORE
    table = untuned.model_dump(mode="json")
    assert set(table["inner"]) == {"norm", "eps", "steps", "step_size"}
    assert set(table["optim"]) == {"lr", "weight_decay", "steps", "warmup", "batch_size", "grad_clip"}
    assert "prompts" not in table
    whole = untuned.model_dump(mode="json", context={"all": True})
    assert (whole["inner"]["mode"], whole["optim"]["algorithm"], whole["prompts"]) == ("eval", "adamw", None)
    changed = recipe("paper-tecoa-original").model_dump(mode="json")
    assert (changed["inner"]["mode"], changed["optim"]["algorithm"]) == ("train", "sgd")
