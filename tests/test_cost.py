"""The cost model against the published profile, hand calculations and what autograd really keeps."""

import dataclasses
import json

import open_clip
import pytest
import torch

from robustbench_vlm import catalogue
from robustbench_vlm.cards import overrides, plugins, reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.defenses.interface import Passes
from robustbench_vlm.training import cost

PROFILE = {  # open_clip, docs/model_profile.csv: GFLOP of an image forward, weights of both in millions
    "ViT-B-32": (8.82, 87.85, 63.43),
    "ViT-B-32-256": (11.5, 87.86, 63.43),
    "ViT-B-16": (35.13, 86.19, 63.43),
    "ViT-L-14": (162.03, 303.97, 123.65),
    "ViT-H-14": (334.59, 632.08, 354.03),
    "RN50": (12.22, 38.32, 63.69),
    "RN101": (19.54, 56.26, 63.43),
    "RN50x4": (42.56, 87.14, 91.16),
}
TINY_RN = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 16, "patch_size": None},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
}
TINY_VIT = TINY_RN | {
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "mlp_ratio": 2.0}
}


def towers(*names):
    return [cost.tower(open_clip.get_model_config(name)) for name in names]


@pytest.mark.parametrize("name", PROFILE)
def test_operations_and_weights_are_those_of_the_published_profile(name):
    (found,) = towers(name)
    flops, image, text = PROFILE[name]
    assert round(found.flops / 1e9, 2) == pytest.approx(flops, abs=0.0101)
    assert round(found.parameters / 1e6, 2) == pytest.approx(image, abs=0.0101)
    assert round(found.text / 1e6, 2) == pytest.approx(text, abs=0.0101)


def test_a_vit_by_hand():
    """Width 4, one layer, patches of 8 in 16 pixels: 4 patches and a class token; one MLP of ratio 2."""
    config = {
        "embed_dim": 3,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 4, "patch_size": 8, "mlp_ratio": 2.0},
        "text_cfg": {"context_length": 2, "vocab_size": 5, "width": 4, "layers": 1, "mlp_ratio": 2.0},
    }
    patches = 4 * (3 * 64) * 4
    attention = 5 * (4 * 12 + 4 * 4) + 2 * 5 * 5 * 4
    mlp = 5 * (4 * 8 + 8 * 4)
    assert cost.tower(config).flops == 2 * (patches + attention + mlp + 4 * 3)


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RN], ids=["vit", "resnet"])
def test_weights_and_memory_are_those_of_the_built_tower(config):
    model = open_clip.model.CLIP(**config)
    found = cost.tower(config)
    assert found.parameters == sum(p.numel() for p in model.visual.parameters())
    everything = sum(p.numel() for p in model.parameters())
    assert found.text == everything - found.parameters
    own = {p.untyped_storage().data_ptr() for p in model.visual.parameters()}
    kept, side = {}, config["vision_cfg"]["image_size"]

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.visual.train()(torch.rand(4, 3, side, side))
    assert out.requires_grad
    assert found.activations == pytest.approx(sum(kept.values()) / 4, rel=0.15)


def recipe(name, **settings):
    table = reader.toml(reader.path("recipes", name))
    return reader.parse(
        overrides.override(table, [f"{k}={v}" for k, v in settings.items()]), Recipe, "a test"
    )


def gflop(name, student="ViT-B-32", attack=10, lora=False, **fields):
    """GFLOP of an image and step of a defense with a ViT-L-14 as every teacher but the anchor."""
    defense = plugins.build("defenses", name, fields, "a test")
    steps = {"inner.steps": attack} if defense.adversarial else {}
    made = recipe(f"tiny-{name}", **steps, **({"lora.r": 16} if lora else {}))
    roles = {role: towers(student if role == "anchor" else "ViT-L-14")[0] for role in defense.teachers}
    return cost.estimate(made, defense.passes(), towers(student)[0], roles, 100)["gflop_per_image"]


TABLE = [  # the lean column of the cost table: what each method strictly needs, student ViT-B-32
    ("mmt-ard", 10, {"lora": True}, 535.7), ("mmt-ard", 10, {}, 553.4), ("single-teacher", 10, {}, 364.9),
    ("tecoa", 10, {}, 202.9), ("fare", 10, {}, 211.7), ("sim-clip", 10, {}, 211.7), ("tecoa", 2, {}, 61.7),
    ("pmg-aft", 2, {}, 97.0), ("tga-zsr", 2, {}, 97.0), ("agft", 2, {}, 70.6), ("rslad", 10, {}, 391.3),
    ("mtard", 10, {}, 553.4), ("b-mtard", 10, {}, 553.4), ("adaad", 10, {"alpha": 0.5}, 3794.0),
    ("trades", 10, {}, 238.2), ("mart", 10, {}, 229.4),  # 27 and 26 forwards of 8.82
]  # fmt: skip


@pytest.mark.parametrize(("name", "steps", "how", "expected"), TABLE, ids=str)
def test_a_step_costs_what_the_table_says(name, steps, how, expected):
    assert gflop(name, attack=steps, **how) == pytest.approx(expected, abs=0.25)


