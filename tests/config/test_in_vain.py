"""What is typed in vain, beside settings that leave it nothing to do, is refused by its name."""

import pytest
from composing import configured
from helpers import error_line, train
from omegaconf import OmegaConf

from train import check_sweep
from vit.config.in_vain import (
    CASES,
    CASES_OF_EQUAL_CLASSES,
    CASES_OF_FILES,
    CASES_OF_FREEZING,
    CASES_OF_MEMORY,
    CASES_WITHOUT_VALIDATION,
    check_typed,
    check_typed_with_data,
)
from vit.errors import ConfigError

FILES = "data=imagenet"
# The key with a value, and what leaves it nothing to do
REFUSED = [
    ("model.mlp_ratio=2", ["model.intermediate_size=32"]),
    (
        "model.dropout=0.1",
        ["model.embedding_dropout=0", "model.projection_dropout=0", "model.mlp_dropout=0"],
    ),
    ("model.cls_position=false", ["model.position=sincos2d"]),
    ("model.cls_position=false", ["model.cls_token=false", "model.global_pool=mean"]),
    ("model.resnet_style=timm", []),
    ("model.conv_stem_strides=[2]", []),
    ("data.mirror=true", ["augment.flip=0"]),
    ("augment.flip=0.5", ["data=digits"]),
    ("augment.alternating_flip=true", ["data=digits"]),
    ("optimizer.layer_decay=0.7", ["train.freeze=backbone"]),
    ("optimizer.layer_decay=0.7", ["model.num_layers=3", "train.freeze=blocks:3"]),
    ("optimizer.momentum=0.5", ["optimizer=muon", "train.freeze=backbone"]),
    ("optimizer.nesterov=false", ["optimizer=muon", "train.freeze=backbone"]),
    ("train.epochs=3", ["experiment=finetune_cifar10_vit_b16"]),
    ("train.class_weights=balanced", ["data.balance=1"]),
    ("train.class_weights=balanced", ["train.teacher=x", "train.distill_weight=1"]),
    ("train.label_smoothing=0.2", ["train.teacher=x", "train.distill_weight=1"]),
    (
        "train.drop_path_schedule=constant",
        ["experiment=cifar10_vit_s4", "train.freeze=backbone"],
    ),
    ("model.dropout=0.1", ["train.freeze=backbone"]),
    ("model.drop_path=0.1", ["train.freeze=backbone"]),
    ("model.attention_dropout=0.1", ["train.freeze=backbone"]),
    ("model.projection_dropout=0.1", ["train.freeze=backbone"]),
    ("model.mlp_dropout=0.1", ["train.freeze=backbone"]),
    ("model.embedding_dropout=0.1", ["train.freeze=blocks:0"]),
    ("model.patch_dropout=0.1", ["train.freeze=blocks:1"]),
    ("runtime.activation_checkpointing=true", ["train.freeze=backbone"]),
    ("runtime.compile=true", ["runtime.sharding=fsdp"]),
    ("runtime.compile=blocks", ["runtime.sharding=fsdp"]),
    ("pretrained_positions=linear", []),
    ("augment.crop_scale=[0.5,1]", ["augment.pad=0.1"]),
    ("data.unreadable=skip", []),
    ("augment.pad=0.1", [FILES]),
]
# The same keys where they act, or ask for what is the case anyway
ACCEPTED = [
    ("model.mlp_ratio=2", []),
    ("model.dropout=0.1", ["model.embedding_dropout=0"]),
    ("model.cls_position=false", []),
    ("model.resnet_style=timm", ["model.resnet_stages=[1]"]),
    ("model.conv_stem_strides=[2]", ["model.conv_stem=[16]"]),
    ("model.conv_stem_strides=null", []),
    ("data.mirror=true", []),
    ("data.mirror=false", ["augment.flip=0"]),
    ("augment.flip=0.2", []),
    ("train.epochs=3", []),
    ("train.epochs=3", ["experiment=finetune_cifar10_vit_b16", "train.steps=null"]),
    ("augment.alternating_flip=true", []),
    ("augment.alternating_flip=false", ["data=digits"]),
    ("augment.flip=0", ["data=digits"]),
    ("optimizer.layer_decay=0.7", []),
    ("optimizer.layer_decay=0.7", ["model.num_layers=3", "train.freeze=blocks:2"]),
    ("model.drop_path=0.1", ["train.freeze=blocks:1"]),
    ("model.drop_path=0", ["train.freeze=backbone"]),
    ("model.patch_dropout=0.1", []),
    ("runtime.activation_checkpointing=true", ["train.freeze=blocks:1"]),
    ("optimizer.momentum=0.5", ["optimizer=muon"]),
    ("optimizer.nesterov=false", ["optimizer=sgd", "train.freeze=backbone"]),
    ("train.class_weights=balanced", ["data.balance=0.5"]),
    ("train.class_weights=none", ["data.balance=1"]),
    ("train.class_weights=balanced", ["train.teacher=x", "train.distill_weight=0.9"]),
    ("train.class_weights=none", ["train.teacher=x", "train.distill_weight=1"]),
    ("train.label_smoothing=0.2", ["train.teacher=x", "train.distill_weight=0.9"]),
    ("train.label_smoothing=0", ["train.teacher=x", "train.distill_weight=1"]),
    ("runtime.compile=true", []),
    ("runtime.compile=false", ["runtime.sharding=fsdp"]),
    ("pretrained_positions=linear", ["pretrained=x"]),
    ("augment.crop_scale=[0.5,1]", ["augment.pad=0"]),
    ("augment.crop_scale=[0.5,1]", ["augment.pad=0.1", FILES]),
    ("data.unreadable=skip", [FILES]),
    ("augment.pad=0.1", []),
    ("augment.pad=0", [FILES]),
]


