"""Facts are TOML: datasets, attack chains, suites and recipes, read strictly into frozen records.

Cards lie in `suites/` (in a wheel: `robustbench_vlm/_suites/`), and in every folder given by `--include`.
An unknown key, a value of the wrong kind or an unknown name is a `CardError` with the nearest known name.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from robustbench_vlm.errors import CardError, InputError, nearest
from robustbench_vlm.protocols import PromptPack as PromptPack
from robustbench_vlm.protocols import Protocol as Protocol
from robustbench_vlm.protocols import Resize
from robustbench_vlm.recipes import Card as Card
from robustbench_vlm.recipes import Recipe as Recipe
from robustbench_vlm.settings import number
from robustbench_vlm.settings import override as override
from robustbench_vlm.studies import Study as Study
from robustbench_vlm.threat import Norm


def home() -> Path:
    """The folder of the project's own cards: inside the wheel, or the checkout's `suites/`."""
    packaged = Path(__file__).parent / "_suites"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "suites"


class Source(Card):
    """Where a dataset comes from, so that a missing one can be fetched."""

    hub: str = ""
    revision: str = ""
    url: str = ""


class DatasetCard(Card):
    """One dataset: what its images mean, and on which canvas the ball lives.

    Attributes:
        folder: name of its folder below the data root (clip-benchmark: `wds_<key>`).
        size: images per split; what `data check` counts.
        canvas: `native`, the ball at the images' own resolution; `model`, at the model's input size.
        native_px: side of the images when `canvas` is `native`.
        resize: how an image comes to a model canvas.
        names: class names in label order; blank names are legal (CLEVR has one).
        names_from: `folder`, where no public list is at hand: they are those of `classnames.txt`.
        templates: sentences with `{c}` for the class name; their unit embeddings are averaged.
        names_sha256: SHA-256 of the newline-joined names, checked when the card is read.
    """

    name: str
    title: str
    version: int = 1
    folder: str
    n_classes: int
    size: dict[str, int]
    canvas: Literal["native", "model"]
    native_px: int = 0
    resize: Resize = "bicubic"
    names: tuple[str, ...] = ()
    names_from: Literal["card", "folder"] = "card"
    templates: tuple[str, ...]
    names_sha256: str = ""
    templates_sha256: str = ""
    metric: Literal["top1"] = "top1"
    metric_official: str = "top1"
    real: bool = True
    licence: str
    source: Source = Source()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> DatasetCard:
        for field, value in (("name", self.name), ("folder", self.folder)):
            if not PLAIN.fullmatch(value):  # they become paths
                raise ValueError(f"{field} must be letters, digits and . _ - (found {value!r:.60})")
        if len(self.names) != (0 if self.names_from == "folder" else self.n_classes):
            raise ValueError(f"names has {len(self.names)} entries, expected n_classes = {self.n_classes}")
        if not self.templates or any("{c}" not in template for template in self.templates):
            raise ValueError("templates must be sentences that contain {c}")
        if self.canvas == "native" and self.native_px <= 0:
            raise ValueError("canvas = 'native' needs native_px, the side of the images in pixels")
        for field, lines in (("names_sha256", self.names), ("templates_sha256", self.templates)):
            stated = getattr(self, field)
            if stated and lines and stated != lines_sha256(lines):
                raise ValueError(f"{field} is {lines_sha256(lines)}, expected {stated}: the list was changed")
        return self


def lines_sha256(lines: tuple[str, ...] | list[str]) -> str:
    """SHA-256 of newline-joined lines: the identity of a list of names or templates."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Stage(BaseModel):
    """One attack of a chain: a plug-in and its fields, every number written out."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    attack: str

    @property
    def fields(self) -> dict[str, Any]:
        """The plug-in's own fields."""
        return dict(self.model_extra or {})


