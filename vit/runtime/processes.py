"""Several processes that train one model: who they are, what part of the work is whose, and what they tell each other.

torchrun (or runtime.processes=N, which uses its API) starts the processes and ends all of them when one ends. Alone, every
function here does nothing, so that training is written once.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from vit.runtime.heartbeat import start_heartbeat
from vit.runtime.launch import started_by_torchrun

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


COLLECTIVE_TIMEOUT = timedelta(
    minutes=30
)  # compiling, saving and listing a data set must fit into it


@dataclass
class Processes:
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

        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def shard(self, model: "nn.Module", device_type: str, half: "torch.dtype | None") -> None:
        """Spread a model's parameters over the processes, in place (FSDP2): each keeps a share of every block's and fetches the
        others' when the block is computed, in `half` precision where given; gradients are added up in float32."""
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device_type, (self.count,))
        policy = MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=torch.float32 if half else None
        )
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


def join_processes(device_type: str) -> Processes:
    """The group of the processes that torchrun started, or a group of one. Blocks until all are there."""
    if not started_by_torchrun():
        return Processes()
    import torch.distributed as dist

    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    host_group = (
        dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        if device_type == "cuda"
        else None
    )
    group = Processes(
        dist.get_rank(),
        dist.get_world_size(),
        int(os.environ.get("LOCAL_RANK", 0)),
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        host_group,
    )
    if group.count > 1:
        start_heartbeat(group)
    return group


def gather_full(tensor: "Tensor") -> "Tensor":
    """A tensor that is spread over the processes, put together in each of them (all must call this); others as they are."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def shard_like(tensor: "Tensor", like: "Tensor") -> "Tensor":
    """The inverse of whole(): spread as `like` is, where it is and has the same shape."""
    if not hasattr(like, "device_mesh") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


@contextlib.contextmanager
def no_gradient_sync(model: "nn.Module") -> Iterator[None]:
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
