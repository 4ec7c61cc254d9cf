"""Random numbers as a function of names, and never of time, order, batch, worker count or device count.

A name such as `"0/tiny-seen/test/s0000012/apgd-t/3/0"` is hashed to the key of a counter-based generator
(Philox), so the same name gives the same numbers everywhere, and the global generators are never touched.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(name: str) -> np.random.Generator:
    """A generator whose stream depends on `name` alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers on [0, 1), float32, of `shape`, a function of `name` alone."""
    return generator(name).random(shape, dtype=np.float32)


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers, float32, of `shape`, a function of `name` alone."""
    return generator(name).standard_normal(shape, dtype=np.float32)


def rank(seed: int, key: str) -> str:
    """The hash by which subsets are drawn: the n images with the smallest hashes are the subset of size n.

    So a smaller subset of the same seed is part of every larger one.
    """
    return hashlib.sha256(f"{seed}/{key}".encode()).hexdigest()
