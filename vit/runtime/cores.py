"""The CPU cores this process may use. Imports no torch, so that launching processes needs none."""

import os


def usable_cores() -> int:
    """How many cores this process may use, which a container or a scheduler may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def loader_workers(requested: int | None, processes: int = 1) -> int:
    """How many processes decode image files: as requested, or one a core, eight at most.

    processes: how many processes of the run share this machine's cores.
    """
    if requested is not None:
        return requested
    return min(8, max(1, usable_cores() // processes))
