"""How many cores a process may use: those that the system gives it, shared with the other ranks of its node.

A container or a job of a scheduler often gets some cores of a machine. Then `os.cpu_count()` is too large, and threads
that share a core only push each other out of its cache.
"""

from __future__ import annotations

import os


def own_cores() -> int:
    """Cores of this process, at least 1: of a rank, its share of those that all ranks of its node may use.

    Ray Train and torchrun say in LOCAL_WORLD_SIZE how many ranks a node has.
    """
    # macOS has no affinity.
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, given // max(1, int(ranks) if ranks.isdecimal() else 1))
