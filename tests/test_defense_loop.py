"""Every registered defense in the loop: what a step costs, in which mode, and that a stopped run goes on."""

import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from safetensors.torch import load_file
from worlds import INNER

from robustbench_vlm import store
from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.data import loader
from robustbench_vlm.defenses.losses import in_one_forward
from robustbench_vlm.errors import InputError
from robustbench_vlm.training import log, loop
from robustbench_vlm.training.prepare import _require_same_sentences, prepare
from robustbench_vlm.training.state import initial, resumed
from robustbench_vlm.training.step import starting_images, train_step

CPU = torch.device("cpu")
NAMES = plugins.names("defenses")
K = INNER["steps"]
WITH_RECIPE = [name for name in NAMES if f"tiny-{name}" in reader.names("recipes")]
PRICED = [
    *((name, {}) for name in NAMES),
    ("ard", {"alpha": 0.5}),
    ("adaad", {"alpha": 0.5}),
    ("sim-clip", {"form": "paper"}),
    ("mmt-ard", {"weighting": "full", "consistency": 1.0}),
    ("mmt-ard", {"attack_target": "robust"}),
    ("mmt-ard", {"attack_target": "label", "robust_input": "clean"}),
    ("mmt-ard", {"weighting": "static", "clean_weight": 0, "attack_target": "robust"}),
    ("multi-teacher", {"inputs": {"robust": "privileged", "clean": "adv"}}),
]


def recipe_of(toy, name, fields=None, **changes):
    """A short recipe of any defense: its teachers, and start and mode of the attack as in its tiny recipe."""
    plugin = plugins.get("defenses", name)
    inner = INNER if plugin.adversarial else None
    known = reader.read("recipes", f"tiny-{name}", Recipe) if name in WITH_RECIPE else None
    if inner and known:
        inner = inner | {"start": known.inner.start, "mode": known.inner.mode}
    prompts = {"image": 1, "text": 1, "depth": 2} if plugin.learners else None
    table = {"defense": {"name": name, **(fields or {})}, "inner": inner, "prompts": prompts}
    return toy.recipe(name, *plugin.teachers, **(table | changes))


def prepared(toy, tmp_path, recipe):
    setup = prepare(recipe, toy.data, CPU)
    return setup, resumed(setup, tmp_path)


def first_batch(setup, size=8):
    return next(loader.batches(setup.split, size, 3, 0, 1, 32))


def watched(setup):
    """A list that fills with (role, training, graph, image) for every batch's worth of a tower's forward."""
    seen = []
    models = {"student": setup.model} | {role: made.model for role, made in setup.teachers.items()}
    for role, model in models.items():

        def note(module, args, role=role):
            worth = len(args[0]) // setup.recipe.optim.batch_size  # x and x' may share a forward
            seen.extend([(role, module.training, torch.is_grad_enabled(), args[0].requires_grad)] * worth)

        model.visual.register_forward_pre_hook(note)
    return seen


@pytest.mark.parametrize(("name", "fields"), PRICED, ids=str)
def test_a_step_costs_what_its_defense_says_and_runs_in_the_recipes_mode(toy, tmp_path, name, fields):
    defense = plugins.build("defenses", name, fields, "a test")
    recipe = recipe_of(toy, name, fields, teachers=toy.teachers(*defense.teachers))
    setup, state = prepared(toy, tmp_path, recipe)
    seen = watched(setup)
    train_step(setup, state, first_batch(setup))
    passes = setup.defense.passes()
    if passes is None:
        pytest.skip(f"{name} does not state its passes")
    steps = K if setup.defense.adversarial else 0
    expected = Counter({"student": passes.student + passes.student_no_grad + steps})
    expected += Counter(passes.teachers)
    expected += Counter(dict.fromkeys(passes.attacked, steps))
    assert Counter(role for role, *_ in seen) == expected
    attacked = Counter(role for role, _, _, image in seen if image)
    assert attacked == Counter({role: steps for role in ("student", *passes.attacked) if steps})
    with_graph = Counter(role for role, _, graph, image in seen if graph and not image)
    assert with_graph == Counter({"student": passes.student}) + Counter(dict.fromkeys(passes.learners, 1))
    assert Counter(role for role, _, graph, _ in seen if not graph)["student"] == passes.student_no_grad
    students = [(training, graph, image) for role, training, graph, image in seen if role == "student"]
    assert all(training == (recipe.inner.mode == "train") for training, _, image in students if image)
    assert all(training == graph for training, graph, image in students if not image)
    assert not any(training for role, training, *_ in seen if role != "student")
    assert not any(part.training for part in setup.model.modules())


