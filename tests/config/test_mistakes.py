"""Every mistake in the configuration is told by its key, before any data is read."""

import re

import pytest
from composing import check, configured

from vit.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.lr=0", "optimizer.lr"),
        ("optimizer.lr=-1e-3", "optimizer.lr"),
        ("optimizer.lr=nan", "optimizer.lr"),
        ("optimizer.lr=inf", "optimizer.lr"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas"),
        ("optimizer.layer_decay=1.5", "optimizer.layer_decay"),
        ("train.epochs=0", "train.epochs"),
        ("train.steps=0", "train.steps"),
        ("train.batch_size=0", "train.batch_size"),
        ("train.label_smoothing=1", "train.label_smoothing"),
        ("train.distillation=both", "train.distillation"),
        ("train.distill_weight=0", "train.distill_weight"),
        ("train.distill_weight=1.5", "train.distill_weight"),
        ("train.distill_temperature=0", "train.distill_temperature"),
        ("data.val_fraction=1.0", "data.val_fraction"),
        ("data.limit=0", "data.limit"),
        ("data.mean=[0.5,0.5]", "data.mean"),
        ("data.std=[0.5,0.5,0]", "data.std"),
        ("model.num_channels=4", "model.num_channels"),
        ("model.dropout=1", "model.dropout"),
        ("model.global_pool=max", "model.global_pool"),
        ("augment.flip=1.5", "augment.flip"),
        ("augment.crop_scale=[0.5]", "augment.crop_scale"),
        ("augment.erasing=2", "augment.erasing"),
        ("augment.mixup=-1", "augment.mixup"),
        ("runtime.compile=maybe", "runtime.compile"),
        ("runtime.workers=-1", "runtime.workers"),
        ("schedule.warmup=5epochs", "schedule.warmup"),
        ("schedule.warmup=-1", "schedule.warmup"),
        ("schedule.warmup=true", "schedule.warmup"),
        ("train.precision=fp8", "train.precision"),
        ("train.freeze=blocks", "train.freeze"),
        ("train.freeze=blocks:-1", "train.freeze"),
        ("train.freeze=blocks:1.5", "train.freeze"),
        ("train.patience=0", "train.patience"),
        ("runtime.max_minutes=0", "runtime.max_minutes"),
    ],
)
def test_values_out_of_range_are_refused_by_name(override, key):
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)} must be .* got "):
        check(configured(override))


@pytest.mark.parametrize(
    ("overrides", "key", "beside"),
    [
        (["optimizer.momentum=0.9"], "optimizer.momentum", "optimizer=adamw.* muon, sgd"),
        (["optimizer.adamw_lr=1e-3"], "optimizer.adamw_lr", "optimizer=adamw.* muon"),
        (["schedule.cooldown=0.2"], "schedule.cooldown", "schedule.name=cosine.* constant"),
        (["augment.policy_ops=2", "augment.policy=none"], "augment.policy_ops", "=none.* rand"),
        (["augment.mix_probability=0.5"], "augment.mix_probability", "augment.mixup"),
        (["train.drop_path_schedule=constant"], "train.drop_path_schedule", "model.drop_path"),
        (["data.test_fraction=0.1"], "data.test_fraction", "data=cifar10"),
        (["data.num_images=10"], "data.num_images", "data=cifar10.* synthetic"),
        (["train.distillation=soft"], "train.distillation", "train.teacher="),
        (["train.distill_weight=0.5"], "train.distill_weight", "train.teacher="),
        (["train.distill_temperature=2"], "train.distill_temperature", "train.teacher="),
        (
            ["train.teacher=x", "train.distill_temperature=2"],
            "train.distill_temperature",
            "train.distillation=soft",
        ),
        (["model.init_range=0.05"], "model.init_range", "trunc_normal"),
        (["model.init=xavier", "model.init_range=0.02"], "model.init_range", "trunc_normal"),
        (
            ["schedule=constant", "schedule.cooldown=null", "schedule.final=0.1"],
            "schedule.final",
            "schedule.cooldown",
        ),
    ],
)
def test_what_does_nothing_is_refused_with_what_it_belongs_to(overrides, key, beside):
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)} does nothing .*{beside}"):
        check(configured(*overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["augment=big_vision", "augment.policy_magnitude=15"],
            r"augment\.policy_magnitude .* 10 .*augment\.policy=randaugment_big_vision, got 15",
        ),
        (
            ["augment.alternating_flip=true", "augment.flip=0.3"],
            r"augment\.alternating_flip .*augment\.flip=0\.5, got 0\.3",
        ),
        (["optimizer=muon", "optimizer.momentum=0"], r"optimizer\.nesterov.*optimizer\.momentum"),
        (["data.root=null"], r"data=cifar10 needs data\.root"),
        (["data=folder"], r"data=folder needs data\.root=FOLDER"),
        (["data=digits", "data.val_fraction=0.9"], r"data\.val_fraction and data\.test_fraction"),
        (["model=r50_vit_b16", "train.whiten_patches=true"], r"train\.whiten_patches"),
        (["pretrained=x", "train.whiten_patches=true"], r"train\.whiten_patches .*pretrained"),
        (
            ["train.teacher=x", "train.distillation=soft", "train.loss=bce"],
            r"train\.distillation=soft .*train\.loss=cross_entropy",
        ),
        (
            ["train.teacher=x", "train.distill_weight=1", "model.distill_token=true"],
            r"train\.distill_weight=1 .*model\.distill_token=false",
        ),
        (
            ["runtime.sharding=fsdp", "optimizer=muon"],
            r"runtime\.sharding=fsdp .*optimizer=adamw",
        ),
        (["model.num_heads=5"], r"model=vit_s4: num_heads"),
        (["model.conv_stem=[16]", "model.resnet_stages=[1]"], r"resnet_stages and conv_stem"),
        (["model.conv_stem=[16,24]"], r"model\.conv_stem must be a list of multiples of 16"),
        (["model.conv_stem=[16]", "model.conv_stem_strides=[3]"], r"model\.conv_stem_strides"),
        (["model.conv_stem=[16]", "model.conv_stem_strides=[1,1]"], r"vit_s4: conv_stem_strides"),
        (["model.conv_stem=[16,16,16]"], r"model=vit_s4: patch_size \(4, 4\) .* stride 8"),
        (["model.conv_stem_strides=[2]"], r"vit_s4: conv_stem_strides does nothing without"),
        (["train.steps=10", "schedule.warmup=10"], r"schedule\.warmup"),
        (["data.name=cifar"], r"data\.name must be one of .*cifar10"),
        (["optimizer.name=adam"], r"optimizer\.name must be one of .*adamw"),
        (["augment.policy=randaug"], r"augment\.policy must be one of none, randaugment"),
    ],
)
def test_what_contradicts_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check(configured(*overrides))


def test_a_key_without_a_value_is_named():
    with pytest.raises(ConfigError, match=r"^model\.num_heads "):
        configured("model.num_heads=???")


def test_a_reference_to_nowhere_is_named():
    with pytest.raises(ConfigError, match=r"^seed: .*nowhere"):
        configured("seed=${nowhere}")


def test_no_more_blocks_are_frozen_than_there_are():
    check(configured("model.num_layers=3", "train.freeze=blocks:3"))
    with pytest.raises(ConfigError, match=r"^train\.freeze=blocks:4 is more than the 3 blocks"):
        check(configured("model.num_layers=3", "train.freeze=blocks:4"))
