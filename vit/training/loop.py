"""The training loop: learning rate, step, average, report, and from time to time evaluate and save.

It receives ready objects and knows neither the configuration nor the data set.
"""

import contextlib
import time
from dataclasses import dataclass

from torch import Tensor

from vit.checkpoints.run import RunCheckpoints
from vit.errors import Stopped
from vit.runtime.compiling import without_compiling
from vit.runtime.processes import Processes
from vit.runtime.signals import Interrupted, StopSignal
from vit.training.agreement import SECONDS, Agreement
from vit.training.batches import Batches
from vit.training.observer import Observer
from vit.training.plan import Plan
from vit.training.state import Progress, TrainingState
from vit.training.step import OptimizerStep
from vit.training.window import require_finite

# Until a save has been measured: bytes a second, digest included, that the slowest disk takes
SAVING_RATE = 1e8
# A step may take so much longer than those before it
STEP_FACTOR = 2.0


@dataclass
class Trainer:
    """Trains a state from its current step to the end of the plan, or of its patience."""

    state: TrainingState
    step: OptimizerStep
    batches: Batches
    plan: Plan
    checkpoints: RunCheckpoints
    observer: Observer
    stop: StopSignal
    processes: Processes

    def __post_init__(self) -> None:
        self.agreement = Agreement(self.processes)
        # Of the last evaluation of this session
        self.evaluation_seconds: float | None = None

    def fit(self) -> None:
        """Train to the end, and leave the last and the best checkpoint.

        Raises Stopped on a signal, after saving; TrainingFailed where the loss is not finite, with
        the last checkpoint kept.
        """
        progress, observer = self.state.progress, self.observer
        training = self.batches.training(progress.step, self.plan.total_steps)
        # The weights, their average, and two moments of each, as an upper limit
        size = 4 * sum(item.numel() * item.element_size() for item in self.state.model.parameters())
        self.stop.expect_save(size / SAVING_RATE)

        # Closing the batches ends the processes that decode image files
        with contextlib.closing(training):
            while True:
                # First, so that a run that was stopped in an evaluation resumes with it, and a
                # checkpoint saved here knows the evaluation of its step
                if self.plan.evaluation_due(progress.step):
                    self.evaluate()
                observer.draw_attention_if_due()
                if progress.step == self.plan.total_steps or self.plan.out_of_patience(progress):
                    break
                self.save_or_stop()

                self.set_learning_rates()
                with observer.waiting_for_data():
                    images, labels = next(training)
                with observer.stepping():
                    row = self.make_step(images, labels)
                    # A signal came between micro-batches: the part of the gradient is dropped, and
                    # save_or_stop() ends the run before another batch is taken
                    if row is None:
                        continue
                    # After real steps only, or the average would count some weights twice
                    if self.state.ema is not None:
                        self.state.ema.update(self.state.model, progress.step)
                    progress.step += 1
                    progress.images += self.plan.batch_size
                    observer.step_done(row, self.agree(row))
                observer.forecast_if_due()

        # Nothing is held out to select by: the last weights are the best, as published recipes do
        if not self.batches.has_validation:
            # Nor is anything measured, even where images were held out before the run was resumed
            progress.adopt_best(Progress(best_step=progress.step))
            self.save_best()
        self.save()

    def make_step(self, images: Tensor, labels: Tensor) -> Tensor | None:
        """Make the optimizer's step, as OptimizerStep does; None where a signal came meanwhile.

        Raises Stopped for a signal to a session that has not done anything yet.
        """
        # Compiling takes a minute, which a person who wants to stop need not wait for: what this
        # session started from is on the disk
        compiles = self.step.compiled and self.state.progress.step == self.observer.clock.first_step
        try:
            with self.stop.interrupting() if compiles else contextlib.nullcontext():
                return self.step(images, labels)
        except (Interrupted, RuntimeError):
            # A terminal's Ctrl-C also ends the compiler itself, which is no bug then
            if not self.stop:
                raise
            if compiles or self.processes.count > 1:  # others can't wait for this process
                raise Stopped(f"stopped by {self.stop.describe()} within a step") from None
            self.state.optimizer.zero_grad()
            return None

    def set_learning_rates(self) -> None:
        # From the step alone: a scheduler with a state would have to be saved and could drift
        factor = self.plan.schedule(self.state.progress.step)
        for group in self.state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def agree(self, row: Tensor) -> bool | None:
        """Decide with the other processes what is to be done after a step, and sum its losses.

        Returns whether the screen shows numbers now, or None in a run of one process, whose screen
        decides for itself. A collective.
        """
        if self.processes.count == 1:
            return None
        step, agreement = self.state.progress.step, self.agreement
        agreement.add(row)
        agreement.showing = False
        self.look_if_due()
        # Only where they are read; all processes do so after the same steps
        if agreement.showing or self.plan.log_due(step):
            agreement.sum_losses()
        return agreement.showing

    def look_if_due(self) -> None:
        step, observer = self.state.progress.step, self.observer
        if self.agreement.is_due(step):
            self.agreement.look(
                step,
                stopping=bool(self.stop),
                saving=self.save_due(),
                showing=observer.console.wants_numbers(step),
            )

    def save_due(self) -> bool:
        return self.observer.clock.save_due(self.state.progress.step, self.plan.save_every)

    def save_or_stop(self) -> None:
        """Save the last checkpoint where it is time to, or where the run has to stop.

        Raises Stopped, after saving, where a signal came to any of the processes, or one of them
        may have no time for the steps until the next look.
        """
        step_seconds = self.observer.clock.seconds_per_step(self.state.progress.step)
        until_look = SECONDS if self.processes.count > 1 else 0.0
        self.stop.require_time(STEP_FACTOR * step_seconds + until_look)

        stopping, saving = bool(self.stop), self.save_due()
        if self.processes.count > 1:
            # Before the first step of all, of which there was no look
            self.look_if_due()
            stopping = self.agreement.stopping
            # Steps are the same everywhere, clocks are not
            saving = self.agreement.saving or (self.plan.save_every is not None and saving)
        if stopping or saving:
            self.save()
        if stopping:
            # All have come here: none may end while another still saves
            self.processes.leave()
            step = self.state.progress.step
            raise Stopped(f"stopped by {self.stop.describe()} after step {step}")

    def evaluate(self) -> None:
        """Evaluate the selected weights, and save them as best where they are.

        These are the averaged weights, or the raw ones where there is no average. Where a signal
        comes in the middle, or the time would not suffice, the run is saved before Stopped is
        raised; resumed, it evaluates again. Raises TrainingFailed where a loss is not finite.
        """
        progress = self.state.progress
        # Done before: the run was saved after this evaluation and resumed, or a step was dropped
        if progress.evaluated_step == progress.step:
            return
        # Weights that diverged must not be taken for the best
        self.require_finite_losses()

        if self.batches.has_validation:
            self.stop.require_time(self.expected_evaluation_seconds())
            began = time.monotonic()
            try:
                # The images that are drawn, too
                with without_compiling():
                    metrics = self.observer.evaluate_validation()
            except Stopped:
                # Its steps were logged when the evaluation became due; there is nothing to keep
                self.observer.restart_window()
                self.save()
                self.processes.leave()
                raise
            self.evaluation_seconds = time.monotonic() - began

            # Neither better nor worse than any other, and no weights to be kept
            require_finite(metrics["loss"], progress.step, "the validation loss")
            improved = progress.improve(metrics, self.state.select)
            self.observer.evaluated(metrics, improved)
            if improved:
                self.save_best()

        # The time of the evaluation must not count as time of the next steps
        progress.evaluated_step = progress.step
        self.observer.restart_window()

    def test_best(self) -> dict[str, float]:
        """Evaluate the best checkpoint on the test split, once training has ended.

        The last weights are overwritten. Raises Stopped where a signal came in the middle.
        """
        images = self.batches.data.test
        assert images is not None
        # Every process reads the file, which the first one has written
        self.processes.barrier()
        model = self.checkpoints.load_best(self.state)
        try:
            return self.batches.evaluate(model, images, self.state.precision)
        except Stopped:
            self.processes.leave()
            raise

    def expected_evaluation_seconds(self) -> float:
        """Estimate how long an evaluation takes, from the last one or from the steps."""
        if self.evaluation_seconds is not None:
            return self.evaluation_seconds
        # A step computes three times as much an image, which leaves room for decoding
        images = self.batches.data.val
        step_seconds = self.observer.clock.seconds_per_step(self.state.progress.step)
        return 0.0 if images is None else step_seconds * len(images) / self.plan.batch_size

    def save(self) -> None:
        """Write the last checkpoint. Raises TrainingFailed instead where training has diverged."""
        began = time.monotonic()
        # Numbers are read only now and then; weights that diverged must not replace the last good
        # checkpoint
        self.require_finite_losses()

        # With the steps since the last log, the log of a resumed run is the same to the byte
        progress = self.state.progress
        progress.scaler = self.step.scaler.state_dict() or None
        progress.window = self.observer.window.to_dict()
        progress.seconds = self.observer.clock.total_seconds()
        with self.observer.during("saving", "saving"):
            self.checkpoints.save_last(self.state)
        self.observer.clock.saved()
        self.stop.expect_save(time.monotonic() - began)
        self.agreement.saving = False

    def require_finite_losses(self) -> None:
        """Raise TrainingFailed, in all processes, where training diverged after the last log."""
        self.agreement.sum_losses()
        self.observer.require_finite_losses()

    def save_best(self) -> None:
        with self.observer.during("saving", "saving"):
            self.checkpoints.save_best(self.state)