def test_modes_are_those_of_the_sources():
    """As published: the TeCoA family, ARD and IAD attack in train mode, all others in eval mode."""
    modes = {}
    for name in WITH_RECIPE:
        inner = reader.read("recipes", f"tiny-{name}", Recipe).inner
        modes[name] = (inner.start, inner.mode) if inner else None
    train_mode = {name for name, mode in modes.items() if mode and mode[1] == "train"}
    assert train_mode == {"pmg-aft", "tga-zsr", "ard", "iad"}
    gaussian = {"rslad", "adaad", "mtard", "b-mtard", "trades", "mart"}
    assert {n for n, m in modes.items() if m and m[0] == "gaussian"} == gaussian
    assert {n for n, m in modes.items() if m is None} == {"clean", "ammkd"}
    paper = reader.read("recipes", "paper-tecoa-original", Recipe).inner
    assert (paper.start, paper.mode) == ("uniform", "train")


def with_batch_norm(setup):
    """The same run with a small residual network as its student's image tower."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        tower = ModifiedResNet([1, 1, 1, 1], 64, heads=4, image_size=32, width=8)
    setup.student.model.visual = tower.eval()
    return setup


@pytest.mark.parametrize(("mode", "updates"), [("eval", 2), ("train", 2 + K)])
def test_batch_norms_count_the_attack_in_train_mode_only(toy, tmp_path, mode, updates):
    recipe = toy.recipe("mmt-ard", "robust", "clean", inner={**INNER, "mode": mode})
    setup = with_batch_norm(prepare(recipe, toy.data, CPU))
    state = resumed(setup, tmp_path)
    before = setup.model.visual.bn1.running_mean.clone()
    train_step(setup, state, first_batch(setup))
    assert setup.model.visual.bn1.num_batches_tracked.item() == updates
    assert not torch.equal(setup.model.visual.bn1.running_mean, before)
    assert not setup.model.visual.bn1.training


def tracked(setup):
    """Running means of a first step's two forwards by hand: fresh statistics, then each batch by a tenth."""
    kept, tower = [], setup.model.visual
    tower.conv1.register_forward_hook(
        lambda module, args, out: kept.append(out.detach().mean((0, 2, 3)) if tower.training else None)
    )
    return kept


@pytest.mark.parametrize("name", ["mmt-ard", "single-teacher", "rslad"])
def test_batch_norms_see_clean_and_adversarial_images_in_the_order_of_the_release(toy, tmp_path, name):
    """x and then x' for MMT-ARD and its baseline; x' and then x for RSLAD."""
    teachers = plugins.get("defenses", name).teachers
    setup = with_batch_norm(prepare(toy.recipe(name, *teachers), toy.data, CPU))
    state, seen, adv = resumed(setup, tmp_path), [], []
    object.__setattr__(setup, "defense", Spy(setup.defense, adv))
    before = setup.model.visual.bn1.running_mean.clone()
    means = tracked(setup)
    note = setup.model.visual.register_forward_pre_hook(
        lambda module, args: (
            seen.append((args[0].detach().clone(), torch.is_grad_enabled())) if module.training else None
        )
    )
    batch = first_batch(setup)
    train_step(setup, state, batch)
    note.remove()
    pair = [batch.images, adv[0]] if name != "rslad" else [adv[0], batch.images]
    assert len(seen) == 2
    for (images, _), expected in zip(seen, pair, strict=True):
        torch.testing.assert_close(images, (expected - setup.model.mean) / setup.model.std)
    assert [graph for _, graph in seen] == [name != "single-teacher", True]
    first, second = [mean for mean in means if mean is not None]
    expected = 0.9 * (0.9 * before + 0.1 * first) + 0.1 * second
    torch.testing.assert_close(setup.model.visual.bn1.running_mean, expected)


