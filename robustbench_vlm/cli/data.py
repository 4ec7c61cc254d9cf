"""`vlmrob data`: datasets on disk."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from robustbench_vlm import console, store
from robustbench_vlm.cards import overrides, reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.cli.images import columns_of, lines_of
from robustbench_vlm.cli.options import AsJson, use_cards_of
from robustbench_vlm.errors import CardError, DataError, InputError, nearest
from robustbench_vlm.types import TEMPLATES

if TYPE_CHECKING:
    from robustbench_vlm.data.check import Checked

BROKEN = 1

Root = Annotated[
    Path,
    typer.Option(
        *("--root", "--data-root"),
        envvar="VLMROB_DATA",
        help="Folder of the datasets.",
        callback=use_cards_of,
    ),
]


def chosen(name: str) -> tuple[list[DatasetCard], str]:
    """The datasets of a suite, or a single dataset, by name; and the split to evaluate on.

    Raises:
        CardError: neither a suite nor a dataset.
    """
    if name.endswith(".toml"):
        known = "suites" if "datasets" in reader.toml(Path(name)) else "datasets"
    else:
        known = next((kind for kind in ("suites", "datasets") if reader.has(kind, name)), "")
    if known == "suites":
        suite = reader.read("suites", name, Suite)
        return [reader.read("datasets", member, DatasetCard) for member in suite.datasets], suite.split
    if known == "datasets":
        return [reader.read("datasets", name, DatasetCard)], "test"
    names = [*reader.names("suites"), *reader.names("datasets")]
    raise CardError(f"suite or dataset {name!r}", "no such card", do=nearest(name, names))


def fetch(
    name: Annotated[str, typer.Argument(help="Suite or dataset.")],
    root: Root = Path("data"),
    mirror: Annotated[
        str, typer.Option(help="Address of a hub mirror; default: HF_ENDPOINT, or the hub.")
    ] = "",
    offline: Annotated[bool, typer.Option("--offline", help="Use no network; list what is missing.")] = False,
    split: Annotated[str, typer.Option(help="Name of the split; default: the suite's.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print licences and sizes, and stop.")] = False,
) -> None:
    """Download datasets from the hub at pinned commits, and verify them.

    Licences and sizes are printed first. An interrupted download continues when the command is repeated.
    """
    from robustbench_vlm.data import check, dataset, fetch, hub

    wanted, usual = chosen(name)
    split = split or usual
    lacking = dataset.missing(wanted, root, split)
    if offline and lacking:
        do = "fetch them without --offline\n  " + "\n  ".join(lacking)
        raise DataError(f"--offline, {name}", f"{len(lacking)} datasets are not below {root}", do=do)
    parcels, by_hand = [], []
    if not offline:
        where = hub.site(mirror)
        for card in wanted:
            if not card.source.hub:
                by_hand += dataset.missing([card], root, split)
            elif not _fetched(card, root, split):
                parcels.append(fetch.plan(card, root, split, where))
        console.show("to fetch", [*fetch.COLUMNS], [parcel.texts for parcel in parcels])
        for parcel in parcels:
            if not parcel.pinned:
                console.remark(
                    f"note: {parcel.card.name}: the card names no commit, so the newest one is fetched"
                )
        fetch.require_space(parcels, root)
    if dry_run:
        return
    with console.meter() as meter:
        for parcel in parcels:
            fetch.fetch(parcel, root, where, meter)
    with console.meter() as meter:
        there = [card for card in wanted if not dataset.missing([card], root, split)]
        results = [check.check(card, root, split, meter) for card in there]
    broken = _print_checks(results, root, as_json=False)
    for line in by_hand:
        console.remark(f"problem: not on the hub: {line}")
    if broken or by_hand:
        raise typer.Exit(BROKEN)


def _fetched(card: DatasetCard, root: Path, split: str) -> bool:
    """Whether a fetch of that very commit has been finished there; its files are checked anyway."""
    from robustbench_vlm.data import fetch, manifest

    known = manifest.read(root / card.folder)
    wanted = card.source.revision or (known.revision if known else "")
    return bool(known and known.revision == wanted and fetch.present(card, root, split))


def check(
    name: Annotated[
        str, typer.Argument(help="Suite or dataset; default: every dataset below the root.")
    ] = "",
    root: Root = Path("data"),
    split: Annotated[str, typer.Option(help="Name of the split; default: the suite's.")] = "",
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check datasets against their cards and manifests: shards, labels, names, counts, hashes.

    Exits with 1 if anything is broken.
    """
    from robustbench_vlm.data import check

    wanted, usual = chosen(name) if name else (_present(root), "test")
    found = []
    with console.meter() as meter:
        for card in wanted:
            splits = [split] if split else [usual] if name else _splits(card, root)
            for part in splits:
                found.append(check.check(card, root, part, meter, decode=decode))
    if _print_checks(found, root, as_json=as_json):
        raise typer.Exit(BROKEN)


