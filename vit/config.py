"""The schema of conf/, its checks, and what Hydra's command line needs around it. Imports neither torch nor the data, so
that `--help` and a mistyped key answer at once."""

import contextlib
import difflib
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vit import sweep
from vit.errors import ConfigError, DataError, GaveUp, Stopped, UserError

# OmegaConf refuses any word but the members' names, and names these.
Activation = Enum("Activation", {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu",
                                 "silu": "silu"})
Position = Enum("Position", {"learned": "learned", "sincos2d": "sincos2d", "sincos1d": "sincos1d", "rope2d": "rope2d",
                             "none": "none"})
PositionResize = Enum("PositionResize", {"bicubic": "bicubic", "linear": "linear"})
ResnetStyle = Enum("ResnetStyle", {"jax": "jax", "timm": "timm"})
Pool = Enum("Pool", {"cls": "cls", "mean": "mean"})
Init = Enum("Init", {"jax": "jax", "xavier": "xavier", "trunc_normal": "trunc_normal", "local": "local"})
Dataset = Enum("Dataset", {"digits": "digits", "cifar10": "cifar10", "cifar100": "cifar100", "tiny_imagenet": "tiny_imagenet",
                           "imagenet": "imagenet", "folder": "folder", "shards": "shards", "synthetic": "synthetic"})
Unreadable = Enum("Unreadable", {"refuse": "refuse", "skip": "skip"})
Interpolation = Enum("Interpolation", {"bilinear": "bilinear", "bicubic": "bicubic"})
PolicyName = Enum("PolicyName", {"none": "none", "randaugment": "randaugment",
                                 "randaugment_big_vision": "randaugment_big_vision", "randaugment_timm": "randaugment_timm",
                                 "autoaugment": "autoaugment", "three_augment": "three_augment"})
OptimizerName = Enum("OptimizerName", {"adamw": "adamw", "lamb": "lamb", "sgd": "sgd", "muon": "muon"})
ScheduleName = Enum("ScheduleName", {"cosine": "cosine", "linear": "linear", "constant": "constant"})
PrecisionName = Enum("PrecisionName", {"auto": "auto", "bf16": "bf16", "fp16": "fp16", "fp32": "fp32"})
Loss = Enum("Loss", {"cross_entropy": "cross_entropy", "bce": "bce"})
DropPathSchedule = Enum("DropPathSchedule", {"linear": "linear", "constant": "constant"})
Freeze = Enum("Freeze", {"none": "none", "backbone": "backbone"})
Device = Enum("Device", {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "mps": "mps"})
Sharding = Enum("Sharding", {"none": "none", "fsdp": "fsdp"})
Split = Enum("Split", {"train": "train", "val": "val", "test": "test"})
ResumeChanged = Enum("ResumeChanged", {"refuse": "refuse", "allow": "allow"})


@dataclass
class ModelConfig:
    """The keyword arguments of vit.model.VisionTransformer, less num_classes, which the data set gives."""

    name: str = MISSING
    image_size: Any = MISSING  # pixels: one number or [height, width]
    patch_size: Any = MISSING  # pixels: one number or [height, width]; null where grid_size is given
    grid_size: Any = None  # patches a side instead of patch_size
    num_channels: int = 3
    hidden_size: int = MISSING
    num_layers: int = MISSING
    num_heads: int = MISSING
    mlp_ratio: float = 4.0
    intermediate_size: int | None = None  # width of the MLP, instead of mlp_ratio
    activation: Activation = Activation.gelu
    dropout: float = 0.0  # of the embeddings, the attention's projection and the MLP, where these have no own
    embedding_dropout: float | None = None
    attention_dropout: float = 0.0
    projection_dropout: float | None = None
    mlp_dropout: float | None = None
    drop_path: float = 0.0  # stochastic depth: the last block's rate (train.drop_path_schedule)
    patch_dropout: float = 0.0  # share of the patches left out in training
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None  # initial factor
    layer_norm_eps: float = 1e-6
    position: Position = Position.learned
    cls_token: bool = True
    cls_position: bool = True  # learned: the class token has a position of its own
    num_registers: int = 0
    global_pool: Pool = Pool.cls
    representation_size: int | None = None  # width of a dense + tanh layer before the head
    resnet_stages: list[int] | None = None  # hybrid: units in each stage of the ResNet before the patches
    resnet_style: ResnetStyle = ResnetStyle.jax
    pruned_heads: Any = None  # {layer: [heads to leave out]}
    init: Init = Init.jax
    init_range: float = 0.02


