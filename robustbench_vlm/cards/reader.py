"""Read cards: TOML files of datasets, attack chains, suites, recipes and more, into frozen records.

Cards are below `suites/` (in a wheel: `robustbench_vlm/_suites/`) and below every folder given by
`--include`. An unknown key, a value of the wrong type or an unknown name is a `CardError` that names the
nearest known one.
"""

from __future__ import annotations

import hashlib
import shlex
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from robustbench_vlm import text_files
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.cards.card import PLAIN
from robustbench_vlm.cards.card import Card as Card
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.fields import fields, nested_record
from robustbench_vlm.cards.model import ModelCard
from robustbench_vlm.cards.overrides import number
from robustbench_vlm.cards.overrides import override as override
from robustbench_vlm.cards.protocol import PromptPack as PromptPack
from robustbench_vlm.cards.protocol import Protocol as Protocol
from robustbench_vlm.cards.recipe import Recipe as Recipe
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

SHADOWS = ("attacks", "protocols", "suites")
"""Kinds whose packaged names mean one thing everywhere: a card of another content has another name."""
SHADOW = "@include"

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

    A chain, protocol or suite that is called like a packaged one and is another one gets `@include` after its
    name, so that nothing measured with it is taken for the packaged one.

    Raises:
        CardError: no such card, or the file breaks the schema; the message names file and key.
    """
    where = path(kind, name)
    card = parse(toml(where), record, str(where))
    require_plain_name(card, str(where))
    if not _shadows(kind, card, where):
        return card
    return card.model_copy(update={"name": f"{getattr(card, 'name', '')}{SHADOW}"})


def _shadows(kind: str, card: Card, file: Path) -> bool:
    """Whether a card has the name of a packaged one, and another content."""
    own = getattr(card, "name", "")
    if kind not in SHADOWS or file.is_relative_to(home()):
        return False
    packaged = home() / FOLDERS[kind][0] / f"{own}.toml"
    if not packaged.is_file():
        return (kind, own) in SAME
    return card != parse(toml(packaged), type(card), str(packaged))


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
    if name.endswith(".toml") or name in names("suites") or name not in names("datasets"):
        return read("suites", name, Suite)
    return Suite(name=name, title=f"{name} alone", datasets=(name,), eps=("4/255",))


def suites_with(dataset: str) -> list[str]:
    """Names of the suites that have a dataset: first those of `--include`, then the smaller ones."""
    found = []
    for name in names("suites"):
        file = path("suites", name)
        members = toml(file).get("datasets")
        if isinstance(members, list) and dataset in members:
            found.append((file.parent == home(), len(members), name))
    return [name for _, _, name in sorted(found)]


def path(kind: str, name: str) -> Path:
    """The file of the card of `kind` called `name`, or `name` itself when it ends in `.toml`.

    Raises:
        CardError: no such card; the message gives the nearest and all known names.
    """
    file = SAME.get((kind, name), name).removesuffix(SHADOW)
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
    """The table of a TOML file, with `@file` strings replaced by that file's lines.

    A value `"@prompts/x.txt"` of `names` or `templates` means the lines of `x.txt` below the card home, so a
    list of a thousand names is written once and shared.
    """
    try:
        table = tomllib.loads(text_files.read_text(path), parse_float=number)
    except FileNotFoundError:
        raise CardError(str(path), "no such file", "a TOML card") from None
    except OSError as error:
        raise CardError(str(path), f"cannot be read ({error.strerror})", "a TOML card") from None
    except (ValueError, RecursionError) as error:  # TOML errors and undecodable bytes are ValueErrors, too
        raise CardError(str(path), f"not TOML ({error!s:.120})", "a TOML card") from None
    for key in ("names", "templates", "wordnet_ids"):
        value = table.get(key)
        if isinstance(value, str) and value.startswith("@"):
            table[key] = _lines(path, value.removeprefix("@"))
        if isinstance(value, dict):
            files = {n: f for n, f in value.items() if isinstance(f, str) and f.startswith("@")}
            value.update({name: _lines(path, file.removeprefix("@")) for name, file in files.items()})
    return table


def _lines(card: Path, name: str) -> list[str]:
    for root in (card.parent.parent, home()):
        if path := below(root, name):
            try:
                return text_files.read_text(path).removesuffix("\n").split("\n")
            except (OSError, UnicodeDecodeError):
                raise CardError(str(path), "unreadable", "UTF-8 text") from None
    raise CardError(str(card), f"names the file {name!r}, which does not exist", f"it below {home()}")


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
    return tuple(_lines(known[name].parent / "list", f"prompts/{known[name].name}"))


def subset(suite: Suite) -> tuple[str, ...]:
    """The image names of a suite that takes them from a file; the file must have the SHA-256 of the card.

    Raises:
        CardError: no such file below a folder of cards, no text, or another SHA-256.
    """
    name, where = suite.subset.removeprefix("file:"), f"suite {suite.name}"
    found = next((file for root in (*card_folders(), home(), Path()) if (file := below(root, name))), None)
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
    return tuple(line for line in text.split("\n") if line.strip())


def below(root: Path, name: str) -> Path | None:
    """The file called `name` below a folder; None if there is none, or if it lies elsewhere."""
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    path = root / name
    return path if path.is_file() and path.resolve().is_relative_to(root.resolve()) else None


def parse(table: Mapping[str, Any], record: type[C], where: str) -> C:
    """A strict record from a table.

    Raises:
        CardError: an unknown or missing key or a value of the wrong kind; the message names `where`, the key,
            what was found and what is expected.
    """
    try:
        return record.model_validate(table)
    except ValidationError as error:
        unknown = [e for e in error.errors() if e["type"] == "extra_forbidden"]
        first = (unknown or error.errors())[0]  # a mistyped key is missing under its right name, too
        missing = [e for e in error.errors() if e["type"] == first["type"] == "missing"]
        keys = [_one_line(".".join(str(part) for part in e["loc"])) for e in missing or [first]]
        key, inner = ", ".join(keys), _record_at(record, first["loc"][:-1])
        if unknown:
            do = nearest(str(first["loc"][-1]), inner.model_fields)
            raise CardError(where, f"unknown key {key!r}", do=do) from None
        if missing:
            last, alone = first["loc"][-1], len(missing) == 1
            facts = next((one for one in fields(inner) if alone and one.key == last), None)
            expected = f"{facts.type_text}: {facts.meaning}".rstrip(".") if facts else "all of them"
            do = "vlmrob new KIND NAME writes a card with every key"
            raise CardError(where, f"no key {key}", expected, do) from None
        raise wrong_value(error, where) from None


def wrong_value(error: ValidationError, where: str) -> CardError:
    """The first finding of pydantic about a value, as `where: key = value; expected ...`."""
    first = error.errors()[0]
    key = _one_line(".".join(str(part) for part in first["loc"]))
    message = _one_line(first["msg"]).removeprefix("Value error, ")
    if not key or not message.startswith("Input should be "):
        return CardError(where, f"{key}: {message}" if key else message)
    return CardError(where, f"{key} = {first['input']!r:.80}", message.removeprefix("Input should be "))


def _one_line(text: str) -> str:
    """The text as it is when it can be printed in a line, else quoted."""
    return text if text.isprintable() else f"{text!r:.200}"


def _record_at(record: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The record of the table at `path` inside `record`."""
    for part in path:
        field = record.model_fields.get(str(part))
        if field is not None:  # otherwise an index into a list of tables
            record = nested_record(field.annotation) or record
    return record
