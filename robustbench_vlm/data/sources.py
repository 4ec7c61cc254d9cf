"""Labelled images that are no dataset of ours yet: class folders, tables of paths or bytes.

| given                    | images                                     | labels                        |
|--------------------------|--------------------------------------------|-------------------------------|
| a folder                 | `<class>/<image>`, or `<split>/<class>/..` | the class folders             |
| `.csv` `.tsv` `.jsonl`   | a column of paths beside the file          | a column of names or integers |
| `.parquet`               | the same, or a column of encoded images    | the same                      |

Nothing is decoded here. Datasets of torchvision are read by `torchvision_images`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from robustbench_vlm.data import class_names, image_files, remarks, shards, tables
from robustbench_vlm.errors import DataError, some

MOST_CLASSES = 100_000
"""Classes of one dataset; a larger class index in a table is a mistake, such as a time or an identifier."""

LONGEST_LABEL = 1000  # characters of a class name

SPLITS = ("test", "val", "validation", "valid", "train")

Item = tuple[str, bytes, str, int]
"""Original key, encoded image, its extension (`png`, `jpg`, `webp`), class index."""


@dataclass(frozen=True)
class LabelledImages:
    """Images with class indices, and where they are read from.

    Attributes:
        count: number of images.
        names: class names in label order; empty where the source has integers only.
        split: name of the split that the images are.
        ignored: files that are no images.
        files: every file that an image or a label comes from.
        items: starts reading the images, in a fixed order.
        notes: what was decided while reading (split, columns, matching of names); one line each.
        flags: what the source has lost (`remarks.lost`), which holds for an export of it, too.
    """

    count: int
    names: tuple[str, ...]
    split: str
    ignored: int
    files: tuple[Path, ...]
    items: Callable[[], Iterator[Item]]
    notes: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


def open_images(
    path: Path,
    names: Sequence[str] = (),
    split: str = "",
    image_column: str = "",
    label_column: str = "",
    other_names: class_names.OtherNames = class_names.NO_OTHER_NAMES,
) -> LabelledImages:
    """The images of a folder or of a table.

    Args:
        path: a folder of class folders (or of split folders), or a file that ends in `.csv`, `.tsv`, `.jsonl`
            or `.parquet`.
        names: class names in label order; by default those of the folders or of the label column, sorted.
        split: which split to read; by default the one for testing, if there are several.
        image_column: column of paths or encoded images; by default one of `tables.IMAGE_COLUMNS`.
        label_column: column of class names or indices; by default one of `tables.LABEL_COLUMNS`.
        other_names: those of the classes of `names`, for folders and labels that are called by them.

    Raises:
        DataError: nothing of that kind there, no images, columns of a folder, or labels that do not fit
            `names`.
    """
    if path.is_dir() and (image_column or label_column):
        raise DataError(str(path), "a folder, which has no columns", "a table", "leave out --columns")
    if path.is_dir():
        return from_folders(path, names, split, other_names)
    if path.suffix.lower() not in tables.SUFFIXES:
        found = "no such file or folder" if not path.exists() else "neither a folder nor a known table"
        raise DataError(str(path), found, f"class folders, or a file in {', '.join(tables.SUFFIXES)}")
    return from_table(path, names, split, image_column, label_column, other_names)


def from_folders(
    folder: Path,
    names: Sequence[str] = (),
    split: str = "",
    other_names: class_names.OtherNames = class_names.NO_OTHER_NAMES,
) -> LabelledImages:
    """A tree `<folder>/<class>/<image>`, with the splits as folders above the classes or without any.

    Without `names`, labels follow the sorted folder names, as in torchvision's `ImageFolder`; with them,
    class folders are matched to names by `class_names.match`.

    Raises:
        DataError: no class folders, no images in them, no such split, or folders that do not fit `names`.
    """
    if not folder.is_dir():
        raise DataError(str(folder), "no such folder", "class folders with images")
    notes: list[str] = []
    folder, split = _split_of(folder, split, notes)
    classes = shards.class_folders(folder)
    if not names:
        class_names.require_distinct(classes, str(folder))
    chosen = tuple(names) or tuple(class_names.spelt(classes))
    matched = class_names.match(classes, chosen, str(folder), other_names)
    if matched.rule != class_names.EXACT and names:
        notes.append(f"class folders are matched to class names by {matched.rule}")
    index = shards.index_folders(folder, tuple(classes))
    losses = remarks.lost(classes, index)
    notes += losses.values()

    def items() -> Iterator[Item]:
        for sample in index.samples:
            yield sample.name, sample.read(), image_files.suffix(sample.path), matched.labels[sample.label]

    files = tuple(sample.path for sample in index.samples)
    others = index.ignored - len(index.left_out)
    split = split or "test"
    return LabelledImages(len(files), chosen, split, others, files, items, tuple(notes), tuple(losses))


def _split_of(folder: Path, split: str, notes: list[str]) -> tuple[Path, str]:
    """The folder of the class folders and the name of the split, where `folder` has a folder a split."""
    inside = shards.class_folders(folder)
    if split in inside and shards.class_folders(folder / split):
        return folder / split, split
    splits = [name for name in SPLITS if name in inside and shards.class_folders(folder / name)]
    if not splits:
        return folder, split
    if split:
        raise DataError(
            str(folder), f"no split {split!r}", f"one of: {', '.join(sorted(splits))}", "choose another"
        )
    if strange := [name for name in inside if name not in splits]:
        found = f"folders {', '.join(splits)} are called like splits, {some(strange)} beside them are not"
        raise DataError(
            str(folder), found, "a folder a class, or a folder a split", "choose one with --split"
        )
    chosen, *others = splits
    if others:
        notes.append(f"split {chosen} is read; {', '.join(sorted(others))} beside it are left alone")
    return folder / chosen, chosen


def from_table(
    file: Path,
    names: Sequence[str] = (),
    split: str = "",
    image_column: str = "",
    label_column: str = "",
    other_names: class_names.OtherNames = class_names.NO_OTHER_NAMES,
) -> LabelledImages:
    """A table with a column of images (paths beside the file, or encoded bytes) and a column of labels.

    Labels that are all integers are class indices: of the class names that the file states, else of `names`.
    They are class names where one of `names` is a number, as all other labels are. The names that the file
    states are matched to `names` by `class_names.match`.

    Raises:
        DataError: no such columns, a row without image or label, an image that is missing or outside the
            file's folder, one that occurs twice, or labels that do not fit `names`.
    """
    table = tables.read(file)
    image = tables.column(table, image_column, tables.IMAGE_COLUMNS)
    label = tables.column(table, label_column, tables.LABEL_COLUMNS)
    inline = image in table.inline
    rows = list(table.rows([label] if inline else [image, label]))
    if not rows:
        raise DataError(str(file), "no images", "one image a row")
    notes = [f"images are in column {image!r}, labels in column {label!r}"]
    values = [_label(where, row.get(label)) for where, row in rows]
    own = table.names.get(label, ())
    indices, chosen = _indexed(values, own, names, str(file), notes, other_names)
    paths = [] if inline else _paths(file, [(where, row.get(image)) for where, row in rows])

    def items() -> Iterator[Item]:
        if not inline:
            for (key, path), index in zip(paths, indices, strict=True):
                content = shards.Sample(key, index, path).read()
                yield key, content, image_files.suffix(path), index
            return
        for i, ((where, row), index) in enumerate(zip(table.rows([image]), indices, strict=True)):
            content, extension = _encoded(where, row.get(image))
            yield f"s{i:07d}", content, extension, index

    files = (file, *(path for _, path in paths))
    stem = file.stem.partition("-")[0].lower()
    split = split or (stem if stem in SPLITS else "test")
    return LabelledImages(len(rows), chosen, split, 0, files, items, tuple(notes))


def _label(where: str, value: object) -> str | int:
    """A label as it stands in a table: a class index, or a class name."""
    expected = f"a class name, or a class index from 0 to {MOST_CLASSES - 1}"
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < MOST_CLASSES:
            raise DataError(where, f"label {_shown(value)}", expected)
        return value
    text = value.strip() if isinstance(value, str) else ""
    if not text or not text.isprintable() or len(text) > LONGEST_LABEL:
        raise DataError(where, f"label {_shown(value)}", expected)
    return text


def _shown(value: object) -> str:
    """The beginning of a value as Python writes it; Python writes no integer of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "of more than 64 bits"
    return f"{value!r:.40}"


