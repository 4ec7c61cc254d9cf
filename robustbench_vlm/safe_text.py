"""Text from files and names as text, wherever it is shown: terminal, Markdown, CSV, HTML, JSON.

Names of models, datasets and classes come from other people. Printed as they are, they could move the cursor
of a terminal, add columns to a table, or be run as a formula by a spreadsheet.
"""

from __future__ import annotations

import html as standard
import json
import re

FORMULA = ("=", "+", "-", "@")
MARKUP = re.compile(r"[\\`*\[\]<>|~]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])")
"""Signs that Markdown gives a meaning to; `_` only at the edge of a word."""


def line(text: str) -> str:
    r"""The text on one line, for a terminal or a log.

    Whatever is not printable is written as Python writes it in a string: line ends and other control
    characters, escape sequences, marks that turn the direction of writing, half characters.

    Example:
        >>> print(line("a\x1b[31mb\n"))
        a\x1b[31mb\n
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def lines(text: str) -> str:
    """As `line`, with line ends kept: for messages that have several lines of their own."""
    return "\n".join(map(line, text.split("\n")))


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def markdown(text: str) -> str:
    r"""The text as it stands, inside a paragraph, a heading or a cell of a table.

    Example:
        >>> print(markdown("a|b <i>"))
        a\|b \<i\>
    """
    return MARKUP.sub(lambda found: "\\" + found[0], line(text))


def code(text: str) -> str:
    """The text between back-quotes of Markdown, which end at the first back-quote in it.

    Example:
        >>> code("a`b")
        "`a'b`"
    """
    return f"`{line(text).replace('`', chr(39)).replace('|', '/')}`"


def csv(text: str) -> str:
    """A field of a CSV file that no spreadsheet takes for a formula; numbers stay numbers.

    A text that begins with `=`, `+`, `-` or `@`, after blanks too, gets an apostrophe in front.

    Example:
        >>> csv("=1+1"), csv("-0.5"), csv("vit-b")
        ("'=1+1", '-0.5', 'vit-b')
    """
    safe = line(text)
    if not safe.lstrip().startswith(FORMULA):
        return safe
    try:
        float(safe)
    except ValueError:
        return f"'{safe}"
    return safe


def html(text: str) -> str:
    """The text inside an element or a quoted attribute.

    Example:
        >>> html("<b>")
        '&lt;b&gt;'
    """
    return standard.escape(line(text), quote=True)


def json_text(text: str) -> str:
    """A JSON document in which characters that are not printable are written by their numbers."""
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
