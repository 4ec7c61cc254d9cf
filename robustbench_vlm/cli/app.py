"""All commands in one program.

Torch is imported by the commands that need it, never here, so help and lists are there at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from robustbench_vlm import console
from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.cli import data
from robustbench_vlm.cli.canary import canary
from robustbench_vlm.cli.compare import compare
from robustbench_vlm.cli.convert import convert
from robustbench_vlm.cli.crosscheck import crosscheck
from robustbench_vlm.cli.demo import demo
from robustbench_vlm.cli.doctor import doctor
from robustbench_vlm.cli.eval import eval_
from robustbench_vlm.cli.export import export
from robustbench_vlm.cli.leaderboard import leaderboard
from robustbench_vlm.cli.lint import lint
from robustbench_vlm.cli.list import list_
from robustbench_vlm.cli.new import new
from robustbench_vlm.cli.plan import plan
from robustbench_vlm.cli.plot import plot
from robustbench_vlm.cli.race import race
from robustbench_vlm.cli.show import show
from robustbench_vlm.cli.slurm import slurm
from robustbench_vlm.cli.study import study
from robustbench_vlm.cli.submit import submit
from robustbench_vlm.cli.train import train
from robustbench_vlm.cli.verify import verify
from robustbench_vlm.errors import InputError
from robustbench_vlm.version import __version__

NAME = "vlmrob"

app = typer.Typer(
    name=NAME,
    help="How robust is a CLIP-like model, compared with every other one, and can that number be trusted?",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Datasets on disk.", no_args_is_help=True)
app.add_typer(data_app, name="data")

ROOT_FLAGS = ("--quiet", "--verbose", "--allow-code")

TYPER_INTERRUPTED = 130
"""What typer returns after Ctrl-C."""

UsageError: Any = typer.BadParameter.__base__
"""What typer raises for a command line that it cannot read."""

Include = Annotated[
    list[Path] | None,
    typer.Option(help="Folder of cards, laid out like suites/; repeatable; before or after the command."),
]


def _version(wanted: bool) -> None:
    if wanted:
        console.result(__version__)
        raise typer.Exit


@app.callback()
def _root(
    include: Include = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print results, flags and errors only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print the log of the libraries and tracebacks, too.")
    ] = False,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code", help="Let cards name Python code as module:Name; before or after the command."
        ),
    ] = False,
    version: Annotated[  # noqa: ARG001 - it acts when it is read
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Train defenses, attack models, and compare them in tables."""
    console.quiet = quiet
    if verbose:
        logging.basicConfig(level=logging.INFO)
    if include:
        reader.include(include)
    plugins.allow_code(allow_code)


app.command()(train)
app.command("eval")(eval_)
app.command()(plan)
app.command()(leaderboard)
app.command()(compare)
app.command()(plot)
app.command()(lint)
app.command()(verify)
app.command()(submit)
app.command()(export)
app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})(slurm)
app.command()(race)
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


def _root_options_first(words: list[str]) -> list[str]:
    """The words with the options of `_root` in front of the command, since typer takes them only there."""
    front: list[str] = []
    rest: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--":
            rest += [word, *left]
        elif word == "--include":
            folder = next(left, None)
            if folder is None:
                return [word]  # typer then reports the missing folder, and does not take the command for it
            front += [word, folder]
        else:
            (front if word.startswith("--include=") or word in ROOT_FLAGS else rest).append(word)
    return [*front, *rest]


def command_of(words: Sequence[str]) -> str:
    """The command out of the words of a command line, such as `data fetch`; empty if there is none."""
    named = [word for word in _root_options_first(list(words)) if not word.startswith("-")]
    known = {info.name or getattr(info.callback, "__name__", "") for info in app.registered_commands}
    for i, word in enumerate(named):
        if word == "data":
            return " ".join(named[i : i + 2])
        if word in known:
            return word
    return ""


def run(words: list[str]) -> int:
    """Run the command line; returns the exit code.

    Raises:
        InputError: an unknown command or option, or a value of the wrong kind.
        KeyboardInterrupt: a signal came.
    """
    try:
        code = app(_root_options_first(words), prog_name=NAME, standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except UsageError as error:
        message = " ".join(error.format_message().split())
        if not message:  # no arguments: the help is printed already
            return int(error.exit_code)
        command = error.ctx.command_path if error.ctx else NAME
        raise InputError(command, message.rstrip("."), do=f"see {command} --help") from None
    if code == TYPER_INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0
