"""The whole configuration: its schema, its checks across groups, and plain dictionaries in and out.

Imports neither torch nor anything of vit/data, so that a mistyped key is answered at once.
"""

import functools
import os
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vit.config.augment import AugmentConfig
from vit.config.composition import known_keys, suggestion
from vit.config.data import DataConfig
from vit.config.model import ModelConfig
from vit.config.optimizer import OptimizerConfig, ScheduleConfig
from vit.config.runtime import EvaluateRuntimeConfig, RuntimeConfig
from vit.config.settings import (
    FREE,
    NOT_NEGATIVE,
    POSITIVE,
    check_settings,
    one_of,
    setting,
)
from vit.config.train import PRECISION, TrainConfig, freezes_all_blocks, frozen_blocks
from vit.errors import ConfigError
from vit.text import first_line

CONF = Path(__file__).parents[2] / "conf"


# Hydra builds the schemas once, before any value is known, so checks across keys are functions
# below and not __post_init__
@dataclass
class Config:
    """The configuration of train.py."""

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    augment: AugmentConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    schedule: ScheduleConfig = MISSING
    train: TrainConfig = MISSING
    runtime: RuntimeConfig = MISSING
    seed: int = setting(NOT_NEGATIVE)
    explain: bool = setting()
    pretrained: str | None = setting(on_resume=FREE)
    pretrained_positions: str = setting(one_of("bicubic", "linear"), on_resume=FREE)
    resume: str | None = setting(on_resume=FREE)
    resume_changed: str = setting(one_of("refuse", "allow"), on_resume=FREE)
    # Of a sweep, on this machine
    jobs_at_once: int | None = setting(POSITIVE, on_resume=FREE)


@dataclass
class EvaluateConfig:
    """The configuration of evaluate.py.

    data: with a checkpoint, changes to its own, or with a name another data set; with pretrained
        weights, the whole group.
    model: with a name, the model that pretrained weights must fit; else the one their file
        describes, in both cases maybe of another image_size.
    precision, batch_size: null: those of the training run, see vit.evaluation.restore.
    """

    checkpoint: str | None = setting()
    pretrained: str | None = setting()
    split: str = setting(one_of("train", "val", "test"))
    out: str | None = setting()
    precision: str | None = setting(PRECISION)
    batch_size: int | None = setting(POSITIVE)
    views: str = setting(one_of("one", "mirrored", "five_crop", "ten_crop"))
    report: bool = setting()
    knn: bool = setting()
    corruptions: bool = setting()
    data: Any = setting()
    model: Any = setting()
    runtime: EvaluateRuntimeConfig = field(default=MISSING)


def register() -> None:
    """Register the schemas and the resolver that conf/ refers to with Hydra."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    # In the names of run folders, so that two runs started in the same second have two folders
    OmegaConf.register_new_resolver("process", os.getpid, replace=True)


def validate(config: Config) -> None:
    """Raise ConfigError, naming the key, for every mistake that shows before any data is read."""
    check_settings(config)
    check_splits(config.data)
    check_augmentation(config.augment)
    check_schedule(config)
    check_distillation(config.train)
    check_start(config)
    check_frozen(config)
    check_lora(config)


def check_splits(data: DataConfig) -> None:
    """The held-out fractions must leave something to train on."""
    if data.val_fraction + (data.test_fraction or 0) >= 1:
        raise ConfigError(
            "data.val_fraction and data.test_fraction leave nothing to train on: "
            "they must sum to less than 1"
        )


def check_augmentation(augment: AugmentConfig) -> None:
    """Check RandAugment's scale of magnitudes, and that mirroring and mixing are ever done."""
    # big_vision and timm count magnitudes to 10, torchvision to 30
    of_ten = augment.policy in ("randaugment_big_vision", "randaugment_timm")
    if of_ten and (augment.policy_magnitude or 0) > 10:
        raise ConfigError(
            f"augment.policy_magnitude is at most 10 with augment.policy={augment.policy}, "
            f"got {augment.policy_magnitude}"
        )
    if augment.alternating_flip and augment.flip != 0.5:
        raise ConfigError(
            "augment.alternating_flip mirrors each image in every second pass, which takes "
            f"augment.flip=0.5, got {augment.flip:g}"
        )
    if augment.mix_probability is not None and not (augment.mixup or augment.cutmix):
        raise ConfigError(
            "augment.mix_probability does nothing without augment.mixup or augment.cutmix above 0"
        )


