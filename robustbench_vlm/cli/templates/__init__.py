"""Files that `vlmrob new` copies; they are linted, typed and run by the tests like any other code."""
