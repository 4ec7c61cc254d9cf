"""A tree of SHA-256 hashes over a list, whose root stands for all of it (RFC 6962, section 2.1).

With the root alone at hand, one entry can be shown to be in the list by log2(N) hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

LEAF, NODE = b"\x00", b"\x01"
"""What is hashed before an entry and before two hashes, so that no node can be taken for an entry."""


def root(entries: Sequence[bytes]) -> str:
    """The root of the tree over some entries, in hex; of none, the hash of nothing."""
    return _root([hashlib.sha256(LEAF + entry).digest() for entry in entries]).hex()


def _root(hashes: Sequence[bytes]) -> bytes:
    if not hashes:
        return hashlib.sha256().digest()
    level = list(hashes)
    while len(level) > 1:  # an odd hash at the end goes up as it is, as in the RFC
        pairs = [hashlib.sha256(NODE + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + ([level[-1]] if len(level) % 2 else [])
    return level[0]
