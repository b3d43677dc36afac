"""The schema of conf/, its checks, and what Hydra's command line needs around it. Imports neither torch nor the data, so
that `--help` and a mistyped key answer at once."""

import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vit.config.augment import AugmentConfig
from vit.config.data import DataConfig
from vit.config.model import ModelConfig, PositionResize
from vit.config.optimizer import OptimizerConfig, ScheduleConfig
from vit.config.ranges import (
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    Check,
    check_values,
    is_duration,
    value_at,
)
from vit.config.runtime import EvaluateRuntimeConfig, RuntimeConfig
from vit.config.train import TrainingConfig
from vit.errors import ConfigError
from vit.text import first_line

Split = Enum("Split", {"train": "train", "val": "val", "test": "test"})


ResumeChanged = Enum("ResumeChanged", {"refuse": "refuse", "allow": "allow"})


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
    jobs_at_once: int | None = (
        None  # of a sweep, on this machine, where the launcher starts them all
    )


@dataclass
class EvaluateConfig:
    checkpoint: str | None = None
    pretrained: str | None = None
    split: Split = Split.test
    out: str | None = None
    report: bool = False
    knn: bool = False
    corruptions: bool = False
    data: Any = (
        None  # a checkpoint's own with what is given here changed; whole for pretrained weights
    )
    model: Any = None  # for pretrained weights: the model they must fit; None: the one they tell
    runtime: EvaluateRuntimeConfig = field(default_factory=EvaluateRuntimeConfig)


def register() -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    OmegaConf.register_new_resolver(
        "process", os.getpid, replace=True
    )  # so that two runs of one second have two folders


CHECKS: dict[str, Check] = {
    "seed": NOT_NEGATIVE,
    "jobs_at_once": POSITIVE,
    **{f"model.{name}": POSITIVE for name in ("hidden_size", "num_layers", "num_heads")},
    "model.mlp_ratio": POSITIVE,
    "model.intermediate_size": POSITIVE,
    "model.num_channels": (lambda x: x in (1, 3), "1 (grey) or 3 (RGB)"),
    **{
        f"model.{name}": PROBABILITY
        for name in (
            "dropout",
            "embedding_dropout",
            "attention_dropout",
            "projection_dropout",
            "mlp_dropout",
            "drop_path",
            "patch_dropout",
        )
    },
    "model.layer_scale": POSITIVE,
    "model.num_registers": NOT_NEGATIVE,
    "model.representation_size": POSITIVE,
    "model.resnet_stages": (
        lambda x: len(x) > 0 and all(units > 0 for units in x),
        "a list of positive whole numbers",
    ),
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
    "augment.crop_scale": (
        lambda x: len(x) == 2 and 0 < x[0] <= x[1] <= 1,
        "[smallest, largest], above 0 and at most 1",
    ),
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
    "optimizer.betas": (
        lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x),
        "two numbers, at least 0 and below 1",
    ),
    "optimizer.layer_decay": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "optimizer.eps": POSITIVE,
    "optimizer.adamw_lr": POSITIVE,
    "optimizer.momentum": PROBABILITY,
    **{
        f"schedule.{name}": (is_duration, "a share of the run (0.05), steps (500) or epochs (5ep)")
        for name in ("warmup", "cooldown")
    },
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


