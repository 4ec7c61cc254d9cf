"""Everything that has a name, and what this machine can do: the commands `list`, `show` and `doctor`."""

from __future__ import annotations

import dataclasses
import inspect
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from robustbench_vlm import store
from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.cards.card import Card
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.model import ModelCard
from robustbench_vlm.cards.protocol import PromptPack, Protocol
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.cards.study import Study
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.defenses.interface import Defense
from robustbench_vlm.errors import InputError, nearest
from robustbench_vlm.training import cost
from robustbench_vlm.version import __version__

CARDS: dict[str, type[Card]] = {
    "attacks": AttackCard,
    "suites": Suite,
    "datasets": DatasetCard,
    "recipes": Recipe,
    "protocols": Protocol,
    "prompts": PromptPack,
    "studies": Study,
}
STARTS = {"tiny-teacher-start": "vlmrob-tiny-teacher"}  # made by `make tiny-weights`, not by a recipe
KINDS = ("attacks", "datasets", "defenses", "models", "prompts", "protocols", "recipes", "studies", "suites")


def _kind(what: str) -> str:
    kind = {"study": "studies"}.get(what, what if what.endswith("s") else f"{what}s")
    if kind not in KINDS:
        raise InputError(f"{what!r}", "not a kind of thing", do=nearest(kind, KINDS))
    return kind


def names(what: str) -> list[tuple[str, str]]:
    """Name and title of everything of a kind, such as `attacks`.

    Raises:
        InputError: no such kind.
    """
    kind = _kind(what)
    if kind in CARDS:
        cards = [(name, _card(kind, name).model_dump()) for name in _shown(kind)]
        return [(name, str(card["title"])) for name, card in cards]
    if kind == "defenses":
        return sorted(plugins.titles(kind).items())
    return [(row["name"], row["title"]) for row in models()]


def _shown(kind: str) -> list[str]:
    """Names of all cards of a kind, as they are shown."""
    return [reader.shown(kind, name) for name in reader.names(kind)]


def _card(kind: str, name: str) -> Card:
    return reader.read(kind, name, CARDS[kind])


def models() -> list[dict[str, str]]:
    """Packaged and public checkpoints, one row each: see `_row` for the columns."""
    from robustbench_vlm.models import model_ids, public

    rows = []
    for name in model_ids.packaged():
        card = store.read_json(model_ids.PACKAGED / name / "card.json")
        data = "unknown data" if card["trained_on"] is None else ", ".join(card["trained_on"])
        title = f"{card['parameters'] / 1e3:.0f}k parameters, trained on {data or 'no listed dataset'}"
        eps = str((card["recipe"].get("inner") or {}).get("eps", ""))
        facts = (name, title, card["defense"], card["arch"], eps, "packaged", "Apache-2.0", "here")
        rows.append(_row(*facts))
    for name in _shown("models"):
        known = reader.read("models", name, ModelCard)
        state = "here" if public.here(known) else "not published" if known.loader == "none" else "not here"
        facts = (name, known.title, known.defense, known.base, known.eps, known.source, known.licence, state)
        rows.append(_row(*facts))
    rows.append(_row("ARCH:TAG", "any open_clip name, e.g. ViT-B-32:openai"))
    return [*rows, _row("DIR", "a checkpoint folder or one of transformers; a weights file with --arch")]


def _row(*facts: str) -> dict[str, str]:
    columns = ("name", "title", "defense", "architecture", "eps", "source", "licence", "weights")
    return dict(zip(columns, [*facts, *[""] * (len(columns) - len(facts))], strict=True))


def list_attacks() -> list[str]:
    """Names of the attack chains that `attack` and `evaluate` take.

    Example:
        >>> "autoattack" in list_attacks()
        True
    """
    return _shown("attacks")


def list_defenses() -> list[str]:
    """Names of the defenses that `train` takes.

    Example:
        >>> "mmt-ard" in list_defenses()
        True
    """
    return plugins.names("defenses")


def list_suites() -> list[str]:
    """Names of the suites, which are lists of datasets that are evaluated together.

    Example:
        >>> "tiny" in list_suites()
        True
    """
    return _shown("suites")


def list_datasets() -> list[str]:
    """Names of the datasets that have a card; their images may have to be fetched.

    Example:
        >>> "tiny-digits" in list_datasets()
        True
    """
    return _shown("datasets")


def list_models() -> list[str]:
    """Names of the checkpoints that ship with the package, then of the public ones that have a card.

    `load_model` takes more than these: checkpoint folders, weights files, and every model of open_clip.

    Example:
        >>> list_models()[0]
        'tiny'
    """
    from robustbench_vlm.models import model_ids

    return [*model_ids.packaged(), *_shown("models")]


def list_recipes() -> list[str]:
    """Names of the recipes that `train` takes.

    Example:
        >>> "tiny-mmt-ard" in list_recipes()
        True
    """
    return _shown("recipes")


