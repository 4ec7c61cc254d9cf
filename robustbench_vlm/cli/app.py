"""The door: what people type, and the one place that prints errors and exits. Torch waits for its verb."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from robustbench_vlm import console
from robustbench_vlm.cards import reader
from robustbench_vlm.cli import data
from robustbench_vlm.cli.canary import canary
from robustbench_vlm.cli.compare import compare
from robustbench_vlm.cli.convert import convert
from robustbench_vlm.cli.crosscheck import crosscheck
from robustbench_vlm.cli.demo import demo
from robustbench_vlm.cli.doctor import doctor
from robustbench_vlm.cli.eval import evaluate
from robustbench_vlm.cli.leaderboard import leaderboard
from robustbench_vlm.cli.list import list_
from robustbench_vlm.cli.new import new
from robustbench_vlm.cli.show import show
from robustbench_vlm.cli.study import study
from robustbench_vlm.cli.train import train
from robustbench_vlm.errors import Incomplete, VlmrobError
from robustbench_vlm.version import __version__

app = typer.Typer(
    name="vlmrob",
    help="How robust is a CLIP-like model, compared with every other one, and can that number be trusted?",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Datasets on disk.", no_args_is_help=True)
app.add_typer(data_app, name="data")

INTERRUPTED = 130  # how typer leaves after Ctrl-C

Include = Annotated[
    list[Path] | None,
    typer.Option(help="Folder of further TOML cards; repeatable; before or after the command."),
]


def _version(wanted: bool) -> None:
    if wanted:
        console.result(__version__)
        raise typer.Exit


@app.callback()
def _root(
    include: Include = None,
    version: Annotated[  # noqa: ARG001 - it acts when it is read
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Train defenses, attack models, read the leaderboard."""
    if include:
        reader.include(include)


app.command()(train)
app.command("eval")(evaluate)
app.command()(leaderboard)
app.command()(compare)
app.command()(demo)
app.command()(study)
app.command()(crosscheck)
app.command()(convert)
app.command()(canary)
app.command()(new)
app.command("list")(list_)
app.command()(show)
app.command()(doctor)
data_app.command()(data.fetch)
data_app.command()(data.check)
data_app.command()(data.export)
data_app.command()(data.make)


def _in_front(words: list[str]) -> list[str]:
    """The words with every `--include FOLDER` moved before the verb, whose option it is."""
    front: list[str] = []
    rest: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--":
            rest += [word, *left]
        elif word == "--include":
            folder = next(left, None)
            if folder is None:
                return [word]  # so that it is missed here, and the verb not taken for it
            front += [word, folder]
        else:
            (front if word.startswith("--include=") else rest).append(word)
    return [*front, *rest]


def _exit(error: VlmrobError) -> NoReturn:
    console.err.print(f"error: {error}", style="bold red", markup=False)
    sys.exit(error.exit_code)


def main() -> None:
    """Run the command line; every known error is one line and an exit code."""
    try:
        app(_in_front(sys.argv[1:]))
    except VlmrobError as error:
        _exit(error)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            _exit(Incomplete("stopped; the same command goes on where it was"))
        raise
    except OSError as error:
        _exit(VlmrobError(f"{error.filename or 'input or output'}: {error.strerror or error}"))
