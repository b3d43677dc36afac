"""One optimizer step on a global batch: micro-batches, loss, clipping, fp16's loss scale."""

import contextlib
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vit.errors import TrainingFailed
from vit.randomness import random_seed, random_uniform
from vit.runtime.precision import Precision
from vit.runtime.processes import Processes, gather_full, no_gradient_sync
from vit.runtime.signals import StopSignal
from vit.training.losses import Loss
from vit.training.state import TrainingState
from vit.training.window import require_finite

MIN_LOSS_SCALE = 2.0**-10


@dataclass
class OptimizerStep:
    """Makes one optimizer step of a state on a batch.

    forward: the state's model, compiled or wrapped so that its gradients are averaged over the
    processes;
    synchronized: the same, not compiled.
    batch_size: global; micro_batch_size: images of a forward and backward pass, None for the whole
    batch.
    clip_norm: of the whole gradient, None for no clipping; seed: of dropout and stochastic depth.
    """

    state: TrainingState
    forward: nn.Module
    synchronized: nn.Module
    loss: Loss
    processes: Processes
    stop: StopSignal
    batch_size: int
    micro_batch_size: int | None
    clip_norm: float | None
    drop_path_schedule: str
    seed: int
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = self.state.precision.scaler()
        if self.state.progress.scaler is not None:
            self.scaler.load_state_dict(self.state.progress.scaler)

    @property
    def compiled(self) -> bool:
        return self.forward is not self.synchronized

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor | None:
        """Make the step on a global batch of which these are this process's images.

        images: normalized, (B, C, height, width); labels: int64 (B,), or of mixed images the
        classes' weights, (B, classes). Returns (loss, correct predictions, gradient norm) of the
        whole batch on the device, or None where a signal came, which leaves the state as it was.
        Raises TrainingFailed where the loss is not finite.
        """
        self.state.model.train()
        while True:
            sums = self.accumulate_gradients(images, labels)
            if sums is None:
                self.state.optimizer.zero_grad()
                return None
            sums = self.processes.sum(sums)
            self.scaler.unscale_(self.state.optimizer)
            grad_norm = self.clip_gradients()
            if (
                labels.device.type == "cpu"
            ):  # reading costs nothing here; on a GPU it waits for the log
                require_finite(sums[0].item(), self.state.progress.step + 1)
            if self.update_weights():
                return torch.stack([*sums, grad_norm])
            # fp16 overflowed: the weights were left alone and the scale was halved; the same batch
            # again

    def accumulate_gradients(self, images: Tensor, labels: Tensor) -> Tensor | None:
        """Forward and backward passes over the batch, a micro-batch at a time.

        Returns the sums of the losses and of the correct predictions, float32 (2,), or None on a
        signal.
        """
        size = self.micro_batch_size or len(labels)
        sums = torch.zeros(2, device=labels.device)
        micro_batches = list(
            zip(
                images.split(size),
                labels.split(size),
                self.keep_masks(len(labels), size, labels.device),
                strict=True,
            )
        )
        for number, (inputs, targets, keep) in enumerate(micro_batches):
            # Several processes stop together, after the step
            if self.stop and self.processes.count == 1:
                return None
            is_last = number == len(micro_batches) - 1
            # Gradients are exchanged once, with the last micro-batch
            waiting = contextlib.nullcontext() if is_last else no_gradient_sync(self.synchronized)
            self.seed_dropout(number)
            with waiting:
                sums = sums + self.forward_and_backward(inputs, targets, keep)
        return sums

    def forward_and_backward(self, inputs: Tensor, targets: Tensor, keep: Tensor | None) -> Tensor:
        """Add a micro-batch's gradients; its loss and number of correct predictions, float32 (2,)
        on the device.
        """
        with self.state.precision.autocast():
            logits = self.forward(inputs, keep)
        if logits.dtype != torch.float64:
            logits = logits.float()
        loss = self.loss(logits, targets) / self.batch_size
        # Over several processes gradients are averaged, not added
        self.scaler.scale(loss * self.processes.count).backward()
        if targets.ndim == 2:  # of mixed images no prediction is simply correct
            correct = torch.full((), math.nan, device=targets.device)
        else:
            correct = (logits.argmax(dim=1) == targets).sum()
        return torch.stack([loss.detach(), correct])

    def keep_masks(self, count: int, size: int, device: torch.device) -> list[Tensor | None]:
        """This process's factors of stochastic depth, cut into micro-batches of `size`; None for
        each without it.
        """
        model = self.state.model
        keep = draw_drop_path(
            model.drop_path,
            len(model.encoder.blocks),
            self.batch_size,
            self.seed,
            self.state.progress.step,
            self.drop_path_schedule,
        )
        if keep is None:
            return [None] * -(-count // size)
        own = keep[self.processes.batch_slice(self.batch_size)]
        return list(own.to(device, non_blocking=True).split(size))

    def seed_dropout(self, micro_batch: int) -> None:
        """Elementwise dropout alone depends on how the batch is split: on the micro-batch and the
        process.
        """
        counter = (self.processes.rank << 32) + micro_batch
        step = self.state.progress.step
        torch.manual_seed(random_seed(self.seed, "dropout", step, counter))

    def clip_gradients(self) -> Tensor:
        """Scale the gradient down to clip_norm where it is longer; its length before."""
        limit = math.inf if self.clip_norm is None else self.clip_norm
        norm = nn.utils.clip_grad_norm_(self.state.model.parameters(), limit)
        return gather_full(norm).detach()

    def update_weights(self) -> bool:
        """The optimizer's step, and no gradients afterwards. False where fp16's gradients
        overflowed.

        Raises TrainingFailed where they overflow at any loss scale.
        """
        scale = self.scaler.get_scale()
        if scale < MIN_LOSS_SCALE:
            raise TrainingFailed(
                f"the fp16 gradients are not finite at step {self.state.progress.step + 1} at any "
                "loss scale; try train.precision=bf16 or fp32, or a lower optimizer.lr. "
                "The last good checkpoint is kept"
            )
        self.scaler.step(self.state.optimizer)
        self.scaler.update()
        self.state.optimizer.zero_grad()
        return self.scaler.get_scale() >= scale


def draw_drop_path(
    rate: float, num_layers: int, batch_size: int, seed: int, step: int, schedule: str = "linear"
) -> Tensor | None:
    """The factors of stochastic depth for a global batch, (B, L, 2) on the CPU; None for a rate of
    0.

    A factor is 0, or 1 / keep rate. schedule linear: the rate of dropping rises from 0 in the first
    block to `rate` in the last (Huang et al. 2016); constant: it is `rate` in every block (Touvron
    et al. 2022, DeiT-III). The factors depend on the arguments alone, so that a batch in parts gets
    the same as a whole one.
    """
    if not rate:
        return None
    first = rate if schedule == "constant" else 0
    rates = torch.linspace(first, rate, num_layers)[:, None]
    images = torch.arange(batch_size)[:, None, None]
    layers = torch.arange(num_layers)[:, None]
    numbers = random_uniform(seed, "drop path", step, images, layers, torch.arange(2))
    return (numbers >= rates) / (1 - rates)


def find_micro_batch_size(
    model: nn.Module, image_shape: tuple[int, ...], batch_size: int, precision: Precision
) -> int:
    """How many images fit into the device's memory in one forward and backward pass, beside the
    optimizer's state.

    image_shape: (C, height, width). Returns batch_size, or that halved as often as it must be.
    Raises torch.OutOfMemoryError where not even one fits.
    """
    trained = sum(item.numel() for item in model.parameters() if item.requires_grad)
    size = batch_size
    while True:
        try:
            moments = torch.zeros(
                2 * trained, device=precision.device
            )  # what the optimizer will keep
            with precision.autocast():
                logits = model(torch.zeros(size, *image_shape, device=precision.device))
            (logits.float().sum() + 0 * moments[:1].sum()).backward()
            return size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = (size + 1) // 2
        finally:
            moments = logits = None
            model.zero_grad()
            if precision.device.type == "cuda":
                torch.cuda.empty_cache()
