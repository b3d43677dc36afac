"""Starting a run in several processes of this machine, and telling whether this is one of them.

Imports no torch at module level, so that a mistaken command is answered at once.
"""

import atexit
import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from vit.runtime.cores import usable_cores
from vit.runtime.signals import StopSignal

TORCHRUN_VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
# Where an agent of torchrun leaves the number of the run for the processes that it starts
AGENTS_RUN = "TORCHELASTIC_RUN_ID"
# Where the process that starts the others leaves when it was started itself
STARTED = "VIT_STARTED"
# How long torchrun lets processes take to save after a signal. torch 2.11 does not read it, and
# gives them 30 seconds
SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SECONDS_TO_SAVE = 600
# How much later than the others the first process may report the same error
SECONDS_TO_REPORT = 10.0


def started_by_torchrun() -> bool:
    """Whether torchrun, or launch_processes through its API, has started this process."""
    return os.environ.keys() >= TORCHRUN_VARIABLES


def end_after(program: Callable[[], int]) -> NoReturn:
    """End this process with a program's exit code; one of several without tearing it down.

    A thread of torch (of gloo, of its store) that comes back into an interpreter that is being torn
    down aborts the process, and a run that has finished or was stopped would be told as failed.
    """
    try:
        code = program()
    except SystemExit as end:
        # A message instead of a number is Python's to print
        if not isinstance(end.code, int):
            raise
        code = end.code
    if not started_by_torchrun():
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # Nobody may read it any more
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def wait_for_first(stop: StopSignal) -> bool:
    """Wait while the first process reports an error that all end in; whether it can have done so.

    An agent of torchrun ends all the others as soon as one process has ended, so one that were
    quicker than the first would take the message with it. stop: the signal of the agent.
    """
    # The variables of torchrun may be set by hand or by a scheduler, which ends nobody
    if AGENTS_RUN not in os.environ:
        return True
    deadline = time.monotonic() + SECONDS_TO_REPORT
    while not stop and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(stop)


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the process dies that has started this one (Linux only).

    Where that one is killed, this one saves and ends then, instead of training on unseen.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def end_with_agent() -> None:
    """end_with_parent() for a process of torchrun's agent, to be called when SIGTERM is handled."""
    if AGENTS_RUN in os.environ:
        end_with_parent()


def start_of_command() -> float:
    """Return when the command was started that this process belongs to, by time.monotonic().

    That clock is one for all processes of a machine. Of a process that torchrun itself has started,
    it is this very moment.
    """
    if started_by_torchrun() and STARTED in os.environ:
        return float(os.environ[STARTED])
    return time.monotonic()


def process_rank() -> int:
    """Return this process's number, 0 where it is alone.

    Rank 0 writes the run folder and prints for the user.
    """
    return int(os.environ.get("RANK", 0)) if started_by_torchrun() else 0


def tasks_of_slurm() -> int:
    """Return how many tasks of SLURM run this command, each as a run of its own.

    1 where it was not srun that started them, or where torchrun has made one run of them.
    """
    return 1 if started_by_torchrun() else int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def process_count() -> int:
    """Return how many processes the run has, on all machines."""
    return int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else 1


def local_process_count() -> int:
    """Return how many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if started_by_torchrun() else 1


def launch_processes(count: int, arguments: Sequence[str], started: float) -> int:
    """Run `python arguments…` in `count` processes of this machine through torchrun's API.

    started: when the command was, which a limit of its time counts from. Returns the exit code of
    the first that failed, 75 after a signal, or 0. A signal is passed on to the processes, which
    are waited for so that they can save.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The processes report their errors themselves
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

    # The processes share the cores; without this torchrun gives each one thread
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
    os.environ[STARTED] = str(started)
    os.environ.setdefault(SHUTDOWN_TIMEOUT, str(SECONDS_TO_SAVE))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"vit-{os.getpid()}",
        # torchrun would restart without resume=; resuming is the user's decision
        max_restarts=0,
        rdzv_backend="c10d",
        # Port 0: any free one, so that two runs on one machine do not meet
        rdzv_endpoint="localhost:0",
        monitor_interval=0.1,
        signals_to_handle="SIGTERM,SIGINT,SIGUSR1",
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # The others are ended after it, so only the first exit code says what happened
        if failure.exitcode >= 0:
            return failure.exitcode
        # Negative: killed by that signal, so it could not report anything itself
        name = signal.Signals(-failure.exitcode).name
        print(f"rank {rank} (process {failure.pid}) was killed by {name}", file=sys.stderr)
        return 3
    except SignalException:
        return 75
    return 0