@dataclass
class DataConfig:
    name: Dataset = MISSING
    root: str | None = None  # where the files are; null for data sets that need none
    val_fraction: float = 0.1  # of train, held out to choose the best checkpoint; 0 trains on everything
    test_fraction: float | None = None  # of train, where the data set has no test split of its own
    limit: int | None = None  # images of each split, spread evenly over the classes
    mean: list[float] = MISSING  # per channel, of pixels in 0..1
    std: list[float] = MISSING
    # Centre crop of evaluation as a share of the shorter side; null squashes to the model's size
    eval_crop: float | None = None
    interpolation: Interpolation = Interpolation.bilinear
    unreadable: Unreadable = Unreadable.refuse  # a picture of train that can't be read ends the run, or is replaced by another
    mirror: bool = True  # a mirrored picture is of the same class
    num_classes: int | None = None  # synthetic only
    num_images: int | None = None  # synthetic only


@dataclass
class AugmentConfig:
    pad: float = 0.0  # random crop of small images: padding on each side as a share of the side (0.125 of 32 px: 4 px)
    # Random crop of pictures from files, and of small images where pad is 0: share of the area; null: as in evaluation
    crop_scale: list[float] | None = None
    flip: float = 0.0  # probability of mirroring, where data.mirror allows it
    policy: PolicyName = PolicyName.none  # see vit.policies.build_policies
    policy_ops: int | None = None  # the RandAugments: operations an image
    policy_magnitude: float | None = None  # the RandAugments: of 30 in torchvision's, of 10 in the others
    color_jitter: float = 0.0  # brightness, contrast and saturation are each multiplied by a number within 1 ± this
    erasing: float = 0.0  # probability of filling a random box with noise
    mixup: float = 0.0  # α of the Beta distribution of two images' shares; 0: off
    cutmix: float = 0.0  # likewise, of their areas; with both on, either half the time
    mix_probability: float | None = None  # of mixing a pair at all; null: 1
    repeats: int = 1  # times a sample comes in a row, changed otherwise each time


@dataclass
class OptimizerConfig:
    name: OptimizerName = MISSING
    lr: float = MISSING  # at the schedule's peak, for the batch size as it is
    weight_decay: float = 0.0  # of matrices and convolutions alone
    layer_decay: float | None = None  # each layer learns at this share of the rate of the layer above it
    betas: list[float] | None = None  # adamw, lamb, muon
    eps: float | None = None  # adamw, lamb, muon
    momentum: float | None = None  # sgd, muon
    nesterov: bool | None = None  # sgd, muon
    adamw_lr: float | None = None  # muon: of all but the blocks' matrices


@dataclass
class ScheduleConfig:
    name: ScheduleName = MISSING
    warmup: Any = 0.0  # linear, from 0: a share of the run (0.05), steps (500) or epochs (5ep)
    final: float | None = None  # learning rate at the end, as a share of the peak
    cooldown: Any = None  # constant: a straight line down at the end, as long as this; null: none


