"""The option `--data` of `vlmrob eval`: images that no card describes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robustbench_vlm import console, text_files
from robustbench_vlm.cards import reader
from robustbench_vlm.errors import InputError

COLUMNS = ("image", "label")


@dataclass(frozen=True)
class Images:
    """`--data` and the options that go with it, as they were typed.

    Attributes:
        source: folder of class folders, or a table; `None` without `--data`.
        names: text file of class names in label order, one a line.
        templates: text file of sentences with `{c}` for the class name, one a line.
        columns: names of the columns of images and of labels, with a comma between them; empty if not given.
        split: which split to read, where the source has several; empty for the one for testing.
    """

    source: Path | None
    names: Path | None
    templates: Path | None
    columns: str
    split: str

    def require_consistent(self, **others: object) -> None:
        """Refuse options that contradict each other.

        Args:
            **others: options that choose datasets in another way (`suite`, `dataset`, `protocol`).

        Raises:
            InputError: `--data` together with one of them, or an option of `--data` without it.
        """
        if self.source is None:
            own = {"names": self.names, "templates": self.templates, "columns": self.columns}
            for name in [name for name, value in {**own, "split": self.split}.items() if value]:
                raise InputError(f"--{name}", "no --data", "--data FOLDER or FILE beside it", "add --data")
            return
        for name in [name for name, value in others.items() if value]:
            found, do = f"--{name} beside it", f"leave out --{name} or --data"
            raise InputError(f"--data {self.source}", found, "one way to choose the images", do)

    def add(self, root: Path) -> str:
        """Export the images into a data root, search its cards from now on; returns the name of their suite.

        Raises:
            DataError: images or labels that cannot be used.
        """
        assert self.source is not None
        from robustbench_vlm.data.image_cards import card_of_images
        from robustbench_vlm.types import TEMPLATES

        with console.meter() as meter:
            made = card_of_images(
                self.source,
                root,
                meter,
                names=lines_of("--names", self.names),
                templates=lines_of("--templates", self.templates) or TEMPLATES,
                split=self.split,
                columns=columns_of(self.columns),
            )
        for note in made.notes:
            console.remark(f"note: {self.source}: {note}")
        reader.include([*reader.included(), made.include])
        return made.name


def columns_of(typed: str) -> tuple[str, str]:
    """The columns of images and of labels that `--columns` names, empty where it names none.

    It is `image=NAME,label=NAME` in any order, one of the two, or both names alone with a comma between them.

    Raises:
        InputError: neither.
    """
    parts = [part.partition("=") for part in typed.split(",")] if typed else []
    named = {key.strip(): name.strip() for key, equals, name in parts if equals}
    if parts and not named and len(parts) == len(COLUMNS):
        named = dict(zip(COLUMNS, (key.strip() for key, *_ in parts), strict=True))
        parts = []
    if not named.keys() <= {*COLUMNS} or len(named) != len(parts or named) or not all(named.values()):
        raise InputError(f"--columns {typed}", "not two columns", "image=NAME,label=NAME", "name the columns")
    return named.get("image", ""), named.get("label", "")


def lines_of(flag: str, file: Path | None) -> tuple[str, ...]:
    """The lines of a text file that an option names; none without the option.

    Raises:
        InputError: no such file, no text, or no line in it.
    """
    if file is None:
        return ()
    expected = "a text file, one entry a line"
    try:
        lines = tuple(text_files.read_lines(file))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"{flag} {file}", reason, expected) from None
    if not lines:
        raise InputError(f"{flag} {file}", "an empty file", expected)
    return lines
