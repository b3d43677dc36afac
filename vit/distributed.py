"""Several processes that train one model: who they are, what part of the work is whose, and what they tell each other.

torchrun (or runtime.processes=N, which uses its API) starts the processes and ends all of them when one ends. Alone, every
function here does nothing, so that training is written once.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # compiling, saving and listing a data set must fit into it
SECONDS_BETWEEN_BEATS, SECONDS_OF_SILENCE = 2.0, 30.0  # a process that has not been heard of for so long ends the run


def rank() -> int:
    """This process's number, 0 where it is alone. Rank 0 writes the run folder and speaks to the user."""
    return int(os.environ.get("RANK", 0)) if started_by_torchrun() else 0


def started_by_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run `python arguments…` in as many processes of this machine through torchrun's API; the exit code of the first that
    failed, or 0. A SIGTERM or SIGINT is passed on to them and waited for, so that they can save."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from vit.runtime import usable_cores

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes tell their errors themselves
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=f"vit-{os.getpid()}", max_restarts=0,
                          rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1,
                          signals_to_handle="SIGTERM,SIGINT,SIGUSR1", shutdown_timeout=600)
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"rank {number} (process {failure.pid}) was ended by {signal.Signals(-failure.exitcode).name}",
                  file=sys.stderr)
            return 3
        return failure.exitcode
    except SignalException:
        return 75
    return 0


@dataclass
class Group:
    """The processes of a run. rank, count: of all; local_rank, local_count: of this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    host_group: Any = None  # collectives on the CPU, also where the gradients' are on GPUs
    held: Any = None  # by rank 0: the store in which all say that they live
    parted: threading.Event = field(default_factory=threading.Event)

    def part(self, batch_size: int) -> slice:
        """Which samples of a global batch are this process's: a run of whole pairs, since neighbours may be mixed."""
        pairs = -(-batch_size // 2)
        first, end = (2 * (pairs * number // self.count) for number in (self.rank, self.rank + 1))
        return slice(first, min(end, batch_size))

    def any(self, *flags: bool) -> list[bool]:
        """Each flag: whether it is set in some process. All processes must call this at the same point."""
        if self.count == 1:
            return list(flags)
        import torch
        import torch.distributed as dist

        told = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(told, dist.ReduceOp.MAX, self.host_group)
        return [bool(flag) for flag in told]

    def sum(self, tensor: "Tensor") -> "Tensor":
        """The sum over all processes, in all of them."""
        if self.count > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, in all processes."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        held = [value]
        dist.broadcast_object_list(held, group=self.host_group)
        return held[0]

    def in_turn(self, call: Callable[[], Any]) -> Any:
        """call() by rank 0 first, then by the others: it may download or build what they then find."""
        result = call() if self.rank == 0 else None
        self.any(True)
        return result if self.rank == 0 else call()

    def wrap(self, model: "nn.Module", device: "torch.device") -> "nn.Module":
        """The model whose gradients are averaged over the processes as they are computed (DistributedDataParallel)."""
        if self.count == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                       broadcast_buffers=False, gradient_as_bucket_view=True)

    def shard(self, model: "nn.Module", device_type: str, half: "torch.dtype | None") -> None:
        """Spread a model's parameters over the processes, in place (FSDP2): each keeps a share of every block's and fetches the
        others' when the block is computed, in `half` precision where given; gradients are added up in float32."""
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device_type, (self.count,))
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
        for block in model.get_submodule("encoder.blocks").children():
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)

    def leave(self) -> None:
        """At the end of a run: wait for all, then part."""
        if self.count > 1:
            import torch.distributed as dist

            self.any(True)
            self.parted.set()
            dist.destroy_process_group()


def join(device_type: str) -> Group:
    """The group of the processes that torchrun started, or a group of one. Blocks until all are there."""
    if not started_by_torchrun():
        return Group()
    import torch.distributed as dist

    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    host_group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if device_type == "cuda" else None
    group = Group(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)),
                  int(os.environ.get("LOCAL_WORLD_SIZE", 1)), host_group)
    if group.count > 1:
        watch_each_other(group)
    return group


def watch_each_other(group: Group) -> None:
    """Start a thread in which every process says that it lives, and ends the run when another falls silent: one that is
    stopped or whose machine is gone would otherwise be waited for until the collectives' timeout. A process that compiles or
    saves goes on saying so, since this is a thread of its own."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    host = os.environ["MASTER_ADDR"]
    server = TCPStore(host, 0, is_master=True, wait_for_workers=False) if group.rank == 0 else None
    port = group.from_first(server.port if server else None)
    # The server's own process connects as a client too, so that a thread and its shutdown share nothing
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SECONDS_OF_SILENCE))
    store.set(f"name {group.rank}", f"{socket.gethostname()} {os.getpid()}")
    group.any(True)
    names = {other: store.get(f"name {other}").decode() for other in range(group.count) if other != group.rank}

    def watch() -> None:
        seen: dict[int, tuple[bytes, float]] = {other: (b"", time.monotonic()) for other in names}
        beat = 0
        while not group.parted.wait(SECONDS_BETWEEN_BEATS):
            beat += 1
            silent = None
            try:
                store.set(f"beat {group.rank}", str(beat))
                for other, (before, since) in seen.items():
                    key = f"beat {other}"
                    told = store.get(key) if store.check([key]) else b""
                    if told != before:
                        seen[other] = (told, time.monotonic())
                    elif time.monotonic() - since > SECONDS_OF_SILENCE:
                        silent = other
            except (RuntimeError, OSError):  # rank 0 keeps the store
                silent = 0
            if silent is not None and not group.parted.is_set():
                end_with(group.rank, silent, names.get(silent, ""))

    group.held = server
    threading.Thread(target=watch, daemon=True, name="watch").start()


def end_with(own: int, silent: int, name: str) -> None:
    """End this process because another has ended or fallen silent, and that one too where it is on this machine."""
    host, _, process = name.partition(" ")
    print(f"rank {own}: nothing is heard of rank {silent} any more (process {process} on {host}); ending. The last checkpoint "
          "is kept", file=sys.stderr, flush=True)
    if host == socket.gethostname():
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(process), signal.SIGKILL)
    os._exit(3)


def whole(tensor: "Tensor") -> "Tensor":
    """A tensor that is spread over the processes, put together in each of them (all must call this); others as they are."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def placed(tensor: "Tensor", like: "Tensor") -> "Tensor":
    """The inverse of whole(): spread as `like` is, where it is and has the same shape."""
    if not hasattr(like, "device_mesh") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


@contextlib.contextmanager
def unsynchronised(model: "nn.Module") -> Iterator[None]:
    """Gradients computed inside stay with their process (DistributedDataParallel, FSDP2); other models are left alone."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)  # pyright: ignore[reportCallIssue]
        yield
        model.set_requires_gradient_sync(True)  # pyright: ignore[reportCallIssue]
    elif hasattr(model, "no_sync"):
        with model.no_sync():  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues]
            yield
    else:
        yield
