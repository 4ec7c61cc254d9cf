"""Stored teacher outputs on clean images: they save passes, change no bit, and never serve other images."""

import json
from pathlib import Path

import command_line
import pytest
import torch
from test_train import write_recipe
from worlds import INNER

from robustbench_vlm import store
from robustbench_vlm.data import loader
from robustbench_vlm.errors import CardError, InputError, WeightsError
from robustbench_vlm.training import log, loop, teacher_cache
from robustbench_vlm.training.prepare import prepare
from robustbench_vlm.training.state import resumed, save_state
from robustbench_vlm.training.step import train_step
from robustbench_vlm.types import Batch

CPU = torch.device("cpu")
ROLES = ("robust", "clean")


def quiet(line):
    del line


def recipe_of(toy, **changes):
    return toy.recipe("mmt-ard", *ROLES, **changes)


def trained(toy, recipe, out, cache):
    loop.run(recipe, out, toy.data, CPU, quiet, cache)
    return (out / "image.safetensors").read_bytes()


def calls_of(setup, role):
    """A list that grows by the rows of every forward of a teacher's tower."""
    rows = []
    setup.teachers[role].model.visual.register_forward_pre_hook(
        lambda module, args: rows.append(len(args[0]))
    )
    return rows


def steps(setup, tmp_path, first=0, last=6):
    state = resumed(setup, tmp_path)
    for batch in loader.batches(setup.split, 8, 3, first, last, 32):
        train_step(setup, state, batch)


def files(cache, suffix):
    return sorted(cache.glob(f"*{suffix}"))


def test_a_run_ends_with_the_same_bytes_with_and_without_and_with_a_filled_file(toy, tmp_path):
    recipe = recipe_of(toy, optim={"lr": 1e-3, "steps": 9, "batch_size": 8})  # 48 images: an epoch and a half
    without = trained(toy, recipe, tmp_path / "a", None)
    assert trained(toy, recipe, tmp_path / "b", tmp_path / "cache") == without
    assert trained(toy, recipe, tmp_path / "c", tmp_path / "cache") == without
    first, *others = [
        [{k: v for k, v in line.items() if k not in log.TIMES} for line in lines]
        for lines in (store.records(tmp_path / name / "log.jsonl") for name in "abc")
    ]
    assert all(lines == first for lines in others)


def test_a_clean_image_is_shown_to_a_teacher_once_and_an_adversarial_one_always(toy, tmp_path):
    setup = prepare(recipe_of(toy), toy.data, CPU, tmp_path / "cache")
    clean, robust = calls_of(setup, "clean"), calls_of(setup, "robust")
    steps(setup, tmp_path / "none", 0, 12)  # two epochs of six batches
    assert clean == [8] * 6
    assert robust == [8] * 12
    again = prepare(recipe_of(toy), toy.data, CPU, tmp_path / "cache")
    clean = calls_of(again, "clean")
    steps(again, tmp_path / "none", 0, 3)
    assert clean == []


