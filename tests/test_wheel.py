"""The wheel works without the checkout: cards, configurations and weights travel inside it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytest.importorskip("hatchling", reason="the wheel is built without the network: pip install -e '.[dev]'")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def typed(wheel, tmp_path_factory):
    """Runs `vlmrob ...` from the installed wheel, in an empty folder, and gives back what it prints."""
    site, empty = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    options = ["--no-deps", "--no-compile", "--quiet", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True)

    def run(*words, code=None):
        command = [sys.executable, *(["-c", code] if code else ["-m", "robustbench_vlm"]), *words]
        environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "120"}
        done = subprocess.run(
            command, cwd=empty, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(code="import robustbench_vlm; print(robustbench_vlm.__file__)")
    assert Path(where.strip()).is_relative_to(site)  # and not the checkout
    return run


def test_the_wheel_holds_all_of_the_package_and_its_cards(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = set()
    for folder, name in (
        (ROOT / "robustbench_vlm", "robustbench_vlm"),
        (ROOT / "suites", "robustbench_vlm/_suites"),
    ):
        files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        wanted |= {f"{name}/{path.relative_to(folder).as_posix()}" for path in files}
    assert wanted <= held, sorted(wanted - held)[:5]
    wanted.add("robustbench_vlm/_leaderboards/published.csv")
    assert wanted <= held
    others = {name for name in held - wanted if ".dist-info/" not in name}
    assert not others, sorted(others)[:5]
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert "robustbench_vlm/py.typed" in held


def test_help(typed):
    assert "eval" in typed("--help")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("suites", "zeroshot"), ("datasets", "imagenet"), ("defenses", "mmt-ard"), ("attacks", "pgd")],
)
def test_lists(typed, kind, name):
    assert name in typed("list", kind)


def test_every_card_in_the_wheel_is_readable(typed):
    code = (
        "from robustbench_vlm.cards import reader\n"
        "assert reader.home().name == '_suites', reader.home()\n"
        "for kind, (_, record) in reader.FOLDERS.items():\n"
        "    for name in reader.names(kind):\n"
        "        card = reader.read(kind, name, record)\n"
        "        print(kind, card.name)\n"
    )
    assert "datasets imagenet" in typed(code=code)