def check_schedule(config: Config) -> None:
    """Refuse settings of schedules that never act."""
    schedule = config.schedule
    # Without a cooldown a constant learning rate never falls
    if schedule.final is not None and schedule.name == "constant" and not schedule.cooldown:
        raise ConfigError(
            "schedule.final does nothing with schedule=constant without schedule.cooldown"
        )
    if config.train.drop_path_schedule != "linear" and not config.model.drop_path:
        raise ConfigError("train.drop_path_schedule does nothing without model.drop_path above 0")


def check_distillation(train: TrainConfig) -> None:
    """Refuse settings of distillation without a teacher, and those that contradict each other."""
    is_soft = train.distillation == "soft"
    if train.teacher is None:
        for key in ("distillation", "distill_weight", "distill_temperature"):
            if getattr(train, key) is not None:
                raise ConfigError(f"train.{key} does nothing without train.teacher=CHECKPOINT")
    if train.distill_temperature is not None and not is_soft:
        raise ConfigError(
            "train.distill_temperature does nothing with hard labels of the teacher; "
            "it belongs to train.distillation=soft"
        )
    if is_soft and train.loss == "bce":
        raise ConfigError(
            "train.distillation=soft compares probabilities that sum to 1, which train.loss=bce "
            "has not; use train.distillation=hard, or train.loss=cross_entropy"
        )


def check_start(config: Config) -> None:
    """Refuse starting weights that contradict each other."""
    if not config.train.whiten_patches:
        return
    if config.model.resnet_stages:
        raise ConfigError(
            "train.whiten_patches needs patches of pixels; "
            "those of a ResNet (model.resnet_stages) are features"
        )
    if config.pretrained is not None:
        raise ConfigError(
            "train.whiten_patches would overwrite the first layer of pretrained=…; "
            "leave one of them out"
        )


def check_frozen(config: Config) -> None:
    """Refuse to freeze more blocks than there are."""
    count, num_layers = frozen_blocks(config.train.freeze), config.model.num_layers
    if count is not None and count > num_layers:
        raise ConfigError(
            f"train.freeze=blocks:{count} is more than the {num_layers} blocks of "
            f"model={config.model.name}; blocks:{num_layers} freezes all of them"
        )


def check_lora(config: Config) -> None:
    """Refuse low-rank changes of nothing, and an optimizer that is not made for them."""
    rank, model, freeze = config.train.lora_rank, config.model, config.train.freeze
    if rank is None:
        return
    if config.pretrained is None:
        raise ConfigError(
            "train.lora_rank changes trained weights, which random ones are not; give pretrained=…"
        )
    if freezes_all_blocks(freeze, model.num_layers):
        raise ConfigError(
            f"train.lora_rank does nothing with train.freeze={freeze}, which leaves no block to be "
            "changed"
        )
    if rank >= model.hidden_size:
        raise ConfigError(
            f"train.lora_rank={rank} is no low rank: it must be below model.hidden_size, "
            f"{model.hidden_size}"
        )
    if config.optimizer.name == "muon":
        raise ConfigError(
            "train.lora_rank does not go with optimizer=muon, which makes the steps of whole "
            "matrices orthogonal, not those of their factors; use optimizer=adamw"
        )


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as dictionaries, lists, numbers and strings.

    This is what the header of a checkpoint and config.yaml hold.
    """
    container = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    assert isinstance(container, dict)
    return cast(dict[str, Any], container)


def to_yaml(config: Config) -> str:
    """Return the configuration as a run's config.yaml holds it."""
    return OmegaConf.to_yaml(to_dict(config))


def require_resolvable(composed: DictConfig) -> None:
    """Raise ConfigError, naming the key, where a value refers to a key that does not exist."""
    try:
        OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {first_line(error)}") from None


def from_composed(composed: DictConfig) -> Any:
    """Return the typed configuration that Hydra composed: a Config or an EvaluateConfig.

    Raises ConfigError, naming the key, where one has no value, can't be resolved or does not exist.
    """
    require_resolvable(composed)
    # Hydra's own keys are mandatory only for launchers and sweepers that are not in use
    missing = sorted(key for key in OmegaConf.missing_keys(composed) if not key.startswith("hydra"))
    if missing:
        key = missing[0]
        raise ConfigError(f"{key} has no value; give it on the command line, such as {key}=…")

    # Hydra lets +KEY=VALUE add a key to any schema; nothing would read it
    config = OmegaConf.to_object(composed)
    for key in added_keys(config):
        raise ConfigError(f"+{key}: no such key{suggestion(key, known_keys(type(config)))}")
    return config