def test_a_row_that_was_torn_is_computed_again(toy, tmp_path):
    cache = tmp_path / "cache"
    whole = trained(toy, recipe_of(toy), tmp_path / "a", cache)
    touched = 0
    for path in files(cache, ".rows"):
        content = bytearray(path.read_bytes())
        touched += any(content)
        content[-3] ^= 1  # in the last embedding, one bit
        content[: len(content) // 2] = bytes(len(content) // 2)  # and half of all rows were never written
        path.write_bytes(content)
    assert touched == 1  # of the clean teacher alone: the robust one sees no clean image
    assert trained(toy, recipe_of(toy), tmp_path / "b", cache) == whole


def test_another_picture_under_the_same_name_is_not_the_one_that_was_seen(toy, tmp_path):
    setup = prepare(recipe_of(toy), toy.data, CPU, tmp_path / "cache")
    kept, teacher = setup.caches["clean"], setup.teachers["clean"].model
    batch = next(loader.batches(setup.split, 8, 3, 0, 1, 32))
    with torch.no_grad():
        first = kept.embeddings(batch, teacher)
        assert torch.equal(kept.embeddings(batch, None), first)  # no teacher is run
        other = Batch(1 - batch.images, batch.labels, batch.keys, ("0" * 64, *batch.sha256[1:]))
        found = kept.embeddings(other, teacher)
        assert torch.equal(found, teacher(other.images))
        assert not torch.equal(found, first)


def test_clean_images_are_known_by_their_pixels_and_others_are_run(toy, tmp_path):
    """A defense may copy the batch; what it has changed, or wants a gradient of, goes through the teacher."""
    setup = prepare(recipe_of(toy), toy.data, CPU, tmp_path / "cache")
    batch = next(loader.batches(setup.split, 8, 3, 0, 1, 32))
    rows = calls_of(setup, "clean")
    teacher = setup.training_roles(batch).teachers["clean"]
    with torch.no_grad():
        first = teacher(batch.images)
        assert rows == [8]
        assert torch.equal(teacher(batch.images.clone()), first)
        assert torch.equal(teacher(batch.images + 0.0), first)
        assert rows == [8]
        changed = batch.images.clone()
        changed[-1, 0, 0, 0] += 1 / 255
        assert not torch.equal(teacher(changed), first)
        assert rows == [8, 8]
        torch.testing.assert_close(teacher(batch.images[:4]), first[:4])
        assert rows == [8, 8, 4]
    leaf = batch.images.clone().requires_grad_()
    assert teacher(leaf).requires_grad
    assert rows == [8, 8, 4, 8]


def test_what_the_bits_depend_on_is_in_the_name(toy, tmp_path):
    """Other weights, images, call sizes and precisions have files of their own; the seed has not."""
    cache = tmp_path / "cache"

    def made(**changes):
        before = set(files(cache, ".rows"))
        prepare(recipe_of(toy, **changes), toy.data, CPU, cache)
        return len(set(files(cache, ".rows")) - before)

    assert made() == 2
    assert made() == 0
    assert made(seed=4, inner={**INNER, "steps": 1}) == 0
    assert made(optim={"lr": 1e-3, "steps": 6, "batch_size": 4}) == 2
    assert made(compute={"precision": "bf16"}) == 2
    assert made(data={"dataset": "toy", "template": "a photo of a {c}", "n": 20}) == 2
    assert made(teachers={"robust": toy.robust, "clean": toy.student}) == 1


def test_a_file_made_from_other_weights_is_refused(toy, tmp_path):
    cache = tmp_path / "cache"
    prepare(recipe_of(toy), toy.data, CPU, cache)
    one, other = files(cache, ".json")
    other.write_bytes(one.read_bytes())
    with pytest.raises(WeightsError, match=r"a cache made from another model \w{16}") as error:
        prepare(recipe_of(toy), toy.data, CPU, cache)
    assert "\n" not in str(error.value)
    assert str(other) in str(error.value)
    other.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        prepare(recipe_of(toy), toy.data, CPU, cache)
    other.write_text(json.dumps([1]))
    with pytest.raises(WeightsError, match="another model None"):
        prepare(recipe_of(toy), toy.data, CPU, cache)


def test_a_folder_that_cannot_be_written_costs_time_alone(toy, tmp_path):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    setup = prepare(recipe_of(toy), toy.data, CPU, blocked / "cache")
    assert setup.caches == {}
    steps(setup, tmp_path / "none")


def test_a_teacher_that_learns_is_never_remembered(toy, tmp_path):
    prompts = {"image": 1, "text": 1, "depth": 2}
    recipe = toy.recipe("apd", "clean", prompts=prompts)
    assert prepare(recipe, toy.data, CPU, tmp_path / "cache").caches == {}


def test_the_command_keeps_them_unless_told(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLMROB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, toy.table("mmt-ard", *ROLES))
    line = ["--include", toy.cards, "train", path, "--data-root", toy.data]
    assert command_line.run_command(monkeypatch, *line, "--out", "a", "--no-cache") == 0
    assert not teacher_cache.default_folder().exists()
    assert command_line.run_command(monkeypatch, *line, "--out", "b") == 0
    assert len(files(teacher_cache.default_folder(), ".rows")) == 2
    assert Path("a/image.safetensors").read_bytes() == Path("b/image.safetensors").read_bytes()
    capsys.readouterr()


# Precision and kernels


def test_a_recipe_without_the_table_keeps_its_fingerprint(toy):
    plain, said = recipe_of(toy), recipe_of(toy, compute={"precision": "fp32"})
    assert "compute" not in plain.model_dump(mode="json")
    assert plain.fingerprint == said.fingerprint
    assert recipe_of(toy, compute={"fused_adamw": True}).fingerprint != plain.fingerprint


def test_fused_adamw_is_of_adamw(toy):
    with pytest.raises(CardError, match=r"compute.fused_adamw is of adamw, optim.algorithm is sgd"):
        recipe_of(
            toy,
            compute={"fused_adamw": True},
            optim={"algorithm": "sgd", "lr": 1e-3, "steps": 6, "batch_size": 8},
        )


def first_line(toy, tmp_path, **changes):
    """The log line of the first step, the step's gradient by parameter, and the student."""
    setup = prepare(recipe_of(toy, **changes), toy.data, CPU)
    state = resumed(setup, tmp_path / "none")
    line = train_step(setup, state, next(loader.batches(setup.split, 8, 3, 0, 1, 32)))
    return line, {n: p.grad.clone() for n, p in setup.parameters().items() if p.grad is not None}, setup


def test_bf16_computes_towers_in_bf16_and_everything_else_in_fp32(toy, tmp_path):
    line, gradients, setup = first_line(toy, tmp_path)
    low, rounded, lower = first_line(toy, tmp_path, compute={"precision": "bf16"})
    assert low["loss"] != line["loss"]
    assert low["loss"] == pytest.approx(line["loss"], rel=0.05)
    assert all(p.dtype == torch.float32 for p in lower.parameters().values())
    a, b = (torch.cat([g.flatten() for g in found.values()]) for found in (gradients, rounded))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.9
    batch = next(loader.batches(setup.split, 8, 3, 0, 1, 32))
    student = lower.training_roles(batch).student
    assert student(batch.images).dtype == torch.float32
    assert lower.roles.student is lower.model  # the probe's view stays fp32


@pytest.mark.parametrize("field", ["channels_last", "fused_adamw"])
def test_kernels_change_a_step_by_rounding_alone_and_a_stopped_run_goes_on(toy, tmp_path, field):
    line, gradients, _ = first_line(toy, tmp_path)
    other, found, _ = first_line(toy, tmp_path, compute={field: True})
    assert other["loss"] == pytest.approx(line["loss"], rel=1e-4)
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-2, atol=1e-4 * float(gradient.abs().max()))
    recipe = recipe_of(toy, compute={field: True})
    whole = trained(toy, recipe, tmp_path / "whole", None)
    setup = prepare(recipe, toy.data, CPU)
    store.write_json(
        tmp_path / "cut" / "recipe.json",
        {"fingerprint": recipe.fingerprint, **recipe.model_dump(mode="json")},
    )
    state = resumed(setup, tmp_path / "cut")
    for batch in loader.batches(setup.split, 8, 3, 0, 4, 32):
        train_step(setup, state, batch)
    save_state(tmp_path / "cut", setup, state)
    assert trained(toy, recipe, tmp_path / "cut", None) == whole


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler, about its own tensors
def test_a_compiled_run_is_the_plain_one_up_to_rounding(toy, tmp_path):
    line, gradients, _ = first_line(toy, tmp_path)
    other, found, setup = first_line(toy, tmp_path, compute={"compile": True})
    assert other["loss"] == pytest.approx(line["loss"], rel=1e-3)
    a, b = (torch.cat([g.flatten() for g in named.values()]) for named in (gradients, found))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.999
    assert not [name for name in setup.parameters() if "_orig_mod" in name]
    trained(toy, recipe_of(toy, compute={"compile": True}), tmp_path / "out", None)
