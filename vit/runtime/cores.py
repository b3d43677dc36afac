"""The CPU cores this process may use. Imports no torch, so that launching processes needs none."""

import os


def usable_cores() -> int:
    """Return how many cores this process may use."""
    # A container or a scheduler may allow fewer than the machine has; macOS can't tell
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def loader_workers(requested: int | None, processes: int = 1) -> int:
    """Return how many processes decode image files: as requested, or one a core, eight at most.

    processes: how many processes of the run share this machine's cores.
    """
    if requested is not None:
        return requested
    # Each worker takes memory for its batches, and more than eight rarely speed a device up
    return min(8, max(1, usable_cores() // processes))
