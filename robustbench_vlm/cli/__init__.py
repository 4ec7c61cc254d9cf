"""The command line: one file a command, and `app`, which puts them together."""

from robustbench_vlm.cli.app import app as app
from robustbench_vlm.cli.app import main as main