class AttackCard(Card):
    """A chain of attacks; each is given the survivors of the ones before.

    Attributes:
        rows: the fixed padded shape of every model call (DESIGN ruling 1); part of the fingerprint.
        stage: the attacks, in order.
        stop: when an image leaves: see `attacks.interface.Rows`.
    """

    name: str
    title: str
    version: int = 1
    rows: int = Field(default=32, ge=1)
    stop: Literal["first", "last", "best"] = "first"
    stage: tuple[Stage, ...]

    @model_validator(mode="after")
    def _stages(self) -> AttackCard:
        names = [stage.name for stage in self.stage]
        if not names or len(set(names)) != len(names):
            raise ValueError("a chain needs at least one stage, and stage names must differ")
        return self


class Suite(Card):
    """A named list of datasets under one threat: what makes two rows comparable.

    Attributes:
        n: images a dataset; 0 means all.
        sample: how they are drawn, by the smallest hashes of seed and key: `hash`, over the whole split;
            `stratified`, class by class in turn, so that few images still hold every class equally.
        subset: a file of image names, one a line, that are taken in its order instead.
        subset_sha256: of that file.
        means: further averages beside the one over all datasets, by name; never `unseen`, which is averaged
            over what the model and its parents were not trained on.
    """

    name: str
    title: str
    version: int = 1
    datasets: tuple[str, ...]
    split: str = "test"
    norm: Norm = "linf"
    eps: tuple[str, ...]
    n: int = Field(default=1000, ge=0)
    sample: Literal["hash", "stratified"] = "hash"
    seed: int = 0
    subset: str = ""
    subset_sha256: str = ""
    means: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _means(self) -> Suite:
        for name, members in self.means.items():
            foreign = sorted(set(members) - set(self.datasets))
            if name == "unseen" or foreign or not members:
                raise ValueError(f"means.{name} must be another name than unseen, over datasets of the suite")
        return self


class ModelCard(Card):
    """A public checkpoint: where its weights are, and how they are read.

    Attributes:
        base: model whose architecture, preprocessing and (without one of its own) text tower it has.
        loader: `open_clip`, by source; `weights`, a file; `transformers`, a folder; `none`, not published.
        file: name of the weights file.
        trained_on: datasets seen; with `"unknown"` when parents saw more than is listed.
    """

    name: str
    title: str
    defense: str
    base: str
    eps: str = ""
    norm: Norm = "linf"
    loader: Literal["open_clip", "weights", "transformers", "none"]
    source: str
    file: str = ""
    sha256: str = ""
    licence: str
    trained_on: tuple[str, ...]
    notes: tuple[str, ...] = ()


PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")

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
"""Names that the literature has for cards of ours."""

_include: list[Path] = []


def include(folders: list[Path]) -> None:
    """Search these folders for cards before the project's own; set once, by the door.

    Raises:
        InputError: a folder does not exist.
    """
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"--include {folder}", "no such folder", "a folder laid out like suites/")
    _include[:] = folders
    _paths.cache_clear()


def singular(kind: str) -> str:
    """`study` for `studies`, `suite` for `suites`."""
    return f"{kind[:-3]}y" if kind.endswith("ies") else kind.removesuffix("s")


def included() -> list[Path]:
    """The folders that `include` was given."""
    return list(_include)


def as_typed() -> str:
    """The folders of `include` as they are typed, behind any command line; empty without one."""
    return "".join(f" --include {folder}" for folder in _include)


@cache
def _paths(kind: str) -> dict[str, Path]:
    folder, _ = FOLDERS[kind]
    found: dict[str, Path] = {}
    for root in (home(), *reversed(_include)):
        found |= {path.stem: path for path in sorted((root / folder).glob("*.toml"))}
    return found


def names(kind: str) -> list[str]:
    """Names of all cards of a kind, sorted."""
    return sorted(_paths(kind))


def read(kind: str, name: str, record: type[C]) -> C:
    """The card of `kind` called `name`, or the TOML file at the path `name`.

    Raises:
        CardError: no such card, or the file breaks the schema; the message names file and key.
    """
    where = path(kind, name)
    card = parse(toml(where), record, str(where))
    own = str(getattr(card, "name", "x"))
    if not PLAIN.fullmatch(own):
        raise CardError(str(where), f"the name {own!r:.60}", "letters, digits and . _ -: it names files")
    return card


