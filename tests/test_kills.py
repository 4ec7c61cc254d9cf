"""SIGKILL at random moments: nothing that was complete is lost, and no verdict or final weight changes.

20 kills by default and 180 more with `-m slow`: of evaluations, of workers and of trainings, all in forked
processes, and of the commands that a user types. The moments are drawn by seed: after some model call, answer
or step, and a fraction of a second later, so that they fall between and into writes too.
"""

import json
import multiprocessing
import pickle
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass
from itertools import count

import command_line
import killed_evaluations
import pandas as pd
import pytest
import torch
import toys
from killed_evaluations import command, forks, lines, outcome
from test_train import PAPER, write_recipe

from robustbench_vlm import store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.evaluation import measure
from robustbench_vlm.evaluation.cluster import About, Lost
from robustbench_vlm.evaluation.pool import Pool
from robustbench_vlm.evaluation.worker import Done, Failed, Worker
from robustbench_vlm.results import verdicts
from robustbench_vlm.training import log, loop

FORK = multiprocessing.get_context("fork")
CPU = torch.device("cpu")


def with_more_when_slow(kills, seeds):
    """Seeds, and the kills of each: one seed by default, and more in the slow run."""
    rest = [pytest.param(seed, kills, marks=pytest.mark.slow) for seed in range(1, seeds)]
    return pytest.mark.parametrize(("seed", "kills"), [(0, kills), *rest])