def attacked_with(toy, mode, dropout):
    """The adversarial images of a first step, with adapters that matter."""
    lora = {"r": 4, "alpha": 400, "dropout": dropout}
    setup = prepare(toy.recipe("tecoa", inner={**INNER, "mode": mode}, lora=lora), toy.data, CPU)
    with torch.no_grad():
        for name, parameter in setup.parameters().items():
            if "lora_B" in name:
                parameter.fill_(0.05)
    kept = []
    object.__setattr__(setup, "defense", Spy(setup.defense, kept))
    torch.rand(3)  # the global generator moves on; nothing may depend on it
    train_step(setup, initial(setup), first_batch(setup))
    return kept[0]


def test_dropout_is_on_in_the_attack_in_train_mode_only_and_keyed(toy):
    assert torch.equal(attacked_with(toy, "eval", 0.5), attacked_with(toy, "eval", 0.0))
    assert not torch.equal(attacked_with(toy, "train", 0.5), attacked_with(toy, "train", 0.0))
    assert torch.equal(attacked_with(toy, "train", 0.5), attacked_with(toy, "train", 0.5))


class Spy:
    """A defense that keeps the adversarial images it is given."""

    def __init__(self, defense, kept):
        self.defense, self.kept = defense, kept

    def __getattr__(self, name):
        return getattr(self.defense, name)

    def outer(self, roles, step):
        self.kept.append(step.adv)
        return self.defense.outer(roles, step)


def test_starts_are_where_the_recipe_says(toy):
    images = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    names = ["a", "b", "c"]

    def start(how):
        inner = toy.recipe("tecoa", inner={**INNER, "start": how}).inner
        return starting_images(inner, inner.threat, images, names)

    eps = 4 / 255
    inside, outside, near = start("uniform"), start("unclipped"), start("gaussian")
    assert inside.min() >= 0
    assert inside.max() <= 1
    assert outside.min() < 0
    assert outside.max() > 1
    torch.testing.assert_close(outside.clamp(0, 1), inside)
    assert ((outside - images).abs().amax((1, 2, 3)) > 0.9 * eps).all()
    assert (near - images).std().item() == pytest.approx(0.001, rel=0.1)
    images, names = images[1:2], names[1:2]
    assert torch.equal(near[1:2], start("gaussian"))


def test_the_radius_grows_with_the_steps_and_with_nothing_else(toy, tmp_path):
    """From 2/255 to 6/255 over half of eight steps: 2, 3, 4, 5, 6, 6, ... and in the box of each step."""
    growing = {**INNER, "eps": "6/255", "steps": 4, "eps_start": "2/255", "eps_growth": 0.5}
    recipe = toy.recipe("tecoa", inner=growing, optim={"lr": 1e-3, "steps": 8, "batch_size": 8})
    radii = [recipe.inner.threat_at(Fraction(step, 8)).eps * 255 for step in range(8)]
    assert radii == [2, 3, 4, 5, 6, 6, 6, 6]
    setup, state = prepared(toy, tmp_path, recipe)
    adv, batch = [], first_batch(setup)
    object.__setattr__(setup, "defense", Spy(setup.defense, adv))
    for _ in range(8):
        train_step(setup, state, batch)
    found = [255 * (images - batch.images).abs().max().item() for images in adv]
    assert found == pytest.approx([float(radius) for radius in radii], abs=1e-3)
    assert recipe.inner.described == "linf 6/255, grown from 2/255"
    assert str(recipe.inner.threat) == toy.recipe("tecoa", inner={**INNER, "eps": "6"}).inner.described


