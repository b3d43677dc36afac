"""What a run reports before its first step, and what it leaves after its last."""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vit.config.config import Config, to_dict, to_yaml
from vit.config.resume import notable_settings
from vit.data.class_balance import are_unbalanced, describe_sizes, largest_share
from vit.data.image_files import typical_side
from vit.data.splits import ImageDataset, ImageSplit
from vit.figures.predictions import class_names
from vit.model.low_rank import count_plain_parameters
from vit.runs.card import repeat_command, write_card
from vit.runs.folder import RunFolder
from vit.runs.screen import Screen
from vit.runs.selection import CRITERIA, OF_CLASSES
from vit.runs.summary import cheaper_setting, log_result
from vit.runs.timing import Circumstances, Cost, bottleneck
from vit.runtime.compiling import worth_compiling
from vit.runtime.cores import worker_cores
from vit.runtime.precision import choose_precision
from vit.training.batches import Batches
from vit.training.distillation import Distillation
from vit.training.freezing import describe_parameters
from vit.training.observer import Observer
from vit.training.plan import Plan
from vit.training.prepare import image_size_of, training_flops_of, training_sizes
from vit.training.state import TrainingState
from vit.training.step import OptimizerStep

log = logging.getLogger("vit")

SHOWN_TRAINING_IMAGES = 64
SMALL_SIDE = 64  # pixels, of models for small images
NOT_HELD_OUT = "nothing held out: the last weights are taken"


def start_log(run: RunFolder, screen: Screen, warnings: list[str]) -> None:
    """Send the log's lines to the screen and to train.log from now on, the warnings first."""
    run.start_log(screen.print)
    for warning in warnings:
        log.info(f"warning: {warning}")


def announce(
    config: Config, run: RunFolder, batches: Batches, plan: Plan, step: OptimizerStep, cost: Cost
) -> None:
    """Say what is about to happen: model, data, length, hardware, folder."""
    model, data = step.state.model, batches.data
    log.info(
        f"model  {config.model.name}: {describe_parameters(model)} parameters, "
        f"{2 * cost.macs / 1e9:.3g} GFLOPs an image"
    )
    if step.distillation is not None:
        log.info(describe_teacher(step.distillation, cost))
    if data.layout:
        log.info(f"data   {data.layout}")
    for name, images in {"train": data.train, "val": data.val, "test": data.test}.items():
        log.info(f"{name:6} {images or NOT_HELD_OUT}")
    for note in notes_on_data(config, data, cost):
        log.info(note)

    # Which weights count is said before the run, and not chosen by their accuracy after it
    epochs = plan.total_steps / plan.steps_per_epoch
    weights = "raw" if step.state.ema is None else "averaged"
    log.info(
        f"run    {plan.total_steps:,} steps of {plan.batch_size} images ({epochs:.3g} epochs), "
        f"{describe_computing(batches, step)}; {weights} weights are evaluated and saved"
    )
    log.info(f"folder {run.path}")
    if step.compiled:
        log.info("note   the first step compiles the model, which takes a minute or so")


def notes_on_data(config: Config, data: ImageDataset, cost: Cost) -> list[str]:
    """Return lines on what is unusual about the data and can be helped."""
    notes = note_on_classes(config, data), note_on_size(config, data.train, cost)
    return [note for note in notes if note is not None]


def note_on_classes(config: Config, data: ImageDataset) -> str | None:
    """Return a line on classes of very unequal size, with what may be done; None for others."""
    sizes = training_sizes(data)
    if not are_unbalanced(sizes):
        return None
    text = f"note   unbalanced classes, in train {describe_sizes(sizes, data.classes)}"
    advice = []
    if not config.data.balance:
        advice.append("data.balance=1 draws all equally often")
    if config.train.class_weights == "none" and config.data.balance < 1:
        advice.append("train.class_weights=balanced weighs the loss")
    if data.val is not None and config.train.select not in OF_CLASSES:
        advice.append("train.select=balanced_top1 or macro_f1 selects by all classes alike")
    return f"{text}: {', '.join(advice)}" if advice else text


