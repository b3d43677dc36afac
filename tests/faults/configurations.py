"""Mistaken command lines, from rules over the schema."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from vit.config.composition import known_keys
from vit.config.config import Config
from vit.config.settings import Range, settings_of

CANDIDATES = [-1, 0, 2, -0.5, 1.5, 31, math.nan, math.inf, [], [0.5], [0.0, 2.0], [1, 2, 3, -4]]
GROUPS = ["model", "data", "augment", "optimizer", "schedule", "train", "runtime", "experiment"]
WORDS = [
    "optimizer.name",
    "train.precision",
    "runtime.device",
    "model.global_pool",
    "augment.policy",
    "train.loss",
    "train.class_weights",
    "train.select",
    "data.interpolation",
    "model.init",
    "model.position",
    "train.freeze",
]
IMPOSSIBLE_MODELS = [
    ("model.num_heads=5", "num_heads"),
    ("model.num_heads=-2", "num_heads"),
    ("model.patch_size=5", "patch_size"),
    ("model.patch_size=0", "patch_size"),
    ("model.patch_size=[4,3]", "patch_size"),
    ("model.image_size=30", "image_size"),
    ("model.image_size=[32]", "image_size"),
    ("model.hidden_size=0", "hidden_size"),
    ("model.num_layers=0", "num_layers"),
    ("model.grid_size=8", "patch_size"),
    ("model.cls_token=false", "cls_token"),
    ("model.init=local", "init=local"),
    ("model.pruned_heads={0:[99]}", "head"),
    ("model.pruned_heads=3", "pruned_heads"),
    ("model.resnet_stages=[3,4]", "patch_size"),
    ("model.conv_stem=[16,16,16]", "patch_size"),
    ("model.conv_stem_strides=[2]", "model.conv_stem_strides"),
]
OTHERS = [
    (["optimizer.lr=("], "optimizer.lr"),
    (["optimizer.lr"], "optimizer.lr"),
    (["=3"], "=3"),
    (["experiment=digits", "train.batch_size=100000"], "train.batch_size"),
    (["data=folder"], "data.root"),
    (["data=imagenet"], "imagenet"),
    (["resume=nowhere"], "nowhere"),
    (["resume=/dev/null"], "/dev/null"),
    (["pretrained=nowhere.npz"], "nowhere.npz"),
    (["hydra.run.dir=/proc/x"], "/proc/x"),
    (["experiment=digits", "train.teacher=nowhere.npz"], "nowhere.npz"),
    (["experiment=digits", "train.teacher=/dev/null"], "/dev/null"),
    (["experiment=digits", "train.distillation=soft"], "train.teacher"),
    (["train.teacher=x", "train.distill_temperature=2"], "train.distill_temperature"),
    (["train.teacher=x", "train.distillation=soft", "train.loss=bce"], "train.loss=bce"),
    (["experiment=digits", "schedule.warmup=5epochs"], "warmup"),
    (["experiment=digits", "train.steps=5", "schedule.warmup=5"], "warmup"),
    (["experiment=digits", "train.freeze=blocks:99"], "train.freeze"),
    (["experiment=digits", "train.lora_rank=4"], "train.lora_rank"),
    (["experiment=digits", "train.patience=3", "data.val_fraction=0"], "train.patience"),
]
OF_EVALUATE = [
    ([], "checkpoint="),
    (["checkpoint=nowhere"], "nowhere"),
    (["split=tset"], "split"),
    (["checkpoint=/dev/null"], "/dev/null"),
    (["pretrained=nowhere", "data=digits"], "nowhere"),
    (["checkpont=x"], "checkpont"),
]


class Case(NamedTuple):
    """A command that must end in exit code 2 and one line with `named` in it."""

    script: str
    arguments: list[str]
    named: str


def configurations() -> Iterator[Case]:
    yield from values_out_of_range()
    yield from misspelled_keys()
    for group in GROUPS:
        for name in ("nothing", "vit_b17", "digit", "_"):
            yield Case("train.py", [f"{group}={name}"], f"{group}={name}")
    for key in WORDS:
        yield Case("train.py", ["experiment=digits", f"{key}=wrong"], key)
    for argument, named in IMPOSSIBLE_MODELS:
        yield Case("train.py", [argument], named)
    for arguments, named in OTHERS:
        yield Case("train.py", arguments, named)
    for arguments, named in OF_EVALUATE:
        yield Case("evaluate.py", arguments, named)


def values_out_of_range() -> Iterator[Case]:
    for setting in settings_of(Config):
        for value in CANDIDATES:
            if setting.allowed is not None and not fits(setting.allowed, value):
                text = str(value).replace(" ", "")
                arguments = ["experiment=digits", f"{setting.key}={text}"]
                yield Case("train.py", arguments, setting.key)


def fits(allowed: Range, value: float | list) -> bool:
    numbers = value if isinstance(value, list) else [value]
    try:
        return all(math.isfinite(number) for number in numbers) and allowed.allows(value)
    except TypeError:  # a list for a number is refused by its type
        return False


def misspelled_keys() -> Iterator[Case]:
    """One letter too many, and where the key is long enough two letters too few."""
    for key in known_keys(Config):
        group, dot, name = key.partition(".")
        if dot:
            yield Case("train.py", [f"{key}x=1"], f"{key}x")
            shortened = key[:-2] if len(name) > 2 else f"{key}yy"
            yield Case("train.py", [f"{shortened}=1"], group)
