"""`vlmrob train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustbench_vlm import console
from robustbench_vlm.cards import reader
from robustbench_vlm.cli.options import DataRoot, Device, place, require_tiny
from robustbench_vlm.errors import InputError
from robustbench_vlm.training.resolve import resolve


def train(
    recipe: Annotated[str, typer.Argument(help="A defense (mmt-ard), a recipe name, or a TOML file.")],
    recipe_option: Annotated[
        str | None, typer.Option("--recipe", help="Recipe or TOML file to train the defense with.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, e.g. optim.steps=100.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Checkpoint folder; default runs/<recipe>-<hash>.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on in a folder that was started before.")] = True,
    cache: Annotated[
        bool,
        typer.Option(help="Store outputs of frozen teachers on clean images; changes the time and no bit."),
    ] = True,
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
) -> None:
    """Train a defense into a checkpoint folder; the same command goes on after an interruption."""
    chosen = resolve(recipe, recipe_option or "", settings or [], console.remark)
    folder = out or Path("runs") / f"{chosen.name}-{chosen.fingerprint[:8]}"
    if not resume and folder.exists() and any(folder.iterdir()):
        raise InputError(
            f"--out {folder}", "not empty", "an empty folder with --no-resume", "choose another one"
        )
    if (folder / "card.json").exists() and (folder / "recipe.json").exists():
        console.remark(f"{folder} is finished already; held against the recipe, nothing is trained again")
    from robustbench_vlm.training import loop, teacher_cache

    where = place(device)
    judged = reader.suites_with(chosen.data.dataset)
    require_tiny([chosen.data.dataset], data_root)
    threat = chosen.inner.threat if chosen.inner else "no adversary"
    console.remark(f"training {chosen.name}: {chosen.optim.steps} steps, {threat}, on {where}, into {folder}")
    total = chosen.optim.steps
    with console.meter() as meter:

        def report(line: Any) -> None:  # noqa: ANN401 - a JSON line of the log
            if "probe" in line:
                console.remark(f"step {line['step']}: probe {line['probe']}")
            else:
                meter(chosen.name, line["step"], total, f"loss {line['loss']:.4f}")

        kept = teacher_cache.folder() if cache else None
        loop.run(chosen, folder, data_root, where, report, kept, console.remark)
    console.result(str(folder))
    told = "" if data_root == Path("data") else f" --data-root {data_root}"
    target = f"--suite {judged[0]}" if judged else f"--dataset {chosen.data.dataset}"
    line = f"vlmrob eval --model {folder} --attack autoattack {target}{told}"
    console.remark(f"next: {line}{reader.as_typed()}")
