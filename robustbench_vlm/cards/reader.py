"""Read cards: TOML files of datasets, attack chains, suites, recipes and more, into frozen records.

Cards are below `suites/` (in a wheel: `robustbench_vlm/_suites/`) and below every folder given by
`--include`. An unknown key, a value of the wrong type or an unknown name is a `CardError` that names the
nearest known one.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from robustbench_vlm import text_files
from robustbench_vlm.cards import toml_tables
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.cards.card import PLAIN
from robustbench_vlm.cards.card import Card as Card
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.model import ModelCard
from robustbench_vlm.cards.overrides import override as override
from robustbench_vlm.cards.protocol import PromptPack as PromptPack
from robustbench_vlm.cards.protocol import Protocol as Protocol
from robustbench_vlm.cards.recipe import Recipe as Recipe
from robustbench_vlm.cards.strict import parse as parse
from robustbench_vlm.cards.study import Study as Study
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import CardError, InputError, nearest


def home() -> Path:
    """The folder of the project's own cards: inside the wheel, or `suites/` of the checkout."""
    packaged = Path(__file__).parents[1] / "_suites"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "suites"


C = TypeVar("C", bound=Card)

FOLDERS: Mapping[str, tuple[str, type[Card]]] = {
    "datasets": ("datasets", DatasetCard),
    "attacks": ("attacks", AttackCard),
    "suites": (".", Suite),
    "recipes": ("recipes", Recipe),
    "models": ("models", ModelCard),
    "protocols": ("protocols", Protocol),
    "prompts": ("prompts", PromptPack),
    "studies": ("studies", Study),
}
"""Kind of card -> folder below each card home, and the record it is read into."""

SAME: Mapping[tuple[str, str], str] = {("attacks", "standard"): "autoattack"}
"""Other names of cards: `standard` is what the literature calls AutoAttack's usual chain."""

SHADOW = "@include"
"""What is put after the name of a card that has the name of a packaged one, and another content."""

REFERENCES: Mapping[str, Sequence[tuple[tuple[str, ...], str]]] = {
    "suites": ((("datasets",), "datasets"), (("means",), "datasets")),
    "protocols": ((("suite",), "suites"), (("attack",), "attacks"), (("prompts",), "prompts")),
    "recipes": (
        (("student",), "models"),
        (("teachers",), "models"),
        (("phases",), "models"),
        (("data", "dataset"), "datasets"),
    ),
    "studies": (
        (("method", "recipe"), "recipes"),
        (("teacher", "recipe"), "recipes"),
        (("validation", "attack"), "attacks"),
        (("validation", "suite"), "suites"),
        (("test", "attack"), "attacks"),
        (("test", "suite"), "suites"),
    ),
}
"""Keys at which a card names other cards, and of which kind those are."""

_include: list[Path] = []  # folders of `include`: state of the process, see there
_beside_data: list[Path] = []  # folder of `use_cards_of`: the same


def include(folders: list[Path]) -> None:
    """Search these folders for cards before the project's own, for the rest of this process.

    This is global state: the command line sets it once, from `--include`. A new process starts without it, so
    worker processes are handed `included()` and call this function first.

    Raises:
        InputError: a folder does not exist.
    """
    for folder in folders:
        if not folder.is_dir():
            expected, do = "a folder laid out like suites/", "vlmrob new KIND NAME --out FOLDER begins one"
            raise InputError(f"--include {folder}", "no such folder", expected, do)
    _include[:] = folders
    _paths.cache_clear()


def use_cards_of(data_root: Path) -> None:
    """Search the folder `cards` of a data root too, to which `vlmrob data export` writes.

    A card there never replaces one of the project's own or of `include`. This is global state, as `include`.
    """
    folder = data_root / "cards"
    _beside_data[:] = [folder] if folder.is_dir() else []
    _paths.cache_clear()


def card_folders() -> list[Path]:
    """Every folder that cards are searched in beside the project's own, as worker processes include them."""
    return [*_include, *_beside_data]


def singular(kind: str) -> str:
    """`study` for `studies`, `suite` for `suites`."""
    return f"{kind[:-3]}y" if kind.endswith("ies") else kind.removesuffix("s")


