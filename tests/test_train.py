"""The training loop: the schedule, exact resume, what a run refuses and what it records."""

import math
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from worlds import INNER, twin

from robustbench_vlm import cli, store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.recipe import Optim, Recipe
from robustbench_vlm.data import loader
from robustbench_vlm.defenses.interface import Defense, Terms
from robustbench_vlm.defenses.mmt_ard import MmtArd
from robustbench_vlm.errors import InputError, TrainingError, WeightsError
from robustbench_vlm.models import checkpoint_card, zoo
from robustbench_vlm.training import loop, run
from robustbench_vlm.training.prepare import prepare
from robustbench_vlm.training.probe import probe
from robustbench_vlm.training.state import resumed
from robustbench_vlm.training.step import learning_rate, train_step

CPU = torch.device("cpu")
LORA = {"r": 4, "alpha": 8, "dropout": 0.25}
PROBE = {"every": 3, "n": 9, "steps": 2}
PAPER = {"name": "mmt-ard", "weighting": "paper"}  # the one that carries statistics from step to step
KINDS = {
    "tecoa": ("tecoa", (), {}),
    "mmt-ard": ("mmt-ard", ("robust", "clean"), {"probe": PROBE, "defense": PAPER}),
    "lora": ("mmt-ard", ("robust", "clean"), {"lora": LORA}),
}


def quiet(line):
    del line


def toml(table, prefix=""):
    """A table as TOML; enough for a recipe."""
    plain = [f"{k} = {value(v)}" for k, v in table.items() if not isinstance(v, dict)]
    inner = [f"\n[{prefix}{k}]\n{toml(v, f'{prefix}{k}.')}" for k, v in table.items() if isinstance(v, dict)]
    return "\n".join([*plain, *inner])


def value(v):
    return f'"{v}"' if isinstance(v, str) else str(v).lower() if isinstance(v, bool) else repr(v)


def write_recipe(folder, table):
    path = folder / f"{table['name']}.toml"
    path.write_text(toml(table))
    assert tomllib.loads(path.read_text()) == table
    return path


def test_a_dataset_that_is_named_by_its_folder_trains_against_those_names(toy, tmp_path):
    recipe = toy.recipe("tecoa")
    card = prepare(recipe, toy.data, CPU)
    named = (toy.cards / "datasets" / "toy.toml").read_text().splitlines()
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "toy.toml").write_text(
        "\n".join('names_from = "folder"' if line.startswith("names = ") else line for line in named)
    )
    reader.include([tmp_path, toy.cards])
    found = prepare(recipe, toy.data, CPU)
    assert found.split.card.names == card.split.card.names
    assert torch.equal(found.roles.text["student"], card.roles.text["student"])


# Schedule


