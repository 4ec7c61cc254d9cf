"""Datasets on disk -> named images on the canvas of the ball. Knows nothing of models, attacks or defenses."""
