"""Square, a black-box random search."""

from robustbench_vlm.attacks.square.square import Square as Square

plugin = Square
