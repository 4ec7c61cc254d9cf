"""Which recipe a run trains: found by the name of a recipe or a defense, and changed by settings.

Torch is imported only where a defense is combined with the recipe of another one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from robustbench_vlm.cards import overrides, plugins, reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.defenses.interface import Defense
from robustbench_vlm.errors import CardError, nearest


def resolve(
    name: str,
    recipe: str = "",
    settings: Sequence[str] = (),
    remark: Callable[[str], None] = lambda _: None,
) -> Recipe:
    """The recipe that `vlmrob train NAME [--recipe RECIPE] [--set key=value ...]` trains.

    Args:
        name: a recipe, a TOML file, or a defense. A defense alone takes its recipe `tiny-NAME`.
        recipe: with a defense as `name`: a recipe or a TOML file that gives models, data, attack and
            optimiser. If it is a recipe of another defense, that defense and its fields are replaced.
        settings: `key=value` each, applied last.
        remark: called with a line about each choice that was not typed.

    Raises:
        CardError: no such recipe or defense, a defense without a recipe, or a recipe that does not fit it.
    """
    known = reader.names("recipes")
    if not recipe and (name.endswith(".toml") or reader.has("recipes", name)):
        return _read(name, settings)
    _require_defense(name, known)
    if recipe:
        path = reader.path("recipes", recipe)
        table = reader.table("recipes", path)
        if _defense_of(table) == name:
            return _parsed(table, settings, str(path), path)
        remark(f"{recipe} is a recipe of {_defense_of(table)}: its defense is replaced by {name}")
        where = f"--recipe {recipe}"
        made = _parsed(_with_defense(table, name, settings, where), settings, where, path)
        _require_fit(made, where)
        return made
    if f"tiny-{name}" not in known:
        raise CardError(
            f"defense {name!r}",
            "it has no recipe of its own",
            "the recipe of another defense, to take models, data, attack and optimiser from",
            f"type: vlmrob train {name} --recipe {_similar(defense_class(name), known)}",
        )
    remark(f"no recipe was named: taking tiny-{name}, for the built-in tiny world")
    if f"paper-{name}" in known:
        remark(f"the paper's setting: vlmrob train {name} --recipe paper-{name}")
    return _read(f"tiny-{name}", settings)


def defense_class(name: str) -> type[Defense]:
    """The class of the defense `name`, registered or at `module:Name`.

    Raises:
        CardError: nothing of that name, or something else than a defense.
    """
    plugin = plugins.get("defenses", name)
    if not (isinstance(plugin, type) and issubclass(plugin, Defense)):
        expected = "a frozen dataclass that subclasses robustbench_vlm.defenses.interface.Defense"
        raise CardError(f"defense {name!r}", f"a {getattr(plugin, '__name__', plugin)!s:.40}", expected)
    return plugin


def built(table: Mapping[str, Any], where: str) -> Defense:
    """The defense of a recipe's table `[defense]`, with its fields set.

    Args:
        table: `name`, and the fields.
        where: what has the table, for messages.

    Raises:
        CardError: no name, an unknown defense or field, or a value that it does not take.
    """
    name = table.get("name")
    if not isinstance(name, str):
        raise CardError(where, "defense has no name", "[defense] name = 'mmt-ard' or another registered one")
    defense_class(name)
    fields = {key: value for key, value in table.items() if key != "name"}
    defense: Defense = plugins.build("defenses", name, fields, where)
    return defense


def _read(name: str, settings: Sequence[str]) -> Recipe:
    path = reader.path("recipes", name)
    table = reader.table("recipes", path)
    if not any(setting.startswith(("defense=", "defense.name=")) for setting in settings):  # typed
        plugins.require_allowed(_defense_of(table), f"{path}, defense.name")
    return _parsed(table, settings, str(path), path)


def _parsed(table: dict[str, Any], settings: Sequence[str], where: str, file: Path) -> Recipe:
    """The recipe of a table with settings; `file` is where the table was read from."""
    plain = copy.deepcopy(table)
    try:
        recipe = reader.parse(overrides.override(table, list(settings)), Recipe, where)
    except CardError as error:
        if settings and _is_recipe(plain):  # so it is the settings that are wrong
            typed = " ".join(f"--set {setting}" for setting in settings)
            raise CardError(typed, str(error).removeprefix(f"{where}: ")) from None
        raise
    reader.require_plain_name(recipe, where)
    return reader.shown_card("recipes", recipe, file)


def _is_recipe(table: dict[str, Any]) -> bool:
    try:
        reader.parse(table, Recipe, "")
    except CardError:
        return False
    return True


def _require_defense(name: str, recipes: Sequence[str]) -> None:
    """Refuse a name that is no defense; a `module:Name` is looked up when it is built."""
    if ":" not in name and name not in (known := plugins.names("defenses")):
        raise CardError(f"defense or recipe {name!r}", "no such thing", do=nearest(name, {*known, *recipes}))


def _defense_of(table: Mapping[str, Any]) -> str:
    """The name of the defense in a recipe's table; empty if there is none."""
    defense = table.get("defense")
    return str(defense.get("name", "")) if isinstance(defense, dict) else ""


