"""What a run needs before it has any weights: machine, data, plan and batches.

The parts take plain values; the functions here, and those of start.py, read the configuration and
call them.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from vit.augment.affine import Affine
from vit.augment.batch import BatchAugmentation
from vit.augment.flips import AlternatingFlip
from vit.augment.mixing import MixupCutmix
from vit.augment.policies import build_policies
from vit.checkpoints.model import build_on_meta
from vit.config.config import Config
from vit.config.data import data_arguments
from vit.config.in_vain import check_typed, check_typed_with_data
from vit.config.resume import overridden_keys, with_settings_of_weights
from vit.config.train import frozen_blocks
from vit.data.class_balance import (
    ClassDraws,
    are_equal,
    are_unbalanced,
    balanced_weights,
    class_sizes,
)
from vit.data.datasets import DATASETS, check_dataset, load_data
from vit.data.preprocessing import Preprocessing
from vit.data.sample_order import SampleOrder
from vit.data.splits import ImageDataset
from vit.data.training_transform import TrainingTransform
from vit.errors import CheckpointError, ConfigError
from vit.model.cost import count_macs, training_flops
from vit.model.low_rank import add_low_rank
from vit.model.positions import pair
from vit.model.vision_transformer import VisionTransformer
from vit.runs.folder import RunFolder
from vit.runs.timing import Cost
from vit.runtime.machine import Machine
from vit.runtime.processes import Processes
from vit.runtime.signals import Interrupted, StopSignal
from vit.training.batches import Augmentation, Batches
from vit.training.distillation import Distillation
from vit.training.freezing import backbone_of, first_blocks_of, freeze
from vit.training.micro_batch import largest_in_step, passes_of_processes
from vit.training.optimizers import COMMON_KEYS, build_optimizer, require_elementwise
from vit.training.plan import Plan, build_schedule
from vit.weights.description import Weights
from vit.weights.loading import read
from vit.weights.sources import find

# Steps, where the run's length is not known yet
LONG_RUN = 10**9


def start_machine(config: Config, stop: StopSignal) -> Machine:
    """Return the hardware that the group `runtime` asks for, with torch set up for it.

    The limit of time holds from here on.
    """
    runtime = config.runtime
    stop.limit(runtime.max_minutes)
    # Importing torch took seconds, in which a signal may have come
    stop.check()
    return Machine.start(
        stop,
        device=runtime.device,
        threads=runtime.threads,
        deterministic=runtime.deterministic,
        workers=runtime.workers,
        sharding=runtime.sharding,
    )


def with_pretrained(
    config: Config, run: RunFolder, processes: Processes, stop: StopSignal
) -> tuple[Config, Weights | None]:
    """Return the configuration with the settings of pretrained=…, and the weights it names.

    The weights are None without them. A name of the network becomes one of the very files that were
    downloaded. Raises CheckpointError where they can't be used.
    """
    # A resumed run has weights and settings in its own checkpoint and configuration
    if config.pretrained is None or run.has_checkpoint():
        return config, None

    name = pinned_name(config.pretrained, processes, stop)
    config = replace(config, pretrained=name)
    weights = read(name)
    preprocessing = weights.preprocessing and weights.preprocessing.to_dict()
    adopted = with_settings_of_weights(config, weights.model, preprocessing, run.overrides, name)
    return adopted, weights


def with_teacher(
    config: Config, run: RunFolder, processes: Processes, stop: StopSignal
) -> tuple[Config, Weights | None]:
    """Return the configuration with the exact name of train.teacher, and the teacher's weights.

    The weights are None without one. A resumed run needs them again. Raises CheckpointError where
    they can't be used.
    """
    train = config.train
    if train.teacher is None:
        return config, None
    try:
        name = pinned_name(train.teacher, processes, stop)
        weights = read(name)
    except CheckpointError as error:
        moved = "; train.teacher=FILE says where it is now" if run.has_checkpoint() else ""
        raise CheckpointError(f"train.teacher: {error}{moved}") from None
    return replace(config, train=replace(train, teacher=name)), weights


def pinned_name(name: str, processes: Processes, stop: StopSignal) -> str:
    """Download the weights of a name where they are not here yet; returns Source.name of them.

    The first process does so before the others, which read the same files. Raises CheckpointError.
    """
    try:
        # Gigabytes, which a person who wants to stop need not wait for
        with stop.interrupting():
            first = find(name).name if processes.rank == 0 else name
    except Interrupted:
        stop.check()
        raise
    return processes.broadcast(first)


def check_parts(config: Config, overrides: Sequence[str] = ()) -> None:
    """Build what needs no data, to find mistakes before minutes of reading. Raises ConfigError.

    overrides: of the command line, none of which may be in vain.
    """
    check_dataset(
        name=config.data.name,
        root=config.data.root,
        test_fraction=config.data.test_fraction,
        settings=data_arguments(config.data, config.model.num_channels)["settings"],
    )
    if config.runtime.sharding == "fsdp":
        require_elementwise(config.optimizer.name)
    check_typed(config, overrides, DATASETS[config.data.name].reads_files)
    check_heads(config)

    build_optimizer_of(config, trained_on_meta(config))

    # Whether warmup and cooldown fit into a run in epochs is known only with the data
    build_schedule(
        **asdict(config.schedule), total_steps=config.train.steps or LONG_RUN, steps_per_epoch=1
    )
    build_policies_of(config)


def check_heads(config: Config) -> None:
    """Raise ConfigError where one of two heads would learn nothing; the logits are of both."""
    # Not in validate(), which comes before pretrained weights bring their distill_token
    if config.model.distill_token and config.train.distill_weight == 1:
        raise ConfigError(
            "train.distill_weight=1 leaves nothing to learn for the class token's head beside "
            "model.distill_token=true; give less, or model.distill_token=false"
        )


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
    """Read the data set, in the first process before the others, since it may download it.

    Raises DataError, and ConfigError for a key of the command line that does nothing with it.
    """
    arguments = data_arguments(config.data, config.model.num_channels)
    size = image_size_of(config)
    typed = {key.removeprefix("data.") for key in overridden_keys(run.overrides)}
    data = machine.processes.first_then_others(
        lambda: load_data(**arguments, image_size=size, device=machine.device, typed=typed)
    )
    check_typed_with_data(
        config,
        run.overrides,
        equal_classes=are_equal(training_sizes(data)),
        has_validation=data.val is not None,
    )
    return data


def training_sizes(data: ImageDataset) -> Tensor:
    """Return the training images of every class, int64 (classes,)."""
    return class_sizes(data.train.labels, len(data.classes))


def has_unbalanced_split(data: ImageDataset) -> bool:
    """Whether in any split the classes are so unequal that accuracy alone would mislead."""
    splits = [images for images in (data.train, data.val, data.test) if images is not None]
    return any(are_unbalanced(images.labels.bincount()) for images in splits)


def image_size_of(config: Config) -> tuple[int, int]:
    """Return (height, width) of the model's input in pixels."""
    return pair(config.model.image_size, "model.image_size")


