"""Tables on a terminal: words stay whole, whatever the width."""

import io

import pytest
from rich.console import Console

from robustbench_vlm import console

NAME = "fare4-convnext-base-w-laion-tower"
ROWS = [[NAME, "FARE on a ConvNeXt, from the LAION start", "packaged"], ["tiny", "", "here"]]
COLUMNS = ["name", "what it is", "weights"]


@pytest.fixture
def printed(monkeypatch):
    """What `console.show` prints on a terminal of some width."""

    def show(width):
        stream = io.StringIO()
        terminal = Console(file=stream, width=width, force_terminal=True, soft_wrap=True, color_system=None)
        monkeypatch.setattr(console, "out", terminal)
        console.show("models", COLUMNS, ROWS)
        return stream.getvalue()

    return show


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_no_name_is_ever_broken(printed, width):
    assert NAME in printed(width)


def test_a_wide_terminal_shows_a_table_and_a_narrow_one_blocks(printed):
    assert "┃ name" in printed(100)
    text = printed(50)
    assert "┃" not in text
    blocks = text.split("\n\n")
    assert blocks[0].splitlines()[1:3] == [
        f"name        {NAME}",
        "what it is  FARE on a ConvNeXt, from the LAION start",
    ]
    assert blocks[1].splitlines() == ["name        tiny", "weights     here"]  # nothing for an empty entry


def test_a_name_of_a_column_with_blanks_is_not_cut(monkeypatch):
    columns = ["dataset", "tiny (e17452)", "tiny-single-teacher (abc123)", "tiny-clean-teacher (abc123)"]
    for width in range(20, 120):
        written = io.StringIO()
        terminal = Console(file=written, width=width, force_terminal=True, color_system=None, soft_wrap=True)
        monkeypatch.setattr(console, "out", terminal)
        console.show("grid", columns, [["tiny-unseen-pairs", "87.20", "1.00", "2.00"]])
        assert "…" not in written.getvalue()


def test_a_table_at_its_least_width_is_not_wider_than_the_terminal(printed):
    for width in range(30, 100):
        text = printed(width)
        assert "┃" not in text or max(map(len, text.splitlines())) <= width
