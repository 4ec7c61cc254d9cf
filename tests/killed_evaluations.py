"""Evaluations that are disturbed, as calls and as commands, and a reader of what they leave behind."""

import json
import multiprocessing
import os
import signal
import sys

import pytest
import toys
from safetensors.torch import load_file

from robustbench_vlm.models.clip import Classifier

forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # from Python 3.12 on


def evaluate(what, request, calls, counted=None):
    """Evaluate, and kill this process in the middle of model call number `calls`."""
    forward, left = Classifier.forward, [calls]

    def counting(self, images):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if counted is not None:
            counted.value += 1
        return forward(self, images)

    Classifier.forward = counting
    toys.run(what, request)


def killed(what, request, calls, counted=None):
    """Evaluate in a child process; returns whether it was killed, False if it ended before that call."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=evaluate, args=(what, request, calls, counted))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def outcome(results):
    """Contents of a result folder by file name; ledger lines are sorted, since they come in any order."""
    found = {}
    for path in sorted(results.rglob("*")):
        name = path.relative_to(results).as_posix()
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            assert len({line["key"] for line in lines}) == len(lines)
            found[name] = sorted(lines, key=lambda line: line["key"])
        elif path.suffix == ".json":
            found[name] = {key: part for key, part in json.loads(path.read_text()).items() if key != "run"}
        elif path.suffix == ".safetensors":
            found[name] = {key: image.tolist() for key, image in load_file(path).items()}
        elif path.suffix == ".parquet":
            found[name] = path.read_bytes()
    return found


def write_place(root, queries):
    """Data, cards and a model for the `command` that evaluates them; `queries` are those of Square."""
    card = toys.dataset_card()
    toys.write(card, root / "data")
    toys.save_model(root / "model")
    chain = toys.chain("aa", "ce", "square")
    square = chain.stage[1].model_copy(update={"queries": queries})
    chain = chain.model_copy(update={"stage": (chain.stage[0], square)})
    toys.write_include(root / "cards", [card], [chain], eps=["2/255", "4/255"])
    return root


def words(root, out):
    """What a user types behind `vlmrob`."""
    typed = f"--include {root / 'cards'} eval --model {root / 'model'} --attack aa --suite toys"
    return [*typed.split(), "--data-root", str(root / "data"), "--out", str(out), "--device", "cpu"]


def command(root, out):
    """The same as a process."""
    return [sys.executable, "-m", "robustbench_vlm", *words(root, out)]


def lines(out):
    """Number of complete lines of all ledgers."""
    return sum(path.read_bytes().count(b"\n") for path in (out / "ledger").rglob("*.jsonl"))
