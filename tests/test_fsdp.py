"""Sharded weights: the steps of one process, less memory, and files for any number of processes."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
from pathlib import Path

import fsdp_steps
import pytest
import torch
from safetensors.torch import load_file
from test_distributed import (
    NEAR,
    apart,
    assert_same_log,
    command,
    ended,
    files_of,
    in_one_process,
    plain,
    process_of,
    quiet,
    start,
    steps_of,
    wait_for_step,
)
from test_share import torchrun
from test_train import PROBE, write_recipe
from torch import nn

from robustbench_vlm.cards.recipe import Compute
from robustbench_vlm.errors import CardError
from robustbench_vlm.models import zoo
from robustbench_vlm.training import fsdp, log, loop
from robustbench_vlm.training.prepare import prepare
from robustbench_vlm.training.state import checkpoint_files, saved_step

LOG = logging.getLogger(__name__)  # docs/training-many.md quotes the figures
CPU = torch.device("cpu")
SHARDED = {"compute": {"fsdp": True}}


@pytest.fixture(scope="module")
def launched(world, tmp_path_factory):
    """What each of two processes found, by the names of cases and runs, and the folder of the runs."""
    out = tmp_path_factory.mktemp("ranks") / "found.json"
    made = json.dumps({name: str(value) for name, value in dataclasses.asdict(world).items()})
    names = (*fsdp_steps.CASES, *fsdp_steps.RUNS)
    words, env = torchrun(2, Path(fsdp_steps.__file__), made, out, *names)
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), out.parent


@pytest.fixture
def ranks(launched, case):
    """What each of two processes found of a case."""
    return [rank[case] for rank in launched[0]]


@pytest.fixture
def runs(launched, name):
    """The folders of a finished, a stopped and a continued run of two processes."""
    found, folder = launched
    finished, stopped, again = (folder / f"{name}-{end}" for end in ("finished", "stopped", "again"))
    line = (
        f"{stopped}: stopped after step 3 of 4, which is saved; type the same command again, and it goes on"
    )
    assert found[0][name] == ["finished", f"{line} at step 3", "finished"]
    assert found[1][name] == ["finished", "", "finished"]  # the first process says it for both
    return finished, stopped, again


@pytest.mark.slow
@pytest.mark.parametrize("case", fsdp_steps.CASES)
def test_two_processes_with_sharded_weights_take_the_steps_of_one(ranks, case):
    for found in ranks:
        apart, moved = found["weights"], found["moved"]
        LOG.info("%s: %.1e apart, %.1e moved", case, apart, moved)
        assert moved > 1e-4  # else nothing was compared
        assert apart < NEAR
        for whole, shared in zip(*found["lines"], strict=True):
            assert shared == pytest.approx(whole, rel=4e-3 if "bf16" in case else 1e-3, abs=5e-5)
        assert found["probes"][0] == found["probes"][1]
    assert ranks[0]["lines"][1] == ranks[1]["lines"][1]


@pytest.mark.slow
@pytest.mark.parametrize("case", fsdp_steps.CASES)
def test_a_process_has_about_half_of_weights_gradients_and_moments(ranks, case):
    for kind in ("weights", "gradients", "moments"):
        shares = [rank["sizes"][kind] for rank in ranks]
        assert all(0.45 < share < 0.55 for share in shares), (kind, shares)
        assert sum(shares) == pytest.approx(1, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("case", fsdp_steps.CASES)
def test_an_attack_gathers_weights_once_and_a_step_exchanges_gradients_once(ranks, case):
    for found in (rank["exchanges"] for rank in ranks):
        groups, attack, step = found["groups"], found["attack"], found["step"]
        assert groups > 2
        assert attack["allgather_base"] == (0 if case == "no attack" else groups)
        assert attack["reduce_scatter_base"] == 0
        in_loss = step["allgather_base"] - attack["allgather_base"]
        assert (
            in_loss == groups if "in parts" in case else in_loss >= 2 * groups - 1
        )  # all but the root twice
        trained = groups - 1 if "adapters" in case else groups  # the root has no adapters
        assert step["reduce_scatter_base"] == trained


# Files


@pytest.mark.slow
@pytest.mark.parametrize("name", fsdp_steps.RUNS)
def test_a_run_gives_the_files_of_one_process(toy, runs, tmp_path, name):
    recipe = fsdp_steps.run_recipe(toy, fsdp_steps.RUNS[name])
    whole, (shared, _, _) = tmp_path / "whole", runs
    loop.run(recipe, whole, toy.data, CPU, quiet)
    assert apart(whole, shared) < NEAR
    assert_same_log(whole, shared)
    assert files_of(whole) == files_of(shared)
    a, b = (load_file(checkpoint_files(folder)[-1]) for folder in (whole, shared))
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
    assert zoo.load(str(shared)).card.trained_on == zoo.load(str(whole)).card.trained_on


@pytest.mark.slow
@pytest.mark.parametrize("name", fsdp_steps.RUNS)
def test_a_stopped_run_goes_on_with_one_process_and_with_two(toy, runs, tmp_path, name):
    finished, stopped, again = runs
    assert saved_step(stopped) == 3
    assert steps_of(stopped) == [1, 2, 3]
    for file in files_of(finished):
        if (finished / file).is_file() and file != log.NAME:
            assert (again / file).read_bytes() == (finished / file).read_bytes(), file
    assert files_of(again) == files_of(finished)
    one = shutil.copytree(stopped, tmp_path / "one")
    loop.run(fsdp_steps.run_recipe(toy, fsdp_steps.RUNS[name]), one, toy.data, CPU, quiet)
    assert apart(one, finished) < NEAR
    assert_same_log(one, finished)


@pytest.mark.slow
def test_a_run_of_which_one_process_is_killed_goes_on(toy, tmp_path):
    """The commands as they are typed."""
    table = plain(toy, **SHARDED, probe=PROBE | {"every": 20})
    whole = in_one_process(toy, table, tmp_path / "whole")
    shared, recipe = tmp_path / "shared", write_recipe(tmp_path, table)
    process = start(command(toy, recipe, shared), tmp_path)
    wait_for_step(7, shared, process)
    os.kill(process_of(1, process.pid), signal.SIGKILL)
    code, _, err = ended(process)
    assert code == 75, err
    assert "process 1 of this training was ended by SIGKILL; type the same command again" in err
    assert "Traceback" not in err
    step = saved_step(shared)
    assert step >= 5
    code, _, err = ended(start(command(toy, recipe, shared), tmp_path))
    assert code == 0, err
    assert err.count(f"in 2 processes with sharded weights, going on at step {step}") == 1
    assert apart(whole, shared) < NEAR
    assert_same_log(whole, shared)


# What is sharded, and what is refused


def test_blocks_are_the_repeated_layers(toy):
    setup = prepare(toy.recipe("tecoa"), toy.data, CPU)
    assert fsdp.blocks(setup.model.visual) == list(setup.model.visual.transformer.resblocks)
    norms = nn.ModuleList([nn.Identity(), nn.Identity()])
    stages = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    found = fsdp.blocks(nn.ModuleDict({"a": norms, "b": stages, "c": nn.Sequential(nn.Linear(2, 2))}))
    assert found == list(stages)


def test_one_process_shards_nothing(toy):
    setup = prepare(toy.recipe("tecoa", **SHARDED), toy.data, CPU)
    assert not setup.sharded
    tensor = torch.ones(3)
    assert fsdp.whole(tensor) is tensor
    assert fsdp.part_of(tensor, tensor) is tensor
    assert fsdp.on_first({"a": tensor}, first=False) == {}
    with fsdp.gathered_once(setup.model.visual):
        assert not setup.sharded


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"compute": {"fsdp": True, "compile": True}}, "fsdp and compile do not go together"),
        ({"compute": {"fsdp": True, "channels_last": True}}, "fsdp and channels_last do not go together"),
        ({**SHARDED, "prompts": {"image": 1}}, r"\[prompts\] trains none"),
    ],
)
def test_what_does_not_go_with_sharded_weights_is_refused_with_the_recipe(toy, changes, found):
    with pytest.raises(CardError, match=found) as error:
        toy.recipe("tecoa", **changes)
    assert "\n" not in str(error.value)


def test_recipes_that_do_not_use_it_keep_their_fingerprints(toy):
    assert "fsdp" not in Compute(precision="bf16").model_dump()
    assert toy.recipe("tecoa", compute={"fsdp": False}).fingerprint == toy.recipe("tecoa").fingerprint
    assert toy.recipe("tecoa", **SHARDED).fingerprint != toy.recipe("tecoa").fingerprint
