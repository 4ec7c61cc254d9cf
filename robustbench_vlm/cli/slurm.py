"""`vlmrob slurm`."""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import Annotated, Any

import typer
from jinja2 import Environment, PackageLoader, StrictUndefined

from robustbench_vlm import console
from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.errors import InputError, VlmrobError

OWN = {"eval": "--workers", "train": "--nproc"}
"""By command: the option that this one writes itself, since it follows from nodes and GPUs."""

TIME = re.compile(r"(\d+-)?\d{1,2}(:\d{2}){0,2}")
PORT = 29500
RAY_PORT = 6379


def slurm(
    words: Annotated[
        list[str], typer.Argument(help="eval or train with its options.", metavar="eval|train ...")
    ],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each machine; 0: processors alone.")] = 8,
    cpus: Annotated[int, typer.Option(min=1, help="Processors of each machine.")] = 32,
    time: Annotated[str, typer.Option(help="Longest time, as Slurm writes it.")] = "24:00:00",
    sbatch: Annotated[
        list[str] | None, typer.Option(help="Further line #SBATCH, such as --partition=gpu; repeatable.")
    ] = None,
    restarts: Annotated[int, typer.Option(min=0, help="How often the job queues itself again.")] = 50,
    submit: Annotated[bool, typer.Option("--submit", help="Give the script to sbatch, too.")] = False,
) -> None:
    """Print a Slurm script for an evaluation or a training on all GPUs; a job that is stopped goes on."""
    command = words[0]
    if command not in OWN:
        do = "its own options come before, as in vlmrob slurm --nodes 2 eval --model x"
        raise InputError("slurm", repr(command), "eval or train", do)
    if any(word.split("=")[0] == OWN[command] for word in words):
        do = "leave it out: it follows from --nodes and --gpus (or --cpus without GPUs)"
        raise InputError(f"slurm {command}", OWN[command], do=do)
    if not TIME.fullmatch(time):
        forms = "minutes, hours:minutes:seconds or days-hours"
        raise InputError("slurm --time", repr(time), forms, "see the manual of sbatch")
    for line in sbatch or ():
        if not re.fullmatch(r"--?[!-~]+", line):
            raise InputError("slurm --sbatch", repr(line), "an option of sbatch such as --partition=gpu")
    made = script(words, nodes=nodes, gpus=gpus, cpus=cpus, time=time, more=sbatch or [], restarts=restarts)
    console.result(made.rstrip("\n"))
    if submit:
        _submit(made)


def script(
    words: list[str],
    *,
    nodes: int,
    gpus: int,
    cpus: int,
    **given: Any,  # noqa: ANN401 - whatever the template prints
) -> str:
    """The script as text; it ends with a line end.

    Args:
        words: of the command, beginning with `eval` or `train`.
        nodes: machines.
        gpus: of each machine; 0 for none.
        cpus: of each machine.
        **given: what the template prints as it is: `time`, `more` and `restarts`.
    """
    command = words[0]
    typed = [*_root_options(), *words]
    own = gpus or cpus
    launched, exports = (_evaluation if command == "eval" else _training)(typed, nodes, gpus, cpus)
    environment = Environment(
        loader=PackageLoader("robustbench_vlm.cli", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - a shell script; every word that was typed is quoted below
    )
    many = f"{nodes} machines" if nodes > 1 else "one machine"
    devices = f"{own} {'GPUs' if gpus else 'processors'}"
    return environment.get_template("slurm.sh.j2").render(
        title=f"vlmrob {command} on {many} of {devices}",
        name=f"vlmrob-{command}",
        nodes=nodes,
        gpus=gpus,
        cpus=cpus,
        words=launched,
        exports=exports,
        **given,
    )


def _root_options() -> list[str]:
    """The options before the command, which were taken off the words."""
    included = [word for folder in reader.included() for word in ("--include", str(folder))]
    return [*included, *(["--allow-code"] if plugins.code_allowed() else [])]


def _evaluation(typed: list[str], nodes: int, gpus: int, cpus: int) -> tuple[str, list[str]]:
    """The command of an evaluation, and what it needs in its environment: a worker for each device."""
    exports = ["RAY_USAGE_STATS_ENABLED=0"]
    if nodes == 1:
        return shlex.join(["vlmrob", *typed, "--workers", str(gpus or cpus)]), exports
    devices = [f"--num-cpus={cpus}", *([f"--num-gpus={gpus}"] if gpus else [])]
    start = f'ray symmetric-run --address "$head:{RAY_PORT}" --min-nodes {nodes} {shlex.join(devices)}'
    return f"{start} -- {shlex.join(['vlmrob', *typed, '--workers', 'ray'])}", exports


def _training(typed: list[str], nodes: int, gpus: int, cpus: int) -> tuple[str, list[str]]:
    """The command of a training, and what it needs in its environment: a process for each device."""
    own = gpus or cpus
    exports = [f"OMP_NUM_THREADS={max(cpus // own, 1)}"]
    if nodes == 1:
        return shlex.join(["vlmrob", *typed, "--nproc", str(own)]), exports
    start = f"torchrun --nnodes={nodes} --nproc-per-node={own}"
    meet = f'--rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:{PORT}"'
    return f'{start} {meet} "$(command -v vlmrob)" {shlex.join(typed)}', exports


def _submit(made: str) -> None:
    """Give a script to sbatch.

    Raises:
        VlmrobError: there is no sbatch here, or it refuses.
    """
    try:
        done = subprocess.run(["sbatch"], input=made, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        do = "save the script, and submit it where there is one"
        raise VlmrobError(f"--submit: no sbatch on this machine; {do}") from None
    if done.returncode:
        raise VlmrobError(f"sbatch: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    console.remark(done.stdout.strip())
