"""Train a defense: set-up, loop, inner maximisation, teacher outputs."""