def path(kind: str, name: str) -> Path:
    """The file of the card of `kind` called `name`, or `name` itself when it ends in `.toml`.

    Raises:
        CardError: no such card; the message gives the nearest and all known names.
    """
    file = SAME.get((kind, name), name)
    found = Path(name) if name.endswith(".toml") else _paths(kind).get(file)
    if found is None:
        raise CardError(f"{singular(kind)} {name!r}", "no such card", do=nearest(name, _paths(kind)))
    return found


def toml(path: Path) -> dict[str, Any]:
    """The table of a TOML file, with `@file` strings replaced by that file's lines.

    A value `"@prompts/x.txt"` of `names` or `templates` means the lines of `x.txt` below the card home, so a
    list of a thousand names is written once and shared.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=number)
    except FileNotFoundError:
        raise CardError(str(path), "no such file", "a TOML card") from None
    except (ValueError, RecursionError) as error:  # TOML errors and undecodable bytes are ValueErrors, too
        raise CardError(str(path), f"not TOML ({error!s:.120})", "a TOML card") from None
    for key in ("names", "templates"):
        value = table.get(key)
        if isinstance(value, str) and value.startswith("@"):
            table[key] = _lines(path, value.removeprefix("@"))
        if isinstance(value, dict):
            files = {n: f for n, f in value.items() if isinstance(f, str) and f.startswith("@")}
            value.update({name: _lines(path, file.removeprefix("@")) for name, file in files.items()})
    return table


def _lines(card: Path, name: str) -> list[str]:
    for root in (card.parent.parent, home()):
        if (path := root / name).is_file() and path.resolve().is_relative_to(root.resolve()):
            try:
                return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            except UnicodeDecodeError:
                raise CardError(str(path), "unreadable", "UTF-8 text") from None
    raise CardError(str(card), f"names the file {name!r}, which does not exist", f"it below {home()}")


def subset(suite: Suite) -> tuple[str, ...]:
    """The image names of a suite that takes them from a file; the file must be the one that the suite means.

    Raises:
        CardError: no such file, or another SHA-256.
    """
    name = suite.subset.removeprefix("file:")
    found = next((at for root in (*_include, home(), Path()) if (at := root / name).is_file()), None)
    if found is None:
        raise CardError(f"suite {suite.name}", f"no file {name!r}", "it below a card home")
    content = found.read_bytes()
    sha = hashlib.sha256(content).hexdigest()
    if suite.subset_sha256 and sha != suite.subset_sha256:
        raise CardError(str(found), f"SHA-256 {sha[:16]}", suite.subset_sha256[:16], "get the right file")
    return tuple(content.decode("utf-8", "replace").split())


def parse(table: Mapping[str, Any], record: type[C], where: str) -> C:
    """A strict record from a table; a CardError names file, key, what was found and the nearest known key."""
    try:
        return record.model_validate(table)
    except ValidationError as error:
        unknown = [e for e in error.errors() if e["type"] == "extra_forbidden"]
        first = (unknown or error.errors())[0]  # a mistyped key is missing under its right name, too
        missing = [e for e in error.errors() if e["type"] == first["type"] == "missing"]
        places = [_one_line(".".join(str(part) for part in e["loc"])) for e in missing or [first]]
        place = ", ".join(places)
        if unknown:
            do = nearest(str(first["loc"][-1]), _known_keys(record, first["loc"][:-1]))
            raise CardError(where, f"unknown key {place!r}", do=do) from None
        found = "" if first["type"] == "missing" else f" (found {first['input']!r:.80})"
        raise CardError(where, f"{place or 'card'}: {_one_line(first['msg'])}{found}") from None


def _one_line(text: str) -> str:
    """The text as it is when it can be printed in a line, else quoted."""
    return text if text.isprintable() else f"{text!r:.200}"


def _known_keys(record: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the table at `path` inside `record`."""
    for part in path:
        field = record.model_fields.get(str(part))
        if field is None:
            continue  # an index into a list of tables
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        inner = [t for t in kinds if isinstance(t, type)]
        record = next((t for t in inner if issubclass(t, BaseModel)), record)
    return list(record.model_fields)
