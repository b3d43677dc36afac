"""Nothing that is typed is ignored: every key and every group of both scripts changes something.

Each is given another value than its default, beside settings with which it can matter, and then
something that can be seen of the run has to change, or the command has to end in a message that
names it. What can be seen is in observed_runs.py.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import make_images
from hydra.core.config_store import ConfigStore
from observed_runs import Observed, observe_evaluation, observe_training
from omegaconf import MISSING

from vit.config.config import CONF, Config, EvaluateConfig, register
from vit.config.data import DataConfig
from vit.config.model import ModelConfig
from vit.config.settings import setting, settings_of
from vit.config.train import TrainConfig

# A model of 7,540 parameters that makes three steps
TINY = (
    "model=vit_ti4",
    "model.image_size=8",
    "model.hidden_size=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "train.batch_size=16",
    "train.steps=3",
    "runtime.workers=0",
    "runtime.threads=1",
)
NOISE = ("data=synthetic", "data.num_classes=4", "data.num_images=120")
FOLDER = ("data=folder", "data.root={folder}")
TABLE = ("data=folder", "data.root={table}")
DAMAGED = ("data=folder", "data.root={damaged}")
WITHOUT_GPU = not torch.cuda.is_available()


class Change(NamedTuple):
    """A value for a key, and the settings beside which it matters.

    says: what the message of a refusal has to hold; None: the key. after_a_run: the folder holds a
    finished run before. Values may refer to the fields of Places, in braces.
    """

    value: str
    beside: tuple[str, ...] = ()
    data: tuple[str, ...] = NOISE
    says: str | None = None
    after_a_run: bool = False


KEYS_OF_TRAIN = {
    # The model
    "model.name": Change("other"),
    "model.image_size": Change("16"),
    "model.patch_size": Change("2"),
    "model.grid_size": Change("4", ("model.patch_size=null", "model.grid_size=2")),
    "model.num_channels": Change("1"),
    "model.hidden_size": Change("32"),
    "model.num_layers": Change("1"),
    "model.num_heads": Change("4"),
    "model.mlp_ratio": Change("2"),
    "model.intermediate_size": Change("24"),
    "model.activation": Change("relu"),
    "model.gated_mlp": Change("true"),
    "model.dropout": Change("0.5"),
    "model.embedding_dropout": Change("0.5"),
    "model.attention_dropout": Change("0.5"),
    "model.projection_dropout": Change("0.5"),
    "model.mlp_dropout": Change("0.5"),
    "model.drop_path": Change("0.5"),
    "model.patch_dropout": Change("0.5"),
    "model.qkv_bias": Change("false"),
    "model.qk_norm": Change("true"),
    "model.layer_scale": Change("0.1"),
    "model.layer_norm_eps": Change("0.01"),
    "model.position": Change("sincos2d"),
    "model.cls_token": Change("false", ("model.global_pool=mean",)),
    "model.cls_position": Change("false"),
    "model.distill_token": Change("true"),
    "model.num_registers": Change("2"),
    "model.pre_norm": Change("true"),
    "model.global_pool": Change("mean"),
    "model.fc_norm": Change("true", ("model.global_pool=mean",)),
    "model.representation_size": Change("8"),
    "model.resnet_stages": Change("[1]", ("model.image_size=16", "model.patch_size=8")),
    "model.resnet_style": Change(
        "timm", ("model.resnet_stages=[1]", "model.image_size=16", "model.patch_size=8")
    ),
    "model.conv_stem": Change("[16]"),
    "model.conv_stem_strides": Change("[1,2]", ("model.conv_stem=[16,16]",)),
    "model.pruned_heads": Change("{0:[1]}"),
    "model.init": Change("xavier"),
    "model.init_range": Change("0.5", ("model.init=trunc_normal",)),
    # The data
    "data.name": Change("digits", says="data=digits"),
    "data.root": Change("{folder}/train", data=FOLDER),
    "data.val_fraction": Change("0.3"),
    "data.test_fraction": Change("0.3"),
    "data.limit": Change("20"),
    "data.mean": Change("[0.1]"),
    "data.std": Change("[0.9]"),
    "data.eval_crop": Change("0.5", data=FOLDER),
    "data.interpolation": Change("bilinear", data=FOLDER),
    "data.unreadable": Change("skip", data=DAMAGED),
    "data.mirror": Change("false"),
    "data.balance": Change("1", ("data.label_column=color",), data=TABLE),
    "data.label_column": Change("color", data=TABLE),
    "data.num_classes": Change("3"),
    "data.num_images": Change("90"),
    # Augmentations
    "augment.pad": Change("0.5"),
    "augment.crop_scale": Change("[0.2,0.3]", ("augment.pad=0",)),
    "augment.flip": Change("0"),
    "augment.alternating_flip": Change("true"),
    "augment.rotate": Change("30"),
    "augment.translate": Change("0.2"),
    "augment.scale": Change("0.2"),
    "augment.shear": Change("20"),
    "augment.policy": Change("randaugment"),
    "augment.policy_ops": Change("4", ("augment.policy=randaugment",)),
    "augment.policy_magnitude": Change("2", ("augment.policy=randaugment",)),
    "augment.color_jitter": Change("0.5"),
    "augment.erasing": Change("0.9"),
    "augment.mixup": Change("0.8"),
    "augment.cutmix": Change("1"),
    "augment.mix_probability": Change("0.1", ("augment.mixup=0.8",)),
    "augment.repeats": Change("3"),
    # The optimizer
    "optimizer.name": Change("sgd", says="optimizer=sgd"),
    "optimizer.lr": Change("0.1"),
    "optimizer.weight_decay": Change("10"),
    "optimizer.layer_decay": Change("0.5"),
    "optimizer.betas": Change("[0.5,0.5]"),
    "optimizer.eps": Change("0.1"),
    "optimizer.momentum": Change("0.1", ("optimizer=sgd",)),
    "optimizer.nesterov": Change("false", ("optimizer=sgd",)),
    "optimizer.adamw_lr": Change("0.5", ("optimizer=muon",)),
    "schedule.name": Change("linear"),
    "schedule.warmup": Change("2"),
    "schedule.final": Change("0.5"),
    "schedule.cooldown": Change("2", ("schedule=constant",)),
    # Training
    "train.epochs": Change("1", ("train.steps=null", "train.epochs=0.5")),
    "train.steps": Change("2"),
    "train.batch_size": Change("8"),
    "train.micro_batch_size": Change("4"),
    "train.precision": Change("bf16"),
    "train.loss": Change("bce"),
    "train.label_smoothing": Change("0"),
    "train.class_weights": Change("balanced", ("data.label_column=color",), data=TABLE),
    "train.teacher": Change("{best}"),
    "train.distillation": Change("soft", ("train.teacher={best}",)),
    "train.distill_weight": Change("0.9", ("train.teacher={best}",)),
    "train.distill_temperature": Change("1", ("train.teacher={best}", "train.distillation=soft")),
    "train.drop_path_schedule": Change("constant", ("model.drop_path=0.5",)),
    "train.clip_norm": Change("0.01"),
    "train.whiten_patches": Change("true"),
    "train.freeze": Change("backbone"),
    "train.lora_rank": Change("2", ("pretrained={best}",)),
    "train.ema_decay": Change("0"),
    "train.eval_every": Change("0.2"),
    "train.select": Change("macro_f1"),
    "train.patience": Change("1", ("train.eval_every=0.1", "optimizer.lr=1e-60")),
    "train.attention_every": Change("null"),
    "train.log_every": Change("1"),
    "train.save_every": Change("1"),
    # How it is computed
    "runtime.device": Change("cuda" if WITHOUT_GPU else "cpu"),
    "runtime.compile": Change("true"),
    "runtime.workers": Change("1", data=FOLDER),
    "runtime.threads": Change("2"),
    "runtime.deterministic": Change("true"),
    "runtime.activation_checkpointing": Change("true"),
    "runtime.processes": Change("2"),
    "runtime.sharding": Change("fsdp"),
    "runtime.max_minutes": Change("0.001"),
    # What belongs to no group
    "seed": Change("1"),
    "explain": Change("true"),
    "pretrained": Change("{best}"),
    "pretrained_positions": Change("linear", ("pretrained={best}", "model.image_size=16")),
    "resume": Change("{run}", after_a_run=True),
    "resume_changed": Change("allow", ("resume=auto", "optimizer.lr=0.1"), after_a_run=True),
    "jobs_at_once": Change("2"),
}

GROUPS_OF_TRAIN = {
    "model": Change("vit_nano4"),
    "data": Change("digits", data=("data.limit=120",)),
    "augment": Change("none"),
    "optimizer": Change("sgd"),
    "schedule": Change("constant"),
    "experiment": Change("digits"),
    "search": Change("digits"),
}
EXEMPT_GROUPS = {
    "train": "has one file, which holds the defaults",
    "runtime": "has one file, which holds the defaults",
    "hydra": "of Hydra itself: the texts of --help",
}


# Beside evaluate.py's checkpoint=…, which brings its own groups `data` and `model`
OF_CHECKPOINT = ("checkpoint={best}", "runtime.workers=0", "runtime.threads=1")
OF_FILES = ("checkpoint={best_of_files}", "runtime.workers=0", "runtime.threads=1")

# Beside pretrained=…, whose data set and model are given
NOISE_TO_EVALUATE = ("pretrained={best}", *NOISE, "split=val", "runtime.threads=1")
FILES_TO_EVALUATE = (
    "pretrained={best_of_files}",
    *FOLDER,
    "split=val",
    "runtime.workers=0",
    "runtime.threads=1",
)
SIZES = TINY[:5]

KEYS_OF_EVALUATE = {
    "checkpoint": Change("{best}"),
    "pretrained": Change("{best}", NOISE),
    "split": Change("val", OF_CHECKPOINT),
    "out": Change("{elsewhere}", OF_CHECKPOINT),
    "precision": Change("bf16", OF_CHECKPOINT),
    "batch_size": Change("5", OF_CHECKPOINT),
    "views": Change("mirrored", OF_CHECKPOINT),
    "report": Change("true", OF_CHECKPOINT),
    "knn": Change("true", OF_CHECKPOINT),
    "corruptions": Change("true", OF_CHECKPOINT),
    "data": Change("digits", OF_CHECKPOINT),
    "model": Change("vit_ti4", OF_CHECKPOINT),
    "data.root": Change("{folder}", OF_CHECKPOINT),
    "data.limit": Change("6", OF_CHECKPOINT),
    "data.eval_crop": Change("0.5", OF_FILES),
    "model.image_size": Change("16", OF_CHECKPOINT),
    "runtime.device": Change("cuda" if WITHOUT_GPU else "cpu", OF_CHECKPOINT),
    "runtime.workers": Change("1", OF_FILES),
    "runtime.threads": Change("2", OF_CHECKPOINT),
    "runtime.deterministic": Change("true", OF_CHECKPOINT),
}

OF_DATA = {
    "name": Change("digits", NOISE_TO_EVALUATE, says="data=digits"),
    # A folder without train/ is taken whole, so that it has no val
    "root": Change("{folder}/train", FILES_TO_EVALUATE, says="split=val"),
    "val_fraction": Change("0.3", NOISE_TO_EVALUATE),
    "test_fraction": Change("0.3", (*NOISE_TO_EVALUATE, "split=test")),
    "limit": Change("6", NOISE_TO_EVALUATE),
    "mean": Change("[0.1]", NOISE_TO_EVALUATE),
    "std": Change("[0.9]", NOISE_TO_EVALUATE),
    "eval_crop": Change("0.5", FILES_TO_EVALUATE),
    "interpolation": Change("bilinear", FILES_TO_EVALUATE),
    "unreadable": Change("skip", FILES_TO_EVALUATE),
    "mirror": Change("false", NOISE_TO_EVALUATE),
    "balance": Change("0.5", NOISE_TO_EVALUATE),
    "label_column": Change("color", FILES_TO_EVALUATE),
    "num_classes": Change("3", NOISE_TO_EVALUATE, says="data=synthetic has 3"),
    "num_images": Change("90", NOISE_TO_EVALUATE),
}
OF_MODEL = {
    "name": Change("other"),
    "image_size": Change("16"),
    "patch_size": Change("2", says="patch_embedding.projection.weight"),
    "grid_size": Change("4", ("model.patch_size=null", "++model.grid_size=2"), says="projection"),
    "num_channels": Change("1"),
    "hidden_size": Change("32"),
    "num_layers": Change("1"),
    "num_heads": Change("4"),
    "mlp_ratio": Change("2", says="mlp.fc1.weight"),
    "intermediate_size": Change("24", says="mlp.fc1.weight"),
    "activation": Change("relu"),
    "gated_mlp": Change("true", says="mlp.fc1.weight"),
    "dropout": Change("0.5"),
    "embedding_dropout": Change("0.5"),
    "attention_dropout": Change("0.5"),
    "projection_dropout": Change("0.5"),
    "mlp_dropout": Change("0.5"),
    "drop_path": Change("0.5"),
    "patch_dropout": Change("0.5"),
    "qkv_bias": Change("false", says="key.bias is no part"),
    "qk_norm": Change("true", says="query_norm.weight is missing"),
    "layer_scale": Change("0.1", says="scale1.factor is missing"),
    "layer_norm_eps": Change("0.01"),
    "position": Change("sincos2d"),
    "cls_token": Change("false", ("++model.global_pool=mean",)),
    "cls_position": Change("false"),
    "distill_token": Change("true", says="distill_token is missing"),
    "num_registers": Change("2", says="registers is missing"),
    "pre_norm": Change("true", says="embeddings.norm.weight is missing"),
    "global_pool": Change("mean"),
    "fc_norm": Change("true", ("++model.global_pool=mean",)),
    "representation_size": Change("8", says="pooler.dense.weight is missing"),
    "resnet_stages": Change(
        "[1]", ("model.image_size=16", "model.patch_size=8"), says="stem.conv.weight is missing"
    ),
    "resnet_style": Change("timm"),
    "conv_stem": Change("[16]", says="stem.layers.0.conv.weight is missing"),
    "conv_stem_strides": Change("[2]"),
    "pruned_heads": Change("{0:[1]}", says="blocks.0.attention.query.weight"),
    "init": Change("xavier"),
    "init_range": Change("0.5"),
}


@dataclass(frozen=True)
class Places:
    """What values refer to: folders of images, a table of one, runs and their best checkpoints."""

    folder: Path
    damaged: Path
    table: Path
    run: Path
    best: Path
    best_of_files: Path
    elsewhere: Path

    def fill(self, overrides: tuple[str, ...]) -> list[str]:
        """The overrides with paths in place of the names in braces; of one key the last alone."""
        filled = {}
        for override in overrides:
            for name, path in vars(self).items():
                override = override.replace("{" + name + "}", str(path))
            filled[override.partition("=")[0].lstrip("+")] = override
        return list(filled.values())


def write_table(path: Path, folder: Path) -> Path:
    """A table of the images in a folder, with two columns that can be learned."""
    lines = ["path,label,color"]
    for number, image in enumerate(sorted(folder.rglob("*.jpg"))):
        lines.append(f"{image},{image.parent.name},{'red' if number % 3 else 'blue'}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Places:
    root = tmp_path_factory.mktemp("every_key")
    splits = {"train": 12, "val": 2, "test": 2}
    folder = make_images(root / "images", splits, size=(20, 16))
    damaged = make_images(root / "damaged", splits, size=(20, 16))
    (damaged / "train" / "cat" / "0.jpg").write_bytes(b"no image")
    run, of_files = root / "run", root / "run_on_files"
    places = Places(
        folder=folder,
        damaged=damaged,
        table=write_table(root / "images.csv", folder / "train"),
        run=run,
        best=run / "checkpoints" / "best.safetensors",
        best_of_files=of_files / "checkpoints" / "best.safetensors",
        elsewhere=root / "elsewhere",
    )
    assert "error" not in observe_training(run, list(TINY + NOISE))
    assert "error" not in observe_training(of_files, places.fill(TINY + FOLDER))
    return places


@pytest.fixture(scope="module")
def observe_train(places, tmp_path_factory) -> Callable[..., Observed]:
    """What can be seen of a training; each is run once."""

    @functools.cache
    def observe(overrides: tuple[str, ...], after_a_run: bool = False) -> Observed:
        folder = tmp_path_factory.mktemp("train") / "run"
        return observe_training(folder, places.fill(overrides), places.run if after_a_run else None)

    return observe


@pytest.fixture(scope="module")
def observe_evaluate(places, tmp_path_factory) -> Callable[..., Observed]:
    """What can be seen of an evaluation; each is run once."""

    @functools.cache
    def observe(overrides: tuple[str, ...]) -> Observed:
        folder = tmp_path_factory.mktemp("evaluate") / "out"
        return observe_evaluation(folder, places.fill(overrides))

    return observe


def effect(key: str, change: Change, before: Observed, after: Observed) -> str | None:
    """What a key has changed, in words, or None where it was ignored."""
    if "error" in after and after != before:
        says = key if change.says is None else change.says
        return "refused" if says in after["error"] else None
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(changed) or None


def effect_in_evaluate(
    override: str, key: str, change: Change, observe: Callable[..., Observed]
) -> str | None:
    """override: the key as it is typed, maybe with ++, for a key that its group's file lacks."""
    before = observe(change.beside)
    after = observe((*change.beside, f"{override}={change.value}"))
    return effect(key, change, before, after)


