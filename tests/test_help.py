"""Help, lists and mistakes are answered at once, without importing torch."""

import resource
import subprocess
import sys

import pytest

VERBS = (
    *("train", "eval", "plan", "leaderboard", "compare", "race", "demo", "crosscheck", "convert", "canary"),
    *(
        "new",
        "list",
        "show",
        "doctor",
        "data",
        "study",
        "plot",
        "lint",
        "verify",
        "submit",
        "export",
        "slurm",
    ),
)


def test_help_does_not_import_torch_and_names_every_verb():
    code = "import sys; sys.argv = ['vlmrob', '--help']\nfrom robustbench_vlm import cli\n"
    code += "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
    code += "print([m for m in ('torch', 'pandas', 'numpy', 'scipy', 'open_clip') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f" {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize(
    "line",
    [
        *("--help", "list models", "list defenses", "list attacks", "list suites", "show suite tiny"),
        *("eval --model nobody", "train nobody", "new suite tiny"),
    ],
)
def test_what_needs_no_torch_answers_in_under_a_second(line):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "robustbench_vlm", *line.split()], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # seconds of the processor: those on the wall depend on who else is using it
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_the_short_form_of_help_and_completion_are_there():
    done = subprocess.run(
        [sys.executable, "-m", "robustbench_vlm", "eval", "-h"], capture_output=True, text=True, check=True
    )
    assert "--attack" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "robustbench_vlm", "-h"], capture_output=True, text=True, check=True
    )
    assert "--install-completion" in done.stdout


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("evla", "error: vlmrob: No such command 'evla'"),
        ("eval --attak aa", "error: vlmrob eval: No such option: --attak"),
        ("train", "error: vlmrob train: Missing argument"),
        ("eval --n some", "error: vlmrob eval: Invalid value for '--n'"),
        ("data chek", "error: vlmrob data: No such command 'chek'"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line(line, error):
    command = [sys.executable, "-m", "robustbench_vlm", *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(error)
    assert done.stderr.count("\n") == 1
    assert "; see vlmrob" in done.stderr
