"""Notes and flags about the images of a split, where they change what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from robustbench_vlm import text_files
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import class_names, layout, shards
from robustbench_vlm.errors import DataError, some

LEFT_OUT, WITHOUT_IMAGES = "images-left-out", "classes-without-images"


def on(
    card: DatasetCard, index: shards.Index, split: Path, *, generated: bool
) -> tuple[list[str], tuple[str, ...]]:
    """Notes about the images of a whole split, and the flags of what changes the measured number.

    Args:
        card: the dataset, with its class names.
        index: of the split.
        split: its folder.
        generated: whether it is a miniature, whose few images need not have every class.

    Raises:
        DataError: flags beside the shards that are none.
    """
    notes = []
    if index.rule not in ("", class_names.EXACT):
        notes.append(f"class folders are matched to class names by {index.rule}")
    if others := index.ignored - len(index.left_out):
        notes.append(f"{others} files that are neither images nor labels were ignored")
    losses = lost(card.names, index)
    if generated:
        losses.pop(WITHOUT_IMAGES, None)
    flags = [flag for flag in losses if index.rule or flag != WITHOUT_IMAGES]
    if not index.rule:  # an export has lost what the folder had lost that it was made of
        of_source = stored(split)
        notes += [f"the folder that was exported has the flag {flag}" for flag in of_source]
        flags += [flag for flag in of_source if flag not in flags]
    return [*notes, *losses.values()], tuple(flags)


def lost(names: Sequence[str], index: shards.Index) -> dict[str, str]:
    """What an index has not, by the flag for it, each as a note: images that were left out, and classes.

    A class without images matters where a folder was made for it; in shards it is no more than a note.
    """
    losses = {}
    if index.left_out:
        what = "hidden, dead links or of a format that is not decoded"
        losses[LEFT_OUT] = f"{len(index.left_out)} images were left out, {what}: {some(index.left_out)}"
    present = {sample.label for sample in index.samples}
    if empty := [name for label, name in enumerate(names) if label not in present]:
        losses[WITHOUT_IMAGES] = f"{len(empty)} of {len(names)} classes have no image: {some(empty)}"
    return losses


def stored(split: Path) -> tuple[str, ...]:
    """The flags that an export wrote beside its shards.

    Raises:
        DataError: no text, or other words than those flags.
    """
    path = split / layout.FLAGS
    try:
        flags = tuple(text_files.read_lines(path))
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError):
        flags = ("(unreadable)",)
    if strange := [flag for flag in flags if flag not in (LEFT_OUT, WITHOUT_IMAGES)]:
        raise DataError(
            str(path), f"{strange[0]!r:.80}", f"{LEFT_OUT} or {WITHOUT_IMAGES}", "export it again"
        )
    return flags
