"""`vlmrob train`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from robustbench_vlm import console
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.cli.options import DataRoot, Device
from robustbench_vlm.errors import InputError
from robustbench_vlm.training.folder import folder_of, refuse_other_runs
from robustbench_vlm.training.resolve import resolve
from robustbench_vlm.training.world import World, launched, require_divisible


def _launched(recipe: Recipe, folder: Path, data_root: Path, processes: int, *, resume: bool) -> int:
    """Start the processes of a training that can begin, and return their exit code when they have ended."""
    from robustbench_vlm.training import inputs

    require_divisible(recipe, World(size=processes))
    inputs.require(recipe, data_root)
    refuse_other_runs(folder, recipe, resume=resume)
    from robustbench_vlm.training.launch import launch

    return launch(processes, sys.argv[1:])


def train(  # noqa: PLR0913 - one parameter a flag
    recipe: Annotated[str, typer.Argument(help="A defense (mmt-ard), a recipe name, or a TOML file.")],
    recipe_option: Annotated[
        str | None, typer.Option("--recipe", help="Recipe or TOML file to train the defense with.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, e.g. optim.steps=100.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Checkpoint folder; default runs/<recipe>-<hash>.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue in a folder of an interrupted training.")] = True,
    cache: Annotated[
        bool,
        typer.Option(help="Store outputs of frozen teachers on clean images; changes the time and no bit."),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained and what is missing, and stop.")
    ] = False,
    nproc: Annotated[
        int, typer.Option(min=1, help="Processes on this machine that train together, one a GPU.")
    ] = 1,
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
) -> None:
    """Train a defense, and write a checkpoint folder.

    An interrupted training continues when the command is repeated. On several machines, start it by torchrun.
    """
    world = launched()
    if nproc not in (1, world.size) and world.size > 1:
        raise InputError(
            f"--nproc {nproc}", f"torchrun started {world.size} processes", do="leave --nproc out"
        )
    starting = nproc > world.size and not dry_run
    console.quiet = console.quiet or starting or not world.first
    chosen = resolve(recipe, recipe_option or "", settings or [], console.remark)
    folder = out or folder_of(chosen)
    if starting:
        raise typer.Exit(_launched(chosen, folder, data_root, nproc, resume=resume))
    from robustbench_vlm.training import run

    if dry_run:
        processes = World(size=max(nproc, world.size))
        for text in run.dry_run(chosen, folder, data_root, processes, resume=resume):
            console.result(text)
        return
    with console.meter() as meter:
        run.run_recipe(chosen, folder, data_root, device, meter, console.remark, resume=resume, cache=cache)
    if not world.first:
        return
    console.result(str(folder))
    suites = reader.suites_with(chosen.data.dataset)
    target = ["--suite", suites[0]] if suites else ["--dataset", chosen.data.dataset]
    root = [] if data_root == Path("data") else ["--data-root", str(data_root)]
    words = ["vlmrob", "eval", "--model", str(folder), "--attack", "autoattack", *target, *root]
    line = shlex.join(words)
    console.remark(f"next: {line}{reader.as_typed()}")