def included() -> list[Path]:
    """The folders that `include` was given."""
    return list(_include)


def as_typed() -> str:
    """The options `--include FOLDER` that a printed command line needs; empty without included folders."""
    return "".join(f" --include {shlex.quote(str(folder))}" for folder in _include)


@cache
def _paths(kind: str) -> dict[str, Path]:
    folder, _ = FOLDERS[kind]
    found: dict[str, Path] = {}
    for root in (*_beside_data, home(), *reversed(_include)):
        files = sorted((root / folder).glob("*.toml"))
        found |= {path.stem: path for path in files if not path.name.startswith(".")}
    return found


def names(kind: str) -> list[str]:
    """Names of all cards of a kind, sorted."""
    return sorted(_paths(kind))


def read(kind: str, name: str, record: type[C]) -> C:
    """The card of `kind` called `name`, or the TOML file at the path `name`.

    A card that is called like a packaged one and is another one gets `@include` after its name, and so does
    one that names such a card, so that nothing measured with it is taken for the packaged one.

    Raises:
        CardError: no such card, or the file breaks the schema; the message names file and key.
    """
    where = path(kind, name)
    card = parse(table(kind, where), record, str(where))
    require_plain_name(card, str(where))
    found = shown_card(kind, card, where)
    if name.endswith(SHADOW) and found is card:
        known = f"no folder of --include has a {singular(kind)} of that name with another content"
        raise CardError(f"{singular(kind)} {name!r:.80}", known, do="name its folder with --include")
    return found


def table(kind: str, file: Path) -> dict[str, Any]:
    """The table of a card's file, in which other cards are called as they are shown."""
    found: Any = toml(file)
    for keys, other in REFERENCES.get(kind, ()) if card_folders() else ():
        found = _renamed(found, keys, other)
    return dict(found)


def _renamed(value: Any, keys: Sequence[str], kind: str) -> Any:  # noqa: ANN401 - any TOML value
    """The value, in which every text at `keys` that names a card of `kind` is the name that is shown."""
    if isinstance(value, str) and not keys:
        return shown(kind, value)
    if isinstance(value, list):
        return [_renamed(entry, keys, kind) for entry in value]
    if isinstance(value, dict) and not keys:
        return {name: _renamed(entry, keys, kind) for name, entry in value.items()}
    if isinstance(value, dict) and keys[0] in value:
        return value | {keys[0]: _renamed(value[keys[0]], keys[1:], kind)}
    return value


def shown(kind: str, name: str) -> str:
    """The name under which the card of `kind` called `name` is shown; what names no card stays as it is."""
    stem = plain_name(SAME.get((kind, name), name))
    found = _paths(kind).get(stem)
    if found is None:
        return name
    return stem + SHADOW if is_shadow(kind, found) else stem


def plain_name(shown_name: str) -> str:
    """The name without `@include`: of the card's file, and of what the card was written for."""
    return shown_name.removesuffix(SHADOW)


def has(kind: str, name: str) -> bool:
    """Whether a card of `kind` is called `name`, with or without `@include`."""
    return plain_name(SAME.get((kind, name), name)) in _paths(kind)


def shown_card(kind: str, card: C, file: Path) -> C:
    """The card that was read from a file, under the name under which it is shown."""
    if not is_shadow(kind, file):
        return card
    return card.model_copy(update={"name": f"{getattr(card, 'name', '')}{SHADOW}"})


def is_shadow(kind: str, file: Path) -> bool:
    """Whether the card in a file has the name of a packaged one and another content.

    A packaged card that names such a card is one, too. Settings of `--set` do not count.

    Raises:
        CardError: the file is not TOML.
    """
    inside = file.is_relative_to(home())
    if inside and not card_folders():
        return False
    folder, record = FOLDERS[kind]
    found, own = table(kind, file), toml(file).get("name")
    if inside:
        return found != toml(file)
    if not isinstance(own, str) or not PLAIN.fullmatch(own):
        return False
    packaged = home() / folder / f"{own}.toml"
    if not packaged.is_file():
        return (kind, own) in SAME
    try:
        return parse(found, record, str(file)) != parse(toml(packaged), record, str(packaged))
    except CardError:  # it is no whole card without the settings that were typed, so not the packaged one
        return True


