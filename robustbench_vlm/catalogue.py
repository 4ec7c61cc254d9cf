"""What can be named on the command line, and what this machine has: the verbs `list`, `show` and `doctor`."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from robustbench_vlm import cards, registry
from robustbench_vlm.errors import InputError, nearest

CARDS: dict[str, type[cards.Card]] = {
    "attacks": cards.AttackCard,
    "suites": cards.Suite,
    "datasets": cards.DatasetCard,
    "recipes": cards.Recipe,
    "protocols": cards.Protocol,
    "prompts": cards.PromptPack,
}
KINDS = ("attacks", "datasets", "defenses", "models", "prompts", "protocols", "recipes", "suites")


def _kind(what: str) -> str:
    kind = what if what.endswith("s") else f"{what}s"
    if kind not in KINDS:
        raise InputError(f"{what!r}", "not a kind of thing", do=nearest(kind, KINDS))
    return kind


def names(what: str) -> list[tuple[str, str]]:
    """(name, one line about it) of everything of a kind.

    Raises:
        InputError: no such kind.
    """
    kind = _kind(what)
    if kind in CARDS:
        read = [(name, cards.read(kind, name, CARDS[kind])) for name in cards.names(kind)]
        return [(name, str(card.model_dump()["title"])) for name, card in read]
    if kind == "defenses":
        return [(name, _first_line(registry.get(kind, name))) for name in registry.names(kind)]
    from robustbench_vlm.models import checkpoint, zoo

    rows = []
    for name in zoo.packaged():
        card = checkpoint.read_card(zoo.PACKAGED / name)
        seen = (
            "unknown data" if card.trained_on is None else ", ".join(card.trained_on) or "no listed dataset"
        )
        facts = f"{card.arch}, {card.parameters / 1e3:.0f}k parameters, defense {card.defense}"
        rows.append((name, f"{facts}, trained on {seen}"))
    return [*rows, ("ARCH:TAG", "any open_clip name, e.g. ViT-B-32:openai"), ("DIR", "a checkpoint folder")]


def details(what: str, name: str) -> dict[str, Any]:
    """Everything known about one thing.

    Raises:
        InputError: no such kind, or nothing of that name.
    """
    kind = _kind(what)
    if kind in CARDS:
        return cards.read(kind, name, CARDS[kind]).model_dump(mode="json")
    if kind == "defenses":
        plugin = registry.get(kind, name)
        fields = {
            field.name: {"default": field.default, "type": str(field.type)}
            for field in dataclasses.fields(plugin)
        }
        module = inspect.getmodule(plugin)
        teachers = list(getattr(plugin, "teachers", ()))
        return {"name": name, "fields": fields, "teachers": teachers, "doc": inspect.getdoc(module)}
    from robustbench_vlm.models import checkpoint, zoo

    folder = zoo.folder_of(name)
    if folder is None:
        raise InputError(
            f"model {name!r}", "no packaged checkpoint or folder", do=nearest(name, zoo.packaged())
        )
    return checkpoint.read_card(folder).model_dump(mode="json")


def _first_line(plugin: type) -> str:
    module = inspect.getmodule(plugin)
    return (inspect.getdoc(module) or inspect.getdoc(plugin) or "").split("\n")[0]


def doctor() -> list[tuple[str, str, str]]:
    """(what, what was found, what to do about it) for everything that decides what this machine can do."""
    import torch

    from robustbench_vlm.models import zoo

    rows = [
        ("python", platform.python_version(), ""),
        ("torch", torch.__version__, ""),
        (
            "cores",
            f"{os.cpu_count()}, torch uses {torch.get_num_threads()}",
            "set OMP_NUM_THREADS to change it",
        ),
    ]
    if torch.cuda.is_available():
        rows += [(f"cuda:{i}", torch.cuda.get_device_name(i), "") for i in range(torch.cuda.device_count())]
    else:
        rows.append(("gpu", "none", "ImageNet-sized models need one; the tiny world does not"))
    for package in ("open_clip_torch", "peft", "safetensors", "pandas", "pyarrow"):
        rows.append((package, _version(package), ""))
    reference = importlib.util.find_spec("autoattack") or importlib.util.find_spec("pyautoattack")
    do = "" if reference else "pip install 'robustbench_vlm[autoattack]', for parity tests"
    rows.append(("autoattack", "there" if reference else "not there", do))
    found = importlib.util.find_spec("torchattacks")
    do = (
        ""
        if found
        else "pip install --no-deps torchattacks (its wheel also brings a package named robustbench)"
    )
    rows.append(("torchattacks", "there" if found else "not there", do))
    rows.append(
        (
            "packaged models",
            ", ".join(zoo.packaged()) or "none",
            "" if zoo.packaged() else "make tiny-weights",
        )
    )
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    rows.append(
        ("free disk here", f"{free:.0f} GiB", "" if free > 30 else "suite zeroshot needs 15 to 30 GB of data")
    )
    return rows


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not there"
