"""Labelled images of a dataset class of torchvision, which hands them out decoded; they become PNG."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from robustbench_vlm.data import class_names
from robustbench_vlm.data.sources import Item, LabelledImages
from robustbench_vlm.errors import DataError, InputError, nearest

SPLIT_ARGUMENTS = ("split", "image_set", "classes")
"""Arguments by which classes of torchvision take the name of a split; `train`, true or false, goes first."""

PNG_MODES = frozenset({"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"})
"""Modes of Pillow that a PNG file has; others become RGB, as `pixels` makes them RGB."""


def from_torchvision(
    name: str,
    root: Path,
    settings: Mapping[str, Any],
    names: Sequence[str] = (),
    split: str = "",
    other_names: class_names.OtherNames = class_names.NO_OTHER_NAMES,
    *,
    ordered: bool = True,
) -> LabelledImages:
    """A dataset class of torchvision; its images become PNG, and its keys are their positions.

    Args:
        name: of the class.
        root: the folder that it reads.
        settings: its further arguments. One that chooses the split is what is read, whatever `split` says.
        names: class names in label order; its own classes are matched to them by `class_names.match`.
        split: which split to read, and its name here; by default that of `settings`, else `test`.
        other_names: those of the classes of `names`.
        ordered: whether `names` are in the order of its labels, which are indices of them where it has no
            class names of its own; else such a dataset is refused.

    Raises:
        InputError: no such class, arguments that it refuses, or no such split.
        DataError: its classes match no class names, or an image or label that is none.
    """
    from torchvision import datasets

    where = f"torchvision:{name}"
    known = [entry for entry in datasets.__all__ if isinstance(getattr(datasets, entry), type)]
    if name not in known:
        raise InputError(where, "no such dataset", do=nearest(name, known))
    kind = getattr(datasets, name)
    accepted = _accepted(kind)
    chosen, split = _split(where, accepted, settings, split)
    arguments = {"root": root} if "root" in accepted else {}  # FakeData has none
    try:
        found = kind(**arguments, **settings, **chosen)
        count = len(found)
    except Exception as error:  # noqa: BLE001 - foreign code, which reads foreign files
        raise InputError(where, _reason(error), do="see --source-root and --set") from None
    notes = [f"{key} = {value!r} of {where} is read as split {split}" for key, value in chosen.items()]
    own = _own_names(found, where)
    labels: tuple[int, ...] = ()
    if names and own:
        ids = list(getattr(found, "wnids", ()))
        by_id = set(other_names.get("WordNet id", ()))
        spellings = ids if ids and by_id.issuperset(ids) else list(own)
        matched = class_names.match(spellings, names, where, other_names)
        labels = matched.labels
        notes.append(f"classes are matched to class names by {matched.rule}")
    elif names and not ordered:
        do = "give --names FILE with the class names in the order of its labels"
        raise DataError(where, "labels without class names", "names that can be matched to the card's", do)

    def items() -> Iterator[Item]:
        return _items(found, count, labels, where)

    return LabelledImages(count, tuple(names) or own, split, 0, (), items, tuple(notes))


def _items(found: Any, count: int, labels: Sequence[int], where: str) -> Iterator[Item]:  # noqa: ANN401
    """The images of a dataset of torchvision; `labels` are the class indices of its own labels, if any."""
    for i in range(count):
        try:
            image, label = found[i]
            content, index = _png(image), int(label)
        except Exception as error:  # noqa: BLE001 - foreign code, which reads foreign files
            expected = "a whole image and a class index"
            raise DataError(f"{where}, image {i}", _reason(error), expected) from None
        if index < 0 or (labels and index >= len(labels)):
            raise DataError(f"{where}, image {i}", f"label {index}", "the index of a class")
        yield f"s{i:07d}", content, "png", labels[index] if labels else index


def _accepted(kind: type) -> set[str]:
    """Names of the arguments of a class, with those that its `**kwargs` hand on to the classes above it."""
    accepted: set[str] = set()
    for above in kind.__mro__:
        found = inspect.signature(above).parameters.values()
        accepted |= {parameter.name for parameter in found}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in found):
            break
    return accepted


def _split(
    where: str, accepted: set[str], settings: Mapping[str, Any], split: str
) -> tuple[dict[str, Any], str]:
    """The argument that chooses the split, if `settings` has none, and the name of what is read."""
    wanted = split or "test"
    if "train" in accepted:
        if "train" in settings:
            return {}, split or ("train" if settings["train"] else "test")
        if wanted not in ("train", "test"):
            raise InputError(where, f"no split {wanted!r:.80}", "train or test", "choose another --split")
        return {"train": wanted == "train"}, wanted
    key = next((key for key in SPLIT_ARGUMENTS if key in accepted), "")
    if not key:
        return {}, wanted
    return ({}, split or str(settings[key])) if key in settings else ({key: wanted}, wanted)


def _own_names(found: Any, where: str) -> tuple[str, ...]:  # noqa: ANN401 - any dataset of torchvision
    """The class names that a dataset has, in the order of its labels; none where it has none."""
    stated = getattr(found, "classes", None) or getattr(found, "categories", None) or ()
    # ImageNet has a tuple of synonyms for each class
    first = [entry if isinstance(entry, str) else next(iter(entry), "") for entry in stated]
    if "" in first:
        raise DataError(where, f"class {first.index('')} has no name", "a name for each class")
    return tuple(class_names.spelt(first))


def _png(image: Any) -> bytes:  # noqa: ANN401 - whatever a dataset hands out
    """A decoded image as PNG."""
    buffer = io.BytesIO()
    (image if image.mode in PNG_MODES else image.convert("RGB")).save(buffer, "PNG")
    return buffer.getvalue()


def _reason(error: Exception) -> str:
    """The first line of an error of foreign code, or its kind where it has none."""
    return str(error).partition("\n")[0][:200] or type(error).__name__
