"""Read the weights files of other programs as data, never as code."""
