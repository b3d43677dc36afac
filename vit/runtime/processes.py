"""The processes that train one model together: which part of a batch is whose, and what they
exchange.

torchrun, or runtime.processes=N, starts the processes and ends all of them when one ends. Alone,
every method here does nothing, so that training is written once.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vit.runtime.heartbeat import Heartbeat, start_heartbeat
from vit.runtime.launch import started_by_torchrun

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(
    minutes=30
)  # compiling, saving and listing a data set must fit into it


@dataclass
class Processes:
    """The processes of a run. rank, count: of all; local_rank, local_count: of this machine.

    cpu_group: for collectives on the CPU where the gradients' are on GPUs; None: the default group.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    cpu_group: Any = None
    heartbeat: Heartbeat | None = None

    def batch_slice(self, batch_size: int) -> slice:
        """Which samples of a global batch are this process's: whole pairs, since neighbors may be
        mixed.
        """
        pairs = -(-batch_size // 2)
        start = 2 * (pairs * self.rank // self.count)
        end = 2 * (pairs * (self.rank + 1) // self.count)
        return slice(start, min(end, batch_size))

    def any_of(self, *flags: bool) -> list[bool]:
        """Each flag: whether it is set in some process. All processes must call this at the same
        point.
        """
        if self.count == 1:
            return list(flags)
        tensor = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, self.cpu_group)
        return [bool(flag) for flag in tensor]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.any_of(True)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in all of them."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        """Rank 0's value, in all processes."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.cpu_group)
        return values[0]

    def first_then_others(self, call: Callable[[], T]) -> T:
        """call() in rank 0 first, then in the others: it may download or build what they
        then find.
        """
        if self.rank == 0:
            result = call()
            self.barrier()
            return result
        self.barrier()
        return call()

    def data_parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model wrapped so that its gradients are averaged over the processes as they are
        computed.
        """
        if self.count == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def shard(self, model: nn.Module, device_type: str, dtype: torch.dtype | None) -> None:
        """Spread a model's parameters over the processes, in place (FSDP2).

        Each process keeps a shard of every block and gathers the others' when the block is
        computed, in `dtype` where given; gradients are reduced in float32.
        """
        mesh = init_device_mesh(device_type, (self.count,))
        reduce_dtype = torch.float32 if dtype else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype)
        for block in model.get_submodule("encoder.blocks").children():
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)

    def leave(self) -> None:
        """At the end of a run: wait for all, then part."""
        if self.count == 1:
            return
        self.barrier()
        if self.heartbeat is not None:
            self.heartbeat.stop()
        dist.destroy_process_group()


def join_processes(device_type: str) -> Processes:
    """The processes that torchrun started, or this one alone. Blocks until all are there."""
    if not started_by_torchrun():
        return Processes()
    on_gpu = device_type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=COLLECTIVE_TIMEOUT)
    processes = Processes(
        rank=dist.get_rank(),
        count=dist.get_world_size(),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        local_count=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        cpu_group=dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if on_gpu else None,
    )
    if processes.count > 1:
        processes.heartbeat = start_heartbeat(
            processes.rank, processes.count, processes.broadcast, processes.barrier
        )
    return processes


def gather_full(tensor: Tensor) -> Tensor:
    """A sharded tensor put together in each process, all of which must call this; others as they
    are.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of gather_full: sharded as `like` is, where that is sharded and has the same
    shape.
    """
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


@contextlib.contextmanager
def no_gradient_sync(model: nn.Module) -> Iterator[None]:
    """Inside: gradients stay with their process (DistributedDataParallel, FSDP2); other models are
    left alone.
    """
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif hasattr(model, "set_requires_gradient_sync"):  # a module that fully_shard() has changed
        model.set_requires_gradient_sync(False)  # pyright: ignore[reportCallIssue]
        yield
        model.set_requires_gradient_sync(True)  # pyright: ignore[reportCallIssue]
    else:
        yield
