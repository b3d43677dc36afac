"""What a run starts from: the state, new, pretrained or resumed, and what works on it.

The parts take plain values; the functions here, and those of prepare.py, read the configuration and
call them.
"""

import logging
from dataclasses import asdict

import torch

from vit.checkpoints.model import build_model
from vit.checkpoints.run import RunCheckpoints
from vit.config.config import Config, to_dict
from vit.config.model import ModelConfig
from vit.data.splits import ImageDataset, sample_evenly
from vit.errors import ConfigError
from vit.model.initialization import whiten_patches
from vit.model.vision_transformer import VisionTransformer
from vit.randomness import random_seed
from vit.runs.console import Console
from vit.runs.folder import RunFolder
from vit.runs.metrics_log import MetricsLog
from vit.runs.screen import Screen
from vit.runs.selection import logged_beside
from vit.runs.summary import cheaper_setting
from vit.runs.tensorboard import TensorBoard
from vit.runs.timing import Clock, Cost, Speed
from vit.runtime.attention_kernels import exclude_faulty_attention
from vit.runtime.compiling import compile_model
from vit.runtime.device import product_rate, reset_peak_memory
from vit.runtime.machine import Machine
from vit.runtime.memory import free_memory
from vit.runtime.precision import Precision, choose_precision
from vit.training.batches import Batches
from vit.training.distillation import TEMPERATURE, WEIGHT, Distillation, build_teacher_loss
from vit.training.losses import build_loss
from vit.training.micro_batch import agree_on_micro_batch_size, largest_in_step
from vit.training.observer import Observer
from vit.training.plan import Plan
from vit.training.prepare import (
    build_optimizer_of,
    choose_trained,
    frozen_parts,
    has_unbalanced_split,
    make_class_weights,
    preprocessing_of,
    require_equal_passes,
)
from vit.training.state import EMA, Progress, TrainingState
from vit.training.step import OptimizerStep
from vit.training.teacher import make_teacher
from vit.training.validation_board import ValidationBoard, watch_gradients
from vit.weights.description import Weights
from vit.weights.loading import load_into

log = logging.getLogger("vit")

# Training images whose patches' principal axes train.whiten_patches takes
WHITENING_IMAGES = 2000
# Validation images whose predictions TensorBoard shows
SHOWN_IMAGES = 16


def starting_state(
    config: Config,
    batches: Batches,
    weights: Weights | None,
    new: bool,
    precision: str | None = None,
) -> TrainingState:
    """Return the state that a run starts from, with random or pretrained weights.

    new: the run is not resumed; a resumed one has its weights replaced by resume(). precision: of
    a resumed run, see precision_of.
    """
    machine = batches.machine
    # Seeded by purpose, so that the weights do not depend on what was random before
    torch.manual_seed(random_seed(config.seed, "initial weights"))
    model = build_model(asdict(config.model), len(batches.data.classes))
    # A model to be sharded may not fit into the memory of one GPU
    model = model.to("cpu" if machine.sharded else machine.device)
    model.separate_heads = config.train.teacher is not None
    # Before sharding, which depends on it
    chosen = precision_of(config, machine, precision)
    # Before the first pass of any kind
    exclude_faulty_attention(machine.device, model)

    if weights is not None:
        load_pretrained(config, model, weights, batches.data.classes)
    if config.train.whiten_patches and new:
        indices = sample_evenly(batches.data.train.labels, WHITENING_IMAGES)
        images, _ = batches.inputs_of(batches.data.train, indices)
        whiten_patches(model, images.to(model.head.weight.device))

    # Before the optimizer is built, which takes the trained parameters alone
    torch.manual_seed(random_seed(config.seed, "low-rank changes"))
    choose_trained(config, model)
    model.encoder.checkpointing = config.runtime.activation_checkpointing

    # The average starts as a copy, so after the weights are final, and is sharded like the model.
    # The optimizer comes last: sharding replaces the parameters
    ema = EMA(model, config.train.ema_decay) if config.train.ema_decay else None
    if machine.sharded:
        dtype = torch.bfloat16 if chosen.name == "bf16" else None
        for sharded in [model] if ema is None else [model, ema.model]:
            machine.processes.shard(sharded, machine.device.type, dtype)
    optimizer = build_optimizer_of(config, model)
    return TrainingState(model, ema, optimizer, chosen, Progress(), config.train.select)


