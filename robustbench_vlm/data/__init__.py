"""Datasets on disk -> named images on the canvas of the ball; no models, attacks or defenses here."""
