"""The training loop.

It receives ready objects and knows neither the configuration nor the data set.
"""

import contextlib
from dataclasses import dataclass

from vit.checkpoints.run import RunCheckpoints
from vit.errors import Stopped
from vit.runtime.processes import Processes
from vit.runtime.signals import StopSignal
from vit.training.batches import Batches
from vit.training.observer import Observer
from vit.training.plan import Plan
from vit.training.state import TrainingState
from vit.training.step import OptimizerStep


@dataclass
class Trainer:
    """Trains a state from where it stands to the end of the plan."""

    state: TrainingState
    step: OptimizerStep
    batches: Batches
    plan: Plan
    checkpoints: RunCheckpoints
    observer: Observer
    stop: StopSignal
    processes: Processes

    def fit(self) -> None:
        """Train to the last step, and leave the last and the best checkpoint.

        Raises Stopped on a signal, after saving; TrainingFailed where the loss is not finite, with
        the last checkpoint kept.
        """
        progress, observer = self.state.progress, self.observer
        training = self.batches.training(progress.step, self.plan.total_steps)
        with contextlib.closing(training):  # ends the processes that decode image files
            while True:
                if self.plan.evaluation_due(progress.step):
                    self.evaluate()
                observer.draw_attention_if_due()
                if progress.step == self.plan.total_steps:
                    break
                self.save_or_stop()

                self.set_learning_rates()
                with observer.waiting_for_data():
                    images, labels = next(training)
                with observer.stepping():
                    row = self.step(images, labels)
                    if (
                        row is None
                    ):  # a signal came between micro-batches: the part of the gradient is dropped
                        continue
                    if self.state.ema is not None:
                        self.state.ema.update(self.state.model, progress.step)
                    progress.step += 1
                    observer.step_done(row)
                observer.forecast_if_due()
        if not self.batches.has_validation:  # then the last weights are the ones to keep
            progress.best_step = progress.step
            self.save_best()
        self.save()

    def set_learning_rates(self) -> None:
        factor = self.plan.schedule(self.state.progress.step)
        for group in self.state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def save_or_stop(self) -> None:
        """Save where it is time to, or a signal came to any of the processes; then raise
        Stopped.
        """
        progress = self.state.progress
        save_due = self.observer.clock.save_due(progress.step, self.plan.save_every)
        stopping, saving = self.processes.any_of(bool(self.stop), save_due)
        if stopping or saving:
            self.save()
        if stopping:
            raise Stopped(f"stopped by {self.stop.describe()} after step {progress.step}")

    def evaluate(self) -> None:
        """Evaluate the averaged weights, or the raw ones where none are averaged, and keep them if
        they are the best.

        Where a signal comes in the middle, the run is saved before Stopped is raised; resumed, it
        evaluates anew.
        """
        progress = self.state.progress
        if progress.evaluated_step == progress.step:
            return
        if self.batches.has_validation:
            try:
                metrics = self.observer.evaluate_validation()
            except Stopped:
                self.observer.restart_window()
                self.save()
                raise
            improved = progress.improve(metrics)
            self.observer.evaluated(metrics, improved)
            if improved:
                self.save_best()
        progress.evaluated_step = progress.step
        self.observer.restart_window()

    def save(self) -> None:
        """Write the last checkpoint, once the losses since the last look are known to be finite."""
        self.observer.require_finite_losses()
        progress = self.state.progress
        progress.scaler = self.step.scaler.state_dict() or None
        progress.window = self.observer.window.to_dict()
        progress.seconds = self.observer.clock.total_seconds()
        with self.observer.clock.during("saving"):
            self.checkpoints.save_last(self.state)
        self.observer.clock.saved()

    def save_best(self) -> None:
        with self.observer.clock.during("saving"):
            self.checkpoints.save_best(self.state)
