"""The processes that train one model together: who computes which samples, what they exchange.

torchrun, or runtime.processes=N, starts the processes and ends all of them when one fails. In a
run of one process every method here does nothing, so that training is written once.
"""

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vit.model.residual import LayerScale
from vit.runtime.heartbeat import Heartbeat, start_heartbeat
from vit.runtime.launch import local_process_count, started_by_torchrun

T = TypeVar("T")

# Compiling, saving and listing a data set must fit into it; the heartbeat finds dead processes
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# The models that DDP has wrapped. Collected at the end of a run, their last reference to gloo's
# group would wait for its thread and hold the interpreter's lock, while with torch 2.11 the thread
# waits for this lock to let go of a tensor. The process ends without it, see end_after()
NEVER_COLLECTED: list[nn.Module] = []


@dataclass
class Processes:
    """The processes of a run. rank, count: of all; local_rank, local_count: of this machine.

    cpu_group: for collectives on the CPU where those of the gradients are on GPUs; None: the
    default group.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    cpu_group: Any = None
    heartbeat: Heartbeat | None = None

    def batch_slice(self, batch_size: int) -> slice:
        """Return which samples of a global batch this process computes.

        The slices of all processes cover the batch without overlap.
        """
        # Whole pairs, since mixup and CutMix mix neighbors: the mix is then the same in one process
        pairs = -(-batch_size // 2)
        start = 2 * (pairs * self.rank // self.count)
        end = 2 * (pairs * (self.rank + 1) // self.count)
        return slice(start, min(end, batch_size))

    def largest(self, *numbers: float) -> list[float]:
        """Return for each number the largest of all processes'.

        A collective: all processes must call it at the same point.
        """
        if self.count == 1:
            return list(numbers)
        # On the CPU, so that a GPU's queue of work is not waited for
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, self.cpu_group)
        return tensor.tolist()

    def any_of(self, flag: bool) -> bool:
        """Return whether a flag is set in any process. A collective."""
        return bool(self.largest(flag)[0])

    def barrier(self) -> None:
        """Wait until all processes are here."""
        # dist.barrier() of NCCL would wait for the GPU too
        self.any_of(True)

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, and return it. A collective."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def least(self, number: int) -> int:
        """Return the smallest of all processes' numbers. A collective."""
        (largest,) = self.largest(-number)
        return -int(largest)

    def broadcast(self, value: T) -> T:
        """Return rank 0's value in all processes. A collective; the value is pickled."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.cpu_group)
        return values[0]

    def first_then_others(self, call: Callable[[], T]) -> T:
        """Return call(), made by rank 0 before the others: it may download what they then find."""
        if self.rank == 0:
            result = call()
            self.barrier()
            return result
        self.barrier()
        return call()

    def data_parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Wrap a model so that its gradients are averaged over the processes (DDP)."""
        if self.count == 1:
            return model
        # The model has no buffers that change. Newer versions of torch have another name for not
        # sending them around, and warn of the old one
        parameters = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers"
        buffers: dict[str, Any] = {name if name in parameters else "broadcast_buffers": False}
        # Gradients as views of the buckets save a copy
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **buffers,
        )
        NEVER_COLLECTED.append(wrapped)
        return wrapped

    def shard(self, model: nn.Module, device_type: str, dtype: torch.dtype | None) -> None:
        """Spread a model's parameters over the processes, in place (FSDP2).

        Each process keeps a shard of every block and gathers the others' when the block is
        computed, in `dtype` where given; gradients are reduced in float32. What else a forward pass
        computes, it computes in the types of a model that is not sharded.
        """
        mesh = init_device_mesh(device_type, (self.count,))

        # Many processes' gradients added in 16 bits would lose the small ones. Inputs are left as
        # they are: autocast rounds those of the products, while the residual stream and the
        # rotations of positions stay in float32
        rounded = MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.float32 if dtype else None,
            cast_forward_inputs=False,
        )
        whole = MixedPrecisionPolicy(cast_forward_inputs=False)

        # Blocks before the whole, which takes the parameters that are left. Norms, LayerScale and
        # positions are not rounded, or the residual stream would become one of 16 bits; they are
        # small
        small = (nn.LayerNorm, LayerScale)
        for block in model.get_submodule("encoder.blocks").children():
            factors: list[nn.Module] = [part for part in block.modules() if isinstance(part, small)]
            if dtype:
                fully_shard(factors, mesh=mesh, mp_policy=whole)
            fully_shard(block, mesh=mesh, mp_policy=rounded)
        fully_shard(model, mesh=mesh, mp_policy=whole)

    def leave(self) -> None:
        """Leave the group at the end of a run, once all processes have come to it.

        A process that ends within a group may be aborted, and the launcher gives the others half a
        minute then, which saving may take.
        """
        if self.count == 1 or not dist.is_initialized():
            return
        self.barrier()
        # The heartbeats first, or they would miss the process that leaves before the others. All of
        # them, since the first process takes their store with it
        if self.heartbeat is not None:
            self.heartbeat.stop()
            self.barrier()
        dist.destroy_process_group()


def join_processes(device_type: str) -> Processes:
    """Return the processes that torchrun started, or this one alone. Waits for all of them."""
    if not started_by_torchrun():
        return Processes()

    # NCCL for tensors on GPUs; gloo beside it for flags and Python objects, which are on the CPU
    on_gpu = device_type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=COLLECTIVE_TIMEOUT)
    processes = Processes(
        rank=dist.get_rank(),
        count=dist.get_world_size(),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        local_count=local_process_count(),
        cpu_group=dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if on_gpu else None,
    )
    if processes.count > 1:
        processes.heartbeat = start_heartbeat(
            processes.rank, processes.count, processes.broadcast, processes.barrier
        )
    return processes


def gather_full(tensor: Tensor) -> Tensor:
    """Put a sharded tensor together in every process; return other tensors as they are.

    A collective for sharded tensors: all processes must call it.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_to_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors by name, on the CPU and in the first process alone: {} in the others.

    One after another, so that no device ever holds more than one of them beside its shards: the
    state of a model that is sharded need not fit into the memory of one. A collective for sharded
    tensors: all processes must call it, with the same names in the same order.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    whole = {}
    for name, tensor in tensors.items():
        full = gather_full(tensor.detach())
        if is_first:
            whole[name] = full.cpu()
        # Before the next one is put together
        del full
    return whole


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a whole tensor as `like` is sharded: the inverse of gather_full.

    Returned as it is where `like` is not sharded, or has another shape (which the caller reports).
    """
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def keep_own_shard(model: nn.Module) -> None:
    """Let go of the weights that the last forward pass has gathered from other processes (FSDP2).

    To be called before a model's weights are changed otherwise than by training it: a forward pass
    without a backward pass leaves those outside of the blocks gathered, and the next would compute
    with them as they were. Other models are left alone.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


@contextlib.contextmanager
def no_gradient_sync(model: nn.Module) -> Iterator[None]:
    """Keep the gradients of the block's backward passes in their process (DDP, FSDP2).

    Other models are left alone.
    """
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        yield