def precision_of(config: Config, machine: Machine, saved: str | None = None) -> Precision:
    """Return what train.precision asks for on this machine.

    saved: of the run that is resumed, whose auto does not choose again.
    """
    name = config.train.precision
    if name == "auto" and saved is not None:
        name = saved
    return choose_precision(name, machine.device, config.model.hidden_size)


def load_pretrained(
    config: Config, model: VisionTransformer, weights: Weights, classes: list[str]
) -> None:
    """Load pretrained weights into a model, and log what fitted and what did not."""
    report = load_into(model, weights, classes, config.pretrained_positions)
    log.info(f"start  {report}")
    if weights.preprocessing is None:
        log.info(
            "  the file does not describe its preprocessing: data.mean, data.std and "
            "data.eval_crop are taken as configured"
        )


def make_distillation(
    config: Config, weights: Weights | None, data: ImageDataset
) -> Distillation | None:
    """Return what the run learns of its teacher, or None without one.

    weights: of the teacher. Raises CheckpointError where it does not know the data's classes.
    """
    train = config.train
    if train.teacher is None or weights is None:
        return None
    teacher = make_teacher(train.teacher, weights, data.classes, preprocessing_of(config))
    kind = train.distillation or "hard"
    temperature = train.distill_temperature or TEMPERATURE
    of_teacher = build_teacher_loss(kind, train.loss, temperature)
    described = f"soft (temperature {temperature:g})" if kind == "soft" else kind
    return Distillation(teacher, described, of_teacher, train.distill_weight or WEIGHT)


def make_checkpoints(
    config: Config, run: RunFolder, batches: Batches, distillation: Distillation | None
) -> RunCheckpoints:
    """Return the run's checkpoints, which hold all that evaluation and a resumed run need."""
    # The checksum shows whether the data set has changed by the time the run is resumed
    header = {
        "config": to_dict(config),
        "classes": batches.data.classes,
        "preprocessing": batches.preprocessing.to_dict(),
        "data": batches.data.train.fingerprint(),
    }
    # A resumed run needs it too, and must not be given another
    if distillation is not None:
        header["teacher"] = distillation.teacher.identity()
    return RunCheckpoints(run.checkpoints, header, run.writes)


def resume(
    config: Config, run: RunFolder, state: TrainingState, plan: Plan, checkpoints: RunCheckpoints
) -> None:
    """Bring the state to where the run's last checkpoint left it.

    Raises CheckpointError where it does not fit, ConfigError where the run is already longer than
    asked for, or has ended for want of improvement.
    """
    may_differ = config.resume_changed == "allow"
    for warning in checkpoints.resume(state, may_differ):
        log.info(f"warning: {warning}")

    step = state.progress.step
    if step > plan.total_steps:
        raise ConfigError(
            f"resume={run.path}: {step} steps are done already, more than the {plan.total_steps} "
            "that train.steps or train.epochs asks for"
        )
    # One that was killed before its result was written is resumed to write it
    if step < plan.total_steps and plan.out_of_patience(state.progress) and run.finished_at(step):
        raise ConfigError(
            f"resume={run.path}: the run is finished ({plan.describe_end(state.progress)}); to go "
            "on, give a larger train.patience, or train.patience=null"
        )
    log.info(f"resuming {run.path} after step {step}")