def details(what: str, name: str) -> dict[str, Any]:
    """The card, or all known facts, of the thing of that kind and name.

    Raises:
        InputError: no such kind, or nothing of that name.
    """
    kind = _kind(what)
    if kind == "recipes":
        recipe = reader.read(kind, name, Recipe)
        defense = _defense(recipe)
        table = recipe.model_dump(mode="json", context={"all": True})
        table["defense"] = {"name": recipe.defense["name"], **dataclasses.asdict(defense)}
        return {**table, "estimate": estimate(recipe, defense)}
    if kind in CARDS:
        return _card(kind, name).model_dump(mode="json")
    if kind == "defenses":
        plugin = plugins.get(kind, name)
        fields = {
            field.name: {**_default(field), "type": str(field.type)} for field in dataclasses.fields(plugin)
        }
        module = inspect.getmodule(plugin)
        teachers = list(getattr(plugin, "teachers", ()))
        return {"name": name, "fields": fields, "teachers": teachers, "doc": inspect.getdoc(module)}
    from robustbench_vlm.models import model_ids, public

    folder = model_ids.folder_of(name)
    if folder is None:
        if reader.has("models", name):
            known = reader.read("models", name, ModelCard)
            where = {"folder": str(public.folder(known)), "here": public.here(known)}
            fetch = {} if known.loader == "none" else {"fetch": public.fetch(known)}
            return {**known.model_dump(mode="json"), **where, **fetch}
        known_names = [*model_ids.packaged(), *_shown("models")]
        found = "no packaged or public checkpoint, and no folder"
        raise InputError(f"model {name!r}", found, do=nearest(name, known_names))
    from robustbench_vlm.models import checkpoint_card

    return checkpoint_card.read_card(folder).model_dump(mode="json")


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """The default of a field under the key `default`; nothing if a value has to be given."""
    if field.default_factory is not dataclasses.MISSING:
        return {"default": field.default_factory()}
    return {} if field.default is dataclasses.MISSING else {"default": field.default}


def _defense(recipe: Recipe) -> Any:  # noqa: ANN401 - the plug-in's type
    fields = {key: value for key, value in recipe.defense.items() if key != "name"}
    name, where = str(recipe.defense.get("name")), f"recipe {recipe.name}"
    plugins.require_allowed(name, f"{where}, defense.name")
    return plugins.build("defenses", name, fields, where)


def estimate(recipe: Recipe, defense: Defense) -> dict[str, Any]:
    """Epochs, operations and memory of a recipe (`cost.estimate`), or why they are unknown."""
    passes = defense.passes()
    if passes is None:
        return {"unknown": f"defense {recipe.defense['name']} does not say what a step costs"}
    towers = {}
    staged = {
        f"{role} until {phase.until:g}": phase.model
        for role, phases in recipe.phases.items()
        for phase in phases
    }
    for role, model in {"student": recipe.student, **recipe.teachers, **staged}.items():
        config = _config(model)
        if config is None:
            return {"unknown": f"the architecture of {role} {model!r}, which is not on this machine"}
        tower = cost.tower(config)
        if tower is None:
            return {"unknown": f"what {role} {model!r} costs: no plain ViT or ModifiedResNet of open_clip"}
        towers[role] = tower
    data = reader.read("datasets", recipe.data.dataset, DatasetCard)
    images = recipe.data.n or data.size.get(recipe.data.split, 0)
    return cost.estimate(recipe, passes, towers.pop("student"), towers, images)


def _config(model: str) -> dict[str, Any] | None:
    """The configuration of a model; of a run that does not exist yet, that of its recipe's student."""
    from robustbench_vlm.models import model_ids, openclip, zoo

    name = Path(model).name
    while model_ids.folder_of(model) is None and model != name and reader.has("recipes", name):
        model = reader.read("recipes", name, Recipe).student
        name = Path(model).name
    return openclip.config(STARTS.get(name, zoo.arch_of(model)))


VARIABLES = (
    "VLMROB_DATA",
    "VLMROB_CACHE",
    "VLMROB_MODELS",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "GOMP_SPINCOUNT",
)
"""Environment variables that change what the commands do."""


def doctor(data_root: Path = Path("data")) -> list[tuple[str, str, str]]:
    """What this machine has: rows of (what, what was found, what to do about it); torch is not imported.

    Args:
        data_root: folder of the datasets.
    """
    from robustbench_vlm.backends.installed import PACKAGES, installed, version
    from robustbench_vlm.models import model_ids

    rows = [
        ("vlmrob", __version__, ""),
        ("python", platform.python_version(), ""),
        ("cores", str(os.cpu_count()), "set OMP_NUM_THREADS to change how many torch uses"),
        *_accelerators(),
    ]
    for package in ("torch", "torchvision", "open_clip_torch", "peft", "safetensors", "pandas", "pyarrow"):
        rows.append((package, _version(package), ""))
    for engine, (modules, how) in PACKAGES.items():
        found = installed(modules)
        rows.append((f"engine {engine}", version(found) if found else "not there", "" if found else how))
    packaged = ", ".join(model_ids.packaged())
    rows.append(("packaged models", packaged or "none", "" if packaged else "make tiny-weights"))
    rows += _datasets(data_root)
    rows.append(("cache", str(store.cache_folder()), "set VLMROB_CACHE to move it"))
    rows += [(name, os.environ.get(name) or "not set", "") for name in VARIABLES]
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    rows.append(
        ("free disk here", f"{free:.0f} GiB", "" if free > 30 else "suite zeroshot needs 15 to 30 GB of data")
    )
    return rows


def _accelerators() -> list[tuple[str, str, str]]:
    """The GPUs that the driver lists, or that there is none."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0 and done.stdout.strip():
            return [(f"cuda:{i}", name, "") for i, name in enumerate(done.stdout.strip().splitlines())]
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return [("gpu", "of Apple", "--device mps is accepted where torch has it, and is not tested")]
    return [("gpu", "none", "ImageNet-sized models need one; the tiny world does not")]


def _datasets(root: Path) -> list[tuple[str, str, str]]:
    cards = [reader.read("datasets", name, DatasetCard) for name in reader.names("datasets")]
    there = [card.name for card in cards if (root / card.folder).is_dir()]
    found = f"{len(there)} of {len(cards)}: {', '.join(there)}" if there else f"none of {len(cards)}"
    do = "" if there else "vlmrob data fetch SUITE; those of the tiny world are rendered when needed"
    return [
        ("data root", str(root.resolve()), "set VLMROB_DATA or --data-root"),
        ("datasets there", found, do),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not there"