def require_plain_name(card: Card, where: str) -> None:
    """Refuse a card whose name cannot become part of a path.

    Raises:
        CardError: its name has other characters than letters, digits and `. _ -`.
    """
    own = str(getattr(card, "name", "x"))
    if not PLAIN.fullmatch(own):
        raise CardError(where, f"the name {own!r:.60}", "letters, digits and . _ -: it names files")


def suite(name: str) -> Suite:
    """The suite called `name`; if there is none, the suite of the one dataset of that name.

    Such a suite has the defaults of the record and the radius 4/255.

    Raises:
        CardError: neither a suite nor a dataset is called `name`.
    """
    if name.endswith(".toml") or has("suites", name) or not has("datasets", name):
        return read("suites", name, Suite)
    alone = shown("datasets", name)
    return Suite(name=alone, title=f"{alone} alone", datasets=(alone,), eps=("4/255",))


def suites_with(dataset: str) -> list[str]:
    """Names of the suites that have a dataset: first those of `--include`, then the smaller ones."""
    found = []
    for name in names("suites"):
        file = path("suites", name)
        members = toml(file).get("datasets")
        if isinstance(members, list) and plain_name(dataset) in members:
            found.append((file.parent == home(), len(members), name))
    return [name for _, _, name in sorted(found)]


def path(kind: str, name: str) -> Path:
    """The file of the card of `kind` called `name`, or `name` itself when it ends in `.toml`.

    Raises:
        CardError: no such card; the message gives the nearest and all known names.
    """
    file = plain_name(SAME.get((kind, name), name))
    found = Path(name) if name.endswith(".toml") else _paths(kind).get(file)
    do = f"vlmrob list {kind} shows them"
    if found is None:
        raise CardError(
            f"{singular(kind)} {name!r}", "no such card", do=f"{nearest(name, _paths(kind))}; {do}"
        )
    if not found.exists():
        raise CardError(f"{singular(kind)} {name}", "no such file", "a TOML card, or a name", do)
    return found


def toml(path: Path) -> dict[str, Any]:
    """The table of a TOML file as it stands there, with the lines of `@file` strings in their place."""
    return toml_tables.read(path, (path.parent.parent, home()))


def class_names(name: str) -> tuple[str, ...]:
    """The class names of the list `prompts/NAME.txt` below a folder of cards, in label order.

    Raises:
        CardError: no such list; the message gives the nearest ones.
    """
    known: dict[str, Path] = {}
    for root in (*_beside_data, home(), *reversed(_include)):
        known |= {path.stem: path for path in sorted((root / "prompts").glob("*-names.txt"))}
    if name not in known:
        raise CardError(f"class names {name!r:.80}", "no such list", do=nearest(name, known))
    file = known[name]
    return tuple(toml_tables.lines_of(file, f"prompts/{file.name}", (file.parent.parent,)))


def subset(suite: Suite) -> tuple[str, ...]:
    """The image names of a suite that takes them from a file; the file must have the SHA-256 of the card.

    Raises:
        CardError: no such file below a folder of cards, no text, no names in it, or another SHA-256.
    """
    name, where = suite.subset.removeprefix("file:"), f"suite {suite.name}"
    found = next(
        (file for root in (*card_folders(), home(), Path()) if (file := toml_tables.below(root, name))), None
    )
    if found is None:
        raise CardError(where, f"no file {name!r:.80}", "a path below a folder of cards, without ..")
    try:
        content = text_files.read_bytes(found)
        text = text_files.decoded(content)
    except (OSError, UnicodeDecodeError):
        raise CardError(str(found), "unreadable", "UTF-8 text, one image name a line") from None
    sha = hashlib.sha256(content).hexdigest()
    if suite.subset_sha256 and sha != suite.subset_sha256:
        raise CardError(str(found), f"SHA-256 {sha[:16]}", suite.subset_sha256[:16], "get the right file")
    names = tuple(line for line in text.split("\n") if line.strip())
    if not names:
        raise CardError(
            str(found), "an empty list", "one image name a line", "leave out subset for all images"
        )
    return names