def effect_in_train(key: str, change: Change, observe: Callable[..., Observed]) -> str | None:
    beside = TINY + change.data + change.beside
    before = observe(beside, change.after_a_run)
    after = observe((*beside, f"{key}={change.value}"), change.after_a_run)
    return effect(key, change, before, after)


TRAIN_KEYS = [item.key for item in settings_of(Config)]
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())


@pytest.mark.parametrize("key", TRAIN_KEYS)
def test_every_key_of_train_changes_something(key, observe_train):
    assert effect_in_train(key, KEYS_OF_TRAIN[key], observe_train), f"{key} is ignored"


@pytest.mark.parametrize("group", [name for name in GROUPS if name not in EXEMPT_GROUPS])
def test_every_group_of_train_changes_something(group, observe_train):
    assert effect_in_train(group, GROUPS_OF_TRAIN[group], observe_train), f"{group} is ignored"


@pytest.mark.parametrize("key", sorted(KEYS_OF_EVALUATE))
def test_every_key_of_evaluate_changes_something(key, observe_evaluate):
    change = KEYS_OF_EVALUATE[key]
    assert effect_in_evaluate(key, key, change, observe_evaluate), f"{key} is ignored"


@pytest.mark.parametrize("key", sorted(OF_DATA))
def test_every_key_of_an_evaluations_data_changes_something(key, observe_evaluate):
    full_key = f"data.{key}"
    found = effect_in_evaluate(f"++{full_key}", full_key, OF_DATA[key], observe_evaluate)
    assert found, f"{full_key} is ignored"


