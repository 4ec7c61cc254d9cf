"""Settings of Ray, which it reads from the environment while it is imported."""

from __future__ import annotations

import os
import secrets
import sys

from robustbench_vlm.evaluation.executor import CLUSTER

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_worker_niceness": "0",
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_health_check_failure_threshold": "30",
}
"""Ray reports no usage, starts its processes as this one was started, and waits for slow ones.

Workers have the priority of any other process. The default is a low one, with which they hardly run on a busy
machine.
"""


def prepare(workers: str) -> None:
    """Set what the user has not set; to be called before Ray is imported.

    A Ray on this machine answers only those who know a token, which is drawn here, so that no other user of
    the machine can give it work. That of a cluster is the user's.

    Args:
        workers: as typed after `--workers`.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    own = not any(name.startswith("RAY_AUTH") for name in os.environ)
    if workers != CLUSTER and own and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
