"""One optimizer step on a global batch: micro-batches, loss, clipping, fp16's loss scale.

The result does not depend on how the batch is split over processes and micro-batches, up to
floating point and dropout: elementwise dropout and model.patch_dropout draw anew for each part.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vit.errors import TrainingFailed
from vit.randomness import random_seed, random_uniform
from vit.runtime.device import send
from vit.runtime.processes import Processes, gather_full, no_gradient_sync
from vit.runtime.signals import StopSignal
from vit.training.distillation import Distillation
from vit.training.losses import Loss
from vit.training.state import TrainingState
from vit.training.window import require_finite

# It starts at 2**16 and is halved at every overflow. So low, the gradients are not finite at all
MIN_LOSS_SCALE = 2.0**-10


@dataclass
class OptimizerStep:
    """Makes one optimizer step of a state on a batch.

    forward: the state's model, wrapped so that its gradients are averaged over the processes, and
    compiled where that pays; synchronized: the same, not compiled. batch_size: global;
    micro_batch_size: images of a forward and backward pass, None for the whole batch. clip_norm: of
    the whole gradient, None for no clipping; seed: of dropout and stochastic depth. distillation:
    the part of the loss that comes from a teacher, None without one. frozen: the modules that give
    fixed features, see vit.training.freezing.
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
    compiled: bool = False
    distillation: Distillation | None = None
    frozen: Sequence[nn.Module] = ()
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.set_frozen_mode()
        frozen = {module for part in self.frozen for module in part.modules()}
        self.frozen_blocks = sum(block in frozen for block in self.state.model.encoder.blocks)
        # Once, since going through all modules in every step takes a GPU's host long
        self.parameters = list(self.state.model.parameters())
        self.scaler = self.state.precision.scaler()
        if self.state.progress.scaler is not None:
            self.scaler.load_state_dict(self.state.progress.scaler)

    @property
    def images_at_once(self) -> int:
        """How many images this process computes in a forward and backward pass."""
        own = len(range(self.batch_size)[self.processes.batch_slice(self.batch_size)])
        return min(own, self.micro_batch_size or own)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor | None:
        """Make the step on a global batch of which these are this process's images.

        images: normalized, (B, C, height, width); labels: int64 (B,), or of mixed images the
        classes' weights, (B, classes). Returns (loss, correct predictions, gradient norm), float32
        (3,) on the device, or None where a signal came, which leaves the state as it was. The norm
        is of the global batch, the others are this process's parts of it, see Agreement. Raises
        TrainingFailed where the loss is not finite.
        """
        # Only after an evaluation: it goes through all modules
        if not self.state.model.training:
            self.state.model.train()
            self.set_frozen_mode()
        while True:
            sums = self.accumulate_gradients(images, labels)
            # Part of a batch's gradient is of no use: a resumed run makes the whole step again
            if sums is None:
                self.state.optimizer.zero_grad()
                return None

            # The clipping is of the true gradient, not of the scaled one
            self.scaler.unscale_(self.state.optimizer)
            grad_norm = self.clip_gradients()

            # Reading a number costs nothing on a CPU. On a GPU it would make every step wait, and
            # among several processes one alone would fail, so that there the losses are checked
            # when they are logged, and before anything is saved
            if labels.device.type == "cpu" and self.processes.count == 1:
                require_finite(sums[0].item(), self.state.progress.step + 1)

            if self.update_weights():
                return torch.stack([*sums, grad_norm])
            # fp16 overflowed: the weights were left alone and the scale was halved. The same batch
            # is tried again, so that neither schedule nor average moves without a step

    def set_frozen_mode(self) -> None:
        """Let nothing be dropped in what is frozen."""
        for part in self.frozen:
            part.eval()

    def accumulate_gradients(self, images: Tensor, labels: Tensor) -> Tensor | None:
        """Forward and backward passes over the batch, a micro-batch at a time.

        Returns (loss, correct predictions) of this process's images, float32 (2,) on the device,
        both summed and the loss divided by the global batch size; None on a signal.
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
            # Several processes stop together, after the step: one alone would leave the others
            # waiting for its gradients
            if self.stop and self.processes.count == 1:
                return None

            # Gradients are exchanged once, with the last micro-batch
            is_last = number == len(micro_batches) - 1
            waiting = contextlib.nullcontext() if is_last else no_gradient_sync(self.synchronized)
            self.seed_dropout(number)
            with waiting:
                sums = sums + self.forward_and_backward(inputs, targets, keep)
        return sums

    def forward_and_backward(self, inputs: Tensor, targets: Tensor, keep: Tensor | None) -> Tensor:
        """Add a micro-batch's gradients to the parameters'.

        keep: the factors of stochastic depth, see keep_masks. Returns (loss, correct predictions),
        float32 (2,) on the device.
        """
        # First, so that its activations are gone before the model's are kept
        taught = None
        if self.distillation is not None:
            taught = self.distillation.teach(inputs, self.state.precision)
        with self.state.precision.autocast():
            logits = self.forward(inputs, keep)

        # The softmax of 16-bit logits would be too coarse; float64 is what tests compute in
        if logits.dtype != torch.float64:
            logits = logits.float()
        # By the global batch, so that micro-batches of any size add up to its mean
        loss = self.sum_of_losses(logits, targets, taught) / self.batch_size

        # Over several processes gradients are averaged, where they should be added
        self.scaler.scale(loss * self.processes.count).backward()

        return torch.stack([loss.detach(), count_correct(logits, targets).to(loss.dtype)])

    def sum_of_losses(self, logits: Tensor, targets: Tensor, taught: Tensor | None) -> Tensor:
        """Return the sum of a micro-batch's losses. taught: logits of the teacher, if any."""
        if self.distillation is None or taught is None:
            return self.loss(logits, targets)
        return self.distillation.loss(self.loss, logits, targets, taught)

    def keep_masks(self, count: int, size: int, device: torch.device) -> list[Tensor | None]:
        """Return this process's factors of stochastic depth, one entry a micro-batch.

        count: this process's images; size: of a micro-batch. Entries are (size, L, 2) on the
        device, or None without stochastic depth.
        """
        model = self.state.model
        keep = draw_drop_path(
            model.drop_path,
            len(model.encoder.blocks),
            self.batch_size,
            self.seed,
            self.state.progress.step,
            self.drop_path_schedule,
            self.frozen_blocks,
        )
        if keep is None:
            return [None] * -(-count // size)

        # Drawn for the global batch and then cut, so that any split drops the same paths
        own = keep[self.processes.batch_slice(self.batch_size)]
        return list(send(own, device).split(size))

    def seed_dropout(self, micro_batch: int) -> None:
        """Seed torch's generator for dropout, from (seed, step, process, micro-batch).

        It is what elementwise dropout and the dropout of patches draw from. A resumed run thus
        repeats the masks without any saved generator. Dropout alone depends on how the batch is
        split.
        """
        # Two counters in one number; nothing has 2**32 micro-batches
        counter = (self.processes.rank << 32) + micro_batch
        step = self.state.progress.step
        torch.manual_seed(random_seed(self.seed, "dropout", step, counter))

    def clip_gradients(self) -> Tensor:
        """Scale the gradient down to clip_norm where its norm is larger; return the norm before."""
        # With an infinite limit only the norm is computed, which is logged
        limit = math.inf if self.clip_norm is None else self.clip_norm
        norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        return gather_full(norm).detach()

    def update_weights(self) -> bool:
        """Make the optimizer's step and drop the gradients.

        Returns whether the weights have changed: they do not where fp16's gradients overflowed.
        Raises TrainingFailed where these overflow at any loss scale.
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
        # The scaler says only by a smaller scale that it has skipped the step
        return self.scaler.get_scale() >= scale


def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Count the images whose most likely class is their label.

    logits: (B, classes), or of two heads (B, 2, classes), whose mean counts. NaN where images are
    mixed: no prediction is simply correct.
    """
    if targets.ndim == 2:
        return torch.full((), math.nan, device=targets.device)
    if logits.ndim == 3:
        logits = logits.mean(dim=1)
    return (logits.argmax(dim=1) == targets).sum()


def draw_drop_path(
    rate: float,
    num_layers: int,
    batch_size: int,
    seed: int,
    step: int,
    schedule: str = "linear",
    frozen_blocks: int = 0,
) -> Tensor | None:
    """Draw the factors of stochastic depth for a global batch: (B, L, 2) on the CPU.

    The last axis is the attention and the MLP of a block. A factor is 0, or 1 / keep rate, so that
    its mean is 1. schedule linear: the rate of dropping rises from 0 in the first block to `rate`
    in the last (Huang et al. 2016, arXiv:1603.09382); constant: it is `rate` in every block
    (Touvron et al. 2022, DeiT-III, arXiv:2204.07118). frozen_blocks: so many first blocks drop
    nothing. Returns None where none does.
    """
    if not rate or frozen_blocks == num_layers:
        return None
    first = rate if schedule == "constant" else 0
    rates = torch.linspace(first, rate, num_layers)[:, None]
    rates[:frozen_blocks] = 0

    # A function of (seed, step, image, layer, branch) alone, without the state of a generator
    images = torch.arange(batch_size)[:, None, None]
    layers = torch.arange(num_layers)[:, None]
    numbers = random_uniform(seed, "drop path", step, images, layers, torch.arange(2))
    return (numbers >= rates) / (1 - rates)
