"""The figures and curves of TensorBoard that show what a model gets right and wrong."""

from pathlib import Path

import pytest
import torch
from helpers import TINY, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn

from vit.data.preprocessing import Preprocessing
from vit.figures.predictions import parameters_by_layer
from vit.model.vision_transformer import VisionTransformer
from vit.runs.tensorboard import LAYOUT, TensorBoard
from vit.runtime.precision import Precision
from vit.training.state import Progress
from vit.training.validation_board import ValidationBoard, watch_gradients

FP32 = Precision("fp32", torch.device("cpu"))


def read_events(folder: Path) -> EventAccumulator:
    everything = {"scalars": 0, "images": 0, "histograms": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def test_gradients_are_those_of_the_layers(tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=(16, 16), patch_size=8, hidden_size=32, num_layers=2, num_heads=4, num_classes=3
    )
    nn.init.normal_(model.head.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    board = TensorBoard(tmp_path, None)
    progress = Progress()
    watch_gradients(board, model, optimizer, progress, 3)
    images = torch.randn(4, 3, 16, 16)
    for _ in range(6):
        model(images).square().sum().backward()
        norms = {
            name: torch.stack([each.grad.norm() for each in layer]).norm().item()
            for name, layer in parameters_by_layer(model).items()
        }
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
    board.close()
    events = read_events(tmp_path)
    assert list(norms) == ["embeddings", "block 00", "block 01", "final norm", "head"]
    for name, norm in norms.items():
        curve = events.Scalars(f"gradients/{name}")
        assert [event.step for event in curve] == [1, 3, 6]
        assert curve[-1].value == pytest.approx(norm, rel=1e-4)


def test_many_classes_get_a_histogram(tmp_path):
    board = TensorBoard(tmp_path, None)
    validation = ValidationBoard(
        board,
        [str(number) for number in range(30)],
        Preprocessing((8, 8), 3, (0.5,), (0.5,), None, "bilinear"),
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, dtype=torch.int64),
        total_steps=100,
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 30))
    for step in range(1, 101):
        validation.evaluated(model, FP32, torch.eye(30, dtype=torch.int64), step)
    board.close()
    events = read_events(tmp_path)
    assert len(events.Histograms("classes/validation accuracy of the classes")) == 100
    drawn = [event.step for event in events.Images("pictures/confusion of the classes")]
    assert drawn == [1, *range(10, 101, 10)]
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
    events = read_events(tmp_path / "run" / "tensorboard")
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
        "loss/train",
        "loss/val",
        "top1/val",
        "optimizer/learning_rate",
        "speed/images_per_second",
    } <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("gradients/head")] == [1, 20, 40]

    value = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(value)
    assert [category.title for category in layout.category] == list(LAYOUT)
    charts = [chart.title for chart in layout.category[0].chart]
    assert charts == ["loss", "top-1", "learning rate", "images per second"]