def fit_memory(
    config: Config,
    state: TrainingState,
    batches: Batches,
    new: bool,
    distillation: Distillation | None = None,
) -> None:
    """Settle how many images are computed at once, so that they fit into the memory.

    A teacher is moved to the device. The size is noted in the batches and, where it was searched
    for, in the state's progress. new: the run is not resumed. Comes before make_step(), since the
    passes that try a size out must not be those of a model that is wrapped or compiled. Raises
    ConfigError, see choose_micro_batch_size.
    """
    # First, so that the micro-batch leaves room for it
    if distillation is not None:
        teacher, device = distillation.teacher, batches.machine.device
        teacher.to(device)
        exclude_faulty_attention(device, teacher.model)
    # Of evaluations too: what doesn't fit in a step need not be tried there
    batches.micro_batch_size = choose_micro_batch_size(config, state, batches, new, distillation)


def choose_micro_batch_size(
    config: Config,
    state: TrainingState,
    batches: Batches,
    new: bool,
    distillation: Distillation | None,
) -> int | None:
    """Return how many images are computed at once: as given, or else as memory allows.

    None for the whole batch. What is found in a new run is noted in its progress. Raises
    ConfigError where processes that share a model can't make equally many passes.
    """
    if config.train.micro_batch_size is not None:
        return config.train.micro_batch_size
    machine, count = batches.machine, batches.machine.processes.count

    # Sharded models are left out, since there each pass is a collective that may not fail
    if new and machine.device.type == "cuda" and not machine.sharded:
        state.progress.micro_batch_size = fitting_micro_batch_size(
            config.model, state, batches, distillation
        )
    found = state.progress.micro_batch_size
    if found is None or not machine.sharded:
        return found

    # It was found before the run was sharded, and no process may make more passes than another
    size = largest_in_step(batches.batch_size, found, count)
    if size is None:
        require_equal_passes(config, found, count)
    return size


def fitting_micro_batch_size(
    model_config: ModelConfig,
    state: TrainingState,
    batches: Batches,
    distillation: Distillation | None,
) -> int | None:
    """Return the largest micro-batch that fits into the GPU's memory; None for the whole batch.

    It is kept with the run's progress, so that a resumed run splits its batches alike.
    """
    preprocessing = batches.preprocessing
    size = agree_on_micro_batch_size(
        state.model,
        (preprocessing.num_channels, *preprocessing.image_size),
        # Images of this process in a global batch
        len(range(batches.batch_size)[batches.own]),
        batches.batch_size,
        state.precision,
        batches.machine.processes,
        None if distillation is None else distillation.teach,
    )
    if size is not None:
        result = "the result is the same"
        if has_dropout(model_config):
            result = "dropout draws other masks than for a whole batch, nothing else differs"
        log.info(
            f"memory holds {size} images at once: each batch is computed in micro-batches of "
            f"{size}; {result}"
        )
    return size


def has_dropout(model: ModelConfig) -> bool:
    """Whether the model drops at random what OptimizerStep.seed_dropout() decides."""
    return any(
        (
            model.dropout,
            model.embedding_dropout,
            model.attention_dropout,
            model.projection_dropout,
            model.mlp_dropout,
            model.patch_dropout,
        )
    )


def make_step(
    config: Config,
    state: TrainingState,
    batches: Batches,
    plan: Plan,
    image_flops: float,
    distillation: Distillation | None = None,
) -> OptimizerStep:
    """Return the optimizer's step, once fit_memory() has settled what it computes at once.

    The model is wrapped for several processes and compiled, its teacher compiled likewise.
    image_flops: of one image in a step, which decide whether compiling pays.
    """
    machine, model = batches.machine, state.model
    synchronized = model
    if not machine.sharded:
        synchronized = machine.processes.data_parallel(model, machine.device)

    run_flops = image_flops * plan.batch_size * plan.total_steps
    mode = compile_mode(config, batches)
    compiled = compile_model(
        synchronized, mode, state.precision, config.model.hidden_size, run_flops
    )
    if compiled.warning:
        log.info(compiled.warning)
    if compiled.is_compiled and distillation is not None:
        distillation.teacher.compile(mode, state.precision)

    weights = make_class_weights(config, batches.data, machine.device)
    return OptimizerStep(
        state=state,
        forward=compiled.forward,
        synchronized=synchronized,
        loss=build_loss(config.train.loss, config.train.label_smoothing, weights),
        processes=machine.processes,
        stop=batches.stop,
        batch_size=plan.batch_size,
        micro_batch_size=batches.micro_batch_size,
        clip_norm=config.train.clip_norm,
        drop_path_schedule=config.train.drop_path_schedule,
        seed=config.seed,
        compiled=compiled.is_compiled,
        distillation=distillation,
        frozen=frozen_parts(config, model),
    )


