"""Adversarial robustness of CLIP-like vision-language models: train, attack, compare."""

__version__ = "0.1.0"