def macs_of(config: Config, num_classes: int) -> int:
    """Return the multiply-adds of one image's forward pass."""
    return count_macs(build_on_meta(asdict(config.model), num_classes))


def trained_on_meta(config: Config, num_classes: int = 2) -> VisionTransformer:
    """Build the model as it is trained, see choose_trained.

    On the meta device, so that even the largest takes no memory. Raises ConfigError.
    """
    model = build_on_meta(asdict(config.model), num_classes)
    choose_trained(config, model)
    return model


def choose_trained(config: Config, model: VisionTransformer) -> None:
    """Freeze what is not trained, and add what is trained instead, in place."""
    freeze(frozen_parts(config, model))
    if config.train.lora_rank is not None:
        first_block = frozen_blocks(config.train.freeze) or 0
        add_low_rank(model, config.train.lora_rank, first_block)


def frozen_parts(config: Config, model: VisionTransformer) -> list[nn.Module]:
    """Return the modules that train.freeze leaves as they are."""
    count = frozen_blocks(config.train.freeze)
    if count is not None:
        return first_blocks_of(model, count)
    return [] if config.train.freeze == "none" else backbone_of(model)


def training_flops_of(
    config: Config, num_classes: int, distillation: Distillation | None = None
) -> int:
    """Return the FLOPs that one image costs in training, see vit.model.cost.training_flops.

    A teacher's forward pass is among them.
    """
    model = trained_on_meta(config, num_classes)
    teaching = 0 if distillation is None else distillation.teacher.flops
    return training_flops(model, frozen_parts(config, model)) + teaching


def flops_a_mac(config: Config, num_classes: int) -> float:
    """Return the FLOPs of training for each multiply-add of a forward pass.

    6 where everything is trained, two forward and four backward; fewer where parts are frozen.
    """
    if config.train.freeze == "none" and config.train.lora_rank is None:
        return 6.0
    everything = training_flops(build_on_meta(asdict(config.model), num_classes))
    return 6.0 * training_flops_of(config, num_classes) / everything


def cost_of(config: Config, num_classes: int, distillation: Distillation | None) -> Cost:
    """Return what one image costs, see Cost: of a teacher two FLOPs a multiply-add."""
    macs = macs_of(config, num_classes)
    teaching = 0 if distillation is None else 2 * distillation.teacher.macs
    return Cost(macs, flops_a_mac(config, num_classes) * macs + teaching)


