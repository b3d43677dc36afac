"""Mistakes on the command line and in YAML files: each in one line that says what to write."""

import importlib.util
import re
from pathlib import Path

import pytest
from composing import composed
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from vit.config.composition import (
    composition_error,
    known_keys,
    refuse_dashes,
    suggestion,
    unreadable_file,
)
from vit.config.config import Config, EvaluateConfig, from_composed
from vit.errors import ConfigError

# What composing raises where a file or an override is mistaken
REFUSALS = (HydraException, OmegaConfBaseException, MarkedYAMLError, UnicodeDecodeError)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=3", r"optimizer\.lrr: no such key; did you mean optimizer\.lr"),
        ("optimiser.lr=3", r"optimiser\.lr: no such key; did you mean optimizer\.lr"),
        ("optimiser=sgd", "optimiser: no such key; did you mean optimizer"),
        ("model=vit_b17", r"model=vit_b17: .*conf/model/vit_b17\.yaml; did you mean vit_b16"),
        ("experiment=digts", r"experiment=digts: .*digts\.yaml; did you mean digits"),
        ("optimizer.lr=fast", r"optimizer\.lr: .*'fast'"),
        ("train.epochs=[1]", r"train\.epochs"),
        ("train.epochs=null", r"train\.epochs: expected a value, got null"),
        ("data.mean=0.5", r"^data\.mean: expected a list, .*brackets"),
        ("model.num_heads=2.5", r"model\.num_heads: .*'2\.5'"),
        ("train.batch_size=", r"train\.batch_size"),
        ("train.batch_size", r"train\.batch_size"),
        ("optimizer.lr=(", r"optimizer\.lr"),
        ("seed=0,1,2", r"^seed=0,1,2: .*-m\b.*brackets"),
    ],
)
def test_mistakes_in_composing_become_one_line(override, message):
    assert re.search(message, mistake(override)), mistake(override)


@pytest.mark.parametrize(
    ("override", "needs", "package"),
    [
        ("search=digits", "hydra/sweeper=optuna", "optuna"),
        ("hydra/launcher=submitit", "hydra/launcher=submitit", "submitit"),
    ],
)
def test_what_is_not_installed_says_what_it_needs(override, needs, package):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    expected = f"{needs} needs pip install -r requirements-sweeps.txt"
    assert mistake(override).startswith(expected)


def mistake(override: str) -> str:
    """The one line that is printed for an override that can't be composed."""
    with pytest.raises((HydraException, OmegaConfBaseException)) as raised:
        composed(override)
    line = composition_error(raised.value, Config)
    assert "\n" not in line
    return line


def test_suggestions():
    assert suggestion("vit_b17", ["vit_b16", "deit"]) == "; did you mean vit_b16?"
    assert suggestion("xyz", ["vit_b16", "vit_s4"]) == "; known: vit_b16, vit_s4"
    assert {"optimizer", "optimizer.lr", "seed"} <= set(known_keys(Config))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=0.1", r"^lr: no such key; did you mean optimizer\.lr\?$"),
        ("train.lr=0.1", r"^train\.lr: no such key; did you mean optimizer\.lr\?$"),
        ("epochs=3", r"^epochs: no such key; did you mean train\.epochs\?$"),
    ],
)
def test_a_key_of_another_group_is_suggested(override, message):
    assert re.search(message, mistake(override)), mistake(override)


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("+train.grad_clip=1", r"train\.clip_norm"),
        ("+train.lr=1", r"optimizer\.lr"),
        ("+stepz=5", r"train\.steps"),
        ("++model.head=5", r"model\.num_heads"),
    ],
)
def test_a_key_that_nothing_reads_cannot_be_added(override, suggested):
    key = override.lstrip("+").partition("=")[0]
    message = rf"^\+{re.escape(key)}: no such key; did you mean .*{suggested}"
    with pytest.raises(ConfigError, match=message):
        from_composed(composed(override))


def test_keys_that_exist_can_be_given_with_a_plus():
    assert from_composed(composed("++train.steps=5")).train.steps == 5


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("model", "hidden_sise: 64", r"^model/mine\.yaml: model\.hidden_sise: .*hidden_size"),
        ("model", "hidden_size: big", r"^model/mine\.yaml: model\.hidden_size: .*'big'"),
        ("model", "- 64", r"^model/mine\.yaml: model: expected its keys, .*\[64\]$"),
        ("model", "only words", r"^model/mine\.yaml: model\.only words: no such key"),
        ("model", "name: a\nname: b", r"model/mine\.yaml, line 2: found duplicate key name$"),
        ("model", "name: a\n\tb: c", r"model/mine\.yaml, line 2: "),
        ("model", "name: a\n b: [", r"model/mine\.yaml, line 2: "),
        ("experiment", "train:\n  steps: 1", r"^experiment/mine\.yaml: its first line must be # @"),
        (
            "experiment",
            "# @package _global_\ntrain: 5",
            r"^experiment/mine\.yaml: train: .* got 5$",
        ),
        (
            "experiment",
            "# @package _global_\ndata:\n  mean: 0.5",
            r"^experiment/mine\.yaml: data\.mean: expected a list",
        ),
        (
            "experiment",
            "# @package _global_\ndefaults:\n  - override /modle: vit_s16",
            r"^experiment/mine\.yaml: modle: no such key; did you mean model",
        ),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, file, text, message):
    line = mistake_in_file(tmp_path, file, text.encode())
    assert re.search(message, line), line


def test_a_file_that_is_no_text_is_told_by_its_beginning(tmp_path):
    line = mistake_in_file(tmp_path, "model", b"name: caf\xe9\n")
    assert line == "a YAML file is not UTF-8 text: byte 0xe9 after 'name: caf'"


def mistake_in_file(folder: Path, group: str, text: bytes) -> str:
    """The one line that is printed for a file of one's own that can't be composed."""
    (folder / group).mkdir()
    (folder / group / "mine.yaml").write_bytes(text)
    overrides = [f"{group}=mine", f"hydra.searchpath=[file://{folder}]"]
    with pytest.raises(REFUSALS) as raised:
        composed(*overrides)
    error = raised.value
    known = isinstance(error, HydraException | OmegaConfBaseException)
    line = composition_error(error, Config) if known else unreadable_file(error)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("--epochs=3", "train.epochs"),
        ("--lr", "optimizer.lr"),
        ("--batch-size", "train.batch_size"),
        ("--model", "model"),
        ("--train.epochs=3", "train.epochs"),
    ],
)
def test_keys_are_no_options(argument, key):
    with pytest.raises(
        ConfigError, match=rf"^{argument}: keys are written without dashes, as {key}=VALUE"
    ):
        refuse_dashes([argument, "3"], Config)


def test_options_of_hydra_pass():
    options = [
        "--cfg",
        "job",
        "--config-dir=model",
        "--multirun",
        "-m",
        "--info=searchpath",
        "seed=1",
    ]
    refuse_dashes(options, Config)


@pytest.mark.parametrize(("schema", "key"), [(Config, "resume"), (EvaluateConfig, "checkpoint")])
def test_a_path_alone_is_told_its_key(tmp_path, schema, key):
    with pytest.raises(HydraException) as raised:
        composed(str(tmp_path))
    line = composition_error(raised.value, schema)
    assert line == f"{tmp_path}: expected KEY=VALUE or GROUP=NAME, as in {key}={tmp_path}"
