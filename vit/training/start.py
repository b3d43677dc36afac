"""From the configuration to the parts of a run: machine, data, plan, state, step, observer.

The parts take plain values; the functions here read the configuration and call them.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict

import torch

from vit.augment.batch import BatchAugmentation
from vit.augment.mixing import MixupCutmix
from vit.augment.policies import build_policies
from vit.checkpoints.model import build_model, build_on_meta
from vit.checkpoints.run import RunCheckpoints
from vit.config.config import Config, to_dict
from vit.config.data import data_arguments
from vit.config.in_vain import check_typed
from vit.config.resume import overridden_keys_of, with_settings_of_weights
from vit.data.datasets import DATASETS, check_dataset, load_data
from vit.data.preprocessing import Preprocessing
from vit.data.sample_order import SampleOrder
from vit.data.splits import ImageDataset, sample_evenly
from vit.data.training_transform import TrainingTransform
from vit.errors import ConfigError
from vit.model.cost import count_macs
from vit.model.initialization import whiten_patches
from vit.model.vision_transformer import VisionTransformer
from vit.randomness import random_seed
from vit.runs.console import Console
from vit.runs.folder import RunFolder
from vit.runs.metrics_log import MetricsLog
from vit.runs.screen import Screen
from vit.runs.summary import cheaper_command
from vit.runs.tensorboard import TensorBoard
from vit.runs.timing import Clock, Speed
from vit.runtime.compiling import compile_model
from vit.runtime.device import product_rate
from vit.runtime.machine import Machine
from vit.runtime.precision import Precision, choose_precision
from vit.runtime.signals import StopSignal
from vit.training.batches import Augmentation, Batches
from vit.training.losses import build_loss
from vit.training.observer import Observer
from vit.training.optimizers import COMMON_KEYS, build_optimizer, freeze_all_but_head
from vit.training.plan import Plan, build_schedule
from vit.training.state import EMA, Progress, TrainingState
from vit.training.step import OptimizerStep, find_micro_batch_size
from vit.training.validation_board import ValidationBoard, watch_gradients
from vit.weights.description import Weights
from vit.weights.loading import load_into, read

log = logging.getLogger("vit")

# Training images whose patches' principal axes train.whiten_patches takes
WHITENING_IMAGES = 2000
# Validation images whose predictions TensorBoard shows
SHOWN_IMAGES = 16
# Steps, where the run's length is not known yet
LONG_RUN = 10**9


def start_machine(config: Config, stop: StopSignal) -> Machine:
    """Return the hardware that the group `runtime` asks for, with torch set up for it."""
    # Importing torch took seconds, in which a signal may have come
    stop.check()
    runtime = config.runtime
    return Machine.start(
        stop,
        device=runtime.device,
        threads=runtime.threads,
        deterministic=runtime.deterministic,
        workers=runtime.workers,
        sharding=runtime.sharding,
    )


def with_pretrained(config: Config, run: RunFolder) -> tuple[Config, Weights | None]:
    """Return the configuration with the settings of pretrained=FILE, and the weights in it.

    The weights are None without such a file. Raises CheckpointError where it can't be used.
    """
    # A resumed run has weights and settings in its own checkpoint and configuration
    if config.pretrained is None or run.has_checkpoint():
        return config, None

    weights = read(config.pretrained)
    preprocessing = weights.preprocessing and weights.preprocessing.to_dict()
    adopted = with_settings_of_weights(
        config, weights.model, preprocessing, run.overrides, config.pretrained
    )
    return adopted, weights


def check_parts(config: Config, overrides: Sequence[str] = ()) -> None:
    """Build what needs no data, to find mistakes before minutes of reading. Raises ConfigError.

    overrides: of the command line, none of which may be in vain.
    """
    check_dataset(
        name=config.data.name,
        root=config.data.root,
        test_fraction=config.data.test_fraction,
        num_classes=config.data.num_classes,
        num_images=config.data.num_images,
    )
    check_typed(config, overrides, DATASETS[config.data.name].reads_files)

    # On the meta device, so that even the largest model takes no memory
    build_optimizer_of(config, build_on_meta(asdict(config.model)))

    # Whether warmup and cooldown fit into a run in epochs is known only with the data
    build_schedule(
        **asdict(config.schedule), total_steps=config.train.steps or LONG_RUN, steps_per_epoch=1
    )
    build_policies_of(config)


def build_optimizer_of(config: Config, model: VisionTransformer) -> torch.optim.Optimizer:
    """Build the optimizer of the group `optimizer`. Raises ConfigError."""
    settings = asdict(config.optimizer)
    common = {key: settings.pop(key) for key in COMMON_KEYS}
    return build_optimizer(model, **common, settings=settings)


def build_policies_of(config: Config) -> list:
    """Build the policies of the group `augment`. Raises ConfigError."""
    augment = config.augment
    return build_policies(
        augment.policy, augment.policy_ops, augment.policy_magnitude, augment.color_jitter
    )


def load_dataset(config: Config, run: RunFolder, machine: Machine) -> ImageDataset:
    """Read the data set, in the first process before the others, since it may download it."""
    arguments = data_arguments(config.data, config.model.num_channels)
    size = image_size_of(config)
    typed = overridden_keys_of("data", run.overrides)
    return machine.processes.first_then_others(
        lambda: load_data(**arguments, image_size=size, device=machine.device, typed=typed)
    )


def image_size_of(config: Config) -> tuple[int, int]:
    """Return (height, width) of the model's input in pixels."""
    return build_on_meta(asdict(config.model)).embeddings.patch_embedding.image_size