def added_keys(config: Any, prefix: str = "") -> list[str]:
    """Return the keys of a typed configuration that its schema does not have, with dots."""
    names = [item.name for item in fields(config)]
    added = [prefix + name for name in vars(config) if name not in [*names, "hydra"]]
    for name in names:
        group = getattr(config, name)
        if is_dataclass(group):
            added += added_keys(group, f"{prefix}{name}.")
    return added


def from_dict(container: dict[str, Any], source: str) -> Config:
    """Return the typed configuration of a plain one: the inverse of to_dict.

    Keys that the version which saved it did not have yet get their defaults. Raises ConfigError,
    naming `source`, where the container does not fit the schema.
    """
    return from_current_dict(migrate(container), source)


def from_current_dict(container: dict[str, Any], source: str) -> Config:
    """from_dict() for a container that was typed by a user of this version, in part at least.

    What earlier versions ignored is kept, so that validate() can refuse it.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), default_values(), container)
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {first_line(error)}") from None


def group_to_dict(group: str, schema: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return one group's values over its defaults, checked against its schema.

    Raises ConfigError where they do not fit it, or a key has no value.
    """
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(schema), default_values().get(group, {}), values
        )
        return cast(dict[str, Any], OmegaConf.to_container(merged, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from None


@functools.cache
def default_values() -> dict[str, Any]:
    """Return the defaults in conf/ as plain values: of every group, and of train.yaml's own keys.

    They are read without Hydra, for configurations that no command line composed.
    """
    defaults = cast(DictConfig, OmegaConf.load(CONF / "defaults.yaml"))
    # These groups have one choice each, whose file holds the defaults
    for group in ("train", "runtime"):
        defaults[group] = OmegaConf.load(CONF / group / "default.yaml")

    top = cast(DictConfig, OmegaConf.load(CONF / "train.yaml"))
    for key in top:
        if key not in ("defaults", "hydra"):
            defaults[key] = top[key]
    return cast(dict[str, Any], OmegaConf.to_container(defaults))


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a run's config.yaml. Raises ConfigError where it is missing or no configuration."""
    try:
        container = OmegaConf.to_container(OmegaConf.load(path))
        if isinstance(container, dict) and container:
            return cast(dict[str, Any], container)
        problem = "it holds no keys"
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        problem = first_line(error)
    raise ConfigError(
        f"{path}: no configuration ({problem}); "
        "a copy of it is in the header of checkpoints/last.safetensors"
    )


def migrate(container: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that an earlier version saved, with the keys and values of today."""
    return migrate_init_range(migrate_randaugment(container))


def migrate_init_range(container: dict[str, Any]) -> dict[str, Any]:
    """It was always set, to 0.02 by default, and had no effect but with init=trunc_normal."""
    model = container.get("model")
    if not isinstance(model, dict) or model.get("init_range") is None:
        return container
    if model.get("init") == "trunc_normal" and model["init_range"] != 0.02:
        return container
    return {**container, "model": {**model, "init_range": None}}


def migrate_randaugment(container: dict[str, Any]) -> dict[str, Any]:
    """There was one RandAugment, torchvision's, and 0 operations switched it off."""
    augment = dict(container.get("augment") or {})
    if "randaugment_ops" not in augment:
        return container
    ops = augment.pop("randaugment_ops")
    magnitude = augment.pop("randaugment_magnitude", None)
    if ops:
        augment |= {"policy": "randaugment", "policy_ops": ops, "policy_magnitude": magnitude}
    return {**container, "augment": augment}


def flatten(container: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, whose keys are joined with dots."""
    flat: dict[str, Any] = {}
    for key, value in container.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def with_changes(container: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a plain configuration with new values of some keys, which are given with dots."""
    config = OmegaConf.create(container)
    for key, value in changes.items():
        # Without merging: a new group or dictionary replaces the old one and leaves none of it
        OmegaConf.update(config, key, value, merge=False)
    return cast(dict[str, Any], OmegaConf.to_container(config))
