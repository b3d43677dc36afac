"""What two processes that share a model's state exchange, and in which types they compute.

Started with the variables that torchrun sets, by test_sharding.py. A small model is sharded
(FSDP) or copied (DDP), makes two steps in bf16 and is saved.

python sharded_state.py FOLDER fsdp|ddp
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.multiprocessing.reductions import StorageWeakRef

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import small_training
from small_training import BATCH_SIZE, batch, make_model

from vit.checkpoints.run import RunCheckpoints
from vit.runtime.precision import Precision
from vit.runtime.processes import Processes, gather_full, join_processes
from vit.training.losses import build_loss
from vit.training.optimizers import build_optimizer
from vit.training.state import EMA, Progress, TrainingState
from vit.training.step import OptimizerStep

CPU = torch.device("cpu")
HEADER = {"config": {}, "classes": ["one", "two", "three"], "preprocessing": {}, "data": 1}


def make_step(processes: Processes, sharding: str) -> OptimizerStep:
    model = make_model(
        hidden_size=64, num_layers=4, num_heads=2, position="rope2d", layer_scale=0.1, drop_path=0.2
    )
    model.encoder.checkpointing = True
    ema = EMA(model, 0.9)
    synchronized: nn.Module = model
    if sharding == "fsdp":
        for sharded in (model, ema.model):
            processes.shard(sharded, "cpu", torch.bfloat16)
    else:
        synchronized = processes.data_parallel(model, CPU)
    optimizer = build_optimizer(model, name="adamw", lr=1e-3, weight_decay=0.05, settings={})
    return small_training.make_step(
        TrainingState(model, ema, optimizer, Precision("bf16", CPU), Progress()),
        loss=build_loss("cross_entropy", 0.1),
        processes=processes,
        synchronized=synchronized,
    )


def note_types(model: nn.Module, types: dict[str, set[str]]) -> None:
    """Note the types in which the blocks of a model compute, by what they are of."""

    def note(name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            types.setdefault(name, set()).add(str(tensor.dtype))

    def noting(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            note(f"{name} input", inputs[0])
            note(f"{name} output", output)

        return hook

    def note_rotation(module: nn.Module, inputs: tuple) -> None:
        note("rotation", inputs[1])

    for block in model.get_submodule("encoder.blocks").children():
        block.register_forward_hook(noting("block"))
        block.get_submodule("attention").register_forward_pre_hook(note_rotation)
        block.get_submodule("mlp.fc1").register_forward_hook(noting("product"))


class Gathered:
    """Watches how many bytes of tensors that were put together are in memory at once.

    peak: the most of them. Within watching() a copy to the CPU is a copy, as from a GPU.
    """

    def __init__(self) -> None:
        self.storages: list[tuple[StorageWeakRef, int]] = []
        self.peak = 0

    def gather(self, tensor: Tensor) -> Tensor:
        full = gather_full(tensor)
        if full is not tensor:
            self.storages.append((StorageWeakRef(full.untyped_storage()), full.nbytes))
        alive = sum(count for storage, count in self.storages if not storage.expired())
        self.peak = max(self.peak, alive)
        return full

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with (
            mock.patch("vit.runtime.processes.gather_full", self.gather),
            mock.patch("torch.Tensor.cpu", torch.Tensor.clone),
        ):
            yield


def differing(tensors: dict[str, Tensor], state: TrainingState) -> list[str]:
    """The names of the tensors that are not, to the bit, those which torch's own gathering gives.

    It puts all of them together in every process.
    """
    assert state.ema is not None
    whole = StateDictOptions(full_state_dict=True)
    expected: dict[str, Any] = {}
    for part, model in (("model", state.model), ("average", state.ema.model)):
        weights = get_model_state_dict(model, options=whole)
        expected |= {f"{part}/{name}": weight for name, weight in weights.items()}
    optimizer: Any = get_optimizer_state_dict(state.model, state.optimizer, options=whole)
    for name, values in optimizer["state"].items():
        expected |= {f"optimizer/{name}/{key}": value for key, value in values.items()}
    if not tensors:
        return []
    assert tensors.keys() == expected.keys()
    return [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])]


@torch.no_grad()
def evaluation_loss(model: nn.Module, precision: Precision) -> float:
    """The loss on images that are no part of training. A collective."""
    images, labels = batch(100)
    with precision.autocast():
        logits = model(images)
    return nn.functional.cross_entropy(logits.float(), labels).item()


def main(folder: str, sharding: str) -> None:
    processes = join_processes("cpu")
    step = make_step(processes, sharding)
    state = step.state
    types: dict[str, set[str]] = {}
    note_types(state.model, types)
    own = processes.batch_slice(BATCH_SIZE)
    losses, losses_of_averages = [], []
    for number in range(2):
        images, labels = batch(number)
        row = step(images[own], labels[own])
        assert row is not None
        assert state.ema is not None
        processes.sum(row[:2])
        losses.append(row.tolist())
        state.ema.update(state.model, number)
        losses_of_averages.append(evaluation_loss(state.ema.model, state.precision))
        state.progress.step += 1
    checkpoints = RunCheckpoints(Path(folder), HEADER, writes=processes.rank == 0)
    gathered = Gathered()
    with gathered.watching():
        tensors = state.tensors()
    notes = {
        "losses": losses,
        "losses of averages": losses_of_averages,
        "types": {name: sorted(found) for name, found in types.items()},
        "gathered": gathered.peak,
        "sizes": {name: tensor.nbytes for name, tensor in tensors.items()},
        "differs": differing(tensors, state),
    }
    checkpoints.save_last(state)
    checkpoints.save_best(state)
    Path(folder, f"{processes.rank}.json").write_text(json.dumps(notes))
    processes.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
