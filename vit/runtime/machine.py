"""Where a run is computed: this process's device, the other processes, the loader's workers."""

from dataclasses import dataclass
from typing import Any

import torch

from vit.errors import ConfigError
from vit.runtime.allocator import keep_freed_memory
from vit.runtime.cores import loader_workers
from vit.runtime.device import (
    DEVICE_NAMES,
    choose_device,
    describe_device,
    start_device,
    use_deterministic_kernels,
    use_threads,
)
from vit.runtime.launch import local_process_count, started_by_torchrun
from vit.runtime.processes import Processes, join_processes
from vit.runtime.signals import StopSignal


@dataclass(frozen=True)
class Machine:
    """What a run needs to know about the hardware; none of it changes the result.

    workers: processes that decode image files; sharded: weights, averages and optimizer state are
    spread over the processes (FSDP).
    """

    device: torch.device
    processes: Processes
    workers: int
    sharded: bool

    @classmethod
    def start(
        cls,
        stop: StopSignal,
        *,
        device: str,
        threads: int | None,
        deterministic: bool,
        workers: int | None,
        sharding: str,
    ) -> "Machine":
        """Choose the device, wait for the other processes, and set torch up.

        Raises ConfigError where the machine has no such device, or one process is to be sharded,
        and Stopped where a signal has come.
        """
        chosen = start_device(device)
        # Before they wait for one another, which NCCL does not without a GPU for each
        require_gpus(chosen, local_process_count())

        # Until all processes are there, nobody looks at the signal and there is nothing to save
        stop.exit_immediately = started_by_torchrun()
        # One that came earlier may have ended another process, which would be waited for
        stop.check()
        processes = join_processes(chosen.type)
        stop.exit_immediately = False

        sharded = require_several(sharding, processes.count)

        # One GPU a process; collectives use the current device
        if chosen.type == "cuda":
            chosen = torch.device("cuda", processes.local_rank)
            torch.cuda.set_device(chosen)

        keep_freed_memory(chosen.type)

        # Before any tensor is computed: all of them change the bits of a result
        use_threads(threads)
        use_deterministic_kernels(deterministic)
        return cls(
            device=chosen,
            processes=processes,
            workers=loader_workers(workers, processes.local_count, chosen.type),
            sharded=sharded,
        )

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run folder and prints for the user."""
        return self.processes.rank == 0

    def describe(self) -> str:
        """Describe the hardware for people: "2 processes, each cpu, 1 threads"."""
        device = describe_device(self.device)
        count = self.processes.count
        return f"{count} processes, each {device}" if count > 1 else device


def require_several(sharding: str, processes: int) -> bool:
    """Return whether runtime.sharding spreads the weights. Raises ConfigError over one process."""
    if sharding == "none":
        return False
    if processes == 1:
        raise ConfigError(
            "runtime.sharding=fsdp needs several processes: runtime.processes=N, or torchrun"
        )
    return True


def require_gpus_of(name: Any, processes: int) -> None:
    """require_gpus() for a value of runtime.device; one that is no device's name is let through."""
    if name in DEVICE_NAMES:
        require_gpus(choose_device(name), processes)


def require_gpus(device: torch.device, processes: int) -> None:
    """Raise ConfigError where the device is a GPU, and this machine has fewer than processes."""
    if device.type == "cpu":
        return
    # Apple's has no collectives either
    gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    if processes > gpus:
        raise ConfigError(
            f"runtime.processes={processes}: each process needs a GPU of its own, and this machine "
            f"has {gpus}; lower it, or use runtime.device=cpu"
        )
