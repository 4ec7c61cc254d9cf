r"""The one `tabular` of a LaTeX file as lines of plain text; what would have to be guessed is refused.

Read are `tabular`, `tabular*`, `tabularx`, `longtable`, rules of booktabs and of LaTeX itself, `\multicolumn`
and `\multirow`, and commands that change how a text looks. Any other command is an error that names it.
"""

from __future__ import annotations

import re

from robustbench_vlm.errors import InputError

BEGIN = re.compile(r"\\begin\{(tabular\*?|tabularx|longtable)\}")
RULES = re.compile(
    r"\\(?:toprule|midrule|bottomrule|hline|endhead|endfirsthead|endfoot|endlastfoot|noalign\{[^{}]*\})(?:\[[^]]*\])?"
    r"|\\c(?:midrule|line)(?:\[[^]]*\])?(?:\([^)]*\))?\{[^{}]*\}"
    r"|\\addlinespace(?:\[[^]]*\])?|\\(?:rowcolor|specialrule)(?:\[[^]]*\])?(?:\{[^{}]*\})+"
)
END_OF_HEADER = re.compile(r"\\(?:midrule|hline)\b")
LOOKS = (
    *("textbf", "textit", "textsc", "texttt", "textrm", "textsf", "text", "emph", "underline", "uline"),
    *("mathbf", "mathrm", "mathit", "boldsymbol", "bm", "mbox", "makecell", "thead", "textsuperscript"),
    *("textsubscript", "ensuremath", "small", "footnotesize", "scriptsize", "tiny", "bf", "it", "bfseries"),
    *("itshape", "centering", "normalsize", "large", "sc", "rm", "quad", "qquad", "left", "right"),
)
"""Commands that leave the text as it is."""

DROPPED = (
    *("cite", "citep", "citet", "ref", "label", "footnote", "color", "cellcolor", "vspace", "hspace"),
    *("tablefootnote", "citealp", "phantom"),
)
"""Commands whose argument is no part of the text."""

SIGNS = {
    **{"pm": "±", "varepsilon": "ε", "epsilon": "ε", "ell": "ℓ", "infty": "∞"},
    **{"uparrow": "↑", "downarrow": "↓"},
    **{"dagger": "†", "ddagger": "‡", "ast": "*", "times": "x", "textpm": "±", "dag": "†", "ddag": "‡"},
    **{"textendash": "–", "textemdash": "—", "Delta": "Δ", "checkmark": "yes", "slash": "/"},
}  # fmt: skip
ESCAPED = {r"\%": "%", r"\&": "&", r"\_": "_", r"\#": "#", r"\$": "$", r"\{": "(", r"\}": ")"}
SPACES = re.compile(r"\\\\|\\[,;:! ]|~")
LARGEST_SPAN = 100  # columns or rows that one cell may cover


def lines(text: str, where: str) -> tuple[list[list[str]], int]:
    """The rows of the table, and how many of them are header.

    Args:
        text: of the file.
        where: its name, for errors.

    Returns:
        rows of plain text, each cell that spans several columns repeated in all of them; the rows above the
        first rule that follows a row are the header, or the first row alone without such a rule.

    Raises:
        InputError: no or several tables, a command that is not known, braces that do not match.
    """
    text = re.sub(r"(?<!\\)((?:\\\\)*)%.*", r"\1", text)
    body = _body(text, where)
    rows: list[list[str]] = []
    spans: dict[int, tuple[int, str]] = {}
    header = 0
    for part in _split(body, r"\\", where):
        rule = END_OF_HEADER.search(part)
        if rule and rows and not header:
            header = len(rows)
        part = RULES.sub(" ", re.sub(r"^\s*\[[^]]*\]", "", part))  # the extra space of the row before
        if part.strip():
            rows.append(_row(part, spans, where))
    width = max((len(row) for row in rows), default=0)
    return [row + [""] * (width - len(row)) for row in rows], header or 1


def _body(text: str, where: str) -> str:
    """The rows of the one table of a text."""
    begins = list(BEGIN.finditer(text))
    if len(begins) != 1:
        do = "write one table a file" if begins else "see vlmrob lint --help"
        raise InputError(where, f"{len(begins)} tables", "one tabular, tabularx or longtable", do)
    name, start = begins[0][1], begins[0].end()
    end = text.find(rf"\end{{{name}}}", start)
    if end < 0:
        raise InputError(where, rf"\begin{{{name}}} without \end", "a whole table")
    body = re.sub(r"^\s*\[[^]]*\]", "", text[start:end])
    arguments = 2 if name in {"tabular*", "tabularx"} else 1
    for _ in range(arguments):
        _, body = _argument(body, where)
    return body