@dataclass
class TrainingConfig:
    epochs: float = 100.0
    steps: int | None = None  # wins over epochs
    batch_size: int = 64  # global: over all processes and micro-steps
    micro_batch_size: int | None = None  # images per forward and backward pass, to save memory; null: the whole batch
    precision: PrecisionName = PrecisionName.auto
    loss: Loss = Loss.cross_entropy
    label_smoothing: float = 0.0
    drop_path_schedule: DropPathSchedule = DropPathSchedule.linear  # of model.drop_path over the blocks
    clip_norm: float | None = 1.0  # of the whole gradient; null: no clipping
    whiten_patches: bool = False  # start the patch embedding from the axes of the training images' patches
    freeze: Freeze = Freeze.none  # backbone: only the head is trained (a linear probe)
    ema_decay: float = 0.0  # of the averaged weights, which are then the ones evaluated and saved as best; 0: no average
    eval_every: float = 1.0  # epochs
    attention_every: float | None = None  # epochs between pictures of attention in TensorBoard; null: none
    log_every: int = 50  # steps
    save_every: int | None = None  # steps; null: every ten minutes


@dataclass
class RuntimeConfig:
    device: Device = Device.auto
    compile: Any = "auto"  # auto, true, false
    workers: int | None = None  # processes that decode pictures; null: one a core, eight at most
    threads: int | None = None  # of torch on the CPU; null: torch's own choice
    deterministic: bool = False
    activation_checkpointing: bool = False  # compute the blocks' activations again in the backward pass, to save memory
    processes: int | None = None  # to start on this machine, each with a GPU or its share of the cores; null: this one alone
    sharding: Sharding = Sharding.none  # fsdp: each process keeps a share of weights, averages and optimizer state


@dataclass
class Config:
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    augment: AugmentConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    schedule: ScheduleConfig = MISSING
    train: TrainingConfig = MISSING
    runtime: RuntimeConfig = MISSING
    seed: int = 0
    explain: bool = False
    pretrained: str | None = None
    pretrained_positions: PositionResize = PositionResize.bicubic
    resume: str | None = None
    resume_changed: ResumeChanged = ResumeChanged.refuse
    jobs_at_once: int | None = None  # of a sweep, on this machine, where the launcher starts them all


@dataclass
class EvaluateRuntimeConfig:
    """RuntimeConfig without compiling: evaluation runs the model as it is, in training too."""

    device: Device = Device.auto
    workers: int | None = None
    threads: int | None = None
    deterministic: bool = False


@dataclass
class EvaluateConfig:
    checkpoint: str | None = None
    pretrained: str | None = None
    split: Split = Split.test
    out: str | None = None
    report: bool = False
    knn: bool = False
    corruptions: bool = False
    data: Any = None  # a checkpoint's own with what is given here changed; whole for pretrained weights
    model: Any = None  # for pretrained weights: the model they must fit; None: the one they tell
    runtime: EvaluateRuntimeConfig = field(default_factory=EvaluateRuntimeConfig)


def register() -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    OmegaConf.register_new_resolver("process", os.getpid, replace=True)  # so that two runs of one second have two folders


# --- checks ----------------------------------------------------------------------------------------------------------

Check = tuple[Callable[[Any], bool], str]
POSITIVE: Check = (lambda x: x > 0, "a positive number")
NOT_NEGATIVE: Check = (lambda x: x >= 0, "0 or more")
PROBABILITY: Check = (lambda x: 0 <= x < 1, "at least 0 and below 1")