def validate(config: Config) -> None:
    """Raise ConfigError, naming the key, for what can be told before any data is read."""
    check_values(config, CHECKS)
    for key, names in BELONGS:
        name = value_at(config, key.split(".")[0]).name.name
        if value_at(config, key) is not None and name not in names:
            raise ConfigError(
                f"{key} does nothing with {key.split('.')[0]}={name}; it belongs to {', '.join(names)}"
            )
    for key in ("data.mean", "data.std"):
        if len(value_at(config, key)) not in (1, 3):
            raise ConfigError(
                f"{key} must hold 1 number (grey) or 3 (RGB), got {value_at(config, key)}"
            )
    from_files = ("imagenet", "tiny_imagenet", "folder", "shards", "cifar10", "cifar100")
    if config.data.name.name in from_files and config.data.root is None:
        raise ConfigError(f"data={config.data.name.name} needs data.root=FOLDER")
    if (
        config.data.name.name in ("digits", "folder", "shards", "synthetic")
        and config.data.test_fraction is None
    ):
        raise ConfigError(
            f"data={config.data.name.name} needs data.test_fraction: its test images are cut from train"
        )
    if config.data.val_fraction + (config.data.test_fraction or 0) >= 1:
        raise ConfigError(
            "data.val_fraction and data.test_fraction leave nothing to train on: they must sum to less than 1"
        )
    augment = config.augment
    if not augment.policy.name.startswith("randaugment"):
        for key in ("policy_ops", "policy_magnitude"):
            if getattr(augment, key) is not None:
                raise ConfigError(
                    f"augment.{key} does nothing with augment.policy={augment.policy.name}; it belongs to the "
                    "three RandAugments"
                )
    elif augment.policy.name != "randaugment" and (augment.policy_magnitude or 0) > 10:
        raise ConfigError(
            f"augment.policy_magnitude is of 10 with augment.policy={augment.policy.name}, "
            f"got {augment.policy_magnitude}"
        )
    if augment.mix_probability is not None and not (augment.mixup or augment.cutmix):
        raise ConfigError(
            "augment.mix_probability does nothing without augment.mixup or augment.cutmix above 0"
        )
    if (
        config.schedule.final is not None
        and config.schedule.name.name == "constant"
        and not config.schedule.cooldown
    ):
        raise ConfigError(
            "schedule.final does nothing with schedule=constant without schedule.cooldown"
        )
    if config.train.drop_path_schedule.name != "linear" and not config.model.drop_path:
        raise ConfigError("train.drop_path_schedule does nothing without model.drop_path above 0")
    if config.train.whiten_patches and config.model.resnet_stages:
        raise ConfigError(
            "train.whiten_patches needs patches of pixels; those of a hybrid (model.resnet_stages) are features"
        )
    if config.train.whiten_patches and config.pretrained is not None:
        raise ConfigError(
            "train.whiten_patches would overwrite the patch embedding of pretrained=…; leave one of them out"
        )
    if config.runtime.sharding.name == "fsdp" and config.optimizer.name.name not in (
        "adamw",
        "sgd",
    ):
        raise ConfigError(
            f"runtime.sharding=fsdp works with optimizer=adamw and sgd; {config.optimizer.name.name} looks at "
            "whole matrices"
        )
    if config.optimizer.nesterov and not config.optimizer.momentum:
        raise ConfigError("optimizer.nesterov=true needs optimizer.momentum above 0")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as dictionaries, lists, numbers and words, resolved: what a checkpoint and config.yaml hold."""
    container = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    assert isinstance(container, dict)
    return cast(dict[str, Any], container)


def group_to_dict(schema: type, values: dict[str, Any]) -> dict[str, Any]:
    """One group's values, checked against its schema, as to_dict() has them; raises ConfigError where they don't fit it."""
    try:
        return cast(
            dict[str, Any],
            OmegaConf.to_container(
                OmegaConf.merge(OmegaConf.structured(schema), values),
                resolve=True,
                enum_to_str=True,
            ),
        )
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from None


def from_composed(composed: DictConfig) -> Config:
    """The typed configuration that Hydra composed; raises ConfigError, naming the key, where one has no value yet."""
    missing = sorted(key for key in OmegaConf.missing_keys(composed) if not key.startswith("hydra"))
    if missing:
        raise ConfigError(
            f"{missing[0]} has no value; give it on the command line, such as {missing[0]}=…"
        )
    return cast(Config, OmegaConf.to_object(composed))


def from_dict(container: dict[str, Any], source: str) -> Config:
    """The typed configuration of to_dict(); raises ConfigError naming `source` where it doesn't fit the schema."""
    try:
        return cast(
            Config,
            OmegaConf.to_object(
                OmegaConf.merge(OmegaConf.structured(Config), in_todays_keys(container))
            ),
        )
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
    raise ConfigError(
        f"{path}: no configuration ({told}); it also stands in the header of checkpoints/last.safetensors"
    )


def in_todays_keys(container: dict[str, Any]) -> dict[str, Any]:
    """A configuration that an earlier version saved, its renamed keys under the names they have now."""
    augment = dict(container.get("augment") or {})
    if "randaugment_ops" not in augment:
        return container
    ops, magnitude = augment.pop("randaugment_ops"), augment.pop("randaugment_magnitude", None)
    policy = (
        {"policy": "randaugment", "policy_ops": ops, "policy_magnitude": magnitude} if ops else {}
    )
    return {**container, "augment": {**augment, **policy}}


def flatten(container: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, its keys joined with dots."""
    flat: dict[str, Any] = {}
    for key, value in container.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat
