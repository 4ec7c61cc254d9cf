"""What several commands share: options, the device, the tiny world and the tables of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustbench_vlm import console
from robustbench_vlm.errors import InputError


def use_cards_of(root: Path) -> Path:
    """The data root as typed; datasets that were exported to it are known from here on."""
    from robustbench_vlm.cards import reader

    reader.use_cards_of(root)
    return root


DataRoot = Annotated[
    Path,
    typer.Option("--data-root", help="Folder of the datasets.", envvar="VLMROB_DATA", callback=use_cards_of),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, mps (not tested) or auto: CUDA if there is one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Engine = Annotated[str, typer.Option(help="native, or an attack package: autoattack or torchattacks.")]
BatchSize = Annotated[
    str,
    typer.Option(
        "--batch-size",
        metavar="N|auto",
        help="Most images in a call of the attacked model; auto: as many as there are and as are fast.",
    ),
]
Results = Annotated[Path, typer.Option("--results", help="Folder of the results.")]


def batch_size_of(typed: str) -> int | None:
    """The number of images that was typed; None for `auto`.

    Raises:
        InputError: neither `auto` nor a number of images.
    """
    from robustbench_vlm.cards.attack import MOST_ROWS

    if typed == "auto":
        return None
    if not typed.isascii() or not typed.isdigit() or not 1 <= int(typed) <= MOST_ROWS:
        raise InputError("--batch-size", repr(typed), f"auto, or a number of images from 1 to {MOST_ROWS}")
    return int(typed)


def comma_separated(typed: list[str] | None) -> tuple[str, ...]:
    """The names of a repeatable option that also takes several names with commas between them.

    What is the name of a file or folder is one name, whatever is in it.
    """
    parts = ([text] if Path(text).exists() else text.split(",") for text in typed or ())
    return tuple(name.strip() for names in parts for name in names if name.strip())


def device_of(name: str) -> Any:  # noqa: ANN401 - torch.device, not imported here
    """The device of that name."""
    from robustbench_vlm import devices

    return devices.choose_device(name)


def require_tiny(names: list[str], root: Path) -> None:
    """Render the datasets of the tiny world that are asked for and not there yet."""
    from robustbench_vlm.data.tiny import write

    with console.meter() as meter:
        made = write.make_missing(root, meter, names)
    if made:
        console.remark(f"rendered the tiny world into {root}")


def print_grids(rows: Any) -> None:  # noqa: ANN401 - a DataFrame, not imported here
    """The tables of some leaderboard rows, why two of them are apart, and what their flags say."""
    from robustbench_vlm.results import flags, grids

    for title, grid in grids.grids(rows):  # datasets go down: there are many of them, and few models
        body = [[str(name), *[str(entry) for entry in grid[name]]] for name in grid.columns]
        columns = ["dataset", *map(str, grid.index)]
        console.show(f"{title}: clean / robust [95 % interval of robust], %", columns, body)
    for line in grids.ladder_notes(rows):
        console.remark(f"note: {line}")
    for line in flags.legend(rows, "failed"):
        console.remark(f"! {line}")
    for line in flags.legend(rows, "fact"):
        console.remark(f"note: {line}")


def print_json(rows: Any) -> None:  # noqa: ANN401 - a DataFrame, not imported here
    """Some leaderboard rows as JSON, numbers as numbers and empty entries as null."""
    from robustbench_vlm.results import columns

    console.result_json([columns.typed(row) for row in rows.to_dict("records")])
