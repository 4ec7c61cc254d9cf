"""Text from files stays text: in terminals, Markdown, CSV, HTML and JSON."""

import csv
import html.parser
import io
import json
import re
import sys

import pandas as pd
import pytest
from rich.console import Console
from test_leaderboard import SUITE, cell, rows, two_models
from test_names import HOSTILE

from robustbench_vlm import console, safe_text
from robustbench_vlm.errors import InputError
from robustbench_vlm.results import grids, leaderboard

NAMES = (
    *HOSTILE,
    *("a|b", "[bold]x[/bold]", ":x:", "![x](http://evil)", "[x](javascript:1)", "<script>alert(1)</script>"),
    *(
        "=1+1",
        "+cmd|' /C calc'!A0",
        "-2+3",
        "@SUM(A1)",
        " =1",
        "\t=1",
        "*x*",
        "_x_",
        "&lt;",
        "\\|",
        "x\x9b2J",
    ),
    *("\x1b]0;title\x07", "\x1b[2J", "a\rb", "\u202egnp.exe", "[/red]", "```", "</td>", "\u2066x"),
)


def ours(text):
    """Whether every character can be printed where somebody reads it."""
    return all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_gets_no_control_character_and_no_markup(name, terminal, monkeypatch, capsys):
    for stream, attribute in ((sys.stdout, "out"), (sys.stderr, "err")):
        made = Console(file=stream, soft_wrap=True, highlight=False, emoji=False, width=100)
        monkeypatch.setattr(console, attribute, made)
        if terminal:
            monkeypatch.setattr(Console, "is_terminal", property(lambda _: True))
    console.remark(name)
    console.result(name)
    console.error(name)
    console.show(name, [name, "b"], [[name, "2"], ["", name]])
    with console.meter() as meter:
        meter(name, 1, 2, name)
    found = capsys.readouterr()
    text = (found.out + found.err).replace("\t", "") if not terminal else found.out + found.err
    assert safe_text.line(name) in found.err or "\n" in name or terminal
    if terminal:
        assert "\x07" not in text
        assert "\x1b]" not in text
        assert "\x1b[2J" not in text
        assert "\x9b" not in text
    else:
        assert ours(text)
        assert all(line.count("\t") == 1 for line in found.out.splitlines() if "\t" in line)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_an_error_is_one_line_whatever_it_names(name):
    message = str(InputError(name, name, name, "do this"))
    assert message.isprintable()


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_json_is_read_back_equal(name, capsys):
    console.result_json({name: [name]})
    text = capsys.readouterr().out
    assert ours(text)
    assert json.loads(text) == {name: [name]}


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_csv_field_is_no_formula_and_one_line(name):
    table = pd.DataFrame({"a": [name, "1"], "b": ["-0.5", "+2"], "c": [-1.5, 2.0]}, dtype=object)
    text = leaderboard.csv(table).decode()
    found = list(csv.reader(io.StringIO(text)))
    assert len(found) == 3
    assert not found[1][0].strip().startswith(("=", "+", "-", "@"))
    assert found[1][1:] == ["-0.5", "-1.5"]  # numbers are numbers
    assert found[2] == ["1", "+2", "2.0"]


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, attributes))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_html_has_the_text_and_no_tag(name):
    parser = Tags()
    parser.feed(f'<p title="{safe_text.html(name)}">{safe_text.html(name)}</p>')
    parser.close()
    assert parser.tags == [("p", [("title", safe_text.line(name))])]
    assert parser.text == safe_text.line(name)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_markdown_table_keeps_its_columns(name, tmp_path):
    printable = name.encode("utf-8", "replace").decode()
    two_models(tmp_path)
    if printable:
        cell(tmp_path, "x", "one", 9, {0: "apgd-ce"}, model_facts={"id": printable})
    suite = SUITE.model_copy(update={"title": printable})
    text = grids.markdown(rows(tmp_path, suite), suite).decode()
    assert ours(text)
    bars = [len(line) - len(line.replace("|", "")) - line.count("\\|") for line in text.splitlines()]
    assert len({count for count in bars if count}) == 1
    for line in text.splitlines():
        plain = line.replace("\\<", "").replace("\\[", "").replace("\\`", "")
        plain = re.sub(r" \[\d+\.\d\d, \d+\.\d\d\](?= )", "", plain)  # the interval of a mean
        assert "<" not in plain
        assert "[" not in plain
    if printable:
        assert safe_text.markdown(printable) in text


def test_ordinary_text_is_left_as_it_is():
    for text in (
        "tiny",
        "vit_b_32 (abc123)",
        "apgd-ce",
        "mean:unseen",
        "aa · linf 4/255 · n = 10",
        "模型",
        "R&D",
    ):
        for function in (safe_text.line, safe_text.markdown, safe_text.csv):
            assert function(text) == text