def note_on_size(config: Config, images: ImageSplit, cost: Cost) -> str | None:
    """Return a line on images of quite another size than the model's input; None for others."""
    model_side = min(image_size_of(config))
    # Enlarging 32 px to 224 costs 49 times the pixels and adds no detail
    if images.pixels is not None:
        side = min(images.pixels.shape[2:])
        # Pretrained weights want the size that they were trained at
        if model_side < 4 * side or config.pretrained is not None:
            return None
        setting = cheaper_setting(cost.macs, config, small_images=True)
        return (
            f"note   images of {side} px are enlarged to {model_side}; from scratch a model of "
            f"their own size learns faster and costs less: {setting}"
        )
    # The default model is one for small images, and a photo of 32 px shows little of what is in it
    side = None if images.paths is None else typical_side(images.paths)
    if side is not None and model_side <= SMALL_SIDE and side >= 4 * model_side:
        return (
            f"note   images of about {side} px are made {model_side} px small, in which little can "
            "be told apart; model=vit_s16 sees 224 px"
        )
    return None


def describe_teacher(distillation: Distillation, cost: Cost) -> str:
    """Describe which teacher is asked what, and what of a step's work that is."""
    teacher = distillation.teacher
    share = 2 * teacher.macs / cost.nominal_flops
    lines = [
        f"teacher {teacher.name}: {teacher.model.num_parameters():,} parameters, "
        f"{2 * teacher.macs / 1e9:.3g} GFLOPs an image, {share:.0%} of a step's work; "
        f"{distillation.describe()}",
        *(f"  {note}" for note in teacher.notes),
    ]
    return "\n".join(lines)


def describe_computing(batches: Batches, step: OptimizerStep) -> str:
    """Describe the precision and the hardware: "bf16 on cpu, 2 threads, compiled"."""
    compiled = ", compiled" if step.compiled else ""
    return f"{step.state.precision.name} on {batches.machine.describe()}{compiled}"


def begin(config: Config, run: RunFolder, state: TrainingState) -> str:
    """Write config.yaml, which makes the folder this run's.

    Returns the command that repeats the run.
    """
    # Before config.yaml is written: a resumed run finds its first command in the old one
    command = repeat_command(run.path / "config.yaml", run.overrides, config.seed)
    progress = state.progress

    def describe_progress() -> dict:
        return {
            "steps": progress.step,
            # Nothing is selected before an evaluation, or where nothing is held out
            "select": None if progress.best_top1 is None else state.select,
            **{f"val_{name}": value for name, value in progress.best().items()},
            "best_step": progress.best_step,
            "seconds": round(progress.seconds, 2),
        }

    run.begin(f"# {command}\n{to_yaml(config)}", describe_progress)
    return command


def show_start(config: Config, observer: Observer) -> None:
    """Write a new run's first entries in TensorBoard.

    These are the configuration, and training images as the model sees them, which show at a glance
    what the augmentation does.
    """
    board, batches = observer.board, observer.batches
    board.text("configuration", f"```yaml\n{to_yaml(config)}```", 0)
    if not board.active:
        return

    # The batch of the first step, which training computes once more
    with contextlib.closing(batches.training(0, 1)) as training:
        images, targets = next(training)
    shown = batches.preprocessing.denormalize(images[:SHOWN_TRAINING_IMAGES])
    names = class_names(targets[:SHOWN_TRAINING_IMAGES], batches.data.classes)
    board.training_images(shown, names, 0)


def finish(
    config: Config,
    run: RunFolder,
    test: Mapping[str, float],
    observer: Observer,
    step: OptimizerStep,
    command: str,
) -> None:
    """Write the result of a run to its files and to TensorBoard, and print it.

    test: the metrics of the best weights on the test split; command: the one that repeats the run.
    """
    plan, batches, progress = observer.plan, observer.batches, observer.state.progress
    data = batches.data

    # A single test value is a row of the HPARAMS page, and no curve
    observer.metrics.evaluation(progress.step, "test", test, observer.beside)
    results = {}
    for name in ("top1", *observer.beside):
        results[f"result/test_{name}"] = test[name]
        # None where nothing is held out
        if (value := progress.best()[name]) is not None:
            results[f"result/val_{name}"] = value
    settings = notable_settings(config, run.overrides)
    observer.board.hyperparameters(settings, results, progress.step)
    observer.close()

    reason = plan.describe_end(progress)
    compute = compute_of(config, observer, step)
    run.write_result(
        status="finished",
        reason=reason,
        **run.describe_progress(),
        **{f"test_{name}": test[name] for name in CRITERIA},
        params=count_plain_parameters(observer.state.model),
        images_per_second=round(progress.images / progress.seconds, 2),
        pflops=compute.pflops,
        product_rate_share=compute.product_rate_share,
    )

    # From the files above, so after them; asking git is for one process
    if run.writes:
        leave_card(config, run, observer, step, command)

    if progress.step < plan.total_steps:
        log.info(f"ended early: {reason}")
    log_result(
        run,
        best=progress.best(),
        best_step=progress.best_step,
        select=observer.state.select,
        test=test,
        seconds=progress.seconds,
        val_title=str(data.val),
        test_title=str(data.test),
        note=note_on_test_classes(data) if observer.beside else "",
    )
    log.info(f"{describe_bottleneck(config, observer, step)}; {compute.describe()}")


