"""A checkpoint is measured again from its file alone, and foreign weights on a data set."""

from pathlib import Path

import pytest
import torch
from helpers import make_images

from vit.checkpoints.file import read_checkpoint
from vit.config.data import DataConfig
from vit.config.train import TrainConfig
from vit.errors import CheckpointError, ConfigError, DataError
from vit.evaluation.restore import (
    build_for_weights,
    default_batch_size,
    preprocessing_for,
    restore,
    restore_pretrained,
)
from vit.model.vision_transformer import VisionTransformer
from vit.weights.description import Weights

CPU = torch.device("cpu")


@pytest.fixture
def best(digits_run) -> Path:
    return digits_run[0] / "checkpoints" / "best.safetensors"


def test_a_checkpoint_brings_its_data_and_precision(best):
    restored = restore(best, {"data.limit": 50}, CPU)
    header = read_checkpoint(best)[1]
    assert not restored.model.training
    assert restored.precision.name == header["precision"]
    assert restored.data.classes == header["classes"]
    assert restored.config.data.limit == 50
    assert restored.measure(restored.model, "test", workers=0)["n"] == 50


def test_precision_and_batch_size_can_be_given(best):
    header = read_checkpoint(best)[1]
    restored = restore(best, {}, CPU)
    assert restored.batch_size == header["config"]["train"]["batch_size"] == 128
    given = restore(best, {}, CPU, precision="bf16", batch_size=7)
    assert given.precision.name == "bf16"
    assert given.batch_size == 7
    metrics, expected = (each.measure(each.model, "test", 0) for each in (given, restored))
    assert metrics["n"] == expected["n"]
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert metrics["loss"] != expected["loss"]


@pytest.mark.parametrize("batch_size", [1, 7, 359, 1000])
def test_the_result_does_not_depend_on_the_batch_size(best, batch_size):
    expected = restore(best, {}, CPU)
    given = restore(best, {}, CPU, batch_size=batch_size)
    metrics, known = (each.measure(each.model, "test", 0) for each in (given, expected))
    assert metrics == known | {"loss": pytest.approx(known["loss"], rel=1e-6)}


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "expected"),
    [(64, None, 64), (4096, None, 256), (4096, 32, 32), (4096, 512, 256)],
)
def test_the_batch_is_the_runs_within_limits(batch_size, micro_batch_size, expected):
    train = TrainConfig(batch_size=batch_size, micro_batch_size=micro_batch_size)
    assert default_batch_size(train) == expected


def test_other_training_images_are_mentioned(best, tmp_path, capsys):
    restore(best, {}, CPU)
    assert "warning" not in capsys.readouterr().out
    restore(best, {"data.val_fraction": 0.3}, CPU)
    assert "warning: the images of train (digits, " in capsys.readouterr().out


def test_a_change_that_does_not_fit_is_refused(best):
    with pytest.raises(ConfigError, match=r"best\.safetensors"):
        restore(best, {"data.limit": "many"}, CPU)


def test_classes_of_another_data_set_are_refused(best, tmp_path):
    make_images(tmp_path, {"train": 4, "test": 2})
    changes = {"data.name": "folder", "data.root": str(tmp_path)}
    with pytest.raises((CheckpointError, DataError), match="class"):
        restore(best, changes, CPU)


def test_weights_need_a_data_set(best):
    with pytest.raises(ConfigError, match="data=NAME"):
        restore_pretrained(best, {"root": None}, None, CPU)


def test_weights_with_another_number_of_classes_are_refused(best, tmp_path):
    make_images(tmp_path, {"train": 4, "test": 2})
    data = {
        "name": "folder",
        "root": str(tmp_path),
        "mean": [0.5],
        "std": [0.5],
        "test_fraction": 0.1,
    }
    with pytest.raises(CheckpointError, match=r"10 classes.* 2"):
        restore_pretrained(best, data, None, CPU)


SETTINGS = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_layers": 1, "num_heads": 2}


def test_a_model_keeps_what_its_weights_were_trained_with():
    trained_with = {"num_channels": 3, "activation": "relu", "num_classes": 5}
    weights = Weights(Path("file"), "test", {}, SETTINGS | trained_with)
    alone = build_for_weights(weights.path, weights, None)
    assert alone.head.out_features == 5
    # The group `model` chooses the sizes, the file the activation
    larger = {"name": "larger", **SETTINGS, "image_size": 16, "activation": "gelu"}
    built = build_for_weights(weights.path, weights, larger)
    assert built.embeddings.patch_embedding.image_size == (16, 16)
    activation = built.encoder.blocks[0].mlp.activation
    assert activation(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]


def test_weights_of_an_impossible_model_are_refused():
    weights = Weights(Path("file"), "test", {}, SETTINGS | {"num_heads": 3, "num_classes": 2})
    with pytest.raises(CheckpointError, match="file: no model can be built"):
        build_for_weights(weights.path, weights, None)


def test_weights_without_a_head_are_refused():
    weights = Weights(Path("file"), "test", {}, SETTINGS)
    with pytest.raises(CheckpointError, match="file: holds no head"):
        build_for_weights(weights.path, weights, None)


def test_the_assumed_preprocessing_is_the_papers():
    settings = SETTINGS | {"num_channels": 1, "num_classes": 2}
    weights = Weights(Path("file"), "test", {}, settings)
    model = VisionTransformer(**settings)
    preprocessing = preprocessing_for(model, weights, DataConfig(), typed=())
    assert preprocessing.image_size == (8, 8)
    assert preprocessing.num_channels == 1
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)
    images = black_and_white.expand(2, 1, 8, 8)
    assert preprocessing.to_input(images)[:, 0, 0, 0].tolist() == [-1.0, 1.0]
