"""The command line: one file a command, and `app`, which puts them together.

Nothing but the standard library is imported before `main` runs, so that it can handle a Ctrl-C from the
start, while the command's libraries are imported.
"""

from robustbench_vlm.cli.main import main as main