def check(override: str, beside: list[str]) -> None:
    config = configured(*beside, override)
    check_typed(config, [override], reads_files=FILES in beside)


@pytest.mark.parametrize(("override", "beside"), REFUSED)
def test_what_is_typed_in_vain_is_refused(override, beside):
    with pytest.raises(ConfigError, match=rf"^{override.partition('=')[0]} does nothing "):
        check(override, beside)
    # Only what is typed: the same value may come from a file of conf/ or from a resumed run
    config = configured(*beside, override)
    check_typed(config, beside, reads_files=FILES in beside)


@pytest.mark.parametrize(("override", "beside"), ACCEPTED)
def test_what_has_an_effect_is_accepted(override, beside):
    check(override, beside)


def test_both_lengths_of_a_run_may_be_typed():
    overrides = ["train.epochs=3", "train.steps=7"]
    check_typed(configured(*overrides), overrides, reads_files=False)


def test_every_case_is_tried_above():
    keys = {case.key for case in (*CASES, *CASES_OF_FREEZING, *CASES_OF_FILES, *CASES_OF_MEMORY)}
    assert keys == {override.partition("=")[0] for override, _ in REFUSED}
    keys = {case.key for case in CASES_OF_EQUAL_CLASSES + CASES_WITHOUT_VALIDATION}
    assert keys == {override.partition("=")[0] for override in REFUSED_WITH_DATA}


REFUSED_WITH_DATA = {
    "data.balance=0.5": {"equal_classes": True, "has_validation": True},
    "train.class_weights=balanced": {"equal_classes": True, "has_validation": True},
    "train.select=loss": {"equal_classes": False, "has_validation": False},
}
ACCEPTED_WITH_DATA = ("data.balance=0", "train.class_weights=none")


@pytest.mark.parametrize(("override", "facts"), REFUSED_WITH_DATA.items())
def test_what_the_data_leaves_nothing_to_do_is_refused(override, facts):
    config = configured(override)
    with pytest.raises(ConfigError, match=rf"^{override.partition('=')[0]} does nothing here"):
        check_typed_with_data(config, [override], **facts)
    check_typed_with_data(config, [], **facts)
    others = {name: not value for name, value in facts.items()}
    check_typed_with_data(config, [override], **{**others, "has_validation": True})


@pytest.mark.parametrize("override", ACCEPTED_WITH_DATA)
def test_what_is_the_case_anyway_is_accepted_with_any_data(override):
    facts = {"equal_classes": True, "has_validation": True}
    check_typed_with_data(configured(override), [override], **facts)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("augment.flip=0.5", r"augment.flip does nothing with data.mirror=false"),
        ("jobs_at_once=2", "jobs_at_once does nothing without -m"),
    ],
)
def test_the_command_line_refuses_it(tmp_path, override, part):
    done = train(tmp_path, "experiment=digits", override, "hydra.run.dir=run")
    assert part in error_line(done)
    assert not (tmp_path / "run").exists()


def test_the_basic_launcher_has_no_use_for_jobs_at_once(tmp_path):
    done = train(tmp_path, "-m", "experiment=digits", "jobs_at_once=2", "seed=1,2")
    assert "hydra/launcher=submitit_local" in error_line(done)


def test_a_search_cannot_be_explained():
    explained = OmegaConf.create({"explain": True, "jobs_at_once": None})
    job = OmegaConf.create({"runtime": {"choices": {"hydra/launcher": "basic"}}})
    with pytest.raises(ConfigError, match=r"^explain=true trains nothing.* leave out search"):
        check_sweep(explained, job, searching=True)
    # Each job of any other sweep is explained
    check_sweep(explained, job, searching=False)