def is_duration(value: Any) -> bool:
    """A number from 0, or one of epochs as text: "5ep", "0.5ep"."""
    if isinstance(value, str):
        return re.fullmatch(r"\d+(\.\d+)?ep", value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


CHECKS: dict[str, Check] = {
    "seed": NOT_NEGATIVE,
    "jobs_at_once": POSITIVE,
    **{f"model.{name}": POSITIVE for name in ("hidden_size", "num_layers", "num_heads")},
    "model.mlp_ratio": POSITIVE,
    "model.intermediate_size": POSITIVE,
    "model.num_channels": (lambda x: x in (1, 3), "1 (grey) or 3 (RGB)"),
    **{f"model.{name}": PROBABILITY for name in ("dropout", "embedding_dropout", "attention_dropout", "projection_dropout",
                                                 "mlp_dropout", "drop_path", "patch_dropout")},
    "model.layer_scale": POSITIVE,
    "model.num_registers": NOT_NEGATIVE,
    "model.representation_size": POSITIVE,
    "model.resnet_stages": (lambda x: len(x) > 0 and all(units > 0 for units in x), "a list of positive whole numbers"),
    "model.layer_norm_eps": POSITIVE,
    "model.init_range": POSITIVE,
    "data.val_fraction": PROBABILITY,
    "data.test_fraction": (lambda x: 0 < x < 1, "between 0 and 1"),
    "data.limit": POSITIVE,
    "data.eval_crop": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "data.std": (lambda x: all(value > 0 for value in x), "positive numbers"),
    "data.num_classes": POSITIVE,
    "data.num_images": POSITIVE,
    "augment.pad": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "augment.flip": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "augment.crop_scale": (lambda x: len(x) == 2 and 0 < x[0] <= x[1] <= 1, "[smallest, largest], above 0 and at most 1"),
    "augment.policy_ops": POSITIVE,
    "augment.policy_magnitude": (lambda x: 0 <= x <= 30, "from 0 to 30"),
    "augment.color_jitter": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "augment.erasing": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "augment.mix_probability": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "augment.repeats": POSITIVE,
    "augment.mixup": NOT_NEGATIVE,
    "augment.cutmix": NOT_NEGATIVE,
    "optimizer.lr": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.betas": (lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x), "two numbers, at least 0 and below 1"),
    "optimizer.layer_decay": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "optimizer.eps": POSITIVE,
    "optimizer.adamw_lr": POSITIVE,
    "optimizer.momentum": PROBABILITY,
    **{f"schedule.{name}": (is_duration, "a share of the run (0.05), steps (500) or epochs (5ep)")
       for name in ("warmup", "cooldown")},
    "schedule.final": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "train.epochs": POSITIVE,
    "train.steps": POSITIVE,
    "train.batch_size": POSITIVE,
    "train.micro_batch_size": POSITIVE,
    "train.label_smoothing": PROBABILITY,
    "train.clip_norm": POSITIVE,
    "train.ema_decay": PROBABILITY,
    "train.eval_every": POSITIVE,
    "train.attention_every": POSITIVE,
    "train.log_every": POSITIVE,
    "train.save_every": POSITIVE,
    "runtime.compile": (lambda x: x in ("auto", True, False), "auto, true or false"),
    "runtime.workers": NOT_NEGATIVE,
    "runtime.threads": POSITIVE,
    "runtime.processes": POSITIVE,
}

# Keys that mean something for some names of their group only: (key, names). Set for another name they would do nothing.
BELONGS = [
    ("optimizer.betas", ("adamw", "lamb", "muon")),
    ("optimizer.eps", ("adamw", "lamb", "muon")),
    ("optimizer.momentum", ("sgd", "muon")),
    ("optimizer.nesterov", ("sgd", "muon")),
    ("optimizer.adamw_lr", ("muon",)),
    ("schedule.cooldown", ("constant",)),
    ("data.test_fraction", ("digits", "folder", "shards", "synthetic")),
    ("data.num_classes", ("synthetic",)),
    ("data.num_images", ("synthetic",)),
]


def value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def check_values(config: Any, checks: dict[str, Check]) -> None:
    """Raise ConfigError for the first value out of its range; null means "not set" and passes."""
    for key, (allowed, expected) in checks.items():
        value = value_at(config, key)
        numbers = value if isinstance(value, list) else [value]
        finite = all(not isinstance(number, float) or math.isfinite(number) for number in numbers)
        if value is not None and not (finite and allowed(value)):
            raise ConfigError(f"{key} must be {expected}, got {value}")


def validate(config: Config) -> None:
    """Raise ConfigError, naming the key, for what can be told before any data is read."""
    check_values(config, CHECKS)
    for key, names in BELONGS:
        name = value_at(config, key.split(".")[0]).name.name
        if value_at(config, key) is not None and name not in names:
            raise ConfigError(f"{key} does nothing with {key.split('.')[0]}={name}; it belongs to {', '.join(names)}")
    for key in ("data.mean", "data.std"):
        if len(value_at(config, key)) not in (1, 3):
            raise ConfigError(f"{key} must hold 1 number (grey) or 3 (RGB), got {value_at(config, key)}")
    from_files = ("imagenet", "tiny_imagenet", "folder", "shards", "cifar10", "cifar100")
    if config.data.name.name in from_files and config.data.root is None:
        raise ConfigError(f"data={config.data.name.name} needs data.root=FOLDER")
    if config.data.name.name in ("digits", "folder", "shards", "synthetic") and config.data.test_fraction is None:
        raise ConfigError(f"data={config.data.name.name} needs data.test_fraction: its test images are cut from train")
    if config.data.val_fraction + (config.data.test_fraction or 0) >= 1:
        raise ConfigError("data.val_fraction and data.test_fraction leave nothing to train on: they must sum to less than 1")
    augment = config.augment
    if not augment.policy.name.startswith("randaugment"):
        for key in ("policy_ops", "policy_magnitude"):
            if getattr(augment, key) is not None:
                raise ConfigError(f"augment.{key} does nothing with augment.policy={augment.policy.name}; it belongs to the "
                                  "three RandAugments")
    elif augment.policy.name != "randaugment" and (augment.policy_magnitude or 0) > 10:
        raise ConfigError(f"augment.policy_magnitude is of 10 with augment.policy={augment.policy.name}, "
                          f"got {augment.policy_magnitude}")
    if augment.mix_probability is not None and not (augment.mixup or augment.cutmix):
        raise ConfigError("augment.mix_probability does nothing without augment.mixup or augment.cutmix above 0")
    if config.schedule.final is not None and config.schedule.name.name == "constant" and not config.schedule.cooldown:
        raise ConfigError("schedule.final does nothing with schedule=constant without schedule.cooldown")
    if config.train.drop_path_schedule.name != "linear" and not config.model.drop_path:
        raise ConfigError("train.drop_path_schedule does nothing without model.drop_path above 0")
    if config.train.whiten_patches and config.model.resnet_stages:
        raise ConfigError("train.whiten_patches needs patches of pixels; those of a hybrid (model.resnet_stages) are features")
    if config.train.whiten_patches and config.pretrained is not None:
        raise ConfigError("train.whiten_patches would overwrite the patch embedding of pretrained=…; leave one of them out")
    if config.runtime.sharding.name == "fsdp" and config.optimizer.name.name not in ("adamw", "sgd"):
        raise ConfigError(f"runtime.sharding=fsdp works with optimizer=adamw and sgd; {config.optimizer.name.name} looks at "
                          "whole matrices")
    if config.optimizer.nesterov and not config.optimizer.momentum:
        raise ConfigError("optimizer.nesterov=true needs optimizer.momentum above 0")


def plain(config: Any) -> dict[str, Any]:
    """The configuration as dictionaries, lists, numbers and words, resolved: what a checkpoint and config.yaml hold."""
    container = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    assert isinstance(container, dict)
    return cast(dict[str, Any], container)


def plain_node(schema: type, values: dict[str, Any]) -> dict[str, Any]:
    """One group's values, checked against its schema, as plain() has them; raises ConfigError where they don't fit it."""
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(schema), values),
                                                           resolve=True, enum_to_str=True))
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from None


