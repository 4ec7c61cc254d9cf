"""The Python interface; everything public here can be imported from `robustbench_vlm`."""
