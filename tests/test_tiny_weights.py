"""The packaged checkpoints: their size, their cards, and that their program runs from nothing."""

import dataclasses

import torch

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.demo import weights
from robustbench_vlm.models import model_ids, zoo

LIMIT = 8 * 2**20  # bytes that a wheel may spend on weights


def test_packaged_weights_fit_the_wheel_and_load():
    names = model_ids.packaged()
    assert names == ["tiny", "tiny-clean-teacher", "tiny-robust-teacher"]
    assert sum(path.stat().st_size for path in model_ids.PACKAGED.rglob("*") if path.is_file()) < LIMIT
    student, clean, robust = (zoo.load(name) for name in names)
    assert student.card.trained_on == ()
    assert clean.card.trained_on == robust.card.trained_on == ("tiny-seen",)
    assert robust.card.parameters > student.card.parameters
    assert student.card.text_sha256 == clean.card.text_sha256 == robust.card.text_sha256


def test_teachers_were_made_by_the_recipes_that_stand_in_the_suites():
    for name in weights.TEACHERS:
        made = zoo.load(name).card.recipe
        assert made == reader.read("recipes", name, Recipe).model_dump(mode="json")


def test_every_packaged_checkpoint_is_made_from_nothing(tmp_path, monkeypatch):
    """The real program with two steps of everything, in an empty folder."""
    short = {"steps": 2, "batch_size": 8, "warmup": 1}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "STUDENT", dataclasses.replace(weights.STUDENT, **short))
    monkeypatch.setattr(weights, "TEACHER", dataclasses.replace(weights.TEACHER, **short))
    monkeypatch.setattr(model_ids, "PACKAGED", tmp_path / "packaged")
    (tmp_path / "include" / "recipes").mkdir(parents=True)
    for name in weights.TEACHERS:
        text = reader.path("recipes", name).read_text().replace("\nsteps = 400\n", "\nsteps = 2\n")
        text = text.replace("\nsteps = 800\n", "\nsteps = 2\n").replace("batch_size = 128", "batch_size = 8")
        (tmp_path / "include" / "recipes" / f"{name}.toml").write_text(text.replace("n = 240", "n = 40"))
    reader.include([tmp_path / "include"])
    monkeypatch.setattr(weights.write, "make_missing", small_world)
    try:
        weights.make(tmp_path / "data", torch.device("cpu"))
    finally:
        reader.include([])
    assert model_ids.packaged() == ["tiny", "tiny-clean-teacher", "tiny-robust-teacher"]
    start = zoo.load(str(weights.WORK / weights.START)).card
    assert zoo.load("tiny-robust-teacher").card.parents[0].sha256 == start.sha256


def small_world(root, meter, only):
    """`tiny-seen` with few images; rendering all 16,000 is another test's business."""
    from robustbench_vlm.data import layout
    from robustbench_vlm.data.tiny import write
    from robustbench_vlm.data.tiny.worlds import WORLDS

    world = WORLDS[only[0]]
    layout.write_texts(root / world.folder, list(world.classes), world.templates)
    for split in ("train", "val"):
        layout.write_split(root / world.folder, split, write.samples(world.name, split, 80), 100)
    return [root / world.folder]
