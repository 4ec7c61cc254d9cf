"""`vlmrob show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustbench_vlm import console
from robustbench_vlm.cli import image
from robustbench_vlm.cli.options import DataRoot, Results
from robustbench_vlm.errors import InputError


def show(
    what: Annotated[
        str,
        typer.Argument(
            help="defense, attack, suite, dataset, model, recipe, protocol, prompts, study, run or image."
        ),
    ],
    name: Annotated[
        str,
        typer.Argument(
            help="Its name; a run: its folder; an image: its result, a JSON file or digits of cell_sha256."
        ),
    ],
    key: Annotated[str, typer.Argument(help="Of an image: its key, or the end of it after a /.")] = "",
    results: Results = Path("results"),
    out: Annotated[Path, typer.Option(help="Of an image: folder of the PNG files.")] = Path("images"),
    data_root: DataRoot = Path("data"),
) -> None:
    """Print all facts about a defense, attack, suite, dataset, model, recipe or study, as JSON.

    Of a run, print how far the training is, how fast, and which share of the time it waited for images.

    Of an image that an attack broke, and that eval --save-adversarial or --save-evidence kept, write PNG
    files: the adversarial image and, where the dataset is on this machine, the clean one and the change.
    """
    if (what == "image") != bool(key):
        found = "no key" if what == "image" else f"{key!r} after the name"
        do = "type vlmrob show image RESULT KEY, or vlmrob show KIND NAME"
        raise InputError(f"show {what}", found, "a key after image RESULT, and after nothing else", do)
    if what == "image":
        image.show(name, key, results, out, data_root)
        return
    if what == "run":
        from robustbench_vlm.training.summary import summary

        console.result_json(summary(Path(name)))
        return
    from robustbench_vlm import catalogue

    console.result_json(catalogue.details(what, name))
