"""Every fact of the configuration has one place: defaults in conf/, choices in the code that takes
them."""

import dataclasses
import importlib
import inspect
import re

import omegaconf
import pytest
import torch
import yaml
from composing import check, configured, files_of, groups, keys_of_schema

from vit.augment.policies import POLICIES, build_policies
from vit.config.composition import known_keys
from vit.config.config import CONF, Config, EvaluateConfig, default_values
from vit.config.data import DataConfig, data_arguments
from vit.config.model import ModelConfig
from vit.config.settings import settings_of
from vit.data.datasets import DATASETS, load_data
from vit.data.preprocessing import PIL_RESAMPLING
from vit.data.test_sets import TEST_SETS
from vit.evaluation.protocol import VIEWS
from vit.model.activations import ACTIVATIONS
from vit.model.positions import resize_positions
from vit.model.vision_transformer import VisionTransformer
from vit.runs.selection import CRITERIA
from vit.runtime.precision import DTYPES
from vit.training.losses import build_loss
from vit.training.optimizers import COMMON_KEYS, OPTIMIZERS, keys_of
from vit.training.plan import build_schedule

GROUPS = groups()
# Groups whose files give what differs between them; conf/defaults.yaml has the rest
CHOICES = ("model", "data", "augment", "optimizer", "schedule")


def dataclasses_of(module_name):
    module = importlib.import_module(f"vit.config.{module_name}")
    classes = [item for _, item in inspect.getmembers(module, inspect.isclass)]
    own = [item for item in classes if item.__module__ == module.__name__]
    return [item for item in own if dataclasses.is_dataclass(item)]


@pytest.mark.parametrize(
    "module_name",
    [path.stem for path in sorted((CONF.parent / "vit" / "config").glob("[!_]*.py"))],
)
def test_defaults_stand_in_conf_alone(module_name):
    for schema in dataclasses_of(module_name):
        for item in dataclasses.fields(schema):
            assert item.default in (dataclasses.MISSING, omegaconf.MISSING), (schema, item.name)
            assert item.default_factory is dataclasses.MISSING, (schema, item.name)


def keys_in(path):
    return set(yaml.safe_load(path.read_text(encoding="utf-8"))) - {"defaults", "hydra"}


@pytest.mark.parametrize("group", CHOICES)
def test_every_key_of_a_group_has_a_default_or_stands_in_all_of_its_files(group):
    defaults = set(default_values()[group])
    assert defaults == keys_of_schema(GROUPS[group]) - required_keys(group)
    for name in files_of(group):
        keys = keys_in(CONF / group / f"{name}.yaml")
        assert keys >= required_keys(group), name
        assert keys <= keys_of_schema(GROUPS[group]), name


def required_keys(group):
    """The keys that have no default, so that every file of the group gives them."""
    return {
        "model": {"name", "image_size", "patch_size", "hidden_size", "num_layers", "num_heads"},
        "data": {"name", "mean", "std"},
        "augment": set(),
        "optimizer": {"name", "lr"},
        "schedule": {"name"},
    }[group]


@pytest.mark.parametrize("group", ["train", "runtime"])
def test_every_key_of_train_and_runtime_stands_in_its_one_file(group):
    assert files_of(group) == ["default"]
    assert keys_in(CONF / group / "default.yaml") == keys_of_schema(GROUPS[group])


def test_all_defaults_are_known():
    assert keys_in(CONF / "defaults.yaml") == set(CHOICES)
    assert default_values().keys() == keys_of_schema(Config)
    assert keys_in(CONF / "train.yaml") == keys_of_schema(Config) - GROUPS.keys()
    assert keys_in(CONF / "evaluate.yaml") == keys_of_schema(EvaluateConfig)


def test_every_group_of_conf_has_a_schema():
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert folders == {*GROUPS, "experiment", "search", "hydra"}
    modules = {path.stem for path in (CONF.parent / "vit" / "config").glob("*.py")}
    assert GROUPS.keys() - modules == {"schedule"}  # stands beside the optimizer


def choices_of(key, schema=Config):
    """The words that a key's schema allows."""
    (declared,) = [item for item in settings_of(schema) if item.key == key]
    assert declared.allowed.expected.startswith("one of ")
    return set(declared.allowed.expected.removeprefix("one of ").split(", "))


def accepted_by(build):
    """The words that the code which takes one names where it refuses another."""
    with pytest.raises(ValueError, match=r"must be .* got nonsense") as refused:
        build("nonsense")
    words = re.search(r"must be (?:one of )?(.*), got nonsense", str(refused.value))[1]
    without_notes = re.sub(r" \(.*?\)", "", words)
    return set(re.split(r", | or ", without_notes))


