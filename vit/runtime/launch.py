"""Starting a run in several processes of this machine, and knowing whether this process is one of
them.

Imports no torch at module level: the process that launches the others needs it only once it
launches.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from vit.runtime.cores import usable_cores

TORCHRUN_VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
SECONDS_TO_SAVE = 600  # that the processes have after a signal


def started_by_torchrun() -> bool:
    """Whether torchrun, or launch_processes, which uses its API, has started this process."""
    return os.environ.keys() >= TORCHRUN_VARIABLES


def process_rank() -> int:
    """This process's number; 0 where it is alone. Rank 0 writes the run folder and speaks to the
    user.
    """
    return int(os.environ.get("RANK", 0)) if started_by_torchrun() else 0


def launch_processes(count: int, arguments: Sequence[str]) -> int:
    """Run `python arguments…` in so many processes of this machine through torchrun's API.

    Returns the exit code of the first that failed, or 0. A SIGTERM or SIGINT is passed on to the
    processes, which are waited for so that they can save.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The processes report their errors themselves
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"vit-{os.getpid()}",
        max_restarts=0,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        monitor_interval=0.1,
        signals_to_handle="SIGTERM,SIGINT,SIGUSR1",
        shutdown_timeout=SECONDS_TO_SAVE,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"rank {rank} (process {failure.pid}) was killed by {name}", file=sys.stderr)
        return 3
    except SignalException:
        return 75
    return 0
