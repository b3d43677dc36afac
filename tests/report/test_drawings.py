"""The figures of the report that don't show single images."""

import pytest
import torch

from vit.evaluation.metrics import reliability
from vit.figures.themes import LIGHT, themed
from vit.report.drawings import (
    draw_calibration,
    draw_curves,
    filter_components,
    mosaic,
    position_similarity,
)


def test_filters():
    weight = torch.zeros(6, 3, 4, 4)
    weight[:3, 0, 1, 2] = 2.0
    weight[3:, 0, 1, 2] = -2.0  # one direction alone
    first = filter_components(weight, 5)[0]
    assert first[0, 1, 2] == pytest.approx(1.0)
    assert first[1, 0, 0] == pytest.approx(0.5)


def test_similarity_of_positions():
    similarity = position_similarity(torch.eye(6), (2, 3))
    assert similarity.shape == (2, 3, 2, 3)
    assert similarity[1, 2, 1, 2] == 1
    assert similarity.sum() == 6


def test_the_gaps_of_a_mosaic_are_transparent():
    image = mosaic(torch.ones(2, 3, 3, 5, 7), gap=4)
    assert image.shape == (4, 2 * 5 + 4, 3 * 7 + 2 * 4)
    assert image[3].sum() == 6 * 35
    assert torch.equal(image[0], image[3])


def test_calibration_curves_have_the_points_of_the_filled_bins():
    logits = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    bins = reliability(logits, torch.arange(500) % 4, 15)
    with themed(LIGHT):
        figure = draw_calibration(LIGHT, [("as it is", bins), ("with temperature", bins)])
    upper, lower = figure.axes
    points = upper.lines[1].get_xydata()
    assert len(points) == int((bins.count > 0).sum())
    heights = [bar.get_height() for bar in lower.patches]
    assert heights == bins.count.tolist() * 2


def test_curves_of_the_splits_that_are_there():
    rows = [
        {"step": 1, "split": "train", "loss": 2.0},
        {"step": 2, "split": "train", "loss": 1.0},
        {"step": 2, "split": "val", "loss": 1.5, "top1": 0.5},
        {"step": 2, "split": "test", "loss": 1.4, "top1": 0.6},
    ]
    with themed(LIGHT):
        figure = draw_curves(LIGHT, rows, best_step=None)
    labels = [[line.get_label() for line in axes.lines] for axes in figure.axes]
    assert labels == [["train", "val", "test"], ["val", "test"]]
    colors = [{line.get_label(): line.get_color() for line in axes.lines} for axes in figure.axes]
    assert colors[0]["val"] == colors[1]["val"] != colors[0]["train"]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 2.0], [2, 1.0]]