def from_composed(composed: DictConfig) -> Config:
    """The typed configuration that Hydra composed; raises ConfigError, naming the key, where one has no value yet."""
    missing = sorted(key for key in OmegaConf.missing_keys(composed) if not key.startswith("hydra"))
    if missing:
        raise ConfigError(f"{missing[0]} has no value; give it on the command line, such as {missing[0]}=…")
    return cast(Config, OmegaConf.to_object(composed))


def from_plain(container: dict[str, Any], source: str) -> Config:
    """The typed configuration of plain(); raises ConfigError naming `source` where it doesn't fit the schema."""
    try:
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), in_todays_keys(container))))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {first_line(error)}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A run's config.yaml; raises ConfigError where it is missing or no configuration."""
    try:
        container = OmegaConf.to_container(OmegaConf.load(path))
        if isinstance(container, dict):
            return cast(dict[str, Any], container)
        told = "it holds no keys"
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        told = first_line(error)
    raise ConfigError(f"{path}: no configuration ({told}); it also stands in the header of checkpoints/last.safetensors")


def in_todays_keys(container: dict[str, Any]) -> dict[str, Any]:
    """A configuration that an earlier version saved, its renamed keys under the names they have now."""
    augment = dict(container.get("augment") or {})
    if "randaugment_ops" not in augment:
        return container
    ops, magnitude = augment.pop("randaugment_ops"), augment.pop("randaugment_magnitude", None)
    policy = {"policy": "randaugment", "policy_ops": ops, "policy_magnitude": magnitude} if ops else {}
    return {**container, "augment": {**augment, **policy}}


