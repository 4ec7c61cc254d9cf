"""A process that writes without end, for tests that kill it; it prints `ready` after its first write."""

import sys
from itertools import count
from pathlib import Path

from robustbench_vlm import store

what, path = sys.argv[1], Path(sys.argv[2])
for i in count():
    if what == "write":
        store.write(path, bytes([i % 251]) * 300_000)
    else:
        store.append(path, {"i": i, "text": "x" * 5000})
    if i == 0:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