@pytest.mark.parametrize(("more", "message"), [
    ({"eps_growth": 0.5}, "eps_growth = 0.5 goes with eps_start"),
    ({"eps_start": "1/255", "eps_growth": 0}, "inner.eps_growth = 0; expected greater than 0"),
])  # fmt: skip
def test_a_growth_of_the_radius_that_makes_no_sense_is_refused(toy, more, message):
    with pytest.raises(InputError, match=message):
        toy.recipe("tecoa", inner={**INNER, **more})


def test_sgd_is_the_rule_with_momentum(toy, tmp_path):
    """w <- w - lr v, v <- 0.9 v + g, over two steps, from the gradients themselves."""
    optim = {"algorithm": "sgd", "lr": 0.1, "weight_decay": 0.0, "steps": 2, "batch_size": 8}
    setup, state = prepared(toy, tmp_path, toy.recipe("clean", inner=None, optim=optim))
    weight, name = setup.model.visual.proj, "student.proj"
    assert name in setup.parameters()
    velocity, rates = torch.zeros_like(weight), [0.1, 0.05]
    for step in range(2):
        before = weight.detach().clone()
        line = train_step(setup, state, first_batch(setup))
        assert line["lr"] == pytest.approx(rates[step])
        velocity = 0.9 * velocity + weight.grad
        torch.testing.assert_close(weight.detach(), before - rates[step] * velocity)


class Stopped(Exception):  # noqa: N818 - not an error: the run is stopped on purpose
    pass


def stop_after(step):
    def report(line):
        if line["step"] == step and "loss" in line:
            raise Stopped

    return report


CARRIES = [name for name in NAMES if name in ("mtard", "b-mtard", "apd")]
RESUMED = [*((name, {}) for name in CARRIES), ("mmt-ard", {"weighting": "full"}), ("ard", {})]
RESUMED += [
    ("multi-teacher", {}),
    ("mmt-ard", {"weighting": "paper", "gap": "robust", "clean_weight_end": 50.0}),
]
RESUMED = [(name, fields, {}) for name, fields in RESUMED]
RESUMED += [("tecoa", {}, {"channels_last": True, "fused_adamw": True})]


