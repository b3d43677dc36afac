"""From the configuration to the parts of a run: a new state, a pretrained one, or a resumed one,
and all it works with.

This is the one module of training that knows the configuration; it calls constructors that take
plain values.
"""

import logging
from dataclasses import asdict

import torch

from vit.augment.batch import BatchAugmentation
from vit.augment.mixing import MixupCutmix
from vit.augment.policies import build_policies
from vit.checkpoints.model import build_model, build_on_meta
from vit.checkpoints.run import RunCheckpoints
from vit.config.config import Config, to_dict
from vit.config.data import data_arguments
from vit.config.resume import with_settings_of_weights
from vit.data.datasets import check_dataset, load_data
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
from vit.runs.summary import cheaper_command
from vit.runs.tensorboard import TensorBoard
from vit.runs.timing import Clock, Speed
from vit.runtime.compiling import compile_model
from vit.runtime.device import product_rate
from vit.runtime.machine import Machine
from vit.runtime.precision import choose_precision
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

WHITENING_IMAGES = 2000  # whose patches' axes train.whiten_patches takes
SHOWN_IMAGES = 16  # whose predictions TensorBoard shows
LONG_RUN = 10**9  # steps, where the run's length is not known yet


def start_machine(config: Config, stop: StopSignal) -> Machine:
    """The hardware that `runtime` asks for."""
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
    """The configuration with the settings that belong to pretrained=FILE, and the weights in it;
    None without.

    A resumed run has them in its checkpoint. Raises CheckpointError where the file can't be used.
    """
    if config.pretrained is None or run.has_checkpoint():
        return config, None
    weights = read(config.pretrained)
    preprocessing = weights.preprocessing and weights.preprocessing.to_dict()
    adopted = with_settings_of_weights(
        config, weights.model, preprocessing, run.overrides, config.pretrained
    )
    return adopted, weights


def check_parts(config: Config) -> None:
    """Build everything that needs no data, without numbers: mistakes are told before any data is
    read.

    Raises ConfigError.
    """
    check_dataset(
        name=config.data.name,
        root=config.data.root,
        test_fraction=config.data.test_fraction,
        num_classes=config.data.num_classes,
        num_images=config.data.num_images,
    )
    build_optimizer_of(config, build_on_meta(asdict(config.model)))
    build_schedule(
        **asdict(config.schedule), total_steps=config.train.steps or LONG_RUN, steps_per_epoch=1
    )
    build_policies_of(config)


def build_optimizer_of(config: Config, model: VisionTransformer) -> torch.optim.Optimizer:
    settings = asdict(config.optimizer)
    common = {key: settings.pop(key) for key in COMMON_KEYS}
    return build_optimizer(model, **common, settings=settings)


def build_policies_of(config: Config) -> list:
    augment = config.augment
    return build_policies(
        augment.policy, augment.policy_ops, augment.policy_magnitude, augment.color_jitter
    )


def load_dataset(config: Config, machine: Machine) -> ImageDataset:
    """The data set, read by the first process before the others: it may download it."""
    arguments = data_arguments(config.data, config.model.num_channels)
    size = image_size_of(config)
    return machine.processes.first_then_others(
        lambda: load_data(**arguments, image_size=size, device=machine.device)
    )


def image_size_of(config: Config) -> tuple[int, int]:
    """(height, width) of the model's input in pixels."""
    return build_on_meta(asdict(config.model)).embeddings.patch_embedding.image_size


def macs_of(config: Config, num_classes: int) -> int:
    """Multiply-adds of one image's forward pass."""
    return count_macs(build_on_meta(asdict(config.model), num_classes))


