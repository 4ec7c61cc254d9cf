"""Which recipe `vlmrob train NAME` means, and what a defense without one is told."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from robustbench_vlm import store
from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.defenses.interface import Defense
from robustbench_vlm.errors import CardError
from robustbench_vlm.training.prepare import build_defense
from robustbench_vlm.training.resolve import resolve


@dataclass(frozen=True)
class Own(Defense):
    """Somebody's defense, which no recipe names: `test_resolve:Own`."""

    strength: float = 1.0

    teachers = ("robust",)


def packaged(name):
    return reader.read("recipes", name, Recipe)


def test_a_recipe_is_taken_by_its_name_or_its_file(tmp_path):
    assert resolve("tiny-tecoa") == packaged("tiny-tecoa")
    path = reader.path("recipes", "tiny-tecoa")
    assert resolve(str(path)) == packaged("tiny-tecoa")
    assert resolve("tiny-tecoa", settings=["seed=7"]).seed == 7


def test_a_defense_takes_its_tiny_recipe_and_names_that_of_its_paper():
    remarks = []
    assert resolve("mmt-ard", remark=remarks.append) == packaged("tiny-mmt-ard")
    assert remarks == [
        "no recipe was named: taking tiny-mmt-ard, for the built-in tiny world",
        "the paper's setting: vlmrob train mmt-ard --recipe paper-mmt-ard",
    ]
    remarks.clear()
    resolve("trades", remark=remarks.append)
    assert remarks == ["no recipe was named: taking tiny-trades, for the built-in tiny world"]
    assert resolve("mmt-ard", "paper-mmt-ard-rn50") == packaged("paper-mmt-ard-rn50")


def test_a_recipe_of_another_defense_lends_everything_but_its_defense():
    remarks = []
    found = resolve("trades", "tiny-mmt-ard", ["defense.beta=3.0"], remarks.append)
    lent = packaged("tiny-mmt-ard")
    assert found.defense == {"name": "trades", "beta": 3.0}  # no weighting: that is a field of mmt-ard
    assert plugins.build("defenses", "trades", {"beta": 3.0}, "a test").beta == 3.0
    assert (found.name, found.teachers, found.notes) == ("trades-with-tiny-mmt-ard", {}, ())
    for field in ("student", "data", "inner", "optim", "probe", "seed"):
        assert getattr(found, field) == getattr(lent, field)
    assert remarks == ["tiny-mmt-ard is a recipe of mmt-ard: its defense is replaced by trades"]


def test_teachers_of_the_same_roles_stay_and_an_unused_attack_goes():
    assert resolve("single-teacher", "tiny-mmt-ard").teachers == {"robust": "tiny-robust-teacher"}
    assert resolve("clean", "tiny-tecoa").inner is None
    found = resolve("fare", "tiny-tecoa", ["teachers.anchor=tiny"])
    assert found.teachers == {"anchor": "tiny"}
    assert found.inner == packaged("tiny-tecoa").inner


@pytest.mark.parametrize(
    ("name", "recipe", "words"),
    [
        ("fare", "tiny-tecoa", "tiny-tecoa: no teacher 'anchor'; .*--set teachers.anchor=MODEL"),
        ("tecoa", "tiny-clean", r"--recipe tiny-clean: no \[inner\] table; .* --recipe tiny-mart"),
        ("tecoa", "tiny-teca", "recipe 'tiny-teca': no such card; did you mean 'tiny-tecoa'"),
        ("tecaa", "", "defense or recipe 'tecaa': no such thing; did you mean 'tecoa'"),
        ("collections:OrderedDict", "tiny-tecoa", "a frozen dataclass that subclasses"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_with_what_to_type(name, recipe, words):
    with pytest.raises(CardError, match=words) as error:
        resolve(name, recipe)
    assert "\n" not in str(error.value)


def test_the_teachers_of_another_recipe_are_those_of_the_defense_as_it_is_set():
    alone = ["weighting=static", "clean_weight=0", "attack_target=robust"]
    found = resolve("mmt-ard", "tiny-single-teacher", [f"defense.{setting}" for setting in alone])
    assert build_defense(found).teachers == ("robust",)
    assert found.teachers == packaged("tiny-single-teacher").teachers
    own = ["defense.inputs={robust='adv', other='clean'}", "defense.weights={robust=1, other=1}"]
    own.append("defense.attack_target=other")
    with pytest.raises(CardError, match=r"no teacher 'other'; .*--set teachers.other=MODEL"):
        resolve("multi-teacher", "tiny-mmt-ard", own)
    found = resolve("multi-teacher", "tiny-mmt-ard", [*own, "teachers.other=tiny"])
    assert found.teachers == {"robust": "tiny-robust-teacher", "other": "tiny"}
    assert set(build_defense(found).teachers) == {"robust", "other"}
    with pytest.raises(CardError, match="unknown key 'focuss' for mmt-ard"):
        resolve("mmt-ard", "tiny-single-teacher", ["defense.focuss=hard"])


def test_a_defense_without_a_recipe_is_told_a_line_that_works():
    with pytest.raises(CardError, match="no recipe of its own; expected the recipe of another") as error:
        resolve("test_resolve:Own")
    typed = str(error.value).partition("type: vlmrob train ")[2].split()
    assert typed[:2] == ["test_resolve:Own", "--recipe"]
    found = resolve(typed[0], typed[2], ["defense.strength=2.5"])
    assert found.defense == {"name": "test_resolve:Own", "strength": 2.5}
    assert set(found.teachers) == {"robust"}
    assert found.name == f"own-with-{typed[2]}"


def test_a_hint_prefers_images_that_this_package_renders_then_the_first_name(tmp_path):
    text = reader.path("recipes", "tiny-tecoa").read_text()
    for name, dataset in (("aaa", "cifar10"), ("aab", "tiny-seen"), ("aac", "tiny-seen")):
        changed = text.replace('"tiny-tecoa"', f'"{name}"').replace('"tiny-seen"', f'"{dataset}"')
        store.write(tmp_path / "recipes" / f"{name}.toml", changed.encode())
    reader.include([tmp_path])
    try:
        with pytest.raises(CardError, match=r"for example --recipe aab$"):
            resolve("tecoa", "tiny-clean")
        (tmp_path / "recipes" / "aab.toml").write_text("data = 3")
        with pytest.raises(CardError, match=r"for example --recipe aac$"):
            resolve("tecoa", "tiny-clean")
    finally:
        reader.include([])


def test_a_mistyped_name_is_answered_without_torch():
    code = """
import sys
from robustbench_vlm.errors import CardError
from robustbench_vlm.training.resolve import resolve
try:
    resolve("mmt-ardd")
except CardError:
    sys.exit("torch" in sys.modules)
sys.exit(2)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_name_of_the_registry_can_be_built():
    """Names are found by searching the source for `plugin =`, so the search must not find too much."""
    for kind in ("defenses", "attacks"):
        for name in plugins.names(kind):
            assert isinstance(plugins.get(kind, name), type)
    assert {"pgd", "fab", "square"} <= set(plugins.names("attacks"))
    assert not {"losses", "interface"} & set(plugins.names("defenses"))
