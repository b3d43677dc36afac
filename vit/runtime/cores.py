"""The CPU cores this process may use. Imports no torch, so that launching processes needs none."""


def usable_cores() -> int:
    """Return how many cores this process may use.

    A scheduler or a container may allow fewer than the machine has, by affinity or by a quota of
    time, as Kubernetes and `docker run --cpus` do.
    """
    # Late, since it imports numpy, which --help can do without
    import joblib

    return joblib.cpu_count()


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