def make_plan(config: Config, data: ImageDataset, machine: Machine) -> Plan:
    """Epochs and fractions turned into steps. Raises ConfigError for an impossible batch size or
    schedule.
    """
    train, num_images, count = config.train, len(data.train), machine.processes.count
    if train.batch_size > num_images:
        raise ConfigError(
            f"train.batch_size={train.batch_size} is more than the {num_images} training images; "
            "lower it"
        )
    if train.batch_size < 2 * count:
        raise ConfigError(
            f"train.batch_size={train.batch_size} is for all {count} processes together: "
            f"it must be at least {2 * count}"
        )
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
    """The batches of training and evaluation."""
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
    """All random changes of training; mirroring is left out where it turns a class into another."""
    augment, seed = config.augment, config.seed
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
    """The state a run starts from: random weights, or pretrained ones. new: the run is
    not resumed.
    """
    torch.manual_seed(random_seed(config.seed, "initial weights"))
    model = build_model(asdict(config.model), len(batches.data.classes))
    # Sharded models may not fit into one GPU's memory before they are sharded
    model = model.to("cpu" if machine.sharded else machine.device)
    precision = choose_precision(config.train.precision, machine.device, config.model.hidden_size)
    if weights is not None:
        load_pretrained(config, model, weights, batches.data.classes)
    if config.train.whiten_patches and new:
        indices = sample_evenly(batches.data.train.labels, WHITENING_IMAGES)
        images, _ = batches.inputs_of(batches.data.train.subset(indices))
        whiten_patches(model, images.to(model.head.weight.device))
    if config.train.freeze == "backbone":
        freeze_all_but_head(model)
    model.encoder.checkpointing = config.runtime.activation_checkpointing
    ema = EMA(model, config.train.ema_decay) if config.train.ema_decay else None
    if machine.sharded:
        dtype = torch.bfloat16 if precision.name == "bf16" else None
        for sharded in [model] if ema is None else [model, ema.model]:
            machine.processes.shard(sharded, machine.device.type, dtype)
    optimizer = build_optimizer_of(config, model)
    return TrainingState(model, ema, optimizer, precision, Progress())


def load_pretrained(
    config: Config, model: VisionTransformer, weights: Weights, classes: list[str]
) -> None:
    report = load_into(model, weights, classes, config.pretrained_positions)
    log.info(f"start  {report}")
    if weights.preprocessing is None:
        log.info(
            "  the file does not describe its preprocessing: data.mean, data.std and "
            "data.eval_crop are taken as configured"
        )


def make_checkpoints(config: Config, run: RunFolder, batches: Batches) -> RunCheckpoints:
    """The run's checkpoints, which hold all that evaluation and a resumed run need."""
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
    """Bring the state to where the run's last checkpoint left it."""
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
    """The optimizer's step: the micro-batch that fits, the model wrapped for several processes, and
    compiled.
    """
    machine = batches.machine
    given = config.train.micro_batch_size is not None
    if new and machine.device.type == "cuda" and not given and not machine.sharded:
        state.progress.micro_batch_size = fitting_micro_batch_size(state, batches)
    model = state.model
    synchronized = model
    if not machine.sharded:
        synchronized = machine.processes.data_parallel(model, machine.device)
    run_flops = 6 * macs * plan.batch_size * plan.total_steps
    mode = False if machine.sharded else config.runtime.compile
    forward, warning = compile_model(
        synchronized, mode, machine.device, config.model.hidden_size, run_flops
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
        micro_batch_size=config.train.micro_batch_size or state.progress.micro_batch_size,
        clip_norm=config.train.clip_norm,
        drop_path_schedule=config.train.drop_path_schedule,
        seed=config.seed,
    )


def fitting_micro_batch_size(state: TrainingState, batches: Batches) -> int | None:
    """The largest micro-batch that fits into the GPU's memory, the same in all processes; None: the
    whole batch.

    It is kept with the run's progress, so that a resumed run splits its batches alike.
    """
    own = len(range(batches.batch_size)[batches.own])
    preprocessing = batches.preprocessing
    shape = (preprocessing.num_channels, *preprocessing.image_size)
    size = find_micro_batch_size(state.model, shape, own, state.precision)
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
    macs: int,
    new: bool,
) -> Observer:
    """What reports on the run; files of a resumed one are cut back to where its
    checkpoint stands.
    """
    machine, first_step = batches.machine, state.progress.step
    board = TensorBoard(run.path / "tensorboard", None if new else first_step + 1, run.writes)
    validation_board = None
    if machine.is_first and not machine.sharded:  # drawing needs all weights in one place
        validation_board = make_validation_board(board, batches, plan)
        interval = 10 * plan.log_every
        watch_gradients(board, state.model, state.optimizer, state.progress, interval)
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
            first_step=first_step,
            total_steps=plan.total_steps,
            steps_per_epoch=plan.steps_per_epoch,
            epochs=plan.epochs,
            batch_size=plan.batch_size,
            speaks=run.writes,
        ),
        metrics=MetricsLog(run.path, first_step, run.writes),
        board=board,
        validation_board=validation_board,
        slow_advice=slow_advice,
    )


def make_validation_board(board: TensorBoard, batches: Batches, plan: Plan) -> ValidationBoard:
    """Shows some validation images, or training images where nothing is held out."""
    split = batches.data.val or batches.data.train
    shown = split.subset(sample_evenly(split.labels, SHOWN_IMAGES))
    images, labels = batches.inputs_of(shown)
    return ValidationBoard(
        board, batches.data.classes, batches.preprocessing, images, labels, plan.total_steps
    )
