"""`vlmrob convert`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from robustbench_vlm import console
from robustbench_vlm.errors import InputError


def convert(  # noqa: PLR0913 - one parameter a flag
    source: Annotated[Path, typer.Argument(help="Weights file, or folder of transformers.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    arch: Annotated[
        str, typer.Option(help="What a weights file was made from, e.g. ViT-L-14:openai or local-dir:DIR.")
    ] = "",
    card: Annotated[
        str, typer.Option(help="Public checkpoint that it is (see list models): gives base, defense, data.")
    ] = "",
    name: Annotated[str, typer.Option(help="Name in tables; default: of the folder.")] = "",
    defense: Annotated[
        str, typer.Option(help="How the model was made robust, e.g. FARE; default: unknown.")
    ] = "",
    trained_on: Annotated[
        str, typer.Option(help="Datasets seen, e.g. imagenet,unknown; default: nothing is known.")
    ] = "",
    max_memory: Annotated[int, typer.Option(min=1, help="GiB of address space for reading.")] = 4,
    max_seconds: Annotated[int, typer.Option(min=1, help="Seconds of processor for reading.")] = 300,
) -> None:
    """Turn weights of another program into a checkpoint folder: safetensors, card and canary.

    A pickle is read as data in a process of its own with limits on memory and time: nothing that it names is
    imported or run, and everything but tensors and plain tables is refused.
    """
    from robustbench_vlm.models import convert, model_ids

    if not card and not arch and not model_ids.is_transformers(source):
        found = "neither --arch nor --card"
        raise InputError(f"convert {source}", found, "the model that the weights were made from")
    typed = {"--arch": arch, "--name": name, "--defense": defense, "--trained-on": trained_on}
    if card and (both := [option for option, value in typed.items() if value]):
        raise InputError(f"--card {card}", f"{', '.join(both)} too, which its card states", do="leave it out")
    if card:
        known = convert.listed(card)
    else:
        known = convert.unlisted(
            name or out.resolve().name, arch, defense or "unknown", tuple(filter(None, trained_on.split(",")))
        )
    made = convert.convert(source, out, known, {"memory": max_memory * 2**30, "seconds": max_seconds})
    console.result(str(out))
    console.remark(f"{made.training['scheme']}, {made.arch}, fingerprint {made.sha256[:12]}")
    if made.training["left_out"]:
        console.remark(f"left out: {', '.join(made.training['left_out'])}")
    console.remark(f"next: vlmrob eval --model {shlex.quote(str(out))} --attack autoattack --suite zeroshot")