def note_on_test_classes(data: ImageDataset) -> str:
    """Say what a model would get on the test split that always names its most frequent class."""
    label, share = largest_share(data.test.labels)
    return f"always {data.classes[label]} would be {share:.2%}"


def leave_card(
    config: Config, run: RunFolder, observer: Observer, step: OptimizerStep, command: str
) -> None:
    """Write the card of a finished run from its files."""
    data = observer.batches.data
    described = {
        "classes": len(data.classes),
        "train": data.train,
        "validation": data.val or "nothing held out",
        "test": data.test,
    }
    computing, cost = describe_computing(observer.batches, step), observer.speed.cost
    teacher = None if step.distillation is None else card_of(step.distillation, cost)
    write_card(run.path, to_dict(config), command, described, cost, computing, teacher)


def card_of(distillation: Distillation, cost: Cost) -> dict[str, str]:
    """Return what the card says of a teacher."""
    teacher = distillation.teacher
    share = 2 * teacher.macs / cost.nominal_flops
    return {
        "name": teacher.name,
        "SHA-256": teacher.sha256,
        "loss": distillation.describe(),
        "GFLOPs an image": f"{2 * teacher.macs / 1e9:.3g} more, {share:.0%} of a step's work",
        "parameters": f"{teacher.model.num_parameters():,}",
    }


@dataclass(frozen=True)
class Compute:
    """What a run's training cost in computing, whatever the machine.

    pflops: 10^15 FLOPs of all training steps, evaluations left out; product_rate_share: the
    fraction of what the machine could have multiplied in the run's time, pauses included.
    """

    pflops: float
    product_rate_share: float

    def describe(self) -> str:
        return f"{self.pflops:.3g} PFLOPs in all, {self.product_rate_share:.0%} of the product rate"


def compute_of(config: Config, observer: Observer, step: OptimizerStep) -> Compute:
    classes, progress = len(observer.batches.data.classes), observer.state.progress
    flops = progress.images * training_flops_of(config, classes, step.distillation)
    possible = observer.speed.product_rate * progress.seconds
    return Compute(float(f"{flops / 1e15:.6g}"), round(flops / possible, 4))


def describe_bottleneck(config: Config, observer: Observer, step: OptimizerStep) -> str:
    """Return the run's last line: what limited it most, and what would help."""
    machine, width = observer.batches.machine, config.model.hidden_size
    # What compiling and bf16 would bring, were they asked for: hence a run of infinite length
    circumstances = Circumstances(
        device=machine.device.type,
        precision=observer.state.precision.name,
        compiled=step.compiled,
        could_compile=worth_compiling(observer.state.precision, width, float("inf")),
        could_use_bf16=choose_precision("auto", machine.device, width).name == "bf16",
        from_files=observer.batches.train.pixels is None,
        workers=machine.workers,
        cores=worker_cores(machine.processes.local_count, machine.device.type),
    )

    mfu = observer.speed.mfu(speed_of_steps(observer, machine.device))
    return bottleneck(observer.clock.spent, mfu, circumstances)


def speed_of_steps(observer: Observer, device: torch.device) -> float:
    """Return the images per second of the steps, without evaluations and pauses."""
    spent = observer.clock.spent
    seconds = spent.steps
    # A GPU goes on with the steps before while the host waits for data
    if device.type != "cpu":
        seconds += spent.data
    # The first step is counted apart, since it may compile
    steps = observer.step - observer.clock.first_step - 1
    return steps * observer.plan.batch_size / max(seconds, 1e-9)