def make_plan(config: Config, data: ImageDataset, machine: Machine) -> Plan:
    """Turn epochs and fractions into steps.

    Raises ConfigError for a batch size, a schedule or a patience that is impossible with this data.
    """
    train, num_images, count = config.train, len(data.train), machine.processes.count
    if train.batch_size > num_images:
        raise ConfigError(
            f"train.batch_size={train.batch_size} is more than the {num_images} training images; "
            "lower it"
        )
    require_pairs(train.batch_size, count)
    require_equal_passes(config, train.micro_batch_size, count)
    if train.patience is not None and data.val is None:
        raise ConfigError(
            f"train.patience={train.patience} counts evaluations on held-out images, and nothing "
            "is held out; raise data.val_fraction, or leave it out"
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
        patience=train.patience,
    )


def require_pairs(batch_size: int, processes: int) -> None:
    """Raise ConfigError where a global batch is too small for so many processes."""
    # Each process computes whole pairs of images, see Processes.batch_slice
    if batch_size < 2 * processes:
        raise ConfigError(
            f"train.batch_size={batch_size} is for all {processes} processes together: "
            f"it must be at least {2 * processes}"
        )


def require_equal_passes(config: Config, micro_batch_size: int | None, processes: int) -> None:
    """Raise ConfigError where processes that share a model would make more passes than others."""
    # One pass each without micro-batches; unsharded, a process is on its own until the last
    if micro_batch_size is None or config.runtime.sharding == "none":
        return
    batch_size = config.train.batch_size
    passes = passes_of_processes(batch_size, micro_batch_size, processes)
    if len(set(passes)) == 1:
        return

    smaller = largest_in_step(batch_size, micro_batch_size, processes)
    or_smaller = "" if smaller is None else f", or train.micro_batch_size={smaller}"
    raise ConfigError(
        f"train.micro_batch_size={micro_batch_size}: the {processes} processes would make "
        f"{min(passes)} to {max(passes)} passes over their parts of train.batch_size={batch_size}, "
        "and runtime.sharding needs equally many; give a train.batch_size that "
        f"{2 * processes} divides{or_smaller}"
    )


def preprocessing_of(config: Config) -> Preprocessing:
    """Return how images are prepared for the model."""
    return Preprocessing(
        image_size_of(config),
        config.model.num_channels,
        tuple(config.data.mean),
        tuple(config.data.std),
        config.data.eval_crop,
        config.data.interpolation,
    )


def make_batches(config: Config, data: ImageDataset, machine: Machine, stop: StopSignal) -> Batches:
    """Return the batches of training and evaluation."""
    preprocessing = preprocessing_of(config)
    batch_size = config.train.batch_size
    return Batches(
        data=data,
        preprocessing=preprocessing,
        augmentation=make_augmentation(config, preprocessing, len(data.classes)),
        order=make_order(config, data),
        batch_size=batch_size,
        machine=machine,
        stop=stop,
    )


def make_order(config: Config, data: ImageDataset) -> SampleOrder:
    """Return which samples each step sees."""
    balance, labels = config.data.balance, data.train.labels
    draws = None
    # Classes of equal size are drawn equally often in any case
    if balance > 0 and not are_equal(training_sizes(data)):
        draws = ClassDraws(labels, balance, config.seed)
    batch_size, repeats = config.train.batch_size, config.augment.repeats
    return SampleOrder(len(labels), batch_size, config.seed, repeats, draws)


def make_class_weights(config: Config, data: ImageDataset, device: torch.device) -> Tensor | None:
    """Return the classes' weights in the loss, float32 (classes,) on the device, or None."""
    if config.train.class_weights == "none":
        return None
    # Of what is drawn: beside data.balance they make up for what it has left
    weights = balanced_weights(training_sizes(data), config.data.balance)
    return weights.float().to(device)


def make_augmentation(
    config: Config, preprocessing: Preprocessing, num_classes: int
) -> Augmentation:
    """Return all random changes of the training images."""
    augment, seed = config.augment, config.seed
    # A mirrored digit is of another class, or of none
    flip = augment.flip if config.data.mirror else 0.0
    if flip and augment.alternating_flip:
        flip = AlternatingFlip(seed)
    policies = build_policies_of(config)
    affine = Affine(augment.rotate, augment.translate, augment.scale, augment.shear)
    crop_scale, size = augment.crop_scale, preprocessing.image_size
    interpolation = preprocessing.interpolation
    mix_probability = 1.0 if augment.mix_probability is None else augment.mix_probability
    return Augmentation(
        image=TrainingTransform(preprocessing, crop_scale, flip, policies, affine),
        batch=BatchAugmentation(
            seed, size, augment.pad, crop_scale, flip, policies, affine, interpolation
        ),
        erasing=augment.erasing,
        mixing=MixupCutmix(seed, num_classes, augment.mixup, augment.cutmix, mix_probability),
        skip_unreadable=config.data.unreadable == "skip",
    )