def _indexed(
    values: Sequence[str | int],
    own: Sequence[str],
    names: Sequence[str],
    where: str,
    notes: list[str],
    other_names: class_names.OtherNames,
) -> tuple[list[int], tuple[str, ...]]:
    """The class index of each label, and the class names: `names`, else the file's `own`, else the labels."""
    stated = own or names
    typed = bool(own) and all(isinstance(value, int) for value in values)  # a ClassLabel of `datasets`
    if _integers(values) and (typed or not class_names.has_numbers(stated)):
        indices = [int(value) for value in values]
        largest = max(indices)
        if largest >= MOST_CLASSES:
            raise DataError(where, f"label {largest}", f"a class index from 0 to {MOST_CLASSES - 1}")
        if not stated:
            notes.append(f"labels are integers without names: the classes are called 0 to {largest}")
        elif largest >= len(stated):
            raise DataError(
                where, f"label {largest}", f"0 to {len(stated) - 1}, for {len(stated)} class names"
            )
        if not own or not names:
            return indices, tuple(stated) or tuple(map(str, range(largest + 1)))
        # a file may state classes that no image of it has, and that the given names lack
        used = range(len(own)) if len(own) == len(names) else sorted(set(indices))
        matched = class_names.match([own[i] for i in used], names, where, other_names)
        notes.append(f"class names of the file are matched to the given ones by {matched.rule}")
        index = dict(zip(used, matched.labels, strict=True))
        return [index[i] for i in indices], tuple(names)
    spellings = sorted({str(value) for value in values})
    if not stated:
        class_names.require_distinct(spellings, where)
    chosen = tuple(names or own) or tuple(spellings)
    matched = class_names.match(spellings, chosen, where, other_names, merge=True)
    if matched.rule != class_names.EXACT:
        notes.append(f"labels are matched to class names by {matched.rule}")
    labels = dict(zip(spellings, matched.labels, strict=True))
    return [labels[str(value)] for value in values], chosen


