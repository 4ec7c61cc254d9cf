"""Write docs/reference: commands, cards and columns, as the code states them (`make docs`)."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from typer.models import ArgumentInfo, OptionInfo

from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.cards.fields import Field, attributes, fields, words
from robustbench_vlm.cards.template import toml
from robustbench_vlm.cli.app import app
from robustbench_vlm.results import columns

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py (make docs); changes by hand are lost. -->"


def pages() -> dict[str, str]:
    """Content of every page of the reference, by file name."""
    return {"commands.md": commands(), "cards.md": cards(), "results.md": results()}


# --- commands ----------------------------------------------------------------------------------------------


def commands() -> str:
    """Every command with its arguments and options."""
    lines = [
        NOTE,
        "",
        "# Commands",
        "",
        "`vlmrob COMMAND --help` (or `-h`) prints the same in a terminal.",
        "",
    ]
    callback = app.registered_callback.callback if app.registered_callback else None
    lines += ["## Options of every command", "", *_parameters(callback)]
    for command in app.registered_commands:
        lines += _command("vlmrob", command.name, command.callback)
    for group in app.registered_groups:
        for command in group.typer_instance.registered_commands:
            lines += _command(f"vlmrob {group.name}", command.name, command.callback)
    return _text(lines)


def _command(prefix: str, name: str | None, callback: Any) -> list[str]:  # noqa: ANN401 - a function
    name = name or callback.__name__.replace("_", "-")
    arguments = [
        key.upper() if default is inspect.Parameter.empty else f"[{key.upper()}]"
        for key, _, info, default in _declared(callback)
        if isinstance(info, ArgumentInfo)
    ]
    usage = " ".join([prefix, name, *arguments, "[OPTIONS]"])
    paragraphs = inspect.cleandoc(callback.__doc__).split("\n\n")
    doc = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
    return ["", f"## {prefix} {name}", "", f"`{usage}`", "", doc, "", *_parameters(callback)]


def _parameters(callback: Any) -> list[str]:  # noqa: ANN401 - a function
    rows = []
    for key, annotation, info, default in _declared(callback):
        shown = "" if default in (None, "", False, inspect.Parameter.empty) else f"`{default}`"
        need = "required" if default is inspect.Parameter.empty else shown
        kind = _kind(annotation, info)
        rows.append([f"`{_spelling(key, annotation, info)}`", kind, need, _help(info)])
    return _table(["argument or option", "type", "default", "meaning"], rows) if rows else []


def _declared(callback: Any) -> list[tuple[str, Any, ArgumentInfo | OptionInfo, Any]]:  # noqa: ANN401 - a function
    """(name, type, what is declared, default) of every parameter of a command."""
    hints = typing.get_type_hints(callback, include_extras=True)
    found = []
    for key, parameter in inspect.signature(callback).parameters.items():
        annotation, *declared = typing.get_args(hints[key])
        info = next(one for one in declared if isinstance(one, ArgumentInfo | OptionInfo))
        found.append((key, annotation, info, parameter.default))
    return found


def _spelling(key: str, annotation: Any, info: ArgumentInfo | OptionInfo) -> str:  # noqa: ANN401 - a type
    if isinstance(info, ArgumentInfo):
        return key.upper()
    declared = (info.default, *(info.param_decls or ()))  # typer files the first name as a default
    names = [name for name in declared if isinstance(name, str) and name.startswith("-")]
    plain = f"--{key.replace('_', '-')}"
    return "`, `".join(names or ([plain, f"--no-{plain[2:]}"] if annotation is bool else [plain]))


def _kind(annotation: Any, info: ArgumentInfo | OptionInfo) -> str:  # noqa: ANN401 - a type
    if annotation is bool:
        return "flag"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"one of {', '.join(str(member.value) for member in annotation)}"
    text = "path" if "Path" in str(annotation) else words(annotation).removeprefix("list of ")
    least = f", at least {info.min}" if info.min is not None else ""
    many = ", repeatable" if "list" in str(annotation) else ""
    return f"{text}{least}{many}"


def _help(info: ArgumentInfo | OptionInfo) -> str:
    variable = f" Environment variable: `{info.envvar}`." if info.envvar else ""
    return f"{info.help or ''}{variable}"


# --- cards -------------------------------------------------------------------------------------------------


def cards() -> str:
    """Every key of every record that is read from TOML, and the fields of attacks and defenses."""
    lines = [NOTE, "", "# Cards", ""]
    lines += [
        "A card is a TOML file. The project's own are below `suites/`; `--include DIR` adds a folder that is",
        "laid out in the same way. An unknown key is refused, and the message names the nearest known one.",
        "`vlmrob new KIND NAME` writes a card with every key.",
    ]
    seen: set[type[BaseModel]] = set()
    for kind, (folder, record) in reader.FOLDERS.items():
        where = f"suites/{'' if folder == '.' else folder + '/'}NAME.toml"
        lines += ["", f"## {kind}", "", f"`{where}`", *_record(record, seen)]
    for kind in ("attacks", "defenses"):
        table = "[[stage]]` of an attack" if kind == "attacks" else "[defense]` of a recipe"
        lines += [
            "",
            f"## fields of {kind}",
            "",
            f"Further keys of `{table} card, by the name of the plug-in.",
        ]
        for name in plugins.names(kind):
            lines += _plugin(kind, name)
    return _text(lines)


def _record(record: type[BaseModel], seen: set[type[BaseModel]]) -> list[str]:
    known = fields(record)
    rows = [[f"`{one.key}`", one.type_text, _default(one), one.meaning] for one in known]
    lines = ["", _first(record), "", *_table(["key", "type", "default", "meaning"], rows)]
    seen.add(record)
    for one in known:
        if one.record is not None and one.record not in seen:
            lines += ["", f"### {one.record.__name__}: `{one.key}`", *_record(one.record, seen)]
    return lines


def _default(one: Field) -> str:
    if one.required:
        return "required"
    return "" if one.default is None or isinstance(one.default, BaseModel) else f"`{toml(one.default)}`"


def _plugin(kind: str, name: str) -> list[str]:
    plugin = plugins.get(kind, name)
    meanings = attributes(plugin)
    hints = typing.get_type_hints(plugin)
    rows = []
    for field in dataclasses.fields(plugin):
        if field.init:
            needed = field.default is dataclasses.MISSING
            default = "required" if needed else f"`{toml(field.default)}`"
            rows.append([f"`{field.name}`", words(hints[field.name]), default, meanings.get(field.name, "")])
    lines = ["", f"### {name}", "", _first(plugin)]
    return [*lines, "", *_table(["key", "type", "default", "meaning"], rows)] if rows else lines


def _first(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


# --- results -----------------------------------------------------------------------------------------------


def results() -> str:
    """Every column of the tables."""
    lines = [NOTE, "", "# Results", ""]
    lines += ["## leaderboards/SUITE.csv", "", "One row a model, dataset, attack and radius.", ""]
    stages = {f"{columns.STAGE}STAGE": "accuracy after that stage of the chain, %; one column a stage"}
    listed = {**columns.BEFORE_STAGES, **stages, **columns.AFTER_STAGES}
    lines += _table(["column", "meaning"], [[f"`{name}`", text] for name, text in listed.items()])
    lines += ["", "## results/cells/MODEL/DATASET/CELL.parquet", "", "One row an image.", ""]
    lines += _table(["column", "meaning"], [[f"`{name}`", text] for name, text in columns.VERDICTS.items()])
    return _text(lines)


# --- Markdown ----------------------------------------------------------------------------------------------


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    plain = [[entry.replace("|", "\\|") for entry in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *plain]]


def _text(lines: list[str]) -> str:
    return "\n".join(line.rstrip() for line in lines) + "\n"


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")