def test_an_estimate_by_hand():
    """10 flops a forward: 3 attack steps, 2 full backwards, a teacher twice and in every attack step."""
    student = cost.Tower(10, 100, 7, 5, text=20)
    teacher = cost.Tower(1000, 1000, 70, 50, text=200)
    made = recipe(
        "tiny-tecoa", **{"inner.steps": 3, "optim.steps": 8, "optim.batch_size": 4, "lora": "{}"}
    ).model_copy(update={"lora": None})
    found = cost.estimate(made, Passes(2, {"robust": 2}, ("robust",)), student, {"robust": teacher}, 64)
    flops = 10 * (2 * 3 + 2 * 3) + 1000 * (2 + 2 * 3)
    assert found["images_seen"] == 32
    assert found["effective_epochs"] == 0.5
    assert found["trained_weights"] == 100
    assert found["gflop_per_image"] == round(flops / 1e9, 4)
    big = cost.estimate(
        made, Passes(2, {"robust": 2}, ("robust",)),
        cost.Tower(10, 2**30, 2**30, 0), {"robust": cost.Tower(1000, 2**28, 2**29, 2**28)}, 64,
    )  # fmt: skip
    assert big["gib"] == {
        "weights": 5.0,  # 1.25 billion weights of four bytes
        "gradients_and_moments": 12.0,
        "activations": 4 * 4 * 2.25,  # two student graphs outweigh one with the teacher's in the attack
        "total": 53.0,
    }


def test_a_batch_in_parts_takes_less_memory_and_more_forwards():
    """The 2 forwards of the loss twice, beside backwards of 4; activations of a quarter of 8 images."""
    made, student = recipe("tiny-clean", **{"optim.batch_size": 8}), cost.Tower(1e9, 2**30, 2**30, 0)
    parts = recipe("tiny-clean", **{"optim.batch_size": 8, "optim.accumulate": 4})
    whole, found = (cost.estimate(one, Passes(2), student, {}, 64) for one in (made, parts))
    assert (whole["gflop_per_image"], found["gflop_per_image"]) == (6.0, 8.0)
    assert found["gib"]["activations"] == whole["gib"]["activations"] / 4 == 16.0
    assert "without checkpointing" in whole["assumes"]
    assert "a batch in 4 parts" in found["assumes"]


def test_a_tower_of_another_kind_is_none():
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        other = {"timm_model_name", "attentional_pool"} & config["vision_cfg"].keys()
        other |= {"hf_model_name"} & config["text_cfg"].keys()
        assert (cost.tower(config) is None) == bool(other), name


def test_what_a_student_of_another_kind_costs_is_said_to_be_unknown():
    made = recipe("tiny-clean", student='"ViT-B-16-SigLIP:webli"')
    defense = plugins.build("defenses", "clean", {}, "a test")
    said = catalogue.estimate(made, defense)["unknown"]
    assert said.startswith("what student 'ViT-B-16-SigLIP:webli' costs")


def test_only_a_student_with_batch_norms_is_run_for_their_statistics():
    """RN50 12.22 and ViT-B-32 8.82 GFLOP: 20 in the attack, 3 in the loss, and for RN50 one on x."""
    made, passes = recipe("paper-single-teacher-rn50"), Passes(1, student_batch_norm=1)
    for name, count, forwards in (("RN50", 1, 24), ("ViT-B-32", 0, 23)):
        (student,) = towers(name)
        found = cost.estimate(made, passes, student, {}, 0)
        assert found["passes_per_step"]["student_without_gradient"] == count
        assert found["gflop_per_image"] == pytest.approx(forwards * student.flops / 1e9)


def test_adapters_train_what_they_add():
    made, (student,) = recipe("paper-mmt-ard"), towers("ViT-B-32")
    assert cost.trained(made, student) == 884_736
    assert cost.trained(recipe("paper-mmt-ard-full"), student) == student.parameters


def test_sgd_keeps_one_moment_and_unknown_images_no_epochs():
    made, (student,) = recipe("paper-tga-zsr"), towers("ViT-B-32")
    found = cost.estimate(made, Passes(1), student, {}, 0)
    assert found["effective_epochs"] is None
    assert found["gib"]["gradients_and_moments"] == round(2 * student.parameters * 4 / 2**30, 3)


@pytest.mark.parametrize("name", reader.names("recipes"))
def test_every_recipe_is_shown_resolved_and_estimated(name):
    shown = catalogue.details("recipe", name)
    json.dumps(shown)
    assert shown["optim"]["algorithm"] in ("adamw", "sgd")
    assert shown["inner"] is None or shown["inner"]["start"]
    fields = {key: value for key, value in shown["defense"].items() if key != "name"}
    defense = plugins.build("defenses", shown["defense"]["name"], fields, "a test")
    assert set(fields) == {field.name for field in dataclasses.fields(defense)}
    assert set(shown["teachers"]) == set(defense.teachers)
    estimate = shown["estimate"]
    assert estimate["effective_epochs"] > 0
    assert estimate["gib"]["total"] > 0


def test_the_papers_run_sees_an_eighth_of_imagenet():
    shown = catalogue.details("recipe", "paper-mmt-ard")["estimate"]
    assert shown["images_seen"] == 160_000
    assert shown["effective_epochs"] == pytest.approx(0.125, abs=0.0005)
    assert shown["gflop_per_image"] == pytest.approx(535.7, abs=0.05)


def test_a_teacher_that_must_be_downloaded_first_is_said_to_be_unknown():
    made = recipe("tiny-single-teacher", **{"teachers.robust": '"hf-hub:nobody/nothing"'})
    defense = plugins.build("defenses", "single-teacher", {}, "a test")
    said = catalogue.estimate(made, defense)["unknown"]
    assert said == "the architecture of robust 'hf-hub:nobody/nothing', which is not on this machine"
