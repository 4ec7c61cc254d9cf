"""The verbs about datasets on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustbench_vlm import cards, console
from robustbench_vlm.cli.options import AsJson
from robustbench_vlm.errors import CardError, nearest

BROKEN = 1

Root = Annotated[
    Path, typer.Option("--root", "--data-root", envvar="VLMROB_DATA", help="Folder of the datasets.")
]


def chosen(name: str) -> tuple[list[cards.DatasetCard], str]:
    """The datasets of a suite, or the one dataset, of that name; and the split that the suite is judged on.

    Raises:
        CardError: neither a suite nor a dataset.
    """
    if name.endswith(".toml"):
        known = "suites" if "datasets" in cards.toml(Path(name)) else "datasets"
    else:
        known = next((kind for kind in ("suites", "datasets") if name in cards.names(kind)), "")
    if known == "suites":
        suite = cards.read("suites", name, cards.Suite)
        return [cards.read("datasets", one, cards.DatasetCard) for one in suite.datasets], suite.split
    if known == "datasets":
        return [cards.read("datasets", name, cards.DatasetCard)], "test"
    names = [*cards.names("suites"), *cards.names("datasets")]
    raise CardError(f"suite or dataset {name!r}", "no such card", do=nearest(name, names))


def check(
    name: Annotated[
        str, typer.Argument(help="Suite or dataset; default: every dataset below the root.")
    ] = "",
    root: Root = Path("data"),
    split: Annotated[str, typer.Option(help="Name of the split; default: the suite's.")] = "",
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Hold datasets to their cards and manifests: shards, labels, names, counts, hashes; exit 1 if broken."""
    from dataclasses import asdict

    from robustbench_vlm.data import check as room

    wanted, usual = chosen(name) if name else (_present(root), "test")
    found = []
    with console.meter() as meter:
        for card in wanted:
            splits = [split] if split else [usual] if name else _splits(card, root)
            for one in splits:
                found.append(room.check(card, root, one, meter, decode=decode))
    for result in found:
        for note in result.notes:
            console.remark(f"note: {result.dataset}: {note}")
        for problem in result.problems:
            console.remark(f"problem: {result.dataset}: {problem}")
    if as_json:
        console.result_json([asdict(result) for result in found])
    else:
        console.show(f"datasets below {root}", [*room.COLUMNS], [result.texts for result in found])
    if any(result.problems for result in found):
        raise typer.Exit(BROKEN)


def _present(root: Path) -> list[cards.DatasetCard]:
    """Cards of the datasets whose folder is there."""
    all_cards = [cards.read("datasets", one, cards.DatasetCard) for one in cards.names("datasets")]
    return [card for card in all_cards if (root / card.folder).is_dir()]


def _splits(card: cards.DatasetCard, root: Path) -> list[str]:
    """The splits of the card that are there; `test` if none is."""
    return [split for split in card.size if (root / card.folder / split).is_dir()] or ["test"]


def make(
    suite: Annotated[str, typer.Argument(help="tiny, or a suite to make a generated miniature of.")],
    root: Root = Path("data"),
    n: Annotated[int, typer.Option(min=1, help="Images a dataset, for a miniature.")] = 16,
    per_class: Annotated[
        int | None, typer.Option(min=1, help="Images of every class instead, for a miniature.")
    ] = None,
    label_with: Annotated[
        str, typer.Option(help="Model whose own predictions become the labels of a miniature.")
    ] = "",
) -> None:
    """Make the tiny world, or a miniature of a suite with generated images in the real layout."""
    from robustbench_vlm import session

    with console.meter() as meter:
        if suite == "tiny":
            session.make_tiny(root, meter)
        else:
            session.make_miniature(suite, root, n, label_with, meter, per_class)
    console.result(str(root))