@pytest.mark.parametrize("key", sorted(OF_MODEL))
def test_every_key_of_an_evaluations_model_changes_something(key, observe_evaluate):
    change = OF_MODEL[key]
    change = change._replace(beside=(*NOISE_TO_EVALUATE, *SIZES, *change.beside))
    # Weights that do not fit name a size and not its key
    found = effect_in_evaluate(f"++model.{key}", key, change, observe_evaluate)
    assert found, f"model.{key} is ignored"


def test_no_key_and_no_group_is_missing_above():
    assert set(TRAIN_KEYS) == set(KEYS_OF_TRAIN)
    assert set(GROUPS) == GROUPS_OF_TRAIN.keys() | EXEMPT_GROUPS.keys()
    assert not GROUPS_OF_TRAIN.keys() & EXEMPT_GROUPS.keys()
    # A checkpoint takes these; the keys of both groups have tables of their own
    of_checkpoint = {"data.root", "data.limit", "data.eval_crop", "model.image_size"}
    of_evaluate = {item.key for item in settings_of(EvaluateConfig)} | of_checkpoint
    assert of_evaluate == set(KEYS_OF_EVALUATE)
    assert {item.key for item in settings_of(DataConfig)} == set(OF_DATA)
    assert {item.key for item in settings_of(ModelConfig)} == set(OF_MODEL)


