"""What evaluate.py measures of a model beyond accuracy, and what it refuses to measure."""

import math

import numpy as np
import pytest
import torch
from helpers import make_images
from limited_memory import memory_of
from noise_models import measured_model, restored_model
from sklearn.metrics import top_k_accuracy_score

from vit.data.splits import ImageDataset, ImageSplit
from vit.errors import CheckpointError, ConfigError
from vit.evaluation.corruptions import CORRUPTIONS
from vit.evaluation.measurements import (
    MEASUREMENTS,
    check_corruptions,
    check_neighbors,
    load_pixels,
    measure_all,
    measure_calibration,
    record_outputs,
    validation_logits,
)
from vit.evaluation.metrics import negative_log_likelihood
from vit.runtime.precision import Precision

MEASURED = list(MEASUREMENTS.values())


def without_validation(restored):
    """The same data set, from which nothing is held out."""
    data = restored.data
    object.__setattr__(restored, "data", ImageDataset(data.classes, data.train, None, data.test))
    return restored


def test_the_record_is_the_models_outputs_in_order():
    restored = restored_model(["a", "b"], 150)
    test = restored.data.test
    with record_outputs(restored.model, logits=True, features=True) as record:
        metrics = restored.measure(restored.model, "test", workers=0, counted=record.keep)
    with torch.no_grad():
        trace = restored.model.trace(restored.model.preprocessing.to_input(test.pixels))
    assert torch.allclose(record.logits, trace.logits, atol=1e-5)
    assert torch.allclose(record.features, trace.pooled, atol=1e-5)
    scores = record.logits[:, 1] - record.logits[:, 0]
    assert top_k_accuracy_score(test.labels, scores, k=1) == metrics["top1"]
    assert not restored.model._forward_hooks
    assert not restored.model.head._forward_pre_hooks


def test_only_what_is_asked_for_is_recorded():
    restored = restored_model(["a", "b"], 10)
    with record_outputs(restored.model, logits=True) as record:
        restored.measure(restored.model, "test", workers=0, counted=record.keep)
    assert record.logits.shape == (10, 2)
    assert not record.feature_batches


def test_all_measurements_of_a_model():
    model = measured_model(restored_model(["a", "b", "c"], 60, image_size=16))
    numbers, lines = measure_all(model, MEASURED)
    assert len(lines) == 1 + len(MEASUREMENTS)
    assert numbers["split"] == "test"
    assert numbers["data"] == "noise test, 60 images"
    assert numbers["checkpoint"] == "x.safetensors"
    assert numbers["precision"] == "fp32"
    assert numbers["n"] == 60
    low, high = numbers["top1_interval_95"]
    assert low < numbers["top1"] < high
    assert numbers["nll"] == pytest.approx(numbers["loss"], rel=1e-6)
    assert numbers["nll_at_temperature"] < numbers["nll"] + 0.05
    assert numbers["knn_bank"] == "noise train, 60 images"
    assert set(numbers["corruptions"]) == set(CORRUPTIONS)
    every = [top1 for row in numbers["corruptions"].values() for top1 in row]
    assert numbers["corruptions_top1"] == pytest.approx(sum(every) / 50)


def test_accuracy_alone_records_nothing():
    model = measured_model(restored_model(["a", "b"], 10))
    numbers, lines = measure_all(model, [])
    assert len(lines) == 1
    assert "knn_top1" not in numbers
    assert not model.outputs.logit_batches
    assert not model.outputs.feature_batches


@pytest.mark.parametrize("at_the_end", [False, True])
def test_all_measurements_are_the_same_where_memory_ends(at_the_end, capsys):
    whole, _ = measure_all(measured_model(restored_model(["a", "b", "c"], 60)), MEASURED)
    model = measured_model(restored_model(["a", "b", "c"], 60))
    with memory_of(model.restored.model, 13, at_the_end) as sizes:
        numbers, _ = measure_all(model, MEASURED)
    assert max(sizes[3:]) == 8
    assert sizes[:3] == [60, 30, 15]
    assert "memory ended with 15 images at once: from here on 8" in capsys.readouterr().out
    assert len(model.outputs.logits) == len(model.outputs.features) == 60
    for key, value in whole.items():
        if isinstance(value, float) and key != "images_per_second":
            assert numbers[key] == pytest.approx(value, rel=1e-5), key


