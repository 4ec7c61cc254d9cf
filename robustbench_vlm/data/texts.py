"""The text files of a dataset's folder: class names and templates, compared with those of its card."""

from __future__ import annotations

from pathlib import Path

from robustbench_vlm import text_files
from robustbench_vlm.cards.dataset import DatasetCard, lines_sha256
from robustbench_vlm.data.class_names import plain
from robustbench_vlm.errors import DataError


def check(card: DatasetCard, folder: Path, *, required: bool) -> list[str]:
    """Notes on the folder's text files; its class names must be those of the card.

    Raises:
        DataError: other class names, another kind of dataset, or no text.
    """
    kind = _lines(folder / "dataset_type.txt")
    if kind and kind[0] not in ("", "classification"):
        raise DataError(str(folder / "dataset_type.txt"), f"{kind[0]!r:.80}", "classification")
    notes: list[str] = []
    names = _lines(folder / "classnames.txt")
    if names is None and required:
        where = str(folder / "classnames.txt")
        raise DataError(where, "no such file", f"the {card.n_classes} class names", "fetch it again")
    if names is not None and card.names_from == "card":
        notes = _same_names(card, folder / "classnames.txt", names)
    templates = _lines(folder / "zeroshot_classification_templates.txt")
    if templates is None:
        return [*notes, "no templates file; the card's templates are used"] if required else notes
    if [line for line in templates if line] != list(card.templates):
        notes.append("the folder's templates differ from the card's; the card's are used")
    return notes


def with_names(card: DatasetCard, folder: Path) -> DatasetCard:
    """The card, with the folder's class names where it has none of its own.

    Raises:
        DataError: no names there, or names whose SHA-256 is not the card's.
    """
    if card.names_from == "card":
        return card
    path = folder / "classnames.txt"
    names = _lines(path)
    if names is None or len(names) > card.n_classes:
        found = "no such file" if names is None else f"{len(names)} names"
        raise DataError(str(path), found, f"the {card.n_classes} class names", "fetch or export it again")
    names += [""] * (card.n_classes - len(names))
    if card.names_sha256 and lines_sha256(names) != card.names_sha256:
        found = f"names with SHA-256 {lines_sha256(names)[:16]}"
        raise DataError(str(path), found, f"{card.names_sha256[:16]} by the card", "get the right folder")
    return card.model_copy(update={"names": tuple(names), "names_from": "card"})


def _same_names(card: DatasetCard, path: Path, found: list[str]) -> list[str]:
    """A note where only the spelling differs (`apple_pie`, `apple pie`); an error for another list."""
    wanted = list(card.names)
    while wanted and not wanted[-1]:  # blank names are legal, but trailing blank lines of a file are dropped
        wanted.pop()
    for number in range(max(len(wanted), len(found))):
        here = [repr(lines[number]) if number < len(lines) else "no line" for lines in (found, wanted)]
        if plain(here[0]) != plain(here[1]):
            here = [f"{line:.80}" for line in here]
            do = f"check that the folder is {card.name}, or give a card with its names by --include"
            raise DataError(f"{path}, line {number + 1}", here[0], f"{here[1]} by the card", do)
    if found == wanted:
        return []
    return ["class names in the folder are spelt differently from the card's; the card's are used"]


def _lines(path: Path) -> list[str] | None:
    """Lines of a UTF-8 text file without trailing blank lines; `None` if there is no such file."""
    try:
        return text_files.read_lines(path)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path), f"unreadable ({error})", "UTF-8 text") from None
