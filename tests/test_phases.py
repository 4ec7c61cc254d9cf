"""Teachers that follow each other, and saved steps of a run as models."""

import pytest
import torch
from safetensors.torch import load_file
from test_defense_loop import Stopped

from robustbench_vlm import catalogue
from robustbench_vlm.cards import overrides, reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.data import loader
from robustbench_vlm.errors import CardError, WeightsError
from robustbench_vlm.models import zoo
from robustbench_vlm.training import loop, run
from robustbench_vlm.training.prepare import prepare

CPU = torch.device("cpu")
OPTIM = {"lr": 1e-2, "steps": 4, "warmup": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def teacher(world, tmp_path_factory):
    """A finished run of four steps, saved after each second one."""
    reader.include([world.cards])
    out = tmp_path_factory.mktemp("teacher") / "run"
    loop.run(world.recipe("clean", inner=None, optim=OPTIM), out, world.data, CPU, lambda line: None)
    reader.include([])
    return out


def step(teacher, number):
    return str(teacher / "checkpoints" / f"step_{number:07d}.safetensors")


def staged(toy, teacher, *phases, **changes):
    phases = phases or ((0.25, step(teacher, 2)), (0.75, toy.robust))
    listed = [{"until": until, "model": model} for until, model in phases]
    teachers = {"robust": {"model": str(teacher), "phases": listed}, "clean": toy.clean}
    return toy.recipe("mmt-ard", teachers=teachers, optim=OPTIM, checkpoint_every=1, **changes)


def test_a_saved_step_of_a_run_is_a_model(teacher, tmp_path):
    """Its image tower is that of the step, and all else is that of the run."""
    last, middle = zoo.load(str(teacher)), zoo.load(step(teacher, 2))
    saved = load_file(step(teacher, 2))
    for name, value in middle.model.visual.state_dict().items():
        assert torch.equal(value, saved[f"student.{name}"])
    assert middle.card.sha256 != last.card.sha256
    assert middle.card.text_sha256 == last.card.text_sha256
    assert middle.card.name == "toy-run-step_0000002"
    assert middle.card.training["step"] == 2
    assert (middle.card.trained_on, middle.card.recipe) == (last.card.trained_on, last.card.recipe)
    assert zoo.load(step(teacher, 4)).card.sha256 == last.card.sha256
    assert zoo.arch_of(step(teacher, 2)) == last.card.arch


def test_a_step_with_adapters_says_what_it_is(toy, tmp_path):
    recipe = toy.recipe("clean", inner=None, optim=OPTIM, lora={"r": 2, "alpha": 2, "targets": ["attn"]})
    loop.run(recipe, tmp_path, toy.data, CPU, lambda line: None)
    name = next(iter(sorted((tmp_path / "checkpoints").glob("*.safetensors"))))
    with pytest.raises(
        WeightsError, match="a saved step with adapters, which are merged at the end of a run"
    ):
        zoo.load(str(name))


def test_a_step_of_an_unfinished_or_other_run_is_refused(toy, teacher, tmp_path):
    alone = tmp_path / "unfinished" / "checkpoints" / "step_0000002.safetensors"
    alone.parent.mkdir(parents=True)
    alone.write_bytes((teacher / "checkpoints" / "step_0000002.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=r"a saved step of .*unfinished, which is no finished run"):
        zoo.load(str(alone))
    other = tmp_path / "other"
    recipe = toy.recipe("clean", inner=None, optim={**OPTIM, "lr": 1e-3}, checkpoint_every=0)
    loop.run(recipe, other, toy.data, CPU, lambda line: None)
    (other / "checkpoints").mkdir()
    moved = other / "checkpoints" / "step_0000002.safetensors"
    moved.write_bytes(alone.read_bytes())
    with pytest.raises(WeightsError, match="a step of another recipe"):
        zoo.load(str(moved))


def test_phases_teach_one_after_the_other(toy, teacher, tmp_path):
    """Of four steps, the first is of the run's step 2, two of another model, the last of the run's end."""
    setup = prepare(staged(toy, teacher), toy.data, CPU, tmp_path / "cache")
    batch = next(loader.batches(setup.split, 8, 3, 0, 1, 32))
    expected = [step(teacher, 2), toy.robust, toy.robust, str(teacher)]
    for number, name in enumerate(expected):
        roles = setup.training_roles(batch, number / 4)
        with torch.no_grad():
            loaded = zoo.load(name)
            bank = loaded.model.text([f"a photo of a {c}" for c in setup.dataset.names])
            unit = torch.nn.functional.normalize(loaded.model(batch.images), dim=-1)
            torch.testing.assert_close(
                roles.logits("robust", batch.images), loaded.model.logit_scale * unit @ bank.T
            )
            again = roles.logits("robust", batch.images)  # from the cache of that very model
            torch.testing.assert_close(again, loaded.model.logit_scale * unit @ bank.T)
            clean = roles.logits("clean", batch.images)
    torch.testing.assert_close(clean, setup.training_roles(batch).logits("clean", batch.images))


def test_a_run_that_is_stopped_within_a_phase_goes_on_with_equal_bits(toy, teacher, tmp_path):
    recipe, whole, torn = staged(toy, teacher), tmp_path / "whole", tmp_path / "torn"

    def stop(line):
        if line["step"] == 3:
            raise Stopped

    loop.run(recipe, whole, toy.data, CPU, lambda line: None)
    with pytest.raises(Stopped):
        loop.run(recipe, torn, toy.data, CPU, stop)
    loop.run(recipe, torn, toy.data, CPU, lambda line: None, tmp_path / "cache")
    for file in ("image.safetensors", "card.json"):
        assert (torn / file).read_bytes() == (whole / file).read_bytes(), file
    parents = [(parent.role, parent.model) for parent in zoo.load(str(whole)).card.parents]
    assert parents == [
        *(("student", "start"), ("robust", "toy-run"), ("clean", "clean")),
        *(("robust", "toy-run-step_0000002"), ("robust", "robust")),
    ]
    plain = toy.recipe("mmt-ard", teachers={"robust": str(teacher), "clean": toy.clean}, optim=OPTIM)
    loop.run(plain, tmp_path / "plain", toy.data, CPU, lambda line: None)
    assert (tmp_path / "plain" / "image.safetensors").read_bytes() != (
        whole / "image.safetensors"
    ).read_bytes()


def test_both_spellings_are_one_recipe_and_recipes_without_phases_keep_their_fingerprint(toy, teacher):
    made = staged(toy, teacher)
    again = reader.parse(made.model_dump(mode="json"), Recipe, "a test")
    assert again == made
    assert again.fingerprint == made.fingerprint
    assert made.teachers["robust"] == str(teacher)
    plain = toy.table("mmt-ard", "robust", "clean")
    assert "phases" not in reader.parse(plain, Recipe, "a test").model_dump(mode="json")
    typed = overrides.override(plain, [f'phases.robust=[{{until = 0.5, model = "{toy.clean}"}}]'])
    assert reader.parse(typed, Recipe, "a test").phases["robust"][0].until == 0.5


def test_a_dry_run_names_the_phases_and_what_is_missing_of_them(toy, teacher, tmp_path):
    lines = run.dry_run(staged(toy, teacher), tmp_path / "out", toy.data)
    assert f"robust {step(teacher, 2)} until 0.25, then {toy.robust} until 0.75, then {teacher}" in lines[1]
    with pytest.raises(WeightsError, match=r"step_0000003\.safetensors: no such file"):
        run.dry_run(staged(toy, teacher, (0.5, step(teacher, 3))), tmp_path / "out", toy.data)


@pytest.mark.parametrize(("changes", "message"), [
    ({"teachers": {"robust": {"model": "tiny"}, "clean": "tiny"}}, r"teachers.robust has \['model'\]"),
    ({"phases": {"other": [{"until": 0.5, "model": "tiny"}]}}, "phases.other without teachers.other"),
    ({"phases": {"robust": [{"until": 0.5, "model": "tiny"}] * 2}}, r"until = \[0.5, 0.5\], expected rising"),
    ({"phases": {"robust": [{"until": 1.0, "model": "tiny"}]}}, "until = 1.0; expected less than 1"),
    (
        {"teachers": {"robust": {"model": "tiny", "phases": []}}, "phases": {"robust": []}},
        "two lists: leave one out",
    ),
])  # fmt: skip
def test_phases_that_make_no_sense_are_refused(toy, changes, message):
    with pytest.raises(CardError, match=message) as error:
        toy.recipe("mmt-ard", "robust", "clean", **changes)
    assert "\n" not in str(error.value)


def test_a_teacher_whose_prompts_are_trained_has_no_phases(toy):
    prompts = {"image": 1, "text": 1, "depth": 2}
    phases = {"clean": [{"until": 0.5, "model": toy.robust}]}
    with pytest.raises(CardError, match=r"phases for \['clean'\]; expected none: apd trains"):
        prepare(toy.recipe("apd", "clean", prompts=prompts, phases=phases), toy.data, CPU)


def test_models_of_phases_count_in_the_memory_of_a_training():
    table = reader.table("recipes", reader.path("recipes", "tiny-mmt-ard"))
    staged = {"robust": [{"until": 0.5, "model": "tiny-clean-teacher"}]}
    weights = []
    for changes in ({}, {"phases": staged}):
        recipe = reader.parse(table | changes, Recipe, "a test")
        weights.append(catalogue.estimate(recipe, catalogue._defense(recipe))["gib"]["weights"])
    assert weights[1] > weights[0]
