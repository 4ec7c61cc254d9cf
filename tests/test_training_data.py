"""Which class names and which resize a recipe trains with, and what the papers' recipes say of them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from worlds import CARD, INNER, NAMES, encoded

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.data import layout, loader
from robustbench_vlm.errors import CardError
from robustbench_vlm.models.text_bank import render, text_bank
from robustbench_vlm.store import fingerprint
from robustbench_vlm.training import loop
from robustbench_vlm.training.prepare import prepare
from robustbench_vlm.training.run import dry_run

CPU = torch.device("cpu")
OTHER = ("crimson", "lime", "navy", "ash")


@pytest.fixture
def lists(toy, tmp_path):
    """Lists of class names beside the toy card, and the same images on the model's canvas."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "toy-other-names.txt").write_text("\n".join(OTHER) + "\n")
    (tmp_path / "prompts" / "toy-short-names.txt").write_text("one\ntwo\n")
    (tmp_path / "datasets").mkdir()
    card = CARD.replace('name = "toy"', 'name = "toy-resized"').replace('"wds_toy"', '"wds_toy-resized"')
    (tmp_path / "datasets" / "toy-resized.toml").write_text(card.replace('"native"', '"model"'))
    folder = tmp_path / "data" / "wds_toy-resized"
    layout.write_texts(folder, NAMES, ["a photo of a {c} square", "a {c} picture"])
    image = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "png")
    some = [(f"s{i:07d}", file.getvalue() if i == 0 else encoded(i % 4, i), "png", i % 4) for i in range(8)]
    for split in ("train", "test"):
        layout.write_split(folder, split, some, 8)
    reader.include([toy.cards, tmp_path])
    return tmp_path, np.asarray(image)


def data(**more):
    return {"dataset": "toy", "template": "a photo of a {c}", **more}


def test_the_class_names_of_a_list_replace_those_of_the_card_in_text_and_probe(toy, lists):
    probe = {"every": 2, "n": 8, "split": "test"}
    plain = prepare(toy.recipe("tecoa", probe=probe), toy.data, CPU)
    other = prepare(toy.recipe("tecoa", data=data(names="toy-other-names"), probe=probe), toy.data, CPU)
    for setup, names in ((plain, NAMES), (other, OTHER)):
        assert setup.dataset.names == names
        bank = text_bank(setup.model, render(names, ["a photo of a {c}"]))
        torch.testing.assert_close(setup.current_roles().text["student"], bank)
        assert setup.probe_batch.keys == plain.probe_batch.keys
    assert not torch.equal(plain.roles.text["student"], other.roles.text["student"])


@pytest.mark.parametrize(("resize", "kernel", "shorter"), [
    ("model", Image.Resampling.BICUBIC, 32),
    ("bilinear", Image.Resampling.BILINEAR, 32),
    ("bilinear-256", Image.Resampling.BILINEAR, 37),  # 32 * 256 / 224 = 36.6
])  # fmt: skip
def test_training_images_are_resized_as_the_recipe_says(toy, lists, resize, kernel, shorter):
    root, image = lists
    chosen = data(dataset="toy-resized", resize=resize)
    setup = prepare(toy.recipe("tecoa", data=chosen), root / "data", CPU)
    batch = next(loader.batches(setup.split, 8, 0, 0, 1, 32))
    longer = int(shorter * 60 / 40)
    made = Image.fromarray(image).resize((longer, shorter), kernel)
    left, top = round((longer - 32) / 2), round((shorter - 32) / 2)
    expected = np.asarray(made.crop((left, top, left + 32, top + 32)))
    found = batch.images[batch.keys.index("toy-resized/train/s0000000")]
    assert np.array_equal((found * 255).round().numpy().transpose(1, 2, 0), expected)