def compile_mode(config: Config, batches: Batches) -> bool | str:
    """Return runtime.compile, or what takes its place beside the other settings.

    Raises ConfigError for what can't be compiled so.
    """
    mode, machine = config.runtime.compile, batches.machine
    if machine.sharded:
        # Typed, it is refused; an experiment's file, or the run that is resumed, may ask for it
        if mode not in (False, "auto"):
            log.info("runtime.compile: a model with runtime.sharding runs uncompiled")
        return False

    if mode == "graphs":
        if machine.processes.count > 1:
            raise ConfigError("runtime.compile=graphs is for one process; use runtime.compile=true")
        size = batches.micro_batch_size
        if size is not None and size < batches.batch_size:
            raise ConfigError(
                f"runtime.compile=graphs computes the whole batch at once, which micro-batches of "
                f"{size} do not; use runtime.compile=true, or a smaller train.batch_size"
            )
    return mode


def make_observer(
    config: Config,
    run: RunFolder,
    state: TrainingState,
    plan: Plan,
    batches: Batches,
    step: OptimizerStep,
    cost: Cost,
    new: bool,
    screen: Screen,
) -> Observer:
    """Return what reports on the run.

    The files of a resumed run are cut back to the step of its checkpoint. new: it is not resumed.
    """
    machine, first_step = batches.machine, state.progress.step
    board = TensorBoard(run.path / "tensorboard", None if new else first_step + 1, run.writes)

    # Drawing needs all weights in one process, and images of one process are enough
    validation_board = None
    if machine.is_first and not machine.sharded:
        validation_board = make_validation_board(board, batches, plan)
        interval = 10 * plan.log_every
        watch_gradients(board, state.model, state.optimizer, state.progress, interval)

    # Of all processes together, as images per second are
    rate = machine.processes.count * product_rate(machine.device, state.precision.dtype)
    # The peak of training is not that of the products, nor of looking for the micro-batch
    free_memory(machine.device)
    reset_peak_memory(machine.device)
    slow_advice = None
    if machine.device.type == "cpu":
        in_memory = batches.train.pixels is not None
        setting = cheaper_setting(cost.macs, config, small_images=in_memory)
        slow_advice = f"  that is long without a GPU; cheaper: the same command with {setting}"

    clock = Clock(first_step, state.progress.seconds)
    return Observer(
        state=state,
        plan=plan,
        batches=batches,
        clock=clock,
        speed=Speed(cost, rate),
        console=Console(
            screen,
            clock,
            total_steps=plan.total_steps,
            steps_per_epoch=plan.steps_per_epoch,
            epochs=plan.epochs,
            batch_size=plan.batch_size,
            evaluations=plan.evaluations(plan.total_steps),
            compiles=step.compiled,
        ),
        metrics=MetricsLog(run.path, first_step, run.writes),
        board=board,
        validation_board=validation_board,
        slow_advice=slow_advice,
        beside=logged_beside(config.train.select, has_unbalanced_split(batches.data)),
    )


def make_validation_board(board: TensorBoard, batches: Batches, plan: Plan) -> ValidationBoard:
    """Return what draws on validation images, or on training images where none are held out."""
    # The same images through the whole run, spread evenly over the classes
    split = batches.data.val or batches.data.train
    images, labels = batches.inputs_of(split, sample_evenly(split.labels, SHOWN_IMAGES))
    return ValidationBoard(
        board, batches.data.classes, batches.preprocessing, images, labels, plan.total_steps
    )
