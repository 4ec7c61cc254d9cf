"""The pages of docs/ are followed to the letter: files are written, commands and Python are run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run_command
from PIL import Image

DOCS = Path(__file__).parent.parent / "docs"
FENCE = re.compile(r"^```(\S*)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """(language, file name or empty, text) of each fenced block of a page, in order."""
    return [(kind, file, text) for kind, file, text in FENCE.findall((DOCS / page).read_text("utf-8"))]


@pytest.fixture
def squares_here(tmp_path, monkeypatch):
    """An empty folder to work in, from which Python files can be imported, with the images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, colour in (("red", (220, 30, 30)), ("blue", (30, 60, 220))):
        (Path("squares") / name).mkdir(parents=True)
        for i in range(4):
            shade = tuple(max(0, value - 9 * i) for value in colour)
            Image.new("RGB", (32, 32), shade).save(f"squares/{name}/{i}.png")


def follow(page, monkeypatch):
    """Write the files and run the commands of a page, in the working directory; returns the commands."""
    typed = []
    for kind, file, text in blocks(page):
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text(text, encoding="utf-8")
        for line in text.splitlines() if kind == "console" else ():
            program, *words = shlex.split(line.removeprefix("$ "))
            if program == "python":
                subprocess.run([sys.executable, *words], check=True)
            else:
                assert program == "vlmrob", line
                assert run_command(monkeypatch, *words) == 0, line
            typed.append(line)
    return typed


def test_the_examples_of_adding_things_run(tmp_path, monkeypatch, capsys, squares_here):
    typed = follow("adding.md", monkeypatch)
    assert len(typed) >= 12
    written = sorted(path.name for path in Path("leaderboards").iterdir())
    assert {"colours.csv", "colours.md"} <= set(written)


def test_the_page_about_python_runs(squares_here):
    names = {}
    for kind, _, text in blocks("python.md"):
        assert kind == "python"
        exec(compile(text, "docs/python.md", "exec"), names)
    assert set(names["result"].robust) == {"pgd20"}
    assert len(names["rows"]) == 2
    assert Path("leaderboards/tiny.csv").is_file()
    assert names["student"].image_size == 32
