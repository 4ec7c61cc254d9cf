"""Whose folder a training may write into; models are not imported, so that a launcher asks first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robustbench_vlm import store
from robustbench_vlm.cards import plugins
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.errors import InputError, some


def folder_of(recipe: Recipe) -> Path:
    """The checkpoint folder of a run that was given none: `runs/<recipe>-<hash>`."""
    return Path("runs") / f"{store.file_name(recipe.name)}-{recipe.fingerprint[:8]}"


def refuse_other_runs(out: Path, recipe: Recipe, *, resume: bool = True) -> None:
    """Refuse a folder that belongs to another recipe, or that no recipe made.

    Args:
        out: checkpoint folder of the run.
        recipe: of the run.
        resume: whether `out` may hold an earlier run of it.

    Raises:
        InputError: the message names the keys that differ, with both values.
    """
    if not resume and out.exists() and any(out.iterdir()):
        expected = "an empty folder with --no-resume"
        raise InputError(f"--out {out}", "not empty", expected, "choose another one")
    path, do = out / "recipe.json", "choose another folder"
    if path.exists():
        earlier = store.read_json(path)
        if not isinstance(earlier, dict) or earlier.get("fingerprint") != recipe.fingerprint:
            changed = differences(earlier, recipe.model_dump(mode="json"))
            found = f"a run of another recipe is in it, with {some(changed) or 'another fingerprint'}"
            raise InputError(f"--out {out}", found, f"the recipe {recipe.name} as it is now", do)
        if {name: earlier.get(name) for name in _code(recipe)} != _code(recipe):
            found = f"a run whose defense {recipe.defense['name']} had other code is in it"
            raise InputError(f"--out {out}", found, "the code that the run began with", do)
    elif (out / "card.json").exists():
        raise InputError(f"--out {out}", "a checkpoint that this recipe did not make is in it", do=do)


def facts(recipe: Recipe) -> dict[str, Any]:
    """What `recipe.json` says: the recipe, its fingerprint, and the code of a defense of somebody else."""
    return {"fingerprint": recipe.fingerprint, **_code(recipe), **recipe.model_dump(mode="json")}


def _code(recipe: Recipe) -> dict[str, str]:
    """The hash of the file of a defense that is not of this package; empty for others."""
    code = plugins.code_sha256(plugins.get("defenses", str(recipe.defense["name"])))
    return {"defense_code_sha256": code} if code else {}


UNHASHED = ("fingerprint", "defense_code_sha256")
"""Keys of `recipe.json` that are not keys of a recipe."""


def differences(earlier: object, now: object, key: str = "") -> list[str]:
    """`optim.lr = 0.1 (now 0.01)` for every value of two recipes, as plain values, that is not the same."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        keys = [name for name in dict.fromkeys([*now, *earlier]) if key or name not in UNHASHED]
        lines = [
            differences(earlier.get(name), now.get(name), f"{key}.{name}" if key else name) for name in keys
        ]
        return [line for part in lines for line in part]
    return [] if earlier == now else [f"{key} = {_plain(earlier)} (now {_plain(now)})"]


def _plain(value: object) -> str:
    return "nothing" if value is None else str(value)