def test_every_image_is_its_own_nearest_neighbor():
    model = measured_model(restored_model(["a", "b"], 150), split="train")
    numbers, _ = measure_all(model, [MEASUREMENTS["knn"]])
    assert numbers["knn_top1"] > 0.6


def test_the_temperature_is_fitted_on_the_validation_split():
    model = measured_model(restored_model(["a", "b"], 80))
    numbers, _ = measure_all(model, [MEASUREMENTS["report"]])
    # At the temperature the loss on val is lower than beside it
    logits, labels = validation_logits(model), model.restored.data.val.labels
    losses = [
        negative_log_likelihood(logits, labels, numbers["temperature"] * factor)
        for factor in (0.9, 1.0, 1.1)
    ]
    assert min(losses) == losses[1]


def test_without_a_validation_split_no_temperature_is_fitted():
    model = measured_model(without_validation(restored_model(["a", "b"], 20)))
    numbers, _ = measure_all(model, [MEASUREMENTS["report"]])
    assert numbers["temperature"] is None
    assert "nll_at_temperature" not in numbers


def test_logits_that_are_not_finite_are_refused():
    model = measured_model(restored_model(["a", "b"], 1))
    model.outputs.logit_batches.append(torch.tensor([[math.nan, 0.0]]))
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        measure_calibration(model)


@pytest.mark.parametrize(
    ("precision", "advice"), [("bf16", "precision=fp32"), ("fp32", "have diverged")]
)
def test_no_accuracy_is_reported_of_outputs_that_are_not_finite(precision, advice):
    restored = restored_model(["a", "b"], 6)
    cpu = torch.device("cpu")
    object.__setattr__(restored, "precision", Precision(precision, cpu))
    with torch.no_grad():
        restored.model.head.weight.fill_(math.inf)
    with pytest.raises(ConfigError, match=f"not finite in {precision}.*{advice}"):
        measure_all(measured_model(restored), [])


def test_neighbors_of_the_training_images_are_refused():
    restored = restored_model(["a", "b"], 4)
    check_neighbors(measured_model(restored, "test"))
    with pytest.raises(ConfigError, match=r"knn=true.* split=train"):
        check_neighbors(measured_model(restored, "train"))


def test_corruptions_of_large_images_are_refused():
    check_corruptions(measured_model(restored_model(["a", "b"], 4)))
    restored = restored_model(["a", "b"], 4, image_size=72, patch_size=24)
    with pytest.raises(ConfigError, match=r"corruptions=true.* 64 px.* 72 x 72 px"):
        check_corruptions(measured_model(restored))
    # Image files are seen at the model's size
    files = ImageSplit("files", torch.arange(2), paths=np.array([b"a.jpg", b"b.jpg"]))
    data = ImageDataset(["a", "b"], files, files, files)
    object.__setattr__(restored, "data", data)
    with pytest.raises(ConfigError, match="72 x 72 px"):
        check_corruptions(measured_model(restored))


def test_image_files_are_corrupted_as_the_model_sees_them(tmp_path):
    make_images(tmp_path, {"test": 2})
    restored = restored_model(["cat", "dog"], 4, image_size=16)
    paths = sorted((tmp_path / "test").rglob("*.jpg"))
    encoded = np.array([str(path).encode() for path in paths])
    files = ImageSplit("files", torch.tensor([0, 0, 1, 1]), paths=encoded)
    images = load_pixels(restored, files, workers=0)
    assert images.pixels.shape == (4, 3, 16, 16)
    preprocessing = restored.model.preprocessing
    inputs = torch.stack([preprocessing(path) for path in paths])
    assert torch.allclose(preprocessing.to_input(images.pixels), inputs, atol=1e-6)
