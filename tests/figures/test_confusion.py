"""The confusion matrix as an image, for few and for many classes."""

import pytest
import torch

from vit.figures.confusion import classes_per_cell, draw_confusion, sum_blocks
from vit.figures.themes import DARK, LIGHT, rasterize, themed


def confusion_of(num_classes: int) -> torch.Tensor:
    confusion = torch.eye(num_classes, dtype=torch.long) * 3
    confusion[-1, 0] = 1
    return confusion


@pytest.mark.parametrize(("num_classes", "cells"), [(3, 3), (250, 250), (601, 201)])
def test_no_image_is_lost_where_classes_share_a_cell(num_classes, cells):
    names = [str(label) for label in range(num_classes)]
    figure = draw_confusion(LIGHT, confusion_of(num_classes), names)
    drawn = figure.axes[0].images[0].get_array()
    assert drawn.shape == (cells, cells)
    assert drawn[-1, 0] == pytest.approx(0.25)
    assert drawn.sum() == pytest.approx(cells)


def test_blocks_are_summed():
    counts = torch.arange(9).reshape(3, 3)
    assert sum_blocks(counts, 2).tolist() == [[0 + 1 + 3 + 4, 2 + 5], [6 + 7, 8]]
    assert torch.equal(sum_blocks(counts, 1), counts)
    assert [classes_per_cell(count) for count in (1, 250, 251, 1000)] == [1, 1, 2, 4]


@pytest.mark.parametrize("num_classes", [2, 20, 21, 40, 41, 150, 1000])
@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_images_of_any_number_of_classes(num_classes, theme):
    names = [f"Klasse $ {number} 鳥" for number in range(num_classes)]
    with themed(theme):
        pixels = rasterize(draw_confusion(theme, confusion_of(num_classes), names))
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == 3
    assert 300 < min(pixels.shape[1:]) <= max(pixels.shape[1:]) < 1200
    corner = pixels[:, 0, 0].tolist()
    assert corner == [int(theme.background[i : i + 2], 16) for i in (1, 3, 5)]


@pytest.mark.parametrize("num_classes", [2, 7, 20, 33, 100, 250, 999])
def test_cells_have_whole_pixels(num_classes):
    confusion = confusion_of(num_classes)
    figure = draw_confusion(LIGHT, confusion, [str(label) for label in range(num_classes)])
    width, height = figure.get_size_inches() * figure.dpi
    box = figure.axes[0].get_position()
    cells = figure.axes[0].images[0].get_array().shape[0]
    assert (box.width * width / cells) % 1 == pytest.approx(0, abs=1e-6) or (
        box.width * width / cells
    ) % 1 == pytest.approx(1, abs=1e-6)
    assert box.width * width == pytest.approx(box.height * height)