def test_the_learning_rate_by_hand():
    optim = Optim(lr=0.8, steps=12, warmup=4, batch_size=1)
    warm = [0.2, 0.4, 0.6, 0.8]
    cosine = [0.8 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert [learning_rate(t, optim) for t in range(12)] == pytest.approx(warm + cosine, abs=1e-15)
    assert learning_rate(8, optim) == pytest.approx(0.4)


def test_the_learning_rate_without_warm_up_starts_full_and_ends_at_zero():
    optim = Optim(lr=0.5, steps=10, warmup=0, batch_size=1)
    rates = [learning_rate(t, optim) for t in range(11)]
    assert rates[0] == 0.5
    assert rates[10] == pytest.approx(0, abs=1e-15)
    assert rates == sorted(rates, reverse=True)


def test_a_momentum_that_would_go_unread_is_refused():
    with pytest.raises(ValueError, match=r"momentum = 0\.5 goes with algorithm = 'sgd', not 'adamw'"):
        Optim(lr=1.0, steps=4, batch_size=1, momentum=0.5)
    assert Optim(lr=1.0, steps=4, batch_size=1, momentum=0.5, algorithm="sgd").momentum == 0.5
    assert Optim(lr=1.0, steps=4, batch_size=1, momentum=0.9).momentum == 0.9


def test_a_warm_up_as_long_as_the_run_is_no_division_by_zero():
    optim = Optim(lr=1.0, steps=4, warmup=4, batch_size=1)
    assert [learning_rate(t, optim) for t in range(4)] == [0.25, 0.5, 0.75, 1.0]


# Resume


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder of an uninterrupted run of each kind."""
    reader.include([world.cards])
    folders = {}
    for kind, (defense, roles, changes) in KINDS.items():
        folders[kind] = tmp_path_factory.mktemp(f"whole-{kind}")
        loop.run(world.recipe(defense, *roles, **changes), folders[kind], world.data, CPU, quiet)
    reader.include([])
    return folders


def same_weights(a, b):
    return (a / "image.safetensors").read_bytes() == (b / "image.safetensors").read_bytes()


def steps_of(folder):
    return [line["step"] for line in store.records(folder / "log.jsonl") if "loss" in line]


class Stopped(Exception):  # noqa: N818 - not an error: the run is stopped on purpose
    pass


def stop_at(step):
    def report(line):
        if line["step"] == step and "loss" in line:
            raise Stopped

    return report


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_twice_ends_with_the_bytes_of_one_that_was_not(toy, whole, tmp_path, kind):
    defense, roles, changes = KINDS[kind]
    recipe = toy.recipe(defense, *roles, **changes)
    for step in (1, 5):  # before the first checkpoint, and after the second
        with pytest.raises(Stopped):
            loop.run(recipe, tmp_path, toy.data, CPU, stop_at(step))
        assert not (tmp_path / "card.json").exists()
    torch.rand(5)  # the global generator has moved on; nothing may depend on it
    loop.run(recipe, tmp_path, toy.data, CPU, quiet)
    assert same_weights(tmp_path, whole[kind])
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "card.json").read_bytes() == (whole[kind] / "card.json").read_bytes()
    losses = [
        [line["loss"] for line in store.records(folder / "log.jsonl") if "loss" in line]
        for folder in (tmp_path, whole[kind])
    ]
    assert losses[0] == losses[1]
    probes = [line["step"] for line in store.records(tmp_path / "log.jsonl") if "probe" in line]
    assert probes == ([0, 3, 6] if "probe" in changes else [])


def test_without_checkpoints_a_run_starts_again_from_the_beginning(toy, whole, tmp_path):
    recipe = toy.recipe("tecoa", checkpoint_every=0)
    with pytest.raises(Stopped):
        loop.run(recipe, tmp_path, toy.data, CPU, stop_at(3))
    half = tmp_path / "checkpoints" / ".step_0000003.safetensors.x1y2z3.part"  # a kill while it was written
    store.write(half, b"half")
    loop.run(recipe, tmp_path, toy.data, CPU, quiet)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "checkpoints").exists()
    assert same_weights(tmp_path, whole["tecoa"])


def test_a_torn_log_line_is_mended_on_the_way(toy, whole, tmp_path):
    recipe = toy.recipe("tecoa")
    with pytest.raises(Stopped):
        loop.run(recipe, tmp_path, toy.data, CPU, stop_at(3))
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'{"step":4,"lo')
    loop.run(recipe, tmp_path, toy.data, CPU, quiet)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert same_weights(tmp_path, whole["tecoa"])


def test_a_truncated_checkpoint_file_is_one_line(toy, tmp_path):
    recipe = toy.recipe("tecoa")
    with pytest.raises(Stopped):
        loop.run(recipe, tmp_path, toy.data, CPU, stop_at(3))
    (path,) = (tmp_path / "checkpoints").iterdir()
    path.write_bytes(path.read_bytes()[:999])
    with pytest.raises(InputError, match="not a whole safetensors file") as error:
        loop.run(recipe, tmp_path, toy.data, CPU, quiet)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["a flipped bit", "another step", "a moment of zeros", "a fact gone"])
def test_a_checkpoint_file_that_was_changed_is_one_line(toy, tmp_path, damage):
    recipe = toy.recipe("tecoa")
    with pytest.raises(Stopped):
        loop.run(recipe, tmp_path, toy.data, CPU, stop_at(3))
    (path,) = (tmp_path / "checkpoints").iterdir()
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("optim." if "moment" in damage else "student."))
    if damage == "another step":
        facts["step"] = "99"
    elif damage == "a fact gone":
        facts = {"recipe": facts["recipe"], "sha257": facts["sha256"], "step": facts["step"]}
    else:
        value = tensors[name].clone().reshape(-1)
        value[0] = 0 if "moment" in damage else -value[0]
        tensors[name] = value.reshape(tensors[name].shape)
    save_file(tensors, path, metadata=facts)
    with pytest.raises(InputError, match=rf"{path}: .*delete {path}, and training goes on") as error:
        loop.run(recipe, tmp_path, toy.data, CPU, quiet)
    assert "\n" not in str(error.value)


def test_a_checkpoint_with_moments_under_their_old_names_is_refused_in_one_line(toy, tmp_path):
    recipe = toy.recipe("tecoa")
    with pytest.raises(Stopped):
        loop.run(recipe, tmp_path, toy.data, CPU, stop_at(3))
    (path,) = (tmp_path / "checkpoints").iterdir()
    with safe_open(path, framework="pt") as file:
        facts = {name: fact for name, fact in file.metadata().items() if name != "sha256"}
    tensors = {name.replace("optim.", "adamw."): value for name, value in load_file(path).items()}
    assert any(name.startswith("adamw.") for name in tensors)
    save_file(tensors, path, metadata=facts)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    words = r"tensor 'adamw\.\d+\.\w+', which this version does not read"
    with pytest.raises(InputError, match=words) as error:
        loop.run(recipe, tmp_path, toy.data, CPU, quiet)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_finished_folder_is_not_trained_again(toy, whole):
    folder = whole["tecoa"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    reported = []
    loop.run(toy.recipe("tecoa"), folder, toy.data, CPU, reported.append)
    assert not reported
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


# What a run does


def test_training_lowers_the_loss_and_changes_every_weight_of_the_image_tower(toy, whole):
    lines = [line for line in store.records(whole["tecoa"] / "log.jsonl") if "loss" in line]
    optim = toy.recipe("tecoa").optim
    assert [line["lr"] for line in lines] == [learning_rate(step, optim) for step in range(6)]
    assert lines[-1]["loss"] < lines[0]["loss"]
    before, after = (
        load_file(f"{toy.student}/image.safetensors"),
        load_file(whole["tecoa"] / "image.safetensors"),
    )
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_lora_changes_the_attention_weights_alone(toy, whole):
    before, after = (
        load_file(f"{toy.student}/image.safetensors"),
        load_file(whole["lora"] / "image.safetensors"),
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {
        name for name in before if name.endswith(("attn.in_proj_weight", "attn.out_proj.weight"))
    }


def test_teachers_and_text_towers_are_untouched_by_training(toy, tmp_path):
    recipe = toy.recipe("mmt-ard", "robust", "clean", optim={"lr": 0.01, "steps": 2, "batch_size": 8})
    setup = prepare(recipe, toy.data, CPU)
    before = {role: loaded.model.fingerprints() for role, loaded in setup.teachers.items()}
    start = setup.model.fingerprints()
    state = resumed(setup, tmp_path)
    for batch in loader.batches(setup.split, 8, 3, 0, 2, 32):
        train_step(setup, state, batch)
    assert {role: loaded.model.fingerprints() for role, loaded in setup.teachers.items()} == before
    assert setup.model.fingerprints()["text"] == start["text"]
    assert setup.model.fingerprints()["image"] != start["image"]
    assert not any(part.training for loaded in setup.teachers.values() for part in loaded.model.modules())
    for loaded in setup.teachers.values():
        assert all(p.grad is None and not p.requires_grad for p in loaded.model.parameters())


def test_the_student_trains_in_train_mode_and_is_attacked_in_eval_mode(toy, tmp_path):
    modes = []

    @dataclass(frozen=True)
    class Watching(MmtArd):
        def inner(self, roles, batch, targets):
            objective = super().inner(roles, batch, targets)
            modes.append(("inner", roles.student.visual.training, roles.student.visual.proj.requires_grad))
            return objective

        def outer(self, roles, step):
            assert not step.adv.requires_grad
            assert (step.adv - step.batch.images).abs().max() <= 4 / 255 + 1e-6
            assert step.adv.min() >= 0
            assert step.adv.max() <= 1
            assert not torch.equal(step.adv, step.batch.images)
            modes.append(("outer", roles.student.visual.training, roles.student.visual.proj.requires_grad))
            return super().outer(roles, step)

    setup = prepare(toy.recipe("mmt-ard", "robust", "clean"), toy.data, CPU)
    setup = replace(setup, defense=Watching())
    state = resumed(setup, tmp_path)
    train_step(setup, state, next(loader.batches(setup.split, 8, 3, 0, 1, 32)))
    assert modes == [("inner", False, False), ("outer", True, True)]
    assert not setup.model.visual.training


def test_the_probe_holds_every_class_as_equally_as_it_can(toy):
    setup = prepare(toy.recipe("tecoa", probe=PROBE), toy.data, CPU)
    labels = Counter(setup.probe_batch.labels.tolist())
    assert sorted(labels.values()) == [2, 2, 2, 3]  # 9 images of 4 classes
    assert all(key.startswith("toy/test/") for key in setup.probe_batch.keys)
    assert setup.probe_batch.keys == prepare(toy.recipe("tecoa", probe=PROBE), toy.data, CPU).probe_batch.keys
    found = probe(setup)
    assert set(found) == {"clean", "robust"}
    with torch.no_grad():
        right = setup.roles.logits("student", setup.probe_batch.images).argmax(1) == setup.probe_batch.labels
    assert found["clean"] == pytest.approx(right.float().mean().item(), abs=1e-4)
    assert found["robust"] <= found["clean"]


def test_the_probe_of_a_defense_without_adversary_or_text(toy):
    clean = prepare(toy.recipe("clean", inner=None, probe=PROBE), toy.data, CPU)
    assert set(probe(clean)) == {"clean"}
    fare = prepare(toy.recipe("fare", "anchor", probe=PROBE), toy.data, CPU)
    assert set(probe(fare)) == {"clean", "robust"}
    assert prepare(toy.recipe("fare", "anchor"), toy.data, CPU).roles.text == {}


def test_a_step_leaves_the_global_generator_alone(toy, tmp_path):
    before = torch.random.get_rng_state()
    loop.run(
        toy.recipe("mmt-ard", "robust", "clean", lora=LORA, optim={"lr": 1e-3, "steps": 1, "batch_size": 4}),
        tmp_path, toy.data, CPU, quiet,
    )  # fmt: skip
    assert torch.equal(torch.random.get_rng_state(), before)


# What a run records


def test_exposure_is_the_union_of_all_parents_and_the_data(whole):
    card = checkpoint_card.read_card(whole["mmt-ard"])
    assert card.trained_on == ("captions", "clean-images", "robust-images", "toy")
    assert checkpoint_card.read_card(whole["tecoa"]).trained_on == ("captions", "toy")


def test_parents_are_recorded_with_role_and_fingerprint(world, whole):
    card = checkpoint_card.read_card(whole["mmt-ard"])
    folders = {"student": world.student, "robust": world.robust, "clean": world.clean}
    assert {parent.role for parent in card.parents} == set(folders)
    for parent in card.parents:
        known = zoo.load(folders[parent.role]).card
        assert (parent.model, parent.sha256, parent.trained_on) == (
            known.name,
            known.sha256,
            known.trained_on,
        )
    assert card.defense == "mmt-ard"
    assert card.text_from == world.student
    assert card.training["images"] == 48
    assert card.recipe["defense"] == PAPER


def test_exposure_is_unknown_when_that_of_a_parent_is(toy, tmp_path):
    table = toy.table("single-teacher", "robust", optim={"lr": 1e-3, "steps": 1, "batch_size": 4})
    table["teachers"]["robust"] = "vlmrob-tiny:random"
    loop.run(reader.parse(table, Recipe, "a test"), tmp_path, toy.data, CPU, quiet)
    card = checkpoint_card.read_card(tmp_path)
    assert card.trained_on is None
    assert {parent.role: parent.trained_on for parent in card.parents} == {
        "student": ("captions",),
        "robust": None,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_folder_is_a_model(whole, kind):
    found = zoo.load(str(whole[kind]))
    assert found.card.name == "toy-run"
    assert torch.isfinite(found.model(torch.rand(2, 3, 32, 32))).all()


# What a run refuses


def refused(toy, tmp_path, monkeypatch, capsys, *arguments, table=None):
    """The one line and the exit code of `vlmrob train RECIPE ...`."""
    recipe = [str(write_recipe(tmp_path, table))] if table else []
    where = ["--data-root", str(toy.data), "--device", "cpu"]
    command = ["vlmrob", "--include", str(toy.cards), "train", *recipe, *map(str, arguments), *where]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert not said.out
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert said.err.splitlines()[-1] == line
    assert "Traceback" not in said.err
    return line


def test_a_folder_of_another_recipe_is_refused(toy, whole, tmp_path, monkeypatch, capsys):
    table = toy.table("tecoa", seed=99)
    before = {path: path.stat().st_mtime_ns for path in whole["tecoa"].rglob("*")}
    line = refused(toy, tmp_path, monkeypatch, capsys, "--out", whole["tecoa"], table=table)
    assert "a run of another recipe is in it" in line
    assert "choose another folder" in line
    assert {path: path.stat().st_mtime_ns for path in whole["tecoa"].rglob("*")} == before


def test_a_folder_with_a_foreign_checkpoint_is_refused(toy, tmp_path, monkeypatch, capsys):
    line = refused(toy, tmp_path, monkeypatch, capsys, "--out", toy.robust, table=toy.table("tecoa"))
    assert "a checkpoint that this recipe did not make is in it" in line


REFUSED = {
    "unknown key": (
        ("tecoa",), {"optim": {"lr": 1e-3, "step": 6, "batch_size": 8}},
        "unknown key 'optim.step'; did you mean 'steps'",
    ),
    "unknown defense": (("mmt-ardd", "robust", "clean"), {}, "did you mean 'mmt-ard'"),
    "unknown field": (("tecoa",), {"defense": {"name": "tecoa", "gama": 1}}, "unknown key 'gama' for tecoa"),
    "no defense name": (("tecoa",), {"defense": {"gamma": 1}}, "defense has no name"),
    "a missing role": (("mmt-ard", "robust"), {}, "exactly ['clean', 'robust'], the roles of mmt-ard"),
    "a role too many": (("tecoa", "robust"), {}, "exactly none, the roles of tecoa"),
    "another role": (("single-teacher", "clean"), {}, "exactly ['robust'], the roles of single-teacher"),
    "inner for clean": (("clean",), {}, "an [inner] table that would go unread"),
    "no inner": (("tecoa",), {"inner": None}, "no [inner] table"),
    "eps": (("tecoa",), {"inner": {**INNER, "eps": "1.5"}}, "eps '1.5'"),
    "infinity": (
        ("tecoa",), {"optim": {"lr": 1.0, "steps": 1, "batch_size": 1, "grad_clip": math.inf}},
        "optim.grad_clip: inf; expected a finite number",
    ),
    "nan": (("tecoa",), {"optim": {"lr": "nan", "steps": 1, "batch_size": 1}}, "finite number"),
    "unknown dataset": (("tecoa",), {"data": {"dataset": "toys"}}, "did you mean 'toy'"),
    "unknown split": (("tecoa",), {"data": {"dataset": "toy", "split": "trian"}}, "no split 'trian'"),
    "unknown model": (("tecoa",), {"student": "tinny"}, "model 'tinny'"),
    "lora targets": (("tecoa",), {"lora": {"targets": ["mlp"]}}, "leave [lora] out"),
    "a class": (("tests.none:Nothing",), {}, "so Python would import 'tests.none'"),
    "no dataclass": (("collections:OrderedDict",), {}, "so Python would import 'collections'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_recipe_that_cannot_be_run_is_one_line_and_claims_no_folder(
    toy, tmp_path, monkeypatch, capsys, case
):
    (defense, *roles), changes, expected = REFUSED[case]
    line = refused(
        toy,
        tmp_path,
        monkeypatch,
        capsys,
        "--out",
        tmp_path / "out",
        table=toy.table(defense, *roles, **changes),
    )
    assert expected in line
    assert not (tmp_path / "out").exists()


def test_a_dry_run_refuses_what_the_run_would_refuse(toy, whole, tmp_path):
    folder = whole["tecoa"]
    (line,) = run.dry_run(toy.recipe("tecoa"), folder, toy.data)
    assert "finished already" in line
    with pytest.raises(InputError, match=r"not empty; expected an empty folder with --no-resume"):
        run.dry_run(toy.recipe("tecoa"), folder, toy.data, resume=False)
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"whatever")
    for student, words in (
        (str(weights), r"weights.pt: its architecture is not in the file; .*vlmrob convert .*weights.pt"),
        ("ViT-B-32", r"'ViT-B-32': an architecture without weights; expected ARCH:TAG"),
    ):
        recipe = toy.recipe("tecoa", student=student)
        with pytest.raises(WeightsError, match=words):
            run.dry_run(recipe, tmp_path / "out", toy.data)
        with pytest.raises(WeightsError, match=words.partition(";")[0]):
            prepare(recipe, toy.data, CPU)


def test_infinity_in_a_defense_is_refused_before_a_fingerprint_is_taken(toy, tmp_path):
    path = write_recipe(tmp_path, toy.table("tecoa", defense={"name": "tecoa", "x": math.inf}))
    with pytest.raises(InputError, match=r"defense\.x: inf; expected a finite number"):
        reader.read("recipes", str(path), Recipe)


def test_an_unknown_defense_on_the_command_line_is_given_its_near_name(toy, tmp_path, monkeypatch, capsys):
    assert "did you mean 'mmt-ard'" in refused(toy, tmp_path, monkeypatch, capsys, "mmt-ardd")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("optim.lr", "no '='"), ("optim.lrr=1", "did you mean 'lr'"), ("name.x=1", "is not a table")],
)
def test_a_setting_that_cannot_be_read_is_one_line(toy, tmp_path, monkeypatch, capsys, setting, expected):
    line = refused(toy, tmp_path, monkeypatch, capsys, "--set", setting, table=toy.table("tecoa"))
    assert expected in line


def test_settings_override_the_file_and_are_recorded(toy, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, toy.table("tecoa"))
    settings = ["optim.steps=1", "optim.warmup=0", "inner.eps=8/255", "seed=5", "lora.r=2", "probe.every=1"]
    command = ["vlmrob", "--include", str(toy.cards), "train", str(recipe), "--out", str(tmp_path / "out")]
    command += [part for setting in settings for part in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", [*command, "--data-root", str(toy.data), "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, None)
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out'}\n"
    made = store.read_json(tmp_path / "out" / "recipe.json")
    assert (made["optim"]["steps"], made["seed"], made["inner"]["eps"]) == (1, 5, "8/255")
    assert (made["lora"]["r"], made["probe"]["every"]) == (2, 1)
    assert checkpoint_card.read_card(tmp_path / "out").recipe["inner"]["eps"] == "8/255"
    assert steps_of(tmp_path / "out") == [1]


# Numbers that are not finite


@dataclass(frozen=True)
class Breaking(Defense):
    """TeCoA that goes wrong on purpose; found by recipes as `test_train:Breaking`."""

    where: str = "part"

    def inner(self, roles, batch, targets):
        factor = math.nan if self.where == "inner" else 1.0
        return lambda adv: factor * roles.logits("student", adv)[:, 0]

    def outer(self, roles, step):
        loss = roles.logits("student", step.adv).mean()
        if self.where == "total":
            return Terms(loss / 0, {"fine": loss.detach()})
        if self.where == "gradient":  # a finite loss whose gradient is not
            return Terms((loss * 0).abs().sqrt(), {"fine": loss.detach()})
        return Terms(loss, {"fine": loss.detach(), "odd": loss.detach() * math.nan})


def test_a_line_about_validation_images_names_the_radius():
    """Of a radius that grows the last one, at which the probe attacks."""
    said = []
    made = reader.read("recipes", "tiny-mmt-ard", Recipe)
    report = run.reporting(made, lambda *_: None, said.append)
    report({"step": 5, "probe": {"clean": 0.5, "robust": 0.25}})
    found = "clean 50.00 %, robust 25.00 % on validation images (robust at linf 6/255)"
    clean = run.reporting(made.model_copy(update={"inner": None}), lambda *_: None, said.append)
    clean({"step": 5, "probe": {"clean": 0.5}})
    alone = "clean 50.00 % on validation images"
    assert said == [f"tiny-mmt-ard, step 5: {one}" for one in (found, alone)]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("part", r"step 0: term 'odd' is nan; images toy/train/s\d+, toy/train/s\d+, toy/train/s\d+, \.\.\."),
        ("total", r"step 0: term 'total' is -?inf; images toy/train/s\d+"),
        ("gradient", r"step 0: the gradient is not finite; first image toy/train/s\d+"),
        (
            "inner",
            r"step 0: the gradient of the inner maximisation is not finite; first image toy/train/s\d+",
        ),
    ],
)
def test_a_number_that_is_not_finite_names_step_term_and_images(toy, tmp_path, where, expected):
    recipe = toy.recipe("tecoa", defense={"name": "test_train:Breaking", "where": where})
    with pytest.raises(TrainingError, match=expected) as error:
        loop.run(recipe, tmp_path, toy.data, CPU, quiet)
    assert error.value.exit_code == 1
    assert not (tmp_path / "card.json").exists()


def test_a_copy_of_a_model_in_two_roles_is_not_the_student(toy, tmp_path):
    """The anchor of FARE is usually the student's own start: it must stay there."""
    recipe = toy.recipe("fare", "anchor", optim={"lr": 1e-2, "steps": 3, "batch_size": 8})
    setup = prepare(recipe, toy.data, CPU)
    assert setup.teachers["anchor"].card.sha256 == setup.student.card.sha256
    before = twin(setup.model)
    state = resumed(setup, tmp_path)
    for batch in loader.batches(setup.split, 8, 3, 0, 2, 32):
        train_step(setup, state, batch)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(setup.teachers["anchor"].model(x), before(x))
        assert not torch.equal(setup.model(x), before(x))
