"""`vlmrob new`: write a card, or a Python file and its card, to start from."""

from __future__ import annotations

import ast
import importlib.util
import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from robustbench_vlm import console, store
from robustbench_vlm.cards import reader, template
from robustbench_vlm.cards.card import PLAIN
from robustbench_vlm.cards.fields import described
from robustbench_vlm.errors import InputError, nearest

TEMPLATES = Path(__file__).parent / "templates"

CARDS: dict[str, dict[str, Any]] = {
    "dataset": {
        "n_classes": 2,
        "size": {"test": 1000},
        "canvas": "model",
        "names": ["red", "blue"],
        "templates": ["a photo of a {c}.", "a picture of a {c}."],
        "licence": "not stated",
    },
    "suite": {"datasets": ["tiny-colours", "tiny-letters"], "eps": ["2/255", "4/255"], "n": 100},
    "model": {
        "defense": "none",
        "base": "vlmrob-tiny:random",
        "loader": "open_clip",
        "source": "vlmrob-tiny:random",
        "licence": "not stated",
        "trained_on": ["unknown"],
    },
    "recipe": {
        "student": "tiny",
        "defense": {"name": "tecoa"},
        "data": {"dataset": "tiny-seen", "split": "train", "template": "this is a photo of a {c}"},
        "inner": {"norm": "linf", "eps": "4/255", "steps": 5, "step_size": "1/255"},
        "optim": {"lr": 1e-3, "weight_decay": 1e-4, "steps": 400, "warmup": 28, "batch_size": 128},
        "probe": {"every": 100, "n": 240, "split": "val"},
    },
}
"""Example values of the cards that are written: each card can be listed, shown and run as it is."""

CHAIN = {"rows": 16, "stop": "last"}
STAGE = {"loss": "ce", "steps": 10, "step_size": "eps/4", "decay": 0.9}

HEADING = "A card of kind {kind}. Replace the example values; keys in comments show their defaults."
KINDS = ("attack", "dataset", "defense", "model", "recipe", "suite")


@dataclass(frozen=True)
class Start:
    """What is written for one kind, and the commands that use it.

    Attributes:
        files: content by path.
        next: command lines to type after it, each with the reason in front.
    """

    files: dict[Path, str]
    next: tuple[str, ...]


def new(
    kind: Annotated[str, typer.Argument(help="dataset, defense, attack, suite, model or recipe.")],
    name: Annotated[str, typer.Argument(help="Its name: letters, digits and . _ -")],
    out: Annotated[Path, typer.Option(help="Folder to write to, which --include then names.")] = Path(
        "cards"
    ),
) -> None:
    """Write a card, or a Python file and its card, to start from; existing files are never overwritten."""
    singular = reader.singular(kind)
    if singular not in KINDS:
        raise InputError(
            f"new {kind}", "not a kind of thing that can be started", do=nearest(singular, KINDS)
        )
    _require_free(singular, name)
    start = _code(singular, name, out) if singular in ("defense", "attack") else _card(singular, name, out)
    for path in start.files:
        if path.exists():
            raise InputError(str(path), "exists already", "no such file", "choose another name, or --out")
    for path, text in start.files.items():
        store.write(path, text.encode())
        console.result(str(path))
    for line in start.next:
        console.remark(line)


def _require_free(kind: str, name: str) -> None:
    """Refuse a name that cannot name files, or that the project or an included folder uses already."""
    where = f"new {kind} {name!r:.80}"
    if not PLAIN.fullmatch(name) or store.file_name(name) != name:  # a card is found by the name of its file
        raise InputError(where, "not a name", "letters, digits and . _ -, beginning with a letter or digit")
    folder = f"{kind}s"
    taken = reader.names(folder) if folder in reader.FOLDERS else []
    if kind == "defense":
        from robustbench_vlm.cards import plugins

        taken = plugins.names(folder)
    if name in taken:
        raise InputError(
            where, f"there is a {kind} of that name", "a name of its own", f"see vlmrob list {folder}"
        )


def _card(kind: str, name: str, out: Path) -> Start:
    facts = {"name": name, "title": f"TODO: one line about {name}", **CARDS[kind]}
    if kind == "dataset":
        facts |= {"folder": f"wds_{name}"}
    include = f" --include {out}{reader.as_typed()}"
    following = {
        "dataset": (
            f"write its images: vlmrob data export FOLDER --name {name}{include}",
            f"then: vlmrob eval --model tiny --dataset {name}{include}",
        ),
        "suite": (f"next: vlmrob eval --model tiny --attack pgd20 --suite {name}{include}",),
        "model": (f"next: vlmrob eval --model {name} --attack pgd20 --suite tiny{include}",),
        "recipe": (f"next: vlmrob train {name}{include}",),
    }[kind]
    return Start({_path(kind, name, out): _text(kind, facts)}, following)


def _code(kind: str, name: str, out: Path) -> Start:
    """A Python file of `cli/templates` under the names of the new thing, and the card that runs it."""
    module = re.sub(r"[-.]", "_", name)
    if not module.isidentifier() or keyword.iskeyword(module):
        found = "not the name of a Python file"
        raise InputError(f"new {kind} {name}", found, "letters, digits and _ -, beginning with a letter")
    if importlib.util.find_spec(module) is not None:
        raise InputError(f"new {kind} {name}", f"Python has a module {module} already", "a name of its own")
    class_name = "".join(word.capitalize() for word in module.split("_"))
    source = (TEMPLATES / f"{kind}.py").read_text(encoding="utf-8")
    meanings = _attributes(source, f"My{kind.capitalize()}")
    source = source.replace(f"My{kind.capitalize()}", class_name)
    plugin = f"{module}:{class_name}"
    facts: dict[str, Any] = {"name": name, "title": f"TODO: one line about {name}"}
    if kind == "defense":
        facts |= {**CARDS["recipe"], "defense": {"name": plugin, "clean_weight": 0.5}}
        card_kind, line = "recipe", f"vlmrob train {name}"
    else:
        facts |= {**CHAIN, "stage": [{"name": name, "attack": plugin, **STAGE}]}
        card_kind, line = "attack", f"vlmrob eval --model tiny --attack {name} --suite tiny --n 10"
    files = {out / f"{module}.py": source, _path(card_kind, name, out): _text(card_kind, facts, meanings)}
    path_note = f"Python must find {module}.py: PYTHONPATH={out}, or the folder of an installed package"
    return Start(
        files, (path_note, f"next: PYTHONPATH={out} {line} --allow-code --include {out}{reader.as_typed()}")
    )


def _path(kind: str, name: str, out: Path) -> Path:
    folder, _ = reader.FOLDERS[f"{kind}s"]
    return out / folder / f"{name}.toml"


def _attributes(source: str, class_name: str) -> dict[str, str]:
    """The attributes that the docstring of a class describes, read without running the file."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return described(next(ast.get_docstring(node) or "" for node in classes if node.name == class_name))


def _text(kind: str, facts: dict[str, Any], meanings: Mapping[str, str] | None = None) -> str:
    _, record = reader.FOLDERS[f"{kind}s"]
    return template.Template(record, facts, meanings or {}).render(HEADING.format(kind=kind))