def _integers(values: Sequence[str | int]) -> bool:
    """Whether all labels are integers, as numbers or as text."""
    return all(isinstance(value, int) or class_names.DIGITS.fullmatch(value) for value in values)


def _paths(file: Path, rows: Sequence[tuple[str, object]]) -> list[tuple[str, Path]]:
    """(path as written, file) of each row."""
    root = file.parent.resolve()
    found: dict[str, Path] = {}
    present: set[Path] = set()
    for where, name in rows:
        if not isinstance(name, str) or not name.isprintable():
            raise DataError(where, f"image {_shown(name)}", "a path beside the table")
        path = _file_below(root, name)
        if path is None:
            raise DataError(where, f"no image {name!r:.80} below {root}", "a path relative to that folder")
        if path in present:
            raise DataError(where, f"image {name!r:.80} occurs twice", "one row an image")
        present.add(path)
        found[name] = path
    return list(found.items())


def _file_below(root: Path, name: str) -> Path | None:
    """The file called `name` below a resolved folder; None where there is none."""
    path = (root / name).resolve()
    try:
        return path if path.is_relative_to(root) and path.is_file() else None
    except OSError:  # a name that is too long for the file system
        return None


def _encoded(where: str, value: object) -> tuple[bytes, str]:
    """The bytes of an image in a table, and their extension; `datasets` stores a struct with `bytes`."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes) or len(content) > shards.LARGEST_IMAGE:
        raise DataError(where, "no image bytes", f"at most {shards.LARGEST_IMAGE} bytes of an encoded image")
    extension = image_files.format_of(content[: image_files.HEAD])
    if not extension:
        raise DataError(
            where, f"bytes that begin with {content[:8]!r}", "a PNG, JPEG, WebP, GIF, BMP or TIFF image"
        )
    return content, extension


def summary(images: LabelledImages, names: Sequence[str]) -> list[str]:
    """How many images of which classes a source has, and how many files are none, one line each."""
    classes = f"{len(names)} classes: {some([repr(name) for name in names])}"
    ignored = [f"{images.ignored} files that are no images were left out"] if images.ignored else []
    return [f"{images.count} images of {classes}", *ignored]