def build_small_model(**settings):
    sizes = {"image_size": 32, "patch_size": 16, "hidden_size": 64, "num_layers": 1, "num_heads": 4}
    return VisionTransformer(num_classes=2, **{**sizes, **settings})


def schedule_of(name):
    return build_schedule(
        name=name, warmup=0, final=None, cooldown=None, total_steps=9, steps_per_epoch=3
    )


BUILDERS = {
    "model.activation": lambda word: build_small_model(activation=word),
    "model.position": lambda word: build_small_model(position=word),
    "model.global_pool": lambda word: build_small_model(global_pool=word),
    "model.init": lambda word: build_small_model(init=word, position="rope2d"),
    "model.resnet_style": lambda word: build_small_model(
        resnet_style=word, resnet_stages=[1], patch_size=8
    ),
    "train.loss": lambda word: build_loss(word, 0.0),
    "schedule.name": schedule_of,
    "pretrained_positions": lambda word: resize_positions(
        torch.zeros(1, 4, 8), (2, 2), (3, 3), word
    ),
}


@pytest.mark.parametrize("key", BUILDERS)
def test_the_choices_of_a_key_are_those_the_code_takes(key):
    choices = choices_of(key)
    assert accepted_by(BUILDERS[key]) == choices
    for word in choices:
        BUILDERS[key](word)


def test_choices_that_tables_of_the_code_hold():
    assert choices_of("model.activation") == ACTIVATIONS.keys()
    assert choices_of("data.interpolation") == PIL_RESAMPLING.keys()
    assert choices_of("train.precision") == {"auto", *DTYPES}
    assert choices_of("train.select") == CRITERIA.keys()
    assert choices_of("views", EvaluateConfig) == VIEWS.keys()
    for word in choices_of("runtime.device") - {"auto"}:
        torch.device(word)


def test_the_model_takes_exactly_the_keys_of_its_group():
    taken = set(inspect.signature(VisionTransformer).parameters)
    assert taken - {"num_classes"} == keys_of_schema(ModelConfig) - {"name"}


def test_every_optimizer_has_a_file_that_gives_exactly_keys_it_takes():
    assert set(files_of("optimizer")) == OPTIMIZERS.keys()
    for name, builder in OPTIMIZERS.items():
        keys = keys_in(CONF / "optimizer" / f"{name}.yaml")
        assert keys - set(COMMON_KEYS) == set(keys_of(builder)), name


def test_every_key_of_the_optimizers_is_some_optimizers():
    taken = {key for builder in OPTIMIZERS.values() for key in keys_of(builder)}
    assert keys_of_schema(GROUPS["optimizer"]) == taken | set(COMMON_KEYS)


def test_every_schedule_has_a_file():
    assert set(files_of("schedule")) == choices_of("schedule.name")


def test_every_data_set_has_a_file():
    readers = set(files_of("data"))
    assert DATASETS.keys() | TEST_SETS.keys() == readers
    for name, reader in DATASETS.items():
        keys = keys_in(CONF / "data" / f"{name}.yaml")
        specific = {key for entry in DATASETS.values() for key in entry.all_settings()}
        assert keys & specific <= reader.all_settings().keys(), name


def test_data_is_loaded_with_the_keys_of_its_group():
    arguments = data_arguments(configured("data=digits").data, num_channels=1)
    elsewhere = {"device", "image_size", "typed"}
    assert arguments.keys() | elsewhere == set(inspect.signature(load_data).parameters)
    specific = arguments.pop("settings").keys()
    assert arguments.keys() - {"num_channels"} <= keys_of_schema(DataConfig)
    # Each belongs to some data set, whose reader takes it
    taken = {key for reader in DATASETS.values() for key in reader.own_settings()}
    assert specific == taken


@pytest.mark.parametrize("name", [*POLICIES, "none"])
def test_every_policy_can_be_configured(name):
    config = configured(f"augment.policy={name}")
    check(config)
    assert len(build_policies(name, None, None, 0.0)) == (name != "none")


def test_the_randaugments_are_those_of_the_table():
    (declared,) = [item for item in settings_of(Config) if item.key == "augment.policy_ops"]
    assert set(declared.belongs.values) == {name for name in POLICIES if "randaugment" in name}


def test_no_unused_key():
    """Every key of the schema is read somewhere outside the schema."""
    root = CONF.parent
    paths = [*root.glob("vit/**/*.py"), root / "train.py", root / "evaluate.py"]
    sources = "\n".join(path.read_text() for path in paths if path.parent.name != "config")
    for key in known_keys(Config):
        assert re.search(rf"\b{key.rpartition('.')[2]}\b", sources), key