def _print_checks(found: list[Checked], root: Path, *, as_json: bool) -> bool:
    """Print what checks found; whether anything is broken."""
    from dataclasses import asdict

    from robustbench_vlm.data.check import COLUMNS

    for result in found:
        for note in result.notes:
            console.remark(f"note: {result.dataset}: {note}")
        for problem in result.problems:
            console.remark(f"problem: {result.dataset}: {problem}")
    if as_json:
        console.result_json([asdict(result) for result in found])
    else:
        console.show(f"datasets below {root}", [*COLUMNS], [result.texts for result in found])
    return any(result.problems for result in found)


def _present(root: Path) -> list[DatasetCard]:
    """Cards of the datasets whose folder is there."""
    all_cards = [reader.read("datasets", name, DatasetCard) for name in reader.names("datasets")]
    return [card for card in all_cards if (root / card.folder).is_dir()]


def _splits(card: DatasetCard, root: Path) -> list[str]:
    """The splits of the card that are there; `test` if none is."""
    return [split for split in card.size if (root / card.folder / split).is_dir()] or ["test"]


def export(
    source: Annotated[
        str,
        typer.Argument(
            help="Class folders, a .csv, .jsonl or .parquet of images and labels, or torchvision:X."
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="Data root to write to.", callback=use_cards_of)] = Path(
        "data"
    ),
    name: Annotated[
        str, typer.Option(help="Name of the dataset; that of a card takes the card's class names.")
    ] = "",
    split: Annotated[
        str, typer.Option(help="Which split to read and write; default: the one for testing.")
    ] = "",
    names: Annotated[Path | None, typer.Option(help="Text file with the class names, one a line.")] = None,
    columns: Annotated[
        str, typer.Option(help="Of a table: image=NAME,label=NAME; default: the usual names.")
    ] = "",
    source_root: Annotated[
        Path | None, typer.Option(help="Root folder that torchvision reads; default: data.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Argument of the torchvision class, e.g. split=test.")
    ] = None,
) -> None:
    """Export images to the clip-benchmark layout; keys, labels and bytes stay what they were."""
    import re

    from robustbench_vlm.data import export, layout, sources, torchvision_images

    name = name or Path(source.rpartition(":")[2]).stem.lower()
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,60}", name) or store.file_name(name) != name:
        raise CardError(f"--name {name}", "not a name", "small letters, digits, - and _")
    known = reader.read("datasets", name, DatasetCard) if reader.has("datasets", name) else None
    given = lines_of("--names", names) if names else known.names if known else ()
    others = known.other_names if known and not names else {}
    of_torchvision = source.startswith("torchvision:")
    unused = {"columns": columns} if of_torchvision else {"set": settings, "source-root": source_root}
    for flag in [flag for flag, value in unused.items() if value]:
        used = "a table" if of_torchvision else "torchvision:X"
        raise InputError(f"--{flag}", f"{source!r:.200} beside it", used, f"leave out --{flag}")
    if of_torchvision:
        arguments = overrides.override({}, settings or [])
        kind = source.partition(":")[2]
        found = torchvision_images.from_torchvision(
            kind, source_root or Path("data"), arguments, given, split, others, ordered=names is not None
        )
    else:
        found = sources.open_images(Path(source), given, split, *columns_of(columns), other_names=others)
    split = split or found.split
    classes = given or found.names
    if not classes:
        raise DataError(source, "no class names", "one a class", "give them with --names FILE")
    templates = known.templates if known else TEMPLATES
    with console.meter() as meter:
        target = to / (known.folder if known else f"wds_{name}")
        finished = layout.is_finished(target, split)
        folder = export.export(found, target, split, classes, templates, meter)
    if finished:
        console.remark(f"note: {target / split} is there already, with the same images; nothing was written")
    for note in (*sources.summary(found, classes), *found.notes):
        console.remark(f"note: {note}")
    console.result(str(folder))
    own = reader.path("datasets", name) if known else to / "cards" / "datasets" / f"{name}.toml"
    if known is None:
        cards = export.write_cards(to, name, split, classes, found.count)
        console.remark(
            f"note: its cards are in {cards}; commands with --data-root {quote(str(to))} find them"
        )
    if own.parents[1] != reader.home() and split not in reader.toml(own).get("size", {}):
        console.remark(f"note: the card of {name} counts no {split}: add {split} = {found.count} to its size")
    place = f"--root {quote(str(to))} --split {quote(split)}"
    console.remark(f"next: vlmrob{reader.as_typed()} data check {name} {place}")


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
    from robustbench_vlm.data.tiny import write
    from robustbench_vlm.demo.datasets import make_miniature

    with console.meter() as meter:
        if suite == "tiny":
            write.make_missing(root, meter)
        else:
            make_miniature(suite, root, n, label_with, meter, per_class)
    console.result(str(root))
