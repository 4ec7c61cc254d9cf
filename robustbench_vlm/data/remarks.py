"""Notes and flags about the images of a split, where they change what is measured."""

from __future__ import annotations

from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import class_names, shards
from robustbench_vlm.errors import some


def on(card: DatasetCard, index: shards.Index, *, generated: bool) -> tuple[list[str], tuple[str, ...]]:
    """Notes about the images of a whole split, and the flags of what changes the measured number.

    Args:
        card: the dataset, with its class names.
        index: of the split.
        generated: whether it is a miniature, whose few images need not have every class.
    """
    notes, flags = [], []
    if index.rule not in ("", class_names.EXACT):
        notes.append(f"class folders are matched to class names by {index.rule}")
    if others := index.ignored - len(index.left_out):
        notes.append(f"{others} files that are neither images nor labels were ignored")
    if index.left_out:
        flags.append("images-left-out")
        what = "hidden, dead links or of a format that is not decoded"
        notes.append(f"{len(index.left_out)} images were left out, {what}: {some(index.left_out)}")
    present = {sample.label for sample in index.samples}
    empty = [name for label, name in enumerate(card.names) if label not in present]
    if empty and not generated:
        if index.rule:  # a folder that was made for a class and is empty has lost its images
            flags.append("classes-without-images")
        notes.append(f"{len(empty)} of {card.n_classes} classes have no image: {some(empty)}")
    return notes, tuple(flags)
