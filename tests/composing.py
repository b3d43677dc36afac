"""Configurations as the command line composes them, without running anything."""

import dataclasses

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from vit.config.config import CONF, Config, from_composed, register, validate
from vit.training.prepare import check_parts

register()


def composed(*overrides: str, name: str = "train") -> DictConfig:
    """What Hydra makes of `train.py overrides…`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


def configured(*overrides: str) -> Config:
    """The typed configuration of `train.py overrides…`."""
    return from_composed(composed(*overrides))


def files_of(group: str) -> list[str]:
    """The names of a group's files in conf/."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def groups() -> dict[str, type]:
    """{group: its dataclass}, of the groups that a configuration consists of."""
    return {
        item.name: item.type
        for item in dataclasses.fields(Config)
        if dataclasses.is_dataclass(item.type)
    }


def keys_of_schema(schema: type) -> set[str]:
    return {item.name for item in dataclasses.fields(schema)}


def check(config: Config) -> None:
    """All that train.py checks before it reads any data."""
    validate(config)
    check_parts(config)