def completed(folder):
    """What is complete in a folder: whole lines of ledgers and logs, and files by their content."""
    found = set()
    for path in folder.rglob("*"):
        if path.suffix == ".jsonl":
            found |= {line for line in path.read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"}
        elif path.is_file() and not path.name.startswith("."):
            found.add((path.relative_to(folder).as_posix(), path.read_bytes()))
    return found


def require_survival(kills, attempt, finish, folders):
    """Kill so many times; whenever a piece of work has come to its end, begin the next one.

    Args:
        kills: number of kills.
        attempt: work in a folder; whether it was killed.
        finish: the same without a kill, and the comparison with undisturbed work.
        folders: parent of the folders.
    """
    names = (folders / str(number) for number in count())
    folder, done = next(names), 0
    for _ in range(5 * kills + 5):
        if done == kills:
            break
        before = completed(folder)
        if attempt(folder):
            done += 1
        else:
            finish(folder)
            folder = next(names)
            continue
        assert before <= completed(folder), "something that was complete is gone"
    assert done == kills
    before = completed(folder)
    finish(folder)
    assert before <= completed(folder)


def killed_after(work, counted, least, seconds):
    """Run `work()` in a child, and kill it some seconds after `counted` reached `least`; was it killed?"""
    counted.value = 0
    child = FORK.Process(target=work)
    child.start()
    while counted.value < least and child.is_alive():
        time.sleep(0.0005)
    time.sleep(seconds)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


# --- evaluations -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images of a random CLIP that labels them."""
    card = toys.dataset_card()
    return toys.subject(card, toys.write(card, tmp_path_factory.mktemp("data")))


def request(results, **more):
    chain = toys.chain("aa", "ce", "t", "fab", "square")
    return toys.request(results, chain, eps=("4/255",), save_images=True, **more)


@forks
@with_more_when_slow(8, 10)
def test_evaluations(images, tmp_path, seed, kills):
    counted, draw = FORK.Value("i", 0), random.Random(seed)
    began = time.perf_counter()
    assert not killed_evaluations.killed(images, request(tmp_path / "whole", batch_size=5), 0, counted)
    calls, whole = counted.value, outcome(tmp_path / "whole")
    call = (time.perf_counter() - began) / calls
    (cell,) = [content for name, content in whole.items() if name.startswith("cells") and "json" in name]
    assert 0 < cell["outcome"]["robust"]["square"] < 12

    def attempt(folder):
        order = request(folder, batch_size=draw.choice([3, 5, 7, 12]))

        def work():
            killed_evaluations.evaluate(images, order, 0, counted)

        return killed_after(work, counted, draw.randint(1, calls // 2), draw.uniform(0, 2 * call))

    def finish(folder):
        toys.run(images, request(folder))
        assert outcome(folder) == whole

    require_survival(kills, attempt, finish, tmp_path / "torn")


# --- workers -----------------------------------------------------------------------------------------------


def serve(pipe, loaded):
    """Carry out orders that come through a pipe, in a process of its own."""
    worker = Worker("cpu", 1)
    while True:
        order, placed = pickle.loads(pipe.recv_bytes())
        for answer in worker.carry_out(order, lambda wanted, at=placed: (loaded if wanted else None, at)):
            pipe.send_bytes(pickle.dumps(answer))


class ForkedWorker:
    """A worker in a process of its own, which is killed some time after the answers with certain numbers."""

    def __init__(self, loaded, cluster):
        self.pipe, other = FORK.Pipe()
        self.process = FORK.Process(target=serve, args=(other, loaded), daemon=True)
        self.process.start()
        other.close()  # so that the end of the process is the end of the pipe
        self.cluster = cluster

    def about(self, seconds):
        return About(self.process.pid, "here", "cpu")

    def answers(self, order, references, tick):
        try:
            self.pipe.send_bytes(pickle.dumps((order, references[1] if references else None)))
            while True:
                answer = pickle.loads(self.pipe.recv_bytes())
                self.cluster.count(self)
                yield answer
                if isinstance(answer, Done | Failed):
                    return
        except (EOFError, OSError):
            raise Lost("died") from None

    def kill(self):
        self.process.kill()


@dataclass
class ForkedCluster:
    """Places for two workers; all processes are forked at the beginning, by the only thread that there is."""

    loaded: object
    moments: list[tuple[int, float]]

    def __post_init__(self):
        self.on_cpu, self.threads, self.joining = True, 1, False
        self.answered, self.lock, self.timers = 0, threading.Lock(), []
        self.ready = [ForkedWorker(self.loaded, self) for _ in range(2 + len(self.moments))]
        self.all = list(self.ready)

    def capacity(self):
        return 2

    def put(self, value):
        return value

    def start(self):
        return self.ready.pop()

    def count(self, worker):
        """Note an answer of a worker; at the numbers that were drawn, kill that worker a little later."""
        with self.lock:
            self.answered += 1
            if self.moments and self.answered >= self.moments[0][0]:
                timer = threading.Timer(self.moments.pop(0)[1], worker.kill)
                self.timers.append(timer)
                timer.start()

    def close(self):
        """End all processes."""
        for timer in self.timers:
            timer.join()
        for worker in self.all:
            worker.kill()
            worker.process.join()


def pooled(images, folder, moments):
    """Evaluate with two workers that are killed at some moments; numbers of answers, and of workers lost."""
    cluster, remarks = ForkedCluster(images.loaded, sorted(moments)), []
    pool = Pool(cluster, remarks.append)
    try:
        list(measure.evaluate(images, request(folder), lambda *_: None, lambda _: None, pool.works))
    finally:
        pool.close()
        cluster.close()
    return cluster.answered, sum("died; another one is started" in remark for remark in remarks)


@forks
@with_more_when_slow(5, 10)
def test_workers(images, tmp_path, seed, kills):
    draw, done = random.Random(seed), 0
    answers, lost = pooled(images, tmp_path / "whole", [])
    assert lost == 0
    toys.run(images, request(tmp_path / "one"))
    whole = outcome(tmp_path / "one")
    assert outcome(tmp_path / "whole") == whole
    for number in range(3 * kills):
        left = min(kills - done, 3)  # fewer than may be lost with the same image
        moments = [(draw.randint(1, answers // 2), draw.uniform(0, 0.02)) for _ in range(left)]
        done += pooled(images, tmp_path / str(number), moments)[1]
        assert outcome(tmp_path / str(number)) == whole
        if done == kills:
            break
    assert done == kills


# --- trainings ---------------------------------------------------------------------------------------------


def trained(folder):
    """Content of a folder of a training by name, the log without times; what a kill set aside is left out."""
    found = {}
    for path in folder.rglob("*"):
        if path.name == log.NAME:
            lines = [{k: v for k, v in line.items() if k not in log.TIMES} for line in store.records(path)]
            found[path.name] = lines
        elif path.is_file() and path.name[0] != "." and not path.name.startswith("log-"):
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


@forks
@with_more_when_slow(4, 15)
def test_trainings(toy, tmp_path, seed, kills):
    """Checkpoints that a killed process wrote, and those of the process that went on, have the same bytes."""
    recipe = toy.recipe("mmt-ard", "robust", "clean", defense=PAPER, checkpoint_every=2)
    counted, draw = FORK.Value("i", 0), random.Random(seed)

    def note(line):
        counted.value += 1

    began = time.perf_counter()
    loop.run(recipe, tmp_path / "whole", toy.data, CPU, note)
    step = (time.perf_counter() - began) / 8
    whole = trained(tmp_path / "whole")
    assert {"card.json", "image.safetensors", "checkpoints/step_0000004.safetensors", log.NAME} < whole.keys()

    def attempt(folder):
        def work():
            loop.run(recipe, folder, toy.data, CPU, note)

        return killed_after(work, counted, draw.randint(0, 4), draw.uniform(0, 2 * step))

    def finish(folder):
        loop.run(recipe, folder, toy.data, CPU, lambda _: None)
        assert trained(folder) == whole

    require_survival(kills, attempt, finish, tmp_path / "torn")


# --- commands ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return killed_evaluations.write_place(tmp_path_factory.mktemp("killed"), queries=150)


def cells(out):
    found = {}
    for path in sorted((out / "cells").rglob("*.json")):
        content = json.loads(path.read_text())
        del content["run"]
        table = pd.read_parquet(path.with_suffix(".parquet"))
        found[path.relative_to(out).as_posix()] = (content, verdicts.sha256(table), table)
    return found


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory):
    """The results of the command that was never killed."""
    whole = tmp_path_factory.mktemp("whole")
    done = command_line.fork_command(killed_evaluations.words(place, whole))
    assert done.returncode == 0, done.stderr
    return whole


@forks
@with_more_when_slow(2, 3)
def test_the_command_that_evaluates(place, undisturbed, tmp_path, seed, kills):
    total, draw, known = lines(undisturbed), random.Random(seed), 0
    for _ in range(kills):
        least = known + draw.randint(1, (total - known) // 4)
        known = command_line.kill_command(command(place, tmp_path), lambda: lines(tmp_path), least)
        assert least <= known < total
    assert len(cells(tmp_path)) < 2
    done = command_line.fork_command(killed_evaluations.words(place, tmp_path))
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path) == total  # what was found before was not found again
    expected, found = cells(undisturbed), cells(tmp_path)
    assert len(expected) == 2
    assert expected.keys() == found.keys()
    for name, (content, sha, table) in expected.items():
        assert found[name][0] == content
        assert found[name][1] == sha == content["outcome"]["verdicts_sha256"]
        pd.testing.assert_frame_equal(found[name][2], table, check_exact=True)
    last = list(expected.values())[-1][2]
    assert 0 < (last.broken_at_eps != "").sum() < last.clean_correct.sum()


@forks
@with_more_when_slow(1, 4)
def test_the_command_that_trains(world, tmp_path, seed, kills):
    steps, draw = 20, random.Random(seed)  # long enough that the signal comes long before the end
    optim = {"lr": 1e-3, "steps": steps, "warmup": 2, "batch_size": 8}
    table = world.table("mmt-ard", "robust", "clean", optim=optim, defense=PAPER)
    recipe, out, whole = write_recipe(tmp_path, table), tmp_path / "out", tmp_path / "whole"
    reader.include([world.cards])
    loop.run(reader.parse(table, Recipe, "a test"), whole, world.data, CPU, lambda _: None)
    reader.include([])
    argv = [sys.executable, "-m", "robustbench_vlm", "--include", str(world.cards), "train", str(recipe)]
    argv += ["--out", str(out), "--data-root", str(world.data), "--device", "cpu"]

    def logged():
        path = out / log.NAME
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for _ in range(kills):
        command_line.kill_command(argv, logged, draw.randint(2, steps // 2))
    assert not (out / "card.json").exists()
    done = command_line.fork_command(argv[3:])
    assert done.returncode == 0, done.stderr
    assert trained(out) == trained(whole)
