"""The configuration: every file composes, and survives a dictionary and a file."""

import pytest
import torch
import yaml
from composing import check, composed, configured, files_of, groups, keys_of_schema

from vit.checkpoints.model import build_model
from vit.config.config import (
    EvaluateConfig,
    flatten,
    from_composed,
    from_dict,
    group_to_dict,
    read_config_file,
    to_dict,
    to_yaml,
    with_changes,
)
from vit.config.model import ModelConfig
from vit.config.resume import command_line_changes, resumed_config
from vit.data.test_sets import TEST_SETS
from vit.errors import ConfigError

FILES = [
    (group, name)
    for group in [*groups(), "experiment"]
    for name in files_of(group)
    if (group, name) not in {("data", test_set) for test_set in TEST_SETS}
]


@pytest.mark.parametrize("name", TEST_SETS)
def test_nothing_is_trained_on_a_test_set(name):
    with pytest.raises(ConfigError, match=f"data={name} is a test set, for evaluate.py"):
        check(configured(f"data={name}"))


@pytest.mark.parametrize(("group", "name"), FILES)
def test_every_file_composes_to_a_valid_configuration(group, name):
    needs_root = "folder" in name or name == "shards"
    extra = ["data.root=somewhere"] if needs_root else []
    config = configured(f"{group}={name}", *extra)
    check(config)
    plain = to_dict(config)
    with torch.device("meta"):
        build_model(plain["model"], 10)
    assert from_dict(plain, "test") == config
    assert from_dict(yaml.safe_load(to_yaml(config)), "test") == config
    if group in ("model", "data", "optimizer", "schedule"):
        assert plain[group]["name"] == name


def test_defaults_are_those_of_the_contract():
    config = configured()
    assert (config.model.name, config.data.name) == ("vit_s4", "cifar10")
    given = configured(
        "optimizer=sgd",
        "optimizer.lr=0.1",
        "model.patch_size=8",
        "train.epochs=5",
        "train.batch_size=256",
        "model=vit_b16",
    )
    assert (given.optimizer.name, given.optimizer.lr, given.model.patch_size) == ("sgd", 0.1, 8)
    assert (given.train.epochs, given.train.batch_size, given.model.hidden_size) == (5, 256, 768)
    assert configured("experiment=digits", "model=vit_ti4").model.name == "vit_ti4"


def test_flat_and_changed_dictionaries():
    nested = {"a": {"b": 1, "c": {"d": [2]}}, "e": None}
    assert flatten(nested) == {"a.b": 1, "a.c.d": [2], "e": None}
    changed = with_changes(nested, {"a.c.d": [3], "e": {"f": 4}})
    assert changed == {"a": {"b": 1, "c": {"d": [3]}}, "e": {"f": 4}}
    assert nested["e"] is None


def test_a_group_by_itself():
    values = {"name": "mine", "image_size": 8, "patch_size": 4, "hidden_size": 16}
    values |= {"num_layers": 1, "num_heads": 2}
    group = group_to_dict("model", ModelConfig, values)
    assert group.keys() == keys_of_schema(ModelConfig)
    assert (group["name"], group["activation"]) == ("mine", "gelu")
    with pytest.raises(ConfigError, match="wings"):
        group_to_dict("model", ModelConfig, {**values, "wings": 2})
    with pytest.raises(ConfigError, match="name"):
        group_to_dict("model", ModelConfig, {"image_size": 8})


def test_a_configuration_that_does_not_fit_names_its_source():
    plain = to_dict(configured())
    with pytest.raises(ConfigError, match=r"^run/config\.yaml: .*'wings'"):
        from_dict({**plain, "wings": 2}, "run/config.yaml")


@pytest.mark.parametrize("text", [None, "", "- a\n- b\n", "a: [1\n", "a: ${\n"])
def test_a_file_that_holds_no_configuration_is_refused(tmp_path, text):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=rf"^{path}: "):
        read_config_file(path)


def test_a_file_comes_back_as_it_was_written(tmp_path):
    config = configured("experiment=digits", "model.pruned_heads={0: [1]}")
    path = tmp_path / "config.yaml"
    path.write_text(f"# python train.py\n{to_yaml(config)}")
    assert from_dict(read_config_file(path), str(path)) == config


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"randaugment_ops": 0, "randaugment_magnitude": 9}, ("none", None, None)),
        ({"randaugment_ops": 2, "randaugment_magnitude": 7}, ("randaugment", 2, 7.0)),
    ],
)
def test_configurations_of_earlier_versions_are_understood(old, new):
    saved = to_dict(configured("experiment=digits"))
    for key in ("policy", "policy_ops", "policy_magnitude", "erasing", "repeats"):
        del saved["augment"][key]
    del saved["train"]["loss"]
    saved["augment"] |= old
    augment = to_dict(from_dict(saved, "old"))["augment"]
    assert (augment["policy"], augment["policy_ops"], augment["policy_magnitude"]) == new

    # The command that says the same in today's words resumes it without a word
    overrides = ["experiment=digits"]
    if new[0] != "none":
        overrides += ["augment.policy=randaugment", "augment.policy_ops=2"]
        overrides += ["augment.policy_magnitude=7"]
    changes = command_line_changes(composed(*overrides), overrides)
    assert resumed_config(saved, changes, allow=False, source="old")[1] == []


def test_evaluate_composes():
    settings = from_composed(composed("checkpoint=x", name="evaluate"))
    assert isinstance(settings, EvaluateConfig)
    assert (settings.checkpoint, settings.split, settings.runtime.device) == ("x", "test", "auto")