def _with_defense(table: dict[str, Any], name: str, settings: Sequence[str], where: str) -> dict[str, Any]:
    """The table of a recipe with the defense `name` instead of its own, before the settings are applied.

    Models, data, attack and optimiser stay. Fields of the other defense are not carried over, nor are its
    notes, teachers of roles that the new defense, as it is set, does not have, or an attack that it does not
    use.
    """
    of_defense = [text for text in settings if text.partition("=")[0].partition(".")[0] == "defense"]
    own = overrides.override({"defense": {"name": name}}, of_defense)["defense"]
    defense = built(own if isinstance(own, dict) else {}, where)
    made = {key: value for key, value in table.items() if key != "notes"}
    made["defense"] = {"name": name}
    made["name"] = f"{name.rpartition(':')[2].lower()}-with-{table.get('name')}"
    made["title"] = f"{name}, with models, data, attack and optimiser of {table.get('name')}"
    if "teachers" in table:
        made["teachers"] = {
            role: table["teachers"][role] for role in defense.teachers if role in table["teachers"]
        }
    if not defense.adversarial:
        made.pop("inner", None)
    return made


def _require_fit(recipe: Recipe, where: str) -> None:
    """Refuse a recipe that lacks a teacher or the attack of its defense."""
    defense, name = built(recipe.defense, where), recipe.defense["name"]
    for role in defense.teachers:
        if role not in recipe.teachers:
            expected = f"teachers {sorted(defense.teachers)}, for {name}"
            raise CardError(where, f"no teacher {role!r}", expected, f"type --set teachers.{role}=MODEL")
    if defense.adversarial and recipe.inner is None:
        fitting = _similar(defense, reader.names("recipes"))
        do = f"type a recipe with one, for example --recipe {fitting}"
        raise CardError(where, "no [inner] table", f"an attack, for {name}", do)


def _similar(defense: Defense | type[Defense], recipes: Sequence[str]) -> str:
    """A recipe that fits a defense: the same teachers, and an attack exactly if it has one.

    Of several, the first by name whose images this package renders, so that it can be tried at once; without
    one of those, the first by name.
    """
    fitting = []
    for recipe in sorted(recipes):
        table = reader.toml(reader.path("recipes", recipe))
        same_roles = set(table.get("teachers", {})) == set(defense.teachers)
        if same_roles and ("inner" in table) == defense.adversarial:
            fitting.append((not _rendered(table), recipe))
    return min(fitting)[1] if fitting else "FILE.toml"


def _rendered(table: Mapping[str, Any]) -> bool:
    """Whether the images of a recipe, as its file has it, are rendered by this package and not fetched."""
    data = table.get("data")
    name = data.get("dataset") if isinstance(data, Mapping) else None
    return name in reader.names("datasets") and bool(reader.read("datasets", name, DatasetCard).made_by)
