"""`python -m robustbench_vlm` is `vlmrob`."""

from robustbench_vlm.cli import main

main()
