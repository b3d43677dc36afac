"""A whole training on a small model and made-up batches, without a configuration or a data set."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vit.model.vision_transformer import VisionTransformer
from vit.runs.console import Console
from vit.runs.metrics_log import MetricsLog
from vit.runs.screen import Screen
from vit.runs.tensorboard import TensorBoard
from vit.runs.timing import Clock, Cost, Speed
from vit.runtime.precision import Precision
from vit.runtime.processes import Processes
from vit.runtime.signals import StopSignal
from vit.training.loop import Trainer
from vit.training.losses import Loss, build_loss
from vit.training.observer import Observer
from vit.training.optimizers import build_optimizer
from vit.training.plan import Plan, Schedule
from vit.training.state import EMA, Progress, TrainingState
from vit.training.step import OptimizerStep

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
BATCH_SIZE = 16
CLASSES = ["one", "two", "three"]

SGD = {
    "name": "sgd",
    "lr": 0.05,
    "weight_decay": 0.0,
    "settings": {"momentum": 0.9, "nesterov": True},
}

Batch = tuple[Tensor, Tensor]


def batch(step: int, size: int = BATCH_SIZE) -> Batch:
    """Images (size, 3, 8, 8) of noise whose mean is their label, and the labels."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, len(CLASSES), (size,), generator=generator)
    images = torch.randn(size, 3, 8, 8, generator=generator) + labels[:, None, None, None]
    return images, labels


def mixed_batch(step: int) -> Batch:
    """batch() with the classes' weights of mixed images as targets."""
    images, labels = batch(step)
    targets = one_hot(labels, len(CLASSES)) * 0.7 + one_hot(labels.flip(0), len(CLASSES)) * 0.3
    return images, targets


def constant(step: int) -> float:
    return 1.0


def make_model(dtype: torch.dtype = torch.float32, **settings: Any) -> VisionTransformer:
    """The same small model each time."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    return VisionTransformer(num_classes=len(CLASSES), **{**sizes, **settings}).to(dtype)


def make_state(
    model: VisionTransformer | None = None,
    optimizer: dict[str, Any] = SGD,
    precision: Precision = FP32,
    ema_decay: float = 0.0,
) -> TrainingState:
    """The state before the first step."""
    model = make_model() if model is None else model
    ema = EMA(model, ema_decay) if ema_decay else None
    return TrainingState(model, ema, build_optimizer(model, **optimizer), precision, Progress())


def make_step(
    state: TrainingState,
    *,
    loss: Loss | None = None,
    stop: StopSignal | None = None,
    micro_batch_size: int | None = None,
    clip_norm: float | None = 1.0,
    seed: int = 0,
    processes: Processes | None = None,
    synchronized: torch.nn.Module | None = None,
    frozen: Sequence[torch.nn.Module] = (),
) -> OptimizerStep:
    """synchronized: the model as the processes share it; None: of one process."""
    synchronized = state.model if synchronized is None else synchronized
    return OptimizerStep(
        state=state,
        forward=synchronized,
        synchronized=synchronized,
        loss=loss or build_loss("cross_entropy", 0.0),
        processes=processes or Processes(),
        stop=StopSignal() if stop is None else stop,  # one that has not come is false
        batch_size=BATCH_SIZE,
        micro_batch_size=micro_batch_size,
        clip_norm=clip_norm,
        drop_path_schedule="linear",
        seed=seed,
        frozen=frozen,
    )


@dataclass
class MadeUpBatches:
    """Stands in for vit.training.batches.Batches.

    source: step → its batch; evaluations: what evaluating on validation images gives, one after
    another, an exception to be raised; None: nothing is held out.
    """

    source: Callable[[int], Batch] = batch
    dtype: torch.dtype = torch.float32
    evaluations: list[dict[str, float] | Exception] | None = None
    machine: Any = field(default_factory=lambda: SimpleNamespace(processes=Processes()))
    closed: bool = False  # whether the generator of the batches has been closed

    loader_seconds: float = 0.0

    def waited(self, seconds: float, loader_seconds_before: float) -> float:
        return seconds

    @property
    def has_validation(self) -> bool:
        return self.evaluations is not None

    @property
    def data(self) -> Any:
        return SimpleNamespace(classes=CLASSES, val="val" if self.has_validation else None)

    def training(self, first_step: int, last_step: int) -> Iterator[Batch]:
        try:
            for step in range(first_step, last_step):
                images, labels = self.source(step)
                yield images.to(self.dtype), labels
        finally:
            self.closed = True

    def evaluate(self, model: VisionTransformer, *others: Any) -> dict[str, float]:
        model.eval()
        assert self.evaluations is not None
        result = self.evaluations.pop(0)
        if isinstance(result, Exception):
            raise result
        return {"n": 10, "top5": 1.0, "balanced_top1": 0.5, "macro_f1": 0.5, **result}


@dataclass
class NotedCheckpoints:
    """Stands in for RunCheckpoints: notes the steps after which it was asked to save."""

    last: list[int] = field(default_factory=list)
    best: list[int] = field(default_factory=list)

    def save_last(self, state: TrainingState) -> None:
        self.last.append(state.progress.step)

    def save_best(self, state: TrainingState) -> None:
        self.best.append(state.progress.step)


def make_plan(
    steps: int,
    schedule: Schedule = constant,
    log_every: int = 2,
    save_every: int | None = None,
) -> Plan:
    """Two epochs, an evaluation after each."""
    return Plan(
        total_steps=steps,
        steps_per_epoch=steps / 2,
        batch_size=BATCH_SIZE,
        schedule=schedule,
        eval_every=1.0,
        attention_every=None,
        log_every=log_every,
        save_every=save_every,
    )


def make_observer(folder: Path, state: TrainingState, plan: Plan, batches: Any) -> Observer:
    """Writes metrics.jsonl and timing.jsonl into the folder, and no TensorBoard."""
    folder.mkdir(parents=True, exist_ok=True)
    first_step = state.progress.step
    clock = Clock(first_step, state.progress.seconds)
    return Observer(
        state=state,
        plan=plan,
        batches=batches,
        clock=clock,
        speed=Speed(Cost(10**6, 6e6), 1e12),
        console=Console(
            Screen(speaks=False),
            clock,
            total_steps=plan.total_steps,
            steps_per_epoch=plan.steps_per_epoch,
            epochs=plan.epochs,
            batch_size=plan.batch_size,
            evaluations=plan.evaluations(plan.total_steps),
        ),
        metrics=MetricsLog(folder, first_step),
        board=TensorBoard(folder / "tensorboard", None, writes=False),
        validation_board=None,
        slow_advice=None,
    )


def make_trainer(
    folder: Path,
    *,
    steps: int = 6,
    state: TrainingState | None = None,
    batches: MadeUpBatches | None = None,
    plan: Plan | None = None,
    checkpoints: Any = None,
    **settings: Any,
) -> Trainer:
    """settings: of make_step."""
    state = make_state() if state is None else state
    batches = batches or MadeUpBatches()
    plan = plan or make_plan(steps)
    stop = StopSignal()
    return Trainer(
        state=state,
        step=make_step(state, stop=stop, **settings),
        batches=batches,
        plan=plan,
        checkpoints=checkpoints or NotedCheckpoints(),
        observer=make_observer(folder, state, plan, batches),
        stop=stop,
        processes=Processes(),
    )


def same_bits(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether two models have the same weights to the last bit."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def assert_close(first: torch.nn.Module, second: torch.nn.Module, **tolerances: float) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerances)