def test_the_same_settings_again_change_nothing(places, tmp_path):
    runs = [observe_training(tmp_path / name, list(TINY + NOISE)) for name in ("a", "b")]
    assert effect("", Change(""), *runs) is None
    overrides = places.fill(OF_CHECKPOINT)
    evaluations = [observe_evaluation(tmp_path / name / "out", overrides) for name in ("c", "d")]
    assert effect("", Change(""), *evaluations) is None


@dataclass
class PlantedTrain(TrainConfig):
    planted: int = setting()


@dataclass
class PlantedConfig(Config):
    train: PlantedTrain = MISSING
    planted: str | None = setting()


@dataclass
class PlantedEvaluateConfig(EvaluateConfig):
    planted: int = setting()


@pytest.fixture
def planted_keys() -> Iterator[None]:
    """Both scripts have keys that nobody reads."""
    store = ConfigStore.instance()
    store.store(name="schema", node=PlantedConfig)
    store.store(name="evaluate_schema", node=PlantedEvaluateConfig)
    yield
    register()


@pytest.mark.usefixtures("planted_keys")
def test_a_key_that_does_nothing_is_found(observe_train, observe_evaluate):
    beside = ("planted=a", "train.planted=0")
    for key, value in (("planted", "b"), ("train.planted", "1")):
        assert effect_in_train(key, Change(value, beside), observe_train) is None
    # A refusal that names another key does not count
    elsewhere = Change("-1", (*beside, "optimizer.lr=-1"))
    assert effect_in_train("train.planted", elsewhere, observe_train) is None
    assert effect_in_train("seed", Change("1", beside), observe_train)

    change = Change("1", (*OF_CHECKPOINT, "planted=0"))
    assert effect_in_evaluate("planted", "planted", change, observe_evaluate) is None
    change = change._replace(value="val")
    assert effect_in_evaluate("split", "split", change, observe_evaluate)