def _argument(text: str, where: str) -> tuple[str, str]:
    """The text in the braces at the beginning, and what follows them."""
    text = text.lstrip()
    depth = 0
    for i, sign in enumerate(text):
        escaped = i > 0 and text[i - 1] == "\\" and text[i - 2 : i - 1] != "\\"
        depth += 0 if escaped else (sign == "{") - (sign == "}")
        if depth == 0:
            break
    if not text.startswith("{") or depth:
        raise InputError(where, f"no text in braces at {text[:30]!r}", "{...}")
    return text[1:i], text[i + 1 :]


def _split(text: str, separator: str, where: str) -> list[str]:
    """The parts between separators that stand outside of braces."""
    parts, depth, begin, i = [], 0, 0, 0
    while i < len(text):
        if depth == 0 and text.startswith(separator, i):
            parts.append(text[begin:i])
            i = begin = i + len(separator)
        elif text[i] == "\\":
            i += 2  # an escaped sign, or the first letter of a command
        else:
            depth += (text[i] == "{") - (text[i] == "}")
            if depth < 0:
                break
            i += 1
    if depth:
        raise InputError(
            where, f"braces that do not match after {text[begin : begin + 30]!r}", "a whole table"
        )
    return [*parts, text[begin:]]


def _row(text: str, spans: dict[int, tuple[int, str]], where: str) -> list[str]:
    """The cells of one row; `spans` has the rows that are left of a cell of several rows, by column."""
    row: list[str] = []
    for part in _split(text, "&", where):
        cell, columns, rows = part.strip(), 1, 1
        if cell.startswith(r"\multicolumn"):
            count, rest = _argument(cell.removeprefix(r"\multicolumn"), where)
            columns = _count(count, where)
            _, rest = _argument(rest, where)
            cell, after = _argument(rest, where)
            cell = (cell + after).strip()
        if cell.startswith(r"\multirow"):
            rest = re.sub(r"^\s*\[[^]]*\]", "", cell.removeprefix(r"\multirow"))
            count, rest = _argument(rest, where)
            rows = _count(count, where)
            width = rest.lstrip()
            rest = width[1:] if width.startswith("*") else _argument(width, where)[1]
            cell, after = _argument(re.sub(r"^\s*\[[^]]*\]", "", rest), where)
            cell += after
        plain = _plain(cell, where)
        for _ in range(columns):
            left, covering = spans.pop(len(row), (0, ""))
            if left > 1:
                spans[len(row)] = (left - 1, covering)
            elif rows > 1:
                spans[len(row)] = (rows - 1, plain)
            row.append(plain or covering)
    return row


def _count(text: str, where: str) -> int:
    """The number of columns or rows that a cell covers."""
    if not re.fullmatch(r"\s*\d{1,3}\s*", text) or not 1 <= int(text) <= LARGEST_SPAN:
        raise InputError(where, f"a cell over {text!r} columns or rows", f"a number from 1 to {LARGEST_SPAN}")
    return int(text)


def _plain(text: str, where: str) -> str:
    """A cell without commands."""
    text = SPACES.sub(" ", text)
    for escaped, sign in ESCAPED.items():
        text = text.replace(escaped, f"\0{ord(sign)}\0")  # kept apart from signs that are commands
    for name in DROPPED:
        text = re.sub(rf"\\{name}\*?(?:\[[^]]*\])*\{{[^{{}}]*\}}", "", text)
    text = re.sub(r"\\textcolor(?:\[[^]]*\])?\{[^{}]*\}", "", text)
    text = re.sub(rf"\\(?:{'|'.join(LOOKS)})(?![A-Za-z])", "", text)
    text = re.sub(r"\\([A-Za-z]+)(?![A-Za-z])", lambda found: SIGNS.get(found[1], found[0]), text)
    unknown = re.search(r"\\([A-Za-z]+|.)", text)
    if unknown:
        do = "replace the command by the text that it prints"
        raise InputError(where, f"the command {unknown[0]}", "commands that change looks alone", do)
    text = re.sub(r"[{}$]", "", text)
    text = re.sub(r"_|(?<=\d)\^", " ", text).replace("^", "")  # an index is no digit of the number before it
    return " ".join(re.sub(r"\0(\d+)\0", lambda found: chr(int(found[1])), text).split())
