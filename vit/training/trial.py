"""A few real steps before the real run: how long they take, and what they keep in memory."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vit.errors import Stopped
from vit.runtime.device import peak_memory, reset_peak_memory
from vit.training.batches import Batches
from vit.training.distillation import Distillation
from vit.training.state import TrainingState
from vit.training.step import OptimizerStep

# The first step allocates memory and is not counted where there are others
MAX_STEPS = 6
# No step is begun after so long
SECONDS = 15.0


@dataclass(frozen=True)
class Trial:
    """What a few steps took.

    step_seconds: mean time of a step, with data_seconds of it waited for its batch;
    evaluation_seconds: of the whole validation split, 0 where there is none. memory: bytes by
    purpose; peak: of the process or the GPU, in bytes.
    """

    steps: int
    step_seconds: float
    data_seconds: float
    evaluation_seconds: float
    memory: dict[str, int]
    peak: int


def try_steps(state: TrainingState, step: OptimizerStep, batches: Batches, total: int) -> Trial:
    """Make a few of a run's `total` steps, and evaluate on a batch of its validation split.

    Changes the state: the run itself starts anew. Raises what training would, and Stopped where a
    signal comes.
    """
    count = min(MAX_STEPS, total)
    kept = KeptTensors(state)
    # Without what looking for the micro-batch took
    reset_peak_memory(state.precision.device)
    step_times, data_times = [], []
    began = time.perf_counter()
    with contextlib.closing(batches.training(0, count)) as training:
        while len(step_times) < count and time.perf_counter() - began < SECONDS:
            start = time.perf_counter()
            loader_seconds = batches.loader_seconds
            images, labels = next(training)
            data_times.append(batches.waited(time.perf_counter() - start, loader_seconds))
            # What the first step keeps is what every step does; looking takes a little time
            with kept.counted() if not step_times else contextlib.nullcontext():
                row = step(images, labels)
            if row is None:
                raise Stopped(f"stopped by {step.stop.describe()} while steps were measured")
            row.sum().item()  # waits for the device
            if state.ema is not None:
                state.ema.update(state.model, state.progress.step)
            state.progress.step += 1
            step_times.append(time.perf_counter() - start)

    counted = slice(1, None) if len(step_times) > 1 else slice(None)
    return Trial(
        steps=len(step_times),
        step_seconds=mean(step_times[counted]),
        data_seconds=mean(data_times[counted]),
        evaluation_seconds=evaluation_seconds(state, batches),
        memory=memory_by_purpose(state, step.distillation, kept.bytes),
        peak=peak_memory(state.precision.device),
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def evaluation_seconds(state: TrainingState, batches: Batches) -> float:
    """Estimate the time of an evaluation on the validation split from one batch of it."""
    images = batches.data.val
    if images is None:
        return 0.0
    part = images.subset(torch.arange(min(batches.batch_size, len(images))))
    start = time.perf_counter()
    batches.evaluate(state.selected(), part, state.precision)
    return (time.perf_counter() - start) * len(images) / len(part)


def memory_by_purpose(
    state: TrainingState, distillation: Distillation | None, activations: int
) -> dict[str, int]:
    """Bytes that training keeps; activations: of the largest micro-batch."""
    trained = [item for item in state.model.parameters() if item.requires_grad]
    # Of what is trained alone; frozen weights are shared with their average
    averages = [] if state.ema is None else trained
    moments = [
        value
        for values in state.optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    return {
        "weights": total_bytes(state.model.parameters()),
        "gradients": total_bytes(trained),
        "optimizer": total_bytes(moments),
        "average": total_bytes(averages),
        "teacher": total_bytes(distillation.teacher.model.parameters()) if distillation else 0,
        "activations": activations,
    }


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class KeptTensors:
    """Counts the bytes that forward passes keep for their backward passes.

    bytes: the largest sum of one micro-batch. Tensors that share their memory count once, weights
    not at all. Activation checkpointing keeps less, and is seen to.
    """

    def __init__(self, state: TrainingState):
        self.weights = {item.untyped_storage().data_ptr() for item in state.model.parameters()}
        self.kept: dict[int, int] = {}
        self.bytes = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            yield

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.kept[storage.data_ptr()] = storage.nbytes()
            self.bytes = max(self.bytes, sum(self.kept.values()))
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        # The backward pass has begun: the next forward pass is another micro-batch's
        self.kept.clear()
        return tensor
