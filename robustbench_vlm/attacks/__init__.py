"""Attacks as per-image state machines, and the engine that drives them. Knows a callable, never a model."""
