"""FAB, the fast adaptive boundary attack."""

from robustbench_vlm.attacks.fab.fab import Fab as Fab

plugin = Fab