@pytest.mark.parametrize(("changes", "message"), [
    ({"names": "toy-othr-names"}, r"class names 'toy-othr-names': .*did you mean 'toy-other-names'"),
    ({"names": "toy-short-names"}, r"names = 'toy-short-names' with 2 names.*the 4 of toy"),
    ({"resize": "bilinear"}, r"resize = 'bilinear', and toy has a native canvas"),
])  # fmt: skip
def test_names_and_resize_that_do_not_fit_are_refused_before_anything_is_loaded(
    toy, lists, tmp_path, changes, message
):
    recipe = toy.recipe("tecoa", data=data(**changes))
    for attempt in (
        lambda: dry_run(recipe, tmp_path / "out", toy.data),
        lambda: loop.run(recipe, tmp_path / "out", toy.data, CPU, lambda line: None),
    ):
        with pytest.raises(CardError, match=message) as error:
            attempt()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_other_class_names_is_refused(toy, lists, tmp_path):
    one = {"inner": None, "optim": {"lr": 1e-3, "steps": 1, "batch_size": 4}}
    recipe = toy.recipe("clean", data=data(names="toy-other-names"), **one)
    teacher = str(loop.run(recipe, tmp_path / "teacher", toy.data, CPU, lambda line: None))
    with pytest.raises(CardError, match="teacher robust was trained with the class names 'toy-other-names'"):
        prepare(toy.recipe("single-teacher", teachers={"robust": teacher}), toy.data, CPU)
    same = toy.recipe("single-teacher", teachers={"robust": teacher}, data=data(names="toy-other-names"))
    prepare(same, toy.data, CPU)


def recipe(name):
    return reader.read("recipes", name, Recipe)


def test_the_tecoa_family_has_its_own_names_and_resize():
    """AGFT resizes to 224 bilinearly and its sentence has a full stop; all others have 256 and a crop."""
    family = {"paper-tecoa-original", "paper-pmg-aft", "paper-tga-zsr", "paper-agft"}
    found = {}
    for name in (name for name in reader.names("recipes") if name.startswith("paper-")):
        if (chosen := recipe(name).data).names or chosen.resize != "model":
            found[name] = (chosen.names, chosen.resize, chosen.template)
    expected = ("imagenet-tecoa-names", "bilinear-256", "This is a photo of a {c}")
    agft = ("imagenet-tecoa-names", "bilinear", "This is a photo of a {c}.")
    assert found == dict.fromkeys(family, expected) | {"paper-agft": agft}
    ours = reader.class_names("imagenet-names")
    assert sum(a != b for a, b in zip(ours, reader.class_names("imagenet-tecoa-names"), strict=True)) == 362


def test_the_loss_of_the_paper_of_pmg_aft_has_the_rate_that_belongs_to_it():
    for name in ("paper-pmg-aft", "paper-robust-teacher"):
        made = recipe(name)
        assert made.defense == {"name": "pmg-aft"}  # `form = "paper"` by default
        assert made.optim.lr == 1e-5
    assert recipe("paper-mmt-ard-pmg").teachers["robust"] == "runs/paper-robust-teacher"


CORRECTED = [
    ({"weighting": "paper"}, True),
    ({"weighting": "paper", "gap": "softmax"}, True),
    ({"weighting": "paper", "gap": "log"}, False),
    ({"weighting": "full"}, True),
    ({"weighting": "full", "gap": "log"}, True),
    ({"weighting": "full", "gap": "log", "text_scale": 100.0}, False),
    ({"weighting": "released"}, False),
    ({"weighting": "static"}, False),
    ({}, False),
]


@pytest.mark.parametrize(("fields", "corrected"), CORRECTED, ids=str)
def test_a_corrected_loss_has_another_fingerprint_and_all_others_keep_theirs(toy, fields, corrected):
    made = toy.recipe("mmt-ard", "robust", "clean", defense={"name": "mmt-ard", **fields}, inner=INNER)
    assert (made.fingerprint != fingerprint(made.model_dump(mode="json"))) == corrected