def explicit_changes(composed: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """What the command line gives itself: {key: value} of the composed configuration for every override.

    A group (`optimizer=sgd`) gives its whole node; `experiment=…` can touch any key and gives them all.
    """
    keys = [re.split(r"[=@]", override.lstrip("+~"))[0].replace("/", ".") for override in overrides]
    if "experiment" in keys:
        keys = [str(key) for key in composed]
    return {key: OmegaConf.select(composed, key) for key in keys}


def data_arguments(data: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of vit.data.load_data, less the device and the image size, from plain() nodes."""
    names = ("name", "root", "val_fraction", "test_fraction", "limit", "num_classes", "num_images")
    return {**{name: data[name] for name in names}, "num_channels": model["num_channels"]}


# What pretrained weights were trained with, and a model must have to compute what they did; its sizes are the user's choice.
TRAVELS = ("layer_norm_eps", "activation", "resnet_style", "qkv_bias", "qk_norm", "layer_scale", "position", "cls_token",
           "cls_position", "num_registers", "global_pool", "pruned_heads")


ADOPTED = (*(f"model.{key}" for key in TRAVELS), *(f"data.{key}" for key in ("mean", "std", "eval_crop", "interpolation")))


def adopt(plain_config: dict[str, Any], model: dict[str, Any], preprocessing: dict[str, Any] | None,
          overrides: Sequence[str]) -> dict[str, Any]:
    """A plain configuration with what travels with pretrained weights, but for keys the command line gives itself."""
    wanted = {f"model.{key}": model[key] for key in TRAVELS if key in model}
    if preprocessing is not None:
        wanted |= {f"data.{key}": preprocessing[key] for key in ("mean", "std", "eval_crop", "interpolation")}
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    return changed(plain_config, {key: value for key, value in wanted.items() if key not in given})


def flatten(container: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, its keys joined with dots."""
    flat: dict[str, Any] = {}
    for key, value in container.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def notable(flat: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Of a flat configuration what tells runs apart on one page: the usual keys, and those the command line gives."""
    given = [override.lstrip("+~").partition("=")[0].replace("/", ".") for override in overrides]
    usual = ("model.name", "data.name", "optimizer.name", "optimizer.lr", "train.batch_size", "seed")
    return {key: value for key, value in flat.items()
            if key in usual or any(key == name or key.startswith(f"{name}.") for name in given)}


# What a resumed run may change without asking: it can't change the result, or (the second) only its last bits.
FREE_TO_CHANGE = ("runtime.workers", "runtime.device", "train.save_every", "train.log_every", "train.attention_every",
                  "data.root", "pretrained", "pretrained_positions", "resume", "resume_changed", "jobs_at_once")
BITS_MAY_DIFFER = ("runtime.threads", "runtime.compile", "runtime.deterministic", "runtime.activation_checkpointing",
                   "runtime.processes", "runtime.sharding")


def changed(saved: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A plain configuration with some keys set anew."""
    config = OmegaConf.create(saved)
    for key, value in changes.items():
        OmegaConf.update(config, key, value, merge=False)
    return cast(dict[str, Any], OmegaConf.to_container(config, enum_to_str=True))


def resumed(saved: dict[str, Any], changes: dict[str, Any], allow: bool) -> tuple[dict[str, Any], list[str]]:
    """A saved configuration with the changes made to it, and a line for every change worth a warning.

    Raises ConfigError, naming the differences, where a change would change the result and `allow` is false.
    """
    saved = plain(from_plain(saved, "config.yaml"))
    container = changed(saved, changes)
    before, after = flatten(saved), flatten(container)
    # What a run finds out itself, from pretrained weights or the memory there is, a repeated command does not take back
    found_out = {"train.micro_batch_size"} | (set(ADOPTED) if saved.get("pretrained") else set())
    own = {key: value for key, value in before.items() if key in found_out - changes.keys()}
    container, after = changed(container, {key: value for key, value in own.items()}), {**after, **own}
    differences = [f"{key}: {before.get(key)} → {after.get(key)}" for key in {**before, **after}
               if before.get(key) != after.get(key) and key not in FREE_TO_CHANGE]
    refused = [line for line in differences if not line.startswith(BITS_MAY_DIFFER)]
    if refused and not allow:
        raise ConfigError("resuming with another configuration would be another run ("
                          + "; ".join(refused) + "); leave these as they were, or add resume_changed=allow")
    return container, [f"resuming with a change: {line}" + ("" if line in refused else " (last bits may differ)")
                       for line in differences]


# --- the command line around Hydra -----------------------------------------------------------------------------------

PATH_KEYS = ("data.root", "hydra.run.dir", "hydra.sweep.dir", "resume", "pretrained", "checkpoint", "out")


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """Quote the values of keys that hold paths, which may contain what Hydra's grammar refuses (ü ~ ( ) = ' , # [), and
    expand ~. A comma under -m stays a sweep."""
    sweep = "-m" in arguments or "--multirun" in arguments
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if (equals and key in PATH_KEYS and value not in ("", "null", "auto") and value[0] not in "'\""
                and not (sweep and "," in value)):
            # In Hydra's quoted strings a backslash is itself, but before a quote or the end it must be doubled.
            value = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), os.path.expanduser(value))
            value = f"'{value}'"
        quoted.append(key + equals + value)
    return quoted


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def nearest(word: str, known: Sequence[str]) -> str:
    """ "; did you mean …?" with the known words nearest to a mistyped one, or all of them where none is near."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"


def known_keys(schema: type) -> list[str]:
    """Every key of the schema with dots, groups included."""
    keys: list[str] = []
    for name, parameter in schema.__dataclass_fields__.items():
        keys.append(name)
        if hasattr(parameter.type, "__dataclass_fields__"):
            keys += [f"{name}.{key}" for key in known_keys(parameter.type)]
    return keys


def composition_error(error: Exception, schema: type) -> str:
    """Hydra's or OmegaConf's complaint about the command line, as one line that says what to write instead."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = [option for option in error.options if not option.endswith("schema")]
        return f"{group}={name}: there is no conf/{group}/{name}.yaml{nearest(name, options)}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in f"{error}\n{cause}".split("\n") if line.strip()]
    wanted = re.search(r"Could not override '([^']+)'", str(error))
    full_key = getattr(cause, "full_key", None) or (wanted and wanted.group(1))
    if ("not in" in str(cause) and "Key" in str(cause)) or "No match in the defaults list" in str(error):
        key = wanted.group(1) if wanted else str(full_key)
        return f"{key}: no such key{nearest(key, known_keys(schema))}"
    told = next((line for line in lines if line.startswith(("Value ", "Invalid value ", "Object of "))), lines[0])
    return f"{full_key}: {told}" if full_key and str(full_key) not in told else told


def prepare_arguments(arguments: Sequence[str]) -> list[str]:
    """What Hydra gets to parse: paths quoted, and the folder of resume=FOLDER as the run folder."""
    arguments = quote_paths(arguments)
    resume = next((argument.partition("=")[2] for argument in arguments if argument.startswith("resume=")), "null")
    if resume not in ("null", "auto") and not any(argument.startswith("hydra.run.dir=") for argument in arguments):
        arguments.append(f"hydra.run.dir={resume}")
    return arguments


def happened_in(error: BaseException, function: str, script: str) -> bool:
    """Whether an exception passed through a function of the script itself."""
    return any(frame.name == function and Path(frame.filename).name == script
               for frame in traceback.extract_tb(error.__traceback__))


class Sweeps(Callback):
    """Hydra's hook by which the process that drives a sweep, whichever launcher runs the jobs, knows the sweep's folder."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        sweep.begun.append(Path(config.hydra.sweep.dir))


class AlreadyTold(Exception):
    """Processes that this one has started ended with an exit code, and told why."""

    def __init__(self, exit_code: int):
        self.exit_code = exit_code


ended: list[UserError | GaveUp | Stopped | AlreadyTold] = []  # how main() ended, where not well


@contextlib.contextmanager
def ending(speaks: bool = True) -> Iterator[None]:
    """Inside a Hydra main: keep the errors that end in one line from Hydra, which would add lines of its own to them.

    speaks: false in all but the first of several processes, which end in the same errors; what may be theirs alone, an
    unreadable picture, they tell.
    """
    try:
        yield
    except (UserError, GaveUp, Stopped) as error:
        ended.append(error if speaks or isinstance(error, DataError) else AlreadyTold(error.exit_code))
    except AlreadyTold as error:
        ended.append(error)


def command_line(main: Callable[[], None], schema: type) -> int:
    """Run a Hydra main and return the exit code of the contract: 0 done, 2 the user's mistake, 3 gave up, 75 stopped by a
    signal. What is no user's mistake keeps its traceback (and Python's exit code 1)."""
    script = Path(sys.argv[0]).name
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises instead of printing and leaving
    # Launchers of sweeps unpickle main() in processes that were not started as this script, in whatever folder
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
    sys.argv[1:] = prepare_arguments(sys.argv[1:])
    try:
        main()
        if not ended:
            return 0
        if isinstance(ended[0], AlreadyTold):
            return ended[0].exit_code
        message, code = str(ended[0]), ended[0].exit_code
    except (UserError, Stopped) as error:  # of a sweep, which they end
        message, code = str(error), error.exit_code
    except ValueError as error:
        if not any(Path(frame.filename).name == "defaults_list.py" for frame in traceback.extract_tb(error.__traceback__)):
            raise
        wrong = [argument for argument in sys.argv[1:] if not re.fullmatch(r"[^=.]+=[A-Za-z_]\w*|[^=]*\.[^=]*=.*", argument)]
        message, code = f"{' '.join(wrong)}: a group takes the name of one of its files, as in model=vit_s16", 2
    except (HydraException, OmegaConfBaseException) as error:
        if happened_in(error, "main", script):
            raise
        message, code = composition_error(error, schema), ConfigError.exit_code
    except OSError as error:
        if happened_in(error, "main", script):
            raise
        message = f"{error.filename}: can't make this run folder ({error.strerror}); choose another with hydra.run.dir=FOLDER"
        code = ConfigError.exit_code
    print(f"{script}: {message}", file=sys.stderr)
    return code
