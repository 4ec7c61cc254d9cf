"""Plug-ins are found by name, filled strictly, and a mistyped name is helped."""

import dataclasses
import sys

import pytest

from robustbench_vlm.cards import plugins
from robustbench_vlm.errors import CardError


@dataclasses.dataclass(frozen=True)
class Mine:
    """A plug-in of somebody else's."""

    strength: float = 1.0
    steps: int = 3


@pytest.fixture
def here(monkeypatch):
    """This file as an importable module, whatever the test runner calls it."""
    monkeypatch.setitem(sys.modules, "my_package", sys.modules[__name__])
    return "my_package"


def test_the_folder_is_the_registry():
    found = plugins.names("defenses")
    assert {"clean", "fare", "mmt-ard", "single-teacher", "tecoa"} <= set(found)
    assert found == sorted(found)
    for name in found:
        assert dataclasses.is_dataclass(plugins.get("defenses", name))
    assert plugins.get("defenses", "mmt-ard").__module__ == "robustbench_vlm.defenses.mmt_ard"


@pytest.mark.parametrize("typed", ["mmtard", "mmt_ard", "mt-ard", "mmt-adr"])
def test_near_names(typed):
    with pytest.raises(CardError, match=r"unknown defense '.*': .*did you mean 'mmt-ard'.*known: .*tecoa"):
        plugins.get("defenses", typed)


def test_a_name_near_to_nothing_lists_all():
    with pytest.raises(CardError, match=r"known: .*mmt-ard") as caught:
        plugins.get("defenses", "zzzzzz")
    assert "did you mean" not in str(caught.value)


def test_module_and_name(here):
    assert plugins.get("attacks", f"{here}:Mine") is Mine
    assert plugins.build("attacks", f"{here}:Mine", {"steps": 7}, "card.toml") == Mine(steps=7)


@pytest.mark.parametrize("name", ["no_such_module_x:Mine", "my_package:Nobody"])
def test_module_or_name_that_is_not_there(here, name):
    with pytest.raises(CardError, match="module:Name of an importable class"):
        plugins.get("attacks", name)


def test_fields_are_read_strictly(here):
    name = f"{here}:Mine"
    with pytest.raises(CardError, match=r"card\.toml: unknown key 'stepz' for .*; did you mean 'steps'"):
        plugins.build("attacks", name, {"stepz": 7}, "card.toml")
    with pytest.raises(CardError, match=r"card\.toml, .*Mine: steps = 'many'; expected a valid integer"):
        plugins.build("attacks", name, {"steps": "many"}, "card.toml")


@dataclasses.dataclass(frozen=True)
class Point:
    """An entry point of an installed package."""

    name: str
    value: str = "package:Mine"
    error: Exception | None = None

    def load(self):
        if self.error:
            raise self.error
        return Mine


def offered(monkeypatch, *points):
    monkeypatch.setattr(plugins, "_points", lambda kind: points if kind == "attacks" else ())


def test_a_name_of_two_plug_ins_is_refused_with_both_origins(monkeypatch):
    """Else what is installed would decide which attack a result is of."""
    offered(monkeypatch, Point("pgd"), Point("mine"), Point("mine", "other:Mine"))
    with pytest.raises(
        CardError, match=r"attack 'pgd': 2 plug-ins: robustbench_vlm.attacks.pgd, package:Mine"
    ):
        plugins.get("attacks", "pgd")
    with pytest.raises(CardError, match=r"attack 'mine': 2 plug-ins: package:Mine, other:Mine; .*uninstall"):
        plugins.get("attacks", "mine")
    assert plugins.get("attacks", "fab").__module__ == "robustbench_vlm.attacks.fab.fab"


def test_an_entry_point_that_cannot_be_imported_is_one_line(monkeypatch):
    offered(monkeypatch, Point("mine", error=ModuleNotFoundError("No module named 'gone'")))
    with pytest.raises(CardError, match=r"attack 'mine': package:Mine cannot be imported .*'gone'"):
        plugins.get("attacks", "mine")


def test_entry_points_of_other_packages(monkeypatch):
    offered(monkeypatch, Point("mine"))
    assert "mine" in plugins.names("attacks")
    assert plugins.get("attacks", "mine") is Mine
    assert "mine" not in plugins.names("defenses")
