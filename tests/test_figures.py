"""The pictures and curves of TensorBoard that show what a model gets right and wrong."""

import pytest
import torch
from helpers import TINY, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn

from vit.data.preprocessing import Preprocessing
from vit.evaluation.accuracy import evaluate
from vit.figures.predictions import (
    RIGHT,
    WRONG,
    Figures,
    confused_table,
    confusion_figure,
    parameters_by_layer,
    prediction_figure,
)
from vit.model.vision_transformer import VisionTransformer
from vit.runs.metrics_log import Tracker
from vit.runs.tensorboard import LAYOUT
from vit.runtime.precision import Precision

FP32 = Precision("fp32", torch.device("cpu"))


@pytest.mark.parametrize("classes", [3, 30])
def test_confusion_counts_every_image_once(classes):
    logits, labels = (
        torch.randn(500, classes, generator=torch.Generator().manual_seed(0)),
        torch.arange(500) % classes,
    )
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    metrics = evaluate(
        nn.Identity(), zip(logits.split(64), labels.split(64), strict=True), FP32, confusion
    )
    assert confusion.sum() == metrics["n"] == 500
    assert confusion.trace() / 500 == pytest.approx(metrics["top1"])
    assert confusion.sum(1).tolist() == labels.bincount().tolist()
    assert confusion.sum(0).tolist() == logits.argmax(1).bincount(minlength=classes).tolist()
    assert metrics == evaluate(nn.Identity(), [(logits, labels)], FP32) | {"loss": metrics["loss"]}


def test_pictures_of_any_number_of_classes():
    for classes in (2, 20, 21, 150, 1000):
        names = [f"Klasse | {number} 鳥" for number in range(classes)]
        confusion = torch.zeros(classes, classes, dtype=torch.int64).fill_diagonal_(3)
        confusion[0, 1] = 1
        picture = confusion_figure(confusion, names)
        assert picture.dtype == torch.uint8
        assert picture.shape[0] == 3
        assert max(picture.shape) < 1200
        assert (
            confused_table(confusion, names).splitlines()[2]
            == "| Klasse \\| 0 鳥 | Klasse \\| 1 鳥 | 1 of 4 |"
        )


def test_predictions_say_what_is_and_what_is_taken_for():
    pictures = torch.zeros(10, 3, 64, 96)
    right = torch.eye(4)[torch.arange(10) % 4]
    grid = prediction_figure(pictures, right, torch.arange(10) % 4, list("abcd"))
    assert grid.shape[0] == 3
    wrong = prediction_figure(pictures, right.roll(1, 0), torch.arange(10) % 4, list("abcd"))
    colours = [set(map(tuple, each.flatten(1).T.tolist())) for each in (grid, wrong)]
    assert RIGHT in colours[0]
    assert WRONG not in colours[0]
    assert WRONG in colours[1]


def read(folder):
    return EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "histograms": 0}
    ).Reload()


def test_gradients_are_those_of_the_layers(tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=(16, 16), patch_size=8, hidden_size=32, num_layers=2, num_heads=4, num_classes=3
    )
    nn.init.normal_(model.head.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tracker = Tracker(tmp_path, 0, 6, 3.0, 4)
    done = [0]
    shown = Figures(
        tracker,
        list("abc"),
        Preprocessing((16, 16), 3, (0.5,), (0.5,), None, "bilinear"),
        FP32,
        torch.zeros(2, 3, 16, 16),
        torch.zeros(2, dtype=torch.int64),
    )
    shown.watch_gradients(model, optimizer, lambda: done[0] + 1, 3)
    images = torch.randn(4, 3, 16, 16)
    for _ in range(6):
        model(images).square().sum().backward()
        norms = {
            name: torch.stack([each.grad.norm() for each in layer]).norm().item()
            for name, layer in parameters_by_layer(model).items()
        }
        optimizer.step()
        optimizer.zero_grad()
        done[0] += 1
    tracker.close()
    assert list(norms) == ["embeddings", "block 00", "block 01", "final norm", "head"]
    assert sum(map(len, parameters_by_layer(model).values())) == len(list(model.parameters()))
    events = read(tmp_path)
    for name, norm in norms.items():
        curve = events.Scalars(f"gradients/{name}")
        assert [event.step for event in curve] == [1, 3, 6]
        assert curve[-1].value == pytest.approx(norm, rel=1e-4)


def test_many_classes_get_a_histogram(tmp_path):
    tracker = Tracker(tmp_path, 0, 100, 10.0, 4)
    shown = Figures(
        tracker,
        [str(number) for number in range(30)],
        Preprocessing((8, 8), 3, (0.5,), (0.5,), None, "bilinear"),
        FP32,
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, dtype=torch.int64),
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 30))
    for step in range(1, 101):
        shown.evaluated(model, torch.eye(30, dtype=torch.int64), step)
    tracker.close()
    events = read(tmp_path)
    assert len(events.Histograms("classes/validation accuracy of the classes")) == 100
    assert [event.step for event in events.Images("pictures/confusion of the classes")] == [
        1,
        *range(10, 101, 10),
    ]
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("classes")]


def test_a_real_run_has_the_tags(tmp_path):
    done = train(
        tmp_path,
        *TINY,
        "train.steps=40",
        "train.log_every=2",
        "train.eval_every=1",
        "hydra.run.dir=run",
    )
    assert done.returncode == 0, done.stderr
    events = read(tmp_path / "run")
    tags = events.Tags()
    assert {
        "pictures/confusion of the classes",
        "pictures/predictions on validation images",
        "pictures/training images",
        "pictures/attention on validation images",
    } <= set(tags["images"])
    assert {
        *(f"classes/{digit:02} {digit}" for digit in range(10)),
        "gradients/embeddings",
        "gradients/block 00",
        "gradients/head",
    } <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("gradients/head")] == [1, 20, 40]
    assert {
        "loss/train",
        "loss/val",
        "top1/val",
        "optimizer/learning_rate",
        "speed/images_per_second",
    } <= set(tags["scalars"])
    layout = layout_pb2.Layout.FromString(
        events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    assert [category.title for category in layout.category] == list(LAYOUT)
    assert [chart.title for chart in layout.category[0].chart] == [
        "loss",
        "top-1",
        "learning rate",
        "images per second",
    ]
