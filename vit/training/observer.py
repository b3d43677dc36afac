"""What the loop reports to the screen, the run's files and TensorBoard."""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vit.runs.console import Console, Numbers
from vit.runs.metrics_log import MetricsLog
from vit.runs.tensorboard import TensorBoard
from vit.runs.timing import Clock, Speed
from vit.runtime.device import peak_memory, wait_for
from vit.text import format_duration
from vit.training.batches import Batches, empty_confusion
from vit.training.plan import Plan
from vit.training.state import TrainingState
from vit.training.validation_board import ValidationBoard
from vit.training.window import StepWindow

log = logging.getLogger("vit")

# A longer forecast comes with advice
SLOW_SECONDS = 2 * 3600
VERY_SLOW_SECONDS = 48 * 3600


@dataclass
class Observer:
    """Watches a run and reports on it.

    It uses no random numbers and changes nothing of the state, so that runs which are watched
    differently have the same result. validation_board: None where this process draws no images;
    slow_advice: a line for a run that will take long, or None. beside: metrics that are shown and
    logged beside loss, top-1 and top-5.
    """

    state: TrainingState
    plan: Plan
    batches: Batches
    clock: Clock
    speed: Speed
    console: Console
    metrics: MetricsLog
    board: TensorBoard
    validation_board: ValidationBoard | None
    slow_advice: str | None
    beside: Sequence[str] = ()
    window: StepWindow = field(init=False)

    def __post_init__(self) -> None:
        # A resumed run completes the window it was stopped in, so that its log is the same
        self.window = StepWindow(self.state.progress.window)

    @property
    def step(self) -> int:
        return self.state.progress.step

    def restart_window(self) -> None:
        """Start a new window: the next steps are collected and timed from now on."""
        self.window = StepWindow()

    def require_finite_losses(self) -> None:
        """Raise TrainingFailed where a loss or gradient since the last log is not finite.

        Waits for the device.
        """
        if self.window.images:
            with self.clock.during(self.step_purpose):
                self.window.means(self.step)

    @contextlib.contextmanager
    def during(self, purpose: str, activity: str) -> Iterator[None]:
        """Count the time of the block for a purpose of the clock, and name it on the screen."""
        # What a GPU still has to do of the steps is their time
        with self.clock.during(self.step_purpose):
            wait_for(self.state.precision.device)
        with self.clock.during(purpose), self.console.screen.during(activity):
            yield

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time of the block, in which a batch is taken: what of it was waiting for data.

        The rest belongs to the step.
        """
        self.console.next_step(self.step + 1)
        loader_seconds = self.batches.loader_seconds
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        waited = self.batches.waited(seconds, loader_seconds)
        self.clock.count("data", waited)
        self.clock.count(self.step_purpose, seconds - waited)
        # The clock counts over the whole run, the window since the last log
        self.window.data_seconds += waited

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Count the time of the block as spent on a step."""
        with self.clock.during(self.step_purpose):
            yield

    @property
    def step_purpose(self) -> str:
        """What the time of a step counts for: the first one apart, since it may compile."""
        return "first_step" if self.step == self.clock.first_step else "steps"

    def step_done(self, row: Tensor, show: bool | None = None) -> None:
        """Report an optimizer step.

        row: (loss, correct predictions, gradient norm) of its global batch, on the device. show:
        whether the screen shows numbers now; None: it decides. Raises TrainingFailed where numbers
        are read and a loss or gradient is not finite.
        """
        self.window.add(row, self.plan.batch_size)
        self.console.advance(self.step)

        # Seldom, since reading numbers makes a GPU wait
        if self.console.wants_numbers(self.step) if show is None else show:
            self.console.show_numbers(self.step, self.numbers())

        if self.plan.log_due(self.step):
            self.log_window()
            self.restart_window()

    def numbers(self) -> Numbers:
        """Return the means over the window's steps. Waits for the device."""
        means = self.window.means(self.step)
        images_per_second = self.window.images_per_second()
        mfu = self.speed.mfu(images_per_second)
        return Numbers(means.loss, means.top1, images_per_second, mfu)

    def log_window(self) -> None:
        """Write the means over the window's steps to the files and TensorBoard.

        They are also remembered for the next line on the screen.
        """
        means = self.window.means(self.step)
        rates = {group["name"]: group["lr"] for group in self.state.optimizer.param_groups}
        learning_rate = max(rates.values())

        images_per_second = self.window.images_per_second()
        mfu = self.speed.mfu(images_per_second)
        data_wait = self.window.data_wait()
        memory = peak_memory(self.state.precision.device)

        self.metrics.train(self.step, means.loss, means.top1, learning_rate, means.grad_norm)
        self.metrics.speed(self.step, images_per_second, mfu, data_wait, memory)
        self.console.note_numbers(Numbers(means.loss, means.top1, images_per_second, mfu))

        scalars = {"loss/train": means.loss}
        # NaN, which differs from itself, where it is unknown since images are mixed
        if means.top1 == means.top1:
            scalars["top1/train"] = means.top1
        scalars["optimizer/learning_rate"] = learning_rate
        scalars["optimizer/gradient_norm"] = means.grad_norm
        # Layer decay and Muon have rates that differ; otherwise one curve says it all
        if len(set(rates.values())) > 1:
            scalars |= {f"optimizer/learning_rate/{name}": rate for name, rate in rates.items()}
        scalars |= {
            "speed/images_per_second": images_per_second,
            "speed/MFU": mfu,
            "speed/data_wait_share": data_wait,
            "speed/peak_memory_GiB": memory / 2**30,
            "optimizer/epoch": self.step / self.plan.steps_per_epoch,
        }
        for tag, value in scalars.items():
            self.board.scalar(tag, value, self.step)

    def evaluate_validation(self) -> dict[str, float]:
        """Evaluate the selected weights on the validation split, and draw their mistakes.

        Returns the metrics of vit.evaluation.accuracy.evaluate. Raises Stopped where a signal came
        in the middle.
        """
        images = self.batches.data.val
        assert images is not None
        model, precision = self.state.selected(), self.state.precision
        confusion = empty_confusion(len(self.batches.data.classes), precision.device)
        with self.during("evaluation", "evaluating on the validation split"):
            metrics = self.batches.evaluate(model, images, precision, confusion)
            # A collective, so before the question whether this process draws
            confusion = self.batches.machine.processes.sum(confusion)
            if self.validation_board is not None:
                self.validation_board.evaluated(model, precision, confusion, self.step)
        return metrics

    def evaluated(self, metrics: dict[str, float], improved: bool) -> None:
        """Report an evaluation on the validation split; improved: it is the best so far."""
        self.metrics.evaluation(self.step, "val", metrics, self.beside)
        for name in ("loss", "top1", "top5", *self.beside):
            self.board.scalar(f"{name}/val", metrics[name], self.step)
        number = self.plan.evaluations(self.step)
        self.console.evaluated(self.step, number, metrics, improved, self.beside)

    def draw_attention_if_due(self) -> None:
        """Draw attention maps on validation images, at the plan's times."""
        # A resumed run has drawn them before it was stopped
        just_started = self.step <= self.clock.first_step
        if self.validation_board is None or just_started or not self.plan.attention_due(self.step):
            return
        with self.during("evaluation", "drawing attention maps"):
            self.validation_board.attention(self.state.model, self.step)

    def forecast_if_due(self) -> None:
        """Say once, after a few steps, how long the run will take."""
        if not self.clock.forecast_due(self.step):
            return
        seconds = self.console.seconds_left(self.step)
        log.info(f"about {format_duration(seconds)} to go")
        if seconds > SLOW_SECONDS and self.slow_advice is not None:
            log.info(self.slow_advice)
        if seconds > VERY_SLOW_SECONDS:
            log.info(
                "  a shorter run: train.epochs or train.steps; Ctrl-C saves, and resume=RUN_FOLDER "
                "continues"
            )

    def close(self) -> None:
        self.board.close()
        self.metrics.close()
