"""Signals: a stopped training saves its state, says where it goes on, and ends as if it never stopped."""

import signal

import pytest
import torch

from robustbench_vlm import interruption, store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.errors import Incomplete, InputError
from robustbench_vlm.training import loop

CPU = torch.device("cpu")


def send_at(step, *numbers):
    """A report that sends signals to this process once a step is logged."""

    def report(line):
        if line["step"] == step and "loss" in line:
            for number in numbers:
                signal.raise_signal(number)

    return report


def quiet(line):
    pass


def lines(folder):
    found = store.records(folder / "log.jsonl")
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in found]


def files(folder):
    """Contents by name, without the log, whose lines state a speed."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("log"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def recipe(toy):
    return reader.parse(toy.table("tecoa", checkpoint_every=0), Recipe, "a test")


@pytest.fixture
def whole(toy, recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    loop.run(recipe, folder, toy.data, CPU, quiet)
    return folder


@pytest.mark.parametrize("number", interruption.SIGNALS, ids=lambda number: number.name)
def test_a_stopped_training_goes_on_at_its_step_and_ends_with_the_same_bytes(
    toy, recipe, whole, tmp_path, number
):
    before, steps, remarks = signal.getsignal(number), recipe.optim.steps, []
    with pytest.raises(Incomplete) as stopped:
        loop.run(recipe, tmp_path, toy.data, CPU, send_at(2, number))
    assert stopped.value.exit_code == 75
    assert f"stopped after step 2 of {steps}, which is saved" in str(stopped.value)
    assert "it goes on at step 2" in str(stopped.value)
    assert signal.getsignal(number) is before
    loop.run(recipe, tmp_path, toy.data, CPU, quiet, remark=remarks.append)
    assert any(remark.startswith("training") and "going on at step 2" in remark for remark in remarks)
    assert files(tmp_path) == files(whole)  # the checkpoint of the stop is gone
    assert lines(tmp_path) == lines(whole)
    assert not list(tmp_path.glob("log-*"))  # every line of it is still valid


def test_where_nothing_is_saved_the_message_says_so_and_the_log_stays(toy, recipe, whole, tmp_path):
    with pytest.raises(Incomplete, match=r"nothing is saved; .* it goes on at step 0"):  # a second signal
        loop.run(recipe, tmp_path, toy.data, CPU, send_at(3, signal.SIGINT, signal.SIGINT))
    log, remarks = (tmp_path / "log.jsonl").read_bytes(), []
    loop.run(recipe, tmp_path, toy.data, CPU, quiet, remark=remarks.append)
    assert any(
        "training begins at step 0; the log of the earlier run is now log-1.jsonl" in r for r in remarks
    )
    assert (tmp_path / "log-1.jsonl").read_bytes() == log
    assert lines(tmp_path) == lines(whole)


def test_lines_after_the_last_checkpoint_stay_in_a_second_log(toy, tmp_path):
    recipe = reader.parse(toy.table("tecoa", checkpoint_every=2), Recipe, "a test")
    with pytest.raises(Incomplete, match=r"the last saved step is 2; .* goes on at step 2"):
        loop.run(recipe, tmp_path, toy.data, CPU, send_at(3, signal.SIGTERM, signal.SIGTERM))
    log = (tmp_path / "log.jsonl").read_bytes()
    loop.run(recipe, tmp_path, toy.data, CPU, quiet)
    assert (tmp_path / "log-1.jsonl").read_bytes() == log


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with interruption.deferred() as stopping:
            signal.raise_signal(signal.SIGTERM)
            assert not stopping()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_changed_recipe_names_its_keys(toy, recipe, whole):
    other = reader.parse(toy.table("tecoa", checkpoint_every=0, seed=99), Recipe, "a test")
    with pytest.raises(InputError, match=rf"with seed = {recipe.seed} \(now 99\); expected the recipe"):
        loop.run(other, whole, toy.data, CPU, quiet)


def test_differences_of_recipes():
    earlier = {"fingerprint": "a", "inner": {"eps": "4/255", "steps": 3}, "lora": None}
    now = {"inner": {"eps": "2/255", "steps": 3}, "lora": {"r": 4}}
    assert loop.differences(earlier, now) == [
        "inner.eps = 4/255 (now 2/255)",
        "lora = nothing (now {'r': 4})",
    ]
