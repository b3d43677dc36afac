"""The training loop.

It receives ready objects and knows neither the configuration nor the data set: batches come as normalised images and
labels on the device, evaluation and saving are functions it calls.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vit.errors import Stopped, TrainingFailed
from vit.model.vision_transformer import VisionTransformer
from vit.randomness import random_seed
from vit.runs.metrics_log import Tracker
from vit.runs.timing import Clock
from vit.runtime.device import peak_memory
from vit.runtime.precision import Precision
from vit.runtime.processes import Processes, gather_full, no_gradient_sync
from vit.runtime.signals import StopSignal
from vit.training.losses import Loss
from vit.training.plan import Schedule
from vit.training.state import TrainingState
from vit.training.step import MIN_LOSS_SCALE, draw_drop_path, split_or_none

log = logging.getLogger("vit")


class Window:
    """What happened since the last log; the numbers stay on the device so that no step waits for those of the one before."""

    def __init__(self, saved: dict | None = None):
        """saved: of an interrupted run, as saved() gave it."""
        rows = saved["rows"] if saved else []
        self.rows: list[Tensor] = [
            torch.tensor(row) for row in rows
        ]  # (loss, correct, gradient norm) of each step
        self.images, self.waited, self.started = (
            saved["images"] if saved else 0,
            0.0,
            time.perf_counter(),
        )

    def saved(self) -> dict:
        return {"rows": [row.tolist() for row in self.rows], "images": self.images}

    def images_per_second(self) -> float:
        return self.images / (time.perf_counter() - self.started)

    def waited_share(self) -> float:
        return self.waited / (time.perf_counter() - self.started)


@dataclass
class Trainer:
    """Everything the loop works with.

    shared: the state's model, or what averages its gradients over the processes; forward: the same, or its compiled twin;
    evaluate: model → metrics, or None where nothing
    is held out; save_last, save_best: write a checkpoint; evaluation_due: step → whether to evaluate after it.
    loss: see build_loss; micro_batch_size, clip_norm: None for the whole batch, for no clipping; seed: of dropout.
    batch_size: global; group: the processes that share each batch, of which `batches` gives this one's part.
    step_share: images/s → the share of the device's matrix-product rate that this is (MFU).
    """

    state: TrainingState
    forward: Callable[[Tensor, Tensor | None], Tensor]
    shared: nn.Module
    schedule: Schedule
    precision: Precision
    batches: Generator[tuple[Tensor, Tensor], None, None]
    total_steps: int
    batch_size: int
    group: Processes
    micro_batch_size: int | None
    loss: Loss
    clip_norm: float | None
    drop_path_schedule: str
    seed: int
    tracker: Tracker
    stop: StopSignal
    evaluate: Callable[[nn.Module], dict[str, float]] | None
    evaluation_due: Callable[[int], bool]
    save_last: Callable[[], None]
    save_best: Callable[[], None]
    forecast: Callable[[float], None]
    draw_attention: Callable[[VisionTransformer, int], None]
    drawing_due: Callable[[int], bool]
    log_every: int
    save_every: int | None
    step_share: Callable[[float], float]

    def fit(self) -> None:
        """Train from progress.step to total_steps. Raises Stopped on a signal, after saving; TrainingFailed where the loss is not
        finite, with the last checkpoint kept."""
        progress, window = self.state.progress, Window(self.state.progress.window)
        self.scaler = self.precision.scaler()
        if progress.scaler is not None:
            self.scaler.load_state_dict(progress.scaler)
        clock = self.clock = Clock(progress.step, progress.seconds)
        while True:
            if self.evaluation_due(progress.step) and progress.evaluated_step != progress.step:
                self.evaluate_and_keep_best()
                window = Window()
            if self.drawing_due(progress.step) and progress.step > clock.first_step:
                with clock.during("evaluation"):
                    self.draw_attention(self.state.model, progress.step)
            if progress.step == self.total_steps:
                break
            stopping, saving = self.group.any(
                self.stop.signal is not None, clock.save_due(progress.step, self.save_every)
            )
            if stopping or saving:
                self.save(window)
            if stopping:
                raise Stopped(
                    f"stopped by {self.stop.signal or 'a signal to another process'} after step {progress.step}"
                )

            for group in self.state.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.schedule(progress.step)
            waiting = clock.spent.data
            with clock.during("data"):
                images, labels = next(self.batches)
            window.waited += clock.spent.data - waiting
            with clock.during("first_step" if progress.step == clock.first_step else "steps"):
                row = self.step(images, labels)
                if (
                    row is None
                ):  # a signal came between micro-steps: the part of the gradient is dropped
                    continue
                if self.state.average is not None:
                    self.state.average.update(self.state.model, progress.step)
                progress.step += 1
                window.rows.append(row)
                window.images += self.batch_size

                self.tracker.advance(progress.step)
                if self.tracker.wants_numbers():
                    rate = window.images_per_second()
                    self.tracker.show(
                        progress.step, *self.finite_means(window), rate, self.step_share(rate)
                    )
                if progress.step % self.log_every == 0 or self.evaluation_due(progress.step):
                    self.report(window)
                    window = Window()
            if clock.forecast_due(progress.step):
                self.forecast(
                    clock.seconds_a_step(progress.step) * (self.total_steps - progress.step)
                )
        if self.evaluate is None:
            progress.best_step = progress.step
            with clock.during("saving"):
                self.save_best()
        self.save(window)

    def step(self, images: Tensor, labels: Tensor) -> Tensor | None:
        """One optimizer step on a global batch, of which these are this process's images; (loss, correct, gradient norm) of the
        whole batch on the device, or None on a signal."""
        self.state.model.train()
        size = self.micro_batch_size or len(labels)
        part, last = self.group.part(self.batch_size), -(-len(labels) // size) - 1
        unknown = torch.full(
            (), math.nan, device=labels.device
        )  # how many of mixed images are right
        while True:
            sums = torch.zeros(2, device=labels.device)
            model, step = self.state.model, self.state.progress.step
            keep = draw_drop_path(
                model.drop_path,
                len(model.encoder.blocks),
                self.batch_size,
                self.seed,
                step,
                self.drop_path_schedule,
            )
            own_keep = split_or_none(None if keep is None else keep[part], size, labels)
            pieces = zip(images.split(size), labels.split(size), own_keep, strict=True)
            for number, (inputs, targets, piece_keep) in enumerate(pieces):
                if (
                    self.stop.signal is not None and self.group.count == 1
                ):  # several end together, after the step
                    self.state.optimizer.zero_grad()
                    return None
                torch.manual_seed(
                    random_seed(self.seed, "dropout", step, (self.group.rank << 32) + number)
                )
                with contextlib.nullcontext() if number == last else no_gradient_sync(self.shared):
                    with self.precision.autocast():
                        logits = self.forward(inputs, piece_keep)
                    logits = logits if logits.dtype == torch.float64 else logits.float()
                    loss = self.loss(logits, targets) / self.batch_size
                    self.scaler.scale(
                        loss * self.group.count
                    ).backward()  # the processes' gradients are averaged, not added
                correct = (logits.argmax(dim=1) == targets).sum() if targets.ndim == 1 else unknown
                sums = sums + torch.stack([loss.detach(), correct])
            sums = self.group.sum(sums)
            self.scaler.unscale_(self.state.optimizer)
            limit = math.inf if self.clip_norm is None else self.clip_norm
            norm = gather_full(nn.utils.clip_grad_norm_(self.state.model.parameters(), limit))
            if (
                labels.device.type == "cpu"
            ):  # reading costs nothing here; on a GPU the window is checked when it is logged
                self.require_finite(sums[0].item(), self.state.progress.step + 1)
            scale = self.scaler.get_scale()
            if scale < MIN_LOSS_SCALE:
                raise TrainingFailed(
                    f"the fp16 gradients are not finite at step {self.state.progress.step + 1} at any loss scale; try "
                    "train.precision=bf16 or fp32, or a lower optimizer.lr. The last good checkpoint is kept"
                )
            self.scaler.step(self.state.optimizer)
            self.scaler.update()
            self.state.optimizer.zero_grad()
            if self.scaler.get_scale() >= scale:
                return torch.stack([*sums, norm.detach()])
            # fp16 overflowed: the optimizer left the weights alone and the scale was halved; the same batch again

    def require_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"the loss is {loss} at step {step}: training has diverged. The last good checkpoint is kept; try a "
                "lower optimizer.lr, a longer schedule.warmup, train.clip_norm=1 or train.precision=fp32"
            )

    def finite_means(self, window: Window) -> tuple[float, float, float]:
        """The window's mean loss, top-1 and gradient norm; raises TrainingFailed, naming the step, where a loss is not finite."""
        rows = torch.stack([row.cpu() for row in window.rows]).double()  # waits for the device
        for offset, loss in enumerate(rows[:, 0].tolist()):
            self.require_finite(loss, self.state.progress.step - len(rows) + offset + 1)
        loss, correct, norm = rows.mean(0).tolist()
        return loss, correct * len(rows) / window.images, norm

    def report(self, window: Window) -> None:
        loss, top1, norm = self.finite_means(window)
        rates = {group["name"]: group["lr"] for group in self.state.optimizer.param_groups}
        images_per_second = window.images_per_second()
        self.tracker.train(
            self.state.progress.step,
            loss=loss,
            top1=top1,
            grad_norm=norm,
            learning_rates=rates,
            images_per_second=images_per_second,
            mfu=self.step_share(images_per_second),
            data_wait=window.waited_share(),
            memory=peak_memory(self.precision.device),
        )

    def save(self, window: Window) -> None:
        """Write the last checkpoint, once the losses since the last look are known to be finite."""
        if window.rows:
            self.finite_means(window)
        progress = self.state.progress
        progress.scaler, progress.window, progress.seconds = (
            self.scaler.state_dict() or None,
            window.saved(),
            self.clock.now(),
        )
        with self.clock.during("saving"):
            self.save_last()
        self.clock.saved = time.monotonic()

    def evaluate_and_keep_best(self) -> None:
        """Evaluate the averaged weights, or the raw ones where none are averaged, and keep them where they are the best.

        Where a signal comes in the middle, what was trained is saved and Stopped goes on its way; a resumed run evaluates anew.
        """
        progress = self.state.progress
        if self.evaluate is not None:
            try:
                with self.clock.during("evaluation"):
                    metrics = self.evaluate(self.state.selected())
            except Stopped:
                self.save(Window())
                raise
            self.tracker.evaluation(progress.step, "val", metrics)
            better = progress.improve(metrics)
            self.tracker.line(
                progress.step,
                f"  val loss {metrics['loss']:.3f}  val top-1 {metrics['top1']:.2%}"
                + ("  best so far" if better else ""),
            )
            if better:
                with self.clock.during("saving"):
                    self.save_best()
        progress.evaluated_step = progress.step
