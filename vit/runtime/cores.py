"""The CPU cores this process may use. Imports no torch, so that launching processes needs none."""

import os


def usable_cores() -> int:
    """Return how many cores this process may use."""
    # A container or a scheduler may allow fewer than the machine has; macOS can't tell
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Each worker takes memory for its batches. A CPU that trains needs few images a second; a GPU may
# take thousands, of which a core decodes four hundred
MOST_WORKERS = 8
MOST_WORKERS_OF_A_GPU = 32


def loader_workers(requested: int | None, processes: int = 1, device_type: str = "cpu") -> int:
    """Return how many processes decode image files: as requested, or from the number of cores.

    One a core, eight at most; beside a GPU one a core but for the core that drives the GPU, 32 at
    most. processes: how many processes of the run share this machine's cores.
    """
    if requested is not None:
        return requested
    most = MOST_WORKERS_OF_A_GPU if device_type == "cuda" else MOST_WORKERS
    return min(most, worker_cores(processes, device_type))


def worker_cores(processes: int, device_type: str) -> int:
    """Return how many cores there are for the workers of one process, at least 1.

    processes: see loader_workers.
    """
    # One is kept for the process that drives the GPU
    kept = 1 if device_type == "cuda" else 0
    return max(1, usable_cores() // processes - kept)
