"""Run a study: train every arm with every seed and attack each model; the same command goes on if stopped.

A run is named by the fingerprint of its recipe, so two studies with the same training share it. Each run is
done by a process of one thread: the number of processes changes the time that a study takes, never a number.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from robustbench_vlm import devices, store
from robustbench_vlm.cards import overrides, plugins, reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.cards.study import Arm, Final, Study
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import CardError, Incomplete, InputError, VlmrobError
from robustbench_vlm.evaluation import planning
from robustbench_vlm.training import loop, prepare

Remark = Callable[[str], None]


@dataclass(frozen=True)
class StudyRun:
    """One arm with one seed.

    Attributes:
        arm: name of the arm.
        seed: of the recipe.
        recipe: the arm's, with seed and probe of the study.
        folder: gets `model/` (the checkpoint), `results/` (of the final attack), `clock.jsonl` (time of each
            step) and, once nothing is left to do, a list of its result files.
    """

    arm: str
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def name(self) -> str:
        """What progress lines and errors call this run."""
        return f"{self.arm}, seed {self.seed}"

    def cells(self, final: Final) -> Path:
        """The file that lists the result files of the final attack; written last of all."""
        chain = reader.read("attacks", final.attack, AttackCard)
        attack = chain.model_dump(mode="json", exclude={"plain_pgd"})  # younger than runs on disk
        suite = reader.read("suites", final.suite, Suite).model_dump(mode="json")
        known = {"attack": attack, "suite": suite, "n": final.n}
        return self.folder / f"cells-{store.file_name(final.attack)}-{store.fingerprint(known)[:12]}.json"


@dataclass(frozen=True)
class Resources:
    """What a study is run with.

    Attributes:
        data_root: folder of the datasets.
        device: where to train and attack.
        jobs: processes at a time.
    """

    data_root: Path
    device: str = "cpu"
    jobs: int = 1


def recipe_of(study: Study, arm: Arm, seed: int) -> Recipe:
    """The recipe of one arm with one seed.

    The recipe card's notes are left out, so that a remark added there does not make another run of it.

    Raises:
        CardError: no such recipe, or a setting that it does not take.
    """
    where = f"study {study.name}, arm {arm.name}"
    file = reader.path("recipes", arm.recipe)
    table = reader.table("recipes", file)
    defense = table.get("defense")
    plugins.require_allowed(str(defense.get("name")) if isinstance(defense, dict) else "", where)
    table = overrides.override(table, [*study.set, *arm.set])
    table |= {"seed": seed, "notes": (), "probe": study.probe.model_dump(mode="json")}
    return reader.shown_card("recipes", reader.parse(table, Recipe, where), file)


def runs(study: Study, out: Path, seeds: int | None = None) -> list[StudyRun]:
    """All runs of a study, seed by seed: a study that is stopped has complete pairs of its first seeds.

    Args:
        study: the card.
        out: folder of the runs.
        seeds: number of seeds, the study's first ones; default: all.

    Raises:
        CardError: see `recipe_of`; or two arms that are one recipe.
        InputError: more seeds than the study has.
    """
    if seeds is not None and seeds > len(study.seeds):
        raise InputError(f"--seeds {seeds}", f"study {study.name} has {len(study.seeds)} seeds")
    found: dict[str, StudyRun] = {}
    for seed in study.seeds[:seeds]:
        for arm in study.arm:
            recipe = recipe_of(study, arm, seed)
            first = found.get(recipe.fingerprint)
            if first is not None:
                raise CardError(f"study {study.name}", f"arms {first.arm} and {arm.name} are one recipe")
            folder = out / f"{store.file_name(recipe.name)}-s{seed}-{recipe.fingerprint[:12]}"
            found[recipe.fingerprint] = StudyRun(arm.name, seed, recipe, folder)
    return list(found.values())


def perform(study: Study, todo: Sequence[StudyRun], resources: Resources, remark: Remark) -> None:
    """Train and attack what is not finished yet.

    Raises:
        InputError: a recipe, model or dataset that cannot be used; found before the first run starts.
        VlmrobError: a run failed; runs beside it are stopped, and the same command goes on.
        Incomplete: a worker was killed.
    """
    waiting = [run for run in todo if not run.cells(study.final).exists()]
    remark(f"study {study.name}: {len(todo)} runs, {len(todo) - len(waiting)} finished")
    check(study, waiting, resources)
    begun = time.perf_counter()
    for done, (run, seconds) in enumerate(_finish(study, waiting, resources), 1):
        left = (time.perf_counter() - begun) / done * (len(waiting) - done)
        last = f"about {left / 60:.0f} min left" if done < len(waiting) else "that was the last"
        remark(f"{run.name}: done in {seconds:.0f} s; {done} of {len(waiting)}, {last}")


def check(study: Study, todo: Sequence[StudyRun], resources: Resources) -> None:
    """Load once what every arm needs, so that what cannot be used is found before the first training.

    Raises:
        InputError: see `perform`.
    """
    device = devices.choose_device(resources.device)
    arms = {run.arm: run for run in reversed(todo)}
    for run in arms.values():
        prepare.prepare(run.recipe, resources.data_root, device)
    if arms:
        student = next(iter(arms.values())).recipe.student
        planning.require_data(
            planning.plan(_request(student, study.final, resources.data_root, Path()), device)
        )


def _request(model: str, final: Final, data_root: Path, results: Path) -> planning.EvalRequest:
    return planning.EvalRequest((model,), (final.attack,), final.suite, results, data_root, n=final.n)


def _finish(study: Study, todo: Sequence[StudyRun], resources: Resources) -> Iterator[tuple[StudyRun, float]]:
    """Do the runs, `resources.jobs` at a time; yields (run, seconds). An error stops all of them."""
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(todo))
    running: dict[int, tuple[SpawnProcess, Connection, StudyRun, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < resources.jobs:
                run = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                cards = (reader.included(), plugins.code_allowed())
                known = (run, study.final, resources, cards, sender)
                process = context.Process(target=_worker, args=known, name=run.name, daemon=True)
                process.start()
                sender.close()
                running[process.sentinel] = (process, receiver, run, time.perf_counter())
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                process, receiver, run, begun = running.pop(sentinel)
                process.join()
                _require_success(run, process.exitcode, receiver)
                yield run, time.perf_counter() - begun
    finally:
        for process, *_ in running.values():
            process.terminate()
            process.join()


def _require_success(run: StudyRun, exitcode: int | None, receiver: Connection) -> None:
    if exitcode == 0:
        return
    try:
        message = receiver.recv() if receiver.poll() else ""
    except EOFError:
        message = ""
    if message:
        raise VlmrobError(f"{run.name}: {message}")
    raise Incomplete(f"{run.name}: its process ended with {exitcode}; the same command goes on")


def _worker(
    run: StudyRun, final: Final, resources: Resources, cards: tuple[list[Path], bool], sender: Connection
) -> None:
    """What one process does; a known error is sent to the parent as its message."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C goes to the parent too, which then ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    include, allowed = cards
    reader.include(include)
    reader.use_cards_of(resources.data_root)
    plugins.allow_code(allowed)
    try:
        with _alone(run.folder):
            _train_and_attack(run, final, resources)
    except VlmrobError as error:
        sender.send(str(error))
        raise SystemExit(error.exit_code) from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # whatever is being written is whole or not there


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process works in `folder`; the system frees the lock of a killed process."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where two studies must not share a folder
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _train_and_attack(run: StudyRun, final: Final, resources: Resources) -> None:
    done = run.cells(final)
    if done.exists():
        return
    device = devices.choose_device(resources.device)
    clock: loop.Report = Clock(run.folder) if device.type == "cpu" else lambda _: None
    # a cache of its own: a run that reused teacher outputs of another would look cheaper than it is
    teacher_cache = run.folder / "teachers"
    model = loop.run(run.recipe, run.folder / "model", resources.data_root, device, clock, teacher_cache)
    request = _request(str(model), final, resources.data_root, run.folder / "results")
    paths = planning.perform(planning.require_data(planning.plan(request, device)), lambda *_: None)
    store.write_json(done, [str(path.relative_to(run.folder)) for path in paths])


class Clock:
    """Writes the processor time of every training step: `{"step": 1, "cpu": 0.24}`, without probes.

    The processor time of one thread hardly depends on what else the machine does. Steps that are repeated
    after a stop are written twice. It does not measure an accelerator, which works beside the process.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "clock.jsonl"
        self._last: float | None = None
        store.mend(self._path)

    def __call__(self, line: loop.Line) -> None:
        """Record one line of the training log."""
        now = time.process_time()
        if "loss" in line and self._last is not None:
            record: dict[str, Any] = {"step": line["step"], "cpu": round(now - self._last, 6)}
            store.append(self._path, record)
        self._last = time.process_time()
