"""Views and competing classes change what is asked of a model as the protocol says."""

import os

import numpy as np
import pytest
import torch
from judged_models import write_noise
from noise_models import measured_model, restored_model
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

from vit.data.preprocessing import Preprocessing
from vit.data.splits import ImageSplit
from vit.data.views import FiveCrops
from vit.errors import ConfigError
from vit.evaluation.measurements import MEASUREMENTS, in_views, measure_accuracy, measure_all
from vit.evaluation.metrics import top_of_answers
from vit.evaluation.protocol import Judge, Protocol, describe_input, protocol_line

CROP = Preprocessing((16, 12), 3, (0.5,), (0.25,), 0.8, "bicubic")


def random_model(classes, count, **changes):
    """restored_model() with random weights everywhere: a new head gives all classes the same."""
    restored = restored_model(classes, count, **changes)
    with torch.no_grad():
        for parameter in restored.model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return restored


def with_data_config(model, mirror=True):
    """The measured model of a data set whose images may be mirrored or not."""
    config = model.restored.config
    config.data = type("Data", (), {"mirror": mirror})()
    return model


def mean_of_probabilities(network: nn.Module, views: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([network(view).softmax(1) for view in views]).mean(0)


def test_mirrored_views_are_averaged_as_probabilities():
    restored = random_model(["a", "b", "c"], 20)
    images = restored.model.preprocessing.to_input(restored.data.test.pixels)
    judge = Judge(restored.model, Protocol(views="mirrored"))
    expected = mean_of_probabilities(restored.model, [images, images.flip(3)])
    with torch.no_grad():
        torch.testing.assert_close(judge(images).exp(), expected)

    model = with_data_config(measured_model(restored))
    numbers, line = measure_accuracy(in_views(model, "mirrored"), frozenset())
    labels = restored.data.test.labels
    loss = -expected[torch.arange(20), labels].log().mean().item()
    assert numbers["loss"] == pytest.approx(loss, rel=1e-5)
    assert numbers["top1"] == (expected.argmax(1) == labels).double().mean().item()
    assert numbers["protocol"]["views"].startswith("2 views (the image and its mirror image)")
    assert "2 views" in line
    one, _ = measure_accuracy(in_views(model, "one"), frozenset())
    assert one["loss"] != numbers["loss"]


@pytest.mark.parametrize("size", [(31, 24), (24, 31), (90, 20)])
def test_the_crops_are_torchvisions(tmp_path, size):
    write_noise(tmp_path / "image.png", 1, size)
    square = Preprocessing((16, 16), 3, (0.5,), (0.25,), 0.8, "bicubic")
    image = Image.open(tmp_path / "image.png")
    resized = transforms.Resize(20, InterpolationMode.BICUBIC)(image)
    expected = [transforms.functional.pil_to_tensor(c) for c in transforms.FiveCrop(16)(resized)]
    crops = FiveCrops(square).read_pixels(tmp_path / "image.png")
    assert torch.equal(crops, torch.cat(expected))
    center = square.read_pixels(tmp_path / "image.png")
    assert torch.equal(crops[-3:], center)
    inputs = FiveCrops(square).to_input(crops[None])
    assert torch.equal(inputs, square.to_input(torch.stack(expected)))


@pytest.mark.parametrize("size", [(3, 3000), (2000, 1)])
def test_of_a_long_strip_the_crops_alone_are_resized(tmp_path, monkeypatch, size):
    write_noise(tmp_path / "strip.png", 0, size)
    whole = FiveCrops(CROP).read_pixels(tmp_path / "strip.png").int()
    sizes, resize = [], Image.Image.resize

    def noting(image, size, *arguments):
        sizes.append(size)
        return resize(image, size, *arguments)

    monkeypatch.setattr(Image.Image, "resize", noting)
    monkeypatch.setattr("vit.data.preprocessing.MAX_PIXELS", 1)
    crops = FiveCrops(CROP).read_pixels(tmp_path / "strip.png").int()
    assert (crops - whole).abs().max() <= 1
    assert sizes == [(12, 16)] * 5


@pytest.mark.parametrize(("views", "mirrored"), [("five_crop", False), ("ten_crop", True)])
def test_crops_are_averaged_as_probabilities(tmp_path, views, mirrored):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        write_noise(path, number, (30 + number, 24))
    restored = random_model(["a", "b"], 4, image_size=(16, 12))
    restored.model.preprocessing = CROP
    images = ImageSplit("files", torch.tensor([0, 1, 1]), paths=as_bytes(paths))
    object.__setattr__(restored.data, "test", images)
    model = in_views(with_data_config(measured_model(restored)), views)
    numbers, _ = measure_accuracy(model, frozenset({"logits"}))

    pixels = torch.stack([FiveCrops(CROP).read_pixels(path) for path in paths])
    crops = [CROP.to_input(pixels[:, 3 * number : 3 * number + 3]) for number in range(5)]
    if mirrored:
        crops += [crop.flip(3) for crop in crops]
    expected = mean_of_probabilities(restored.model, crops)
    torch.testing.assert_close(model.outputs.logits.exp(), expected)
    loss = -expected[torch.arange(3), images.labels].log().mean().item()
    assert numbers["loss"] == pytest.approx(loss, rel=1e-5)
    assert numbers["n"] == 3


def as_bytes(paths):
    return np.array([os.fsencode(path) for path in paths])


def test_classes_that_do_not_compete_get_nothing():
    restored = random_model(["a", "b", "c", "d"], 20)
    images = restored.model.preprocessing.to_input(restored.data.test.pixels)
    competing = torch.tensor([1, 3])
    judge = Judge(restored.model, Protocol(competing=competing))
    with torch.no_grad():
        asked, logits = judge(images), restored.model(images)
    torch.testing.assert_close(asked.softmax(1)[:, competing], logits[:, competing].softmax(1))
    assert (asked.softmax(1)[:, [0, 2]] == 0).all()
    views = Judge(restored.model, Protocol(views="mirrored", competing=competing))
    with torch.no_grad():
        assert (views(images).exp()[:, [0, 2]] == 0).all()


def test_several_right_answers():
    logits = torch.tensor([[0.1, 0.9, 0.0, 0, 0, 0, 0], [9.0, 8, 7, 6, 5, 4, 3]])
    answers = torch.zeros(2, 7, dtype=torch.bool)
    answers[0, [1, 4]] = True
    answers[1, 4] = True
    assert top_of_answers(logits, answers) == {"top1": 0.5, "top5": 1.0}
    answers[1, 4], answers[1, 5] = False, True
    assert top_of_answers(logits, answers) == {"top1": 0.5, "top5": 0.5}


def test_with_several_right_answers_there_is_no_loss():
    restored = restored_model(["a", "b"], 10)
    answers = torch.ones(10, 2, dtype=torch.bool)
    object.__setattr__(restored, "protocol", Protocol(answers=answers))
    model = measured_model(restored)
    numbers, line = measure_accuracy(model, frozenset())
    assert numbers["loss"] is None
    assert numbers["top1"] == 1
    assert "loss" not in line
    assert "any of an image's labels is right" in line
    for key, measurement in MEASUREMENTS.items():
        with pytest.raises(ConfigError, match=rf"{key}=true needs one label an image"):
            measurement.check(model)


def test_the_line_names_everything():
    restored = restored_model(["a", "b", "c"], 2)
    protocol = Protocol("pets taken whole", competing=torch.tensor([0, 1]))
    described = protocol.describe(CROP, restored.data.test, ["a", "b", "c"])
    assert described["classes_without_images"] == ["c"]
    assert protocol_line(described) == (
        "protocol: pets taken whole; 2 of the model's 3 classes compete; 1 of the model's have no "
        "image (c); one view; resized to 16x12 px (bicubic)"
    )


def test_the_input_in_words():
    files = ImageSplit("files", torch.tensor([0]), paths=as_bytes(["a.png"]))
    assert describe_input(CROP, files) == "to cover 20x15 px (bicubic), crop 16x12 px"
    standard = Preprocessing((224, 224), 3, (0.5,), (0.5,), 0.875, "bicubic")
    assert describe_input(standard, files) == "shorter side to 256 px (bicubic), crop 224x224 px"
    squash = Preprocessing((8, 8), 3, (0.5,), (0.5,), None, "bilinear")
    assert describe_input(squash, files) == "squashed to 8x8 px (bilinear)"
    pixels = ImageSplit("noise", torch.tensor([0]), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert describe_input(squash, pixels) == "8x8 px as they are"


def test_views_that_do_not_exist_are_refused():
    model = with_data_config(measured_model(restored_model(["a", "b"], 4)), mirror=False)
    with pytest.raises(ConfigError, match=r"views=mirrored does not go with data\.mirror=false"):
        in_views(model, "mirrored")
    with_data_config(model)
    with pytest.raises(ConfigError, match="views=five_crop is for image files"):
        in_views(model, "five_crop")
    images = ImageSplit("files", torch.tensor([0]), paths=as_bytes(["a.png"]))
    object.__setattr__(model.restored.data, "test", images)
    with pytest.raises(ConfigError, match=r"views=ten_crop needs .*data\.eval_crop=0\.875"):
        in_views(model, "ten_crop")


def test_measurements_of_one_view():
    model = in_views(with_data_config(measured_model(random_model(["a", "b"], 9))), "mirrored")
    for key in ("knn", "corruptions"):
        with pytest.raises(ConfigError, match=f"{key}=true looks at one view"):
            MEASUREMENTS[key].check(model)
    numbers, _ = measure_all(model, [MEASUREMENTS["report"]])
    assert numbers["nll"] == pytest.approx(numbers["loss"], rel=1e-5)
