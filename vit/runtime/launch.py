"""TODO: say what this file is for."""

import logging
import os
import signal
import sys
from collections.abc import Sequence


def process_rank() -> int:
    """This process's number, 0 where it is alone. Rank 0 writes the run folder and speaks to the user."""
    return int(os.environ.get("RANK", 0)) if started_by_torchrun() else 0


def started_by_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def launch_processes(count: int, arguments: Sequence[str]) -> int:
    """Run `python arguments…` in as many processes of this machine through torchrun's API; the exit code of the first that
    failed, or 0. A SIGTERM or SIGINT is passed on to them and waited for, so that they can save."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from vit.runtime.device import usable_cores

    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # the processes tell their errors themselves
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
        shutdown_timeout=600,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(
                f"rank {number} (process {failure.pid}) was ended by {signal.Signals(-failure.exitcode).name}",
                file=sys.stderr,
            )
            return 3
        return failure.exitcode
    except SignalException:
        return 75
    return 0