def macs_of(config: Config, num_classes: int) -> int:
    """Return the multiply-adds of one image's forward pass."""
    return count_macs(build_on_meta(asdict(config.model), num_classes))


def make_plan(config: Config, data: ImageDataset, machine: Machine) -> Plan:
    """Turn epochs and fractions into steps.

    Raises ConfigError for a batch size or a schedule that is impossible with this data.
    """
    train, num_images, count = config.train, len(data.train), machine.processes.count
    if train.batch_size > num_images:
        raise ConfigError(
            f"train.batch_size={train.batch_size} is more than the {num_images} training images; "
            "lower it"
        )
    # Each process computes whole pairs of images, see Processes.batch_slice
    if train.batch_size < 2 * count:
        raise ConfigError(
            f"train.batch_size={train.batch_size} is for all {count} processes together: "
            f"it must be at least {2 * count}"
        )

    # Not rounded: batches run on over the end of an epoch, so that none is smaller
    steps_per_epoch = num_images / train.batch_size
    total_steps = train.steps or max(1, round(train.epochs * steps_per_epoch))
    schedule = build_schedule(
        **asdict(config.schedule), total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    return Plan(
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        batch_size=train.batch_size,
        schedule=schedule,
        eval_every=train.eval_every,
        attention_every=train.attention_every,
        log_every=train.log_every,
        save_every=train.save_every,
    )


def make_batches(config: Config, data: ImageDataset, machine: Machine, stop: StopSignal) -> Batches:
    """Return the batches of training and evaluation."""
    preprocessing = Preprocessing(
        image_size_of(config),
        config.model.num_channels,
        tuple(config.data.mean),
        tuple(config.data.std),
        config.data.eval_crop,
        config.data.interpolation,
    )
    batch_size = config.train.batch_size
    return Batches(
        data=data,
        preprocessing=preprocessing,
        augmentation=make_augmentation(config, preprocessing, len(data.classes)),
        order=SampleOrder(len(data.train), batch_size, config.seed, config.augment.repeats),
        batch_size=batch_size,
        machine=machine,
        stop=stop,
    )


def make_augmentation(
    config: Config, preprocessing: Preprocessing, num_classes: int
) -> Augmentation:
    """Return all random changes of the training images."""
    augment, seed = config.augment, config.seed
    # A mirrored digit is of another class, or of none
    flip = augment.flip if config.data.mirror else 0.0
    policies = build_policies_of(config)
    crop_scale, size = augment.crop_scale, preprocessing.image_size
    mix_probability = 1.0 if augment.mix_probability is None else augment.mix_probability
    return Augmentation(
        image=TrainingTransform(preprocessing, crop_scale, flip, policies),
        batch=BatchAugmentation(seed, size, augment.pad, crop_scale, flip, policies),
        erasing=augment.erasing,
        mixing=MixupCutmix(seed, num_classes, augment.mixup, augment.cutmix, mix_probability),
        skip_unreadable=config.data.unreadable == "skip",
    )


def starting_state(
    config: Config, batches: Batches, weights: Weights | None, machine: Machine, new: bool
) -> TrainingState:
    """Return the state that a run starts from, with random or pretrained weights.

    new: the run is not resumed; a resumed one has its weights replaced by resume().
    """
    # Seeded by purpose, so that the weights do not depend on what was random before
    torch.manual_seed(random_seed(config.seed, "initial weights"))
    model = build_model(asdict(config.model), len(batches.data.classes))
    # A model to be sharded may not fit into the memory of one GPU
    model = model.to("cpu" if machine.sharded else machine.device)
    precision = precision_of(config, machine)

    if weights is not None:
        load_pretrained(config, model, weights, batches.data.classes)
    if config.train.whiten_patches and new:
        indices = sample_evenly(batches.data.train.labels, WHITENING_IMAGES)
        images, _ = batches.inputs_of(batches.data.train.subset(indices))
        whiten_patches(model, images.to(model.head.weight.device))

    # Before the optimizer is built, which takes the trained parameters alone
    if config.train.freeze == "backbone":
        freeze_all_but_head(model)
    model.encoder.checkpointing = config.runtime.activation_checkpointing

    # The average starts as a copy, so after the weights are final, and is sharded like the model.
    # The optimizer comes last: sharding replaces the parameters
    ema = EMA(model, config.train.ema_decay) if config.train.ema_decay else None
    if machine.sharded:
        dtype = torch.bfloat16 if precision.name == "bf16" else None
        for sharded in [model] if ema is None else [model, ema.model]:
            machine.processes.shard(sharded, machine.device.type, dtype)
    optimizer = build_optimizer_of(config, model)
    return TrainingState(model, ema, optimizer, precision, Progress())


def precision_of(config: Config, machine: Machine) -> Precision:
    """Return what train.precision asks for on this machine."""
    return choose_precision(config.train.precision, machine.device, config.model.hidden_size)


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


def make_checkpoints(config: Config, run: RunFolder, batches: Batches) -> RunCheckpoints:
    """Return the run's checkpoints, which hold all that evaluation and a resumed run need."""
    # The checksum shows whether the data set has changed by the time the run is resumed
    header = {
        "config": to_dict(config),
        "classes": batches.data.classes,
        "preprocessing": batches.preprocessing.to_dict(),
        "data": batches.data.train.fingerprint(),
    }
    return RunCheckpoints(run.checkpoints, header, run.writes)


def resume(
    config: Config, run: RunFolder, state: TrainingState, plan: Plan, checkpoints: RunCheckpoints
) -> None:
    """Bring the state to where the run's last checkpoint left it.

    Raises CheckpointError where it does not fit, ConfigError where the run is already longer than
    asked for.
    """
    data_may_differ = config.resume_changed == "allow"
    for warning in checkpoints.resume(state, data_may_differ):
        log.info(f"warning: {warning}")

    step = state.progress.step
    if step > plan.total_steps:
        raise ConfigError(
            f"resume={run.path}: {step} steps are done already, more than the {plan.total_steps} "
            "that train.steps or train.epochs asks for"
        )
    log.info(f"resuming {run.path} after step {step}")


def make_step(
    config: Config, state: TrainingState, batches: Batches, plan: Plan, macs: int, new: bool
) -> OptimizerStep:
    """Return the optimizer's step.

    The micro-batch is made to fit into the memory, and the model is wrapped for several processes
    and compiled. macs: multiply-adds of one image's forward pass; new: the run is not resumed.
    """
    machine = batches.machine

    # Before the model is wrapped and compiled: the passes that try it out must exchange nothing.
    # Sharded models are left out, since there each pass is a collective that may not fail
    given = config.train.micro_batch_size is not None
    if new and machine.device.type == "cuda" and not given and not machine.sharded:
        state.progress.micro_batch_size = fitting_micro_batch_size(state, batches)
    # Of evaluations too: what doesn't fit in a step need not be tried there
    batches.micro_batch_size = config.train.micro_batch_size or state.progress.micro_batch_size

    model = state.model
    synchronized = model
    if not machine.sharded:
        synchronized = machine.processes.data_parallel(model, machine.device)

    # Forward and twice that backward, two operations a multiply-add
    run_flops = 6 * macs * plan.batch_size * plan.total_steps
    mode = False if machine.sharded else config.runtime.compile
    forward, warning = compile_model(
        synchronized, mode, state.precision, config.model.hidden_size, run_flops
    )
    if warning:
        log.info(warning)

    return OptimizerStep(
        state=state,
        forward=forward,
        synchronized=synchronized,
        loss=build_loss(config.train.loss, config.train.label_smoothing),
        processes=machine.processes,
        stop=batches.stop,
        batch_size=plan.batch_size,
        micro_batch_size=batches.micro_batch_size,
        clip_norm=config.train.clip_norm,
        drop_path_schedule=config.train.drop_path_schedule,
        seed=config.seed,
    )


def fitting_micro_batch_size(state: TrainingState, batches: Batches) -> int | None:
    """Return the largest micro-batch that fits into the GPU's memory; None for the whole batch.

    It is kept with the run's progress, so that a resumed run splits its batches alike.
    """
    # Images of this process in a global batch
    own = len(range(batches.batch_size)[batches.own])
    preprocessing = batches.preprocessing
    shape = (preprocessing.num_channels, *preprocessing.image_size)
    size = find_micro_batch_size(state.model, shape, own, state.precision)
    # GPUs may differ in what else fills them, but the processes' micro-batches have to match
    size = batches.machine.processes.broadcast(size)
    if size >= own:
        return None
    log.info(
        f"memory holds {size} images at once: each batch is computed in micro-batches of {size}; "
        "the result is the same"
    )
    return size


def make_observer(
    config: Config,
    run: RunFolder,
    state: TrainingState,
    plan: Plan,
    batches: Batches,
    step: OptimizerStep,
    macs: int,
    new: bool,
    screen: Screen,
) -> Observer:
    """Return what reports on the run.

    The files of a resumed run are cut back to the step of its checkpoint. macs: multiply-adds of
    one image's forward pass; new: the run is not resumed.
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
    slow_advice = None
    if machine.device.type == "cpu":
        command = cheaper_command(macs, config)
        slow_advice = f"  that is long without a GPU; cheaper: {command}"

    return Observer(
        state=state,
        plan=plan,
        batches=batches,
        clock=Clock(first_step, state.progress.seconds),
        speed=Speed(macs, rate),
        console=Console(
            screen,
            first_step=first_step,
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
    )


def make_validation_board(board: TensorBoard, batches: Batches, plan: Plan) -> ValidationBoard:
    """Return what draws on validation images, or on training images where none are held out."""
    # The same images through the whole run, spread evenly over the classes
    split = batches.data.val or batches.data.train
    shown = split.subset(sample_evenly(split.labels, SHOWN_IMAGES))
    images, labels = batches.inputs_of(shown)
    return ValidationBoard(
        board, batches.data.classes, batches.preprocessing, images, labels, plan.total_steps
    )
