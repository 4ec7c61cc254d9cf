"""The share of a batch: for every defense, parts and processes give the steps of the whole batch."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import shared_steps
import torch
from shared_steps import CASES, CPU, TRAINED, build, case_id, compared, setup_of
from torch import nn
from torch.nn import functional
from worlds import INNER

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.recipe import Optim
from robustbench_vlm.data import loader
from robustbench_vlm.defenses.interface import Defense, Terms
from robustbench_vlm.devices import choose_device
from robustbench_vlm.errors import CardError, InputError, TrainingError
from robustbench_vlm.training import dropout, exchange, share
from robustbench_vlm.training.prepare import prepare
from robustbench_vlm.training.share import Parted, Share
from robustbench_vlm.training.world import ALONE, World, launched, require_divisible

CLOSE = 2e-6  # of values of size 1; the rounding of sums in another order
IDS = [case_id(case) for case in CASES]


def torchrun(processes, *words, **environment):
    """The command that starts several processes, and its environment."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*command, "--nproc-per-node", str(processes), *map(str, words)], env


@pytest.fixture(scope="module")
def setups(world):
    reader.include([world.cards])
    yield {trained: setup_of(world, trained) for trained in TRAINED}
    reader.include([])


@pytest.fixture(scope="module")
def in_two_processes(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "found.json"
    made = json.dumps({field.name: str(getattr(world, field.name)) for field in dataclasses.fields(world)})
    command, env = torchrun(2, Path(shared_steps.__file__), made, out)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def assert_same(found):
    assert found["moved"] > 1e-4  # else nothing was compared
    assert found["weights"] < 2e-3 * found["moved"] + 3e-7
    assert found["carry"] < CLOSE
    for whole, shared in zip(*found["lines"], strict=True):
        assert shared == pytest.approx(whole, rel=1e-3, abs=5e-5)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_two_processes_take_the_steps_of_one(in_two_processes, case):
    assert_same(in_two_processes[case_id(case)])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_parts_take_the_steps_of_the_whole_batch(setups, case):
    trained, name, fields = case
    assert_same(compared(setups[trained], build(name, fields), parts=4))


def test_the_cases_have_statistics_that_are_carried_and_weights_of_every_kind(in_two_processes):
    carried = {name for found in in_two_processes.values() for name in found["carried"]}
    assert {"robust", "clean", "i2t", "t2i", "weight", "first", "temperature"} <= carried


def test_a_mean_over_the_rows_of_one_process_would_be_seen(setups):
    """The comparison can fail: half of the rows alone do not give the step of all of them."""

    @dataclasses.dataclass(frozen=True)
    class OfHalf(Defense):
        def inner(self, roles, batch, targets):
            return build("tecoa", {}).inner(roles, batch, targets)

        def outer(self, roles, step):
            terms = build("tecoa", {}).outer(roles, step)
            rows = len(step.adv) if len(step.adv) < len(step.batch.labels) else 4
            logits = roles.logits("student", step.adv)[:rows]
            loss = functional.cross_entropy(logits, step.batch.labels[:rows])
            return Terms(loss, terms.parts)

    whole, _, _ = shared_steps.steps(setups["tower"], build("tecoa", {}), ALONE)
    half, _, _ = shared_steps.steps(setups["tower"], OfHalf(), ALONE)
    assert shared_steps.furthest(whole, half) > 100 * CLOSE


# Dropout


@pytest.mark.parametrize("blocks", [1, 2])
def test_dropout_of_some_rows_is_that_of_the_whole_batch(blocks):
    x = torch.ones(blocks * 6, 5, 7)
    with dropout.keyed("a", CPU):
        whole = functional.dropout(functional.dropout(x, 0.25), 0.5)
    for first, count in ((0, 2), (2, 2), (4, 2), (0, 3), (3, 3), (0, 6)):
        own = x[: blocks * count]
        with dropout.keyed("a", CPU), dropout.of_rows(6, first, count, drawn=True):
            found = nn.Dropout(0.5)(nn.Dropout(0.25)(own))
        wanted = whole.view(blocks, 6, 5, 7)[:, first : first + count].reshape(own.shape)
        assert torch.equal(found, wanted)
        assert 0 < (found == 0).float().mean() < 1


def test_dropout_off_and_in_eval_mode_draws_nothing():
    x = torch.ones(2, 3)
    with dropout.of_rows(4, 0, 2, drawn=True):
        before = torch.get_rng_state()
        assert nn.Dropout(0.5).eval()(x) is x
        assert nn.Dropout(0.0)(x) is x
        assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_whose_first_axis_is_not_the_image_is_refused():
    with (
        dropout.of_rows(8, 0, 4, drawn=True),
        pytest.raises(TrainingError, match="of 17 rows where 4 images"),
    ):
        functional.dropout(torch.ones(17, 4, 3), 0.5)


# What is refused


def test_a_batch_that_cannot_be_cut_is_refused_in_one_line(toy):
    recipe = toy.recipe("tecoa", optim={"lr": 1e-3, "steps": 1, "batch_size": 8, "accumulate": 2})
    require_divisible(recipe, World(0, 4))
    with pytest.raises(
        CardError, match="batch_size = 8 for 3 processes with accumulate = 2; expected a multiple of 6"
    ):
        require_divisible(recipe, World(0, 3))


class RandomTokens(nn.Module):
    """Adds noise that is drawn for the images of the call, as patch dropout and stochastic depth do."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual

    def forward(self, images):
        rows = self.visual(images)
        return rows + torch.randn(rows.shape) if self.training else rows


def test_students_whose_rows_depend_on_each_other_are_refused_for_shares_alone(toy):
    setup = prepare(toy.recipe("tecoa"), toy.data, CPU)
    parts = toy.recipe("tecoa", optim={"lr": 1e-3, "steps": 1, "batch_size": 8, "accumulate": 2})
    assert share.of(parts, setup.model, ALONE) == Share(ALONE, 2, drops=False)
    for module, found in (
        (nn.Sequential(setup.model.visual, nn.BatchNorm1d(64)), "has batch norms"),
        (RandomTokens(setup.model.visual), "has random layers"),
    ):
        student = setup.model.replaced(visual=module)
        assert share.of(setup.recipe, student, ALONE).whole
        for recipe, world in ((parts, ALONE), (setup.recipe, World(1, 2))):
            with pytest.raises(CardError, match=found) as error:
                share.of(recipe, student, world)
            assert "\n" not in str(error.value)


def test_compiled_dropout_is_refused(toy):
    changes = {"lora": {"r": 2}, "compute": {"compile": True}}
    setup = prepare(toy.recipe("tecoa", lora={"r": 2}), toy.data, CPU)
    with pytest.raises(CardError, match="compile with dropout"):
        share.of(toy.recipe("tecoa", **changes), setup.model, World(0, 2))


def test_images_of_another_number_are_refused_by_the_encoder_of_a_share(toy):
    setup = prepare(toy.recipe("tecoa"), toy.data, CPU)
    encoder = Parted(setup.model, Share(parts=2), 4)
    assert encoder(torch.zeros(8, 3, 32, 32)).shape == (8, 64)
    with pytest.raises(TrainingError, match="got 6 images in `outer`"):
        encoder(torch.zeros(6, 3, 32, 32))


def test_parts_store_the_activations_of_one_part():
    """The forward keeps nothing but the images, and the backward computes one part after the other."""
    rows, kept = [], []

    class Counted(nn.Module):
        image_size, logit_scale, rows_apart = 4, 1.0, True

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(48, 5)

        def forward(self, images):
            rows.append(len(images))
            return self.linear(images.flatten(1)).exp()

    def pack(tensor):
        kept.append(tensor)
        return tensor

    model, x = Counted(), torch.rand(8, 3, 4, 4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = Parted(model, Share(parts=4), 8)(x)
    assert rows == [2, 2, 2, 2]
    assert not any(t.shape[-1] == 5 for t in kept)
    found.sum().backward()
    assert rows == [2] * 8
    gradient = model.linear.weight.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(model.linear.weight.grad, gradient)


# The processes


def variables(**changes):
    found = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "here", "MASTER_PORT": "1"} | changes
    return {name: value for name, value in found.items() if value is not None}


def test_what_a_launcher_says():
    assert launched({}) == ALONE
    assert launched(variables(MASTER_ADDR=None)) == ALONE  # as a batch system sets a rank for other purposes
    assert launched(variables()) == World(1, 4, 1, 4)
    assert launched(variables(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")) == World(1, 4, 0, 1)
    assert launched(variables(TORCHELASTIC_RESTART_COUNT="2")).attempt == 2
    assert not launched(variables()).first
    with pytest.raises(InputError, match="RANK: 'x'; expected a number"):
        launched(variables(RANK="x"))
    with pytest.raises(InputError, match="process 4 of 4"):
        launched(variables(RANK="4"))


def test_rows_of_processes_and_parts_cover_the_batch_in_order(toy):
    split = prepare(toy.recipe("tecoa"), toy.data, CPU).split
    (whole,) = loader.batches(split, 8, 3, 1, 2, 32)
    keys = []
    for rank in range(2):
        own = Share(World(rank, 2), 2)
        (batch,) = loader.batches(split, 8, 3, 1, 2, 32, own.rows(8))
        parts = own.split(batch)
        assert [len(part.images) for part in parts] == [2, 2]
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images[own.rows(8)])
        keys += [key for part in parts for key in part.keys]
    assert tuple(keys) == whole.keys


def test_a_device_of_several_processes():
    assert choose_device("cpu", 1) == CPU
    assert choose_device("auto", 1).type in ("cpu", "cuda")
    with pytest.raises(InputError, match="--device cuda:0: several processes cannot share it"):
        choose_device("cuda:0", 1)


def test_one_process_exchanges_nothing():
    rows = torch.ones(2, 3)
    assert exchange.all_rows(rows, 1, ALONE) is rows
    assert [exchange.any_of(flag, ALONE) for flag in (True, False)] == [True, False]
    exchange.average([rows], ALONE)
    exchange.wait(ALONE)
    assert torch.equal(rows, torch.ones(2, 3))


def test_accumulate_is_left_out_of_recipes_that_do_not_use_it():
    assert "accumulate" not in Optim(lr=1, steps=1, batch_size=1).model_dump()
    assert Optim(lr=1, steps=1, batch_size=1, accumulate=2).model_dump()["accumulate"] == 2
    assert INNER  # the attack of the cases above
