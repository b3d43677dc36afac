"""Attention maps laid over images."""

import pytest
import torch

from vit.data.preprocessing import Preprocessing
from vit.figures.attention import (
    COLORMAP,
    attention_figure,
    colorize,
    displayable_images,
    enlarge,
    head_panels,
    layers_to_show,
    overlay,
    tile,
)
from vit.model.attention_maps import head_maps, trace_images
from vit.model.vision_transformer import VisionTransformer

PREPROCESSING = Preprocessing((16, 24), 3, (0.5,), (0.5,), None, "bilinear")


def build(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    arguments = {
        "image_size": (16, 24),
        "patch_size": 8,
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_classes": 2,
        "init": "trunc_normal",
        "init_range": 0.3,
    }
    return VisionTransformer(**{**arguments, **changes}).eval()


def test_the_overlay_is_brightest_where_the_map_is_highest():
    maps = torch.tensor([[[0.1, 0.1, 0.1], [0.1, 0.1, 0.6]]])
    image = overlay(torch.full((1, 3, 16, 24), 0.5), maps)[0]
    assert image.shape == (3, 16, 24)
    assert 0 <= image.min() <= image.max() <= 1
    brightness = image.mean(dim=0)
    row, column = divmod(int(brightness.argmax()), 24)
    assert row >= 8
    assert column >= 16
    assert brightness[:8, :8].max() < 0.4


def test_the_overlay_of_a_flat_map_is_finite():
    flat = overlay(torch.zeros(1, 3, 8, 8), torch.full((1, 2, 2), 0.3))
    assert flat.isfinite().all()


def test_colors_run_along_the_colormap():
    ends = colorize(torch.tensor([[[0.0, 1.0]]]))
    torch.testing.assert_close(ends[:, 0].T, COLORMAP[[0, -1]])
    between = colorize(torch.tensor([[[0.125]]]))
    torch.testing.assert_close(between[:, 0, 0], COLORMAP[:2].mean(dim=0))


def test_removed_heads_stay_blank():
    model = build(pruned_heads={1: [0, 2]})
    trace = trace_images(model, torch.randn(2, 3, 16, 24))
    panels = head_panels(trace, model, torch.zeros(3, 16, 24), 1)
    assert panels.shape == (3, 4, 3, 16, 24)
    blank = (panels == 1).flatten(2).all(dim=2)
    assert blank.nonzero().tolist() == [[1, 0], [1, 2]]
    expected = overlay(torch.zeros(3, 16, 24), head_maps(trace, model)[1][1, 1])
    torch.testing.assert_close(panels[1, 3], expected)  # the second of those left is head 3


def test_the_figure_leaves_the_model_and_the_generator_alone():
    model = build(dropout=0.5).train()
    inputs = torch.randn(3, 3, 16, 24)
    state = torch.get_rng_state()
    figure = attention_figure(model, PREPROCESSING, inputs)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    # 3 rows of 80 x 120 px; columns: image, layers 0 to 2, rollout; gaps of 4
    assert figure.shape == (3, 3 * 84 + 4, 5 * 124 + 4)
    assert 0 <= figure.min() <= figure.max() <= 1
    expected = enlarge(PREPROCESSING.denormalize(inputs)[1], 5)
    torch.testing.assert_close(figure[:, 88:168, 4:124], expected)


def test_large_images_are_shown_smaller():
    gray = Preprocessing((192, 384), 1, (0.5,), (0.5,), None, "bilinear")
    images = displayable_images(torch.zeros(1, 1, 192, 384), gray, side=96)
    assert images.shape == (1, 3, 48, 96)


@pytest.mark.parametrize(("num_layers", "shown"), [(12, [0, 4, 7, 11]), (2, [0, 1]), (1, [0])])
def test_layers_are_chosen_evenly(num_layers, shown):
    assert layers_to_show(num_layers) == shown


def test_tiles_have_gaps_around_them():
    panels = torch.zeros(2, 3, 3, 5, 7)
    image = tile(panels, gap=2)
    assert image.shape == (3, 2 * 7 + 2, 3 * 9 + 2)
    assert image[0].sum() == 16 * 29 - 6 * 35
    assert tile(panels, gap=2, gap_value=0.0).sum() == 0