@pytest.mark.parametrize(("name", "fields", "compute"), RESUMED, ids=str)
def test_running_state_is_saved_and_resumed_to_the_bit(toy, tmp_path, name, fields, compute):
    sgd = {"algorithm": "sgd"} if name == "ard" else {}
    optim = {"lr": 1e-2, "steps": 4, "warmup": 1, "batch_size": 8, **sgd}
    recipe = recipe_of(toy, name, fields, optim=optim, compute=compute, checkpoint_every=1)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    loop.run(recipe, whole, toy.data, CPU, lambda line: None)
    for step in (2, 3):
        with pytest.raises(Stopped):
            loop.run(recipe, torn, toy.data, CPU, stop_after(step))
    loop.run(recipe, torn, toy.data, CPU, lambda line: None)
    for file in ("image.safetensors", "card.json"):
        assert (torn / file).read_bytes() == (whole / file).read_bytes(), file
    a, b = (load_file(folder / "checkpoints" / "step_0000004.safetensors") for folder in (whole, torn))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    kept = {"ard": "optim.0.momentum_buffer", "apd": "prompts.clean.text.", "tecoa": "optim.0.exp_avg"}
    kept = kept.get(name, "carry.")
    assert any(key.startswith(kept) for key in a)
    lines = [
        [{k: v for k, v in line.items() if k not in log.TIMES} for line in store.records(f / "log.jsonl")]
        for f in (whole, torn)
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 4


def test_carries_change_from_step_to_step(toy, tmp_path):
    """What the test above resumes is no constant."""
    for name in ("mtard", "b-mtard"):
        setup, state = prepared(toy, tmp_path, recipe_of(toy, name))
        weights = []
        for batch in loader.batches(setup.split, 8, 3, 0, 3, 32):
            train_step(setup, state, batch)
            weights.append(state.carry["weight"])
        assert not torch.equal(weights[0], weights[2])


# Patch tokens


def test_patch_tokens_begin_with_the_embedding_and_share_its_projection(toy, tmp_path):
    setup, _ = prepared(toy, tmp_path, toy.recipe("tecoa"))
    model, x = setup.model, torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = model.tokens(x)
        model.visual.output_tokens = True
        pooled, patches = model.visual((x - model.mean) / model.std)
        model.visual.output_tokens = False
        assert rows.shape == (3, 17, 64)
        torch.testing.assert_close(rows[:, 0], model(x))
        torch.testing.assert_close(rows[:, 0], pooled)
        torch.testing.assert_close(rows[:, 1:], patches @ model.visual.proj)
    assert not model.visual.transformer._forward_hooks


def test_a_tower_without_a_class_token_is_refused_by_tga_zsr_in_one_line(toy, tmp_path):
    setup = with_batch_norm(prepare(recipe_of(toy, "tga-zsr"), toy.data, CPU))
    with pytest.raises(InputError, match="patch tokens: vlmrob-tiny has no class token") as error:
        setup.defense.require(setup.roles)
    assert "\n" not in str(error.value)


# Teachers of other sentences


def trained_teacher(toy, folder, template):
    recipe = toy.recipe(
        "clean", inner=None, optim={"lr": 1e-3, "steps": 1, "batch_size": 4},
        data={"dataset": "toy", "template": template},
    )  # fmt: skip
    return str(loop.run(recipe, folder, toy.data, CPU, lambda line: None))


def test_a_teacher_of_other_sentences_is_refused_in_one_line(toy, tmp_path):
    teacher = trained_teacher(toy, tmp_path / "teacher", "a {c} picture")
    table = toy.table("single-teacher", "robust") | {"teachers": {"robust": teacher}}
    recipe = reader.parse(table, Recipe, "a test")
    with pytest.raises(InputError, match=r"trained with the sentences 'a \{c\} picture'") as e:
        loop.run(recipe, tmp_path / "out", toy.data, CPU, lambda line: None)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()
    same = table | {"data": {"dataset": "toy", "template": "a {c} picture"}}
    prepare(reader.parse(same, Recipe, "a test"), toy.data, CPU)


CODE_OF_A_CARD = ({"name": "this:x"}, {"name": "nobody"}, {}, [], None)


@pytest.mark.parametrize("defense", CODE_OF_A_CARD, ids=str)
def test_the_card_of_a_teacher_runs_no_code_and_needs_no_defense(toy, tmp_path, defense):
    """Whoever trained it with a defense that is not known here may have used its sentences."""
    sys.modules.pop("this", None)
    setup = prepare(toy.recipe("single-teacher", "robust"), toy.data, CPU)
    made = {"data": {"dataset": "toy", "template": "a {c} picture"}, "defense": defense}
    teacher = setup.teachers["robust"]
    teacher = replace(teacher, card=teacher.card.model_copy(update={"recipe": made}))
    with pytest.raises(InputError, match=r"trained with the sentences 'a \{c\} picture'"):
        _require_same_sentences("robust", teacher, setup.recipe)
    assert "this" not in sys.modules
    no_text = {**made, "defense": {"name": "fare"}}
    teacher = replace(teacher, card=teacher.card.model_copy(update={"recipe": no_text}))
    _require_same_sentences("robust", teacher, setup.recipe)


def test_clean_and_adversarial_images_share_a_forward_unless_rows_see_each_other(toy, tmp_path):
    setup, _ = prepared(toy, tmp_path, toy.recipe("tecoa"))
    rows = []
    setup.model.visual.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    one, other = torch.rand(3, 3, 32, 32), torch.rand(5, 3, 32, 32)
    apart = [setup.model(one), setup.model(other)]
    joined = in_one_forward(setup.model, setup.model, one, other)
    assert rows == [3, 5, 8]
    for a, b in zip(apart, joined, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    model = with_batch_norm(setup).model
    model.visual.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    in_one_forward(model, model, one, other)
    model.visual.train()
    in_one_forward(model, model, one, other)
    assert rows[3:] == [8, 3, 5]
