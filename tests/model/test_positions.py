"""The grid of patches, fixed positions, rotations, and the resizing of learned positions."""

from functools import partial

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed

from vit.model.positions import (
    fixed_positions,
    pair,
    patch_grid,
    resize_positions,
    rope2d,
    rope_dinov3,
    rotate,
    sincos1d,
    sincos2d,
)


def test_a_size_is_one_number_or_two():
    assert pair(7, "size") == (7, 7)
    assert pair((3, 5), "size") == (3, 5)
    assert pair([3, 5], "size") == (3, 5)
    for wrong in (0, -1, (3, 0), (3,), (3, 4, 5), "16", (3.0, 4)):
        with pytest.raises(ValueError, match=r"^size must be a positive whole number"):
            pair(wrong, "size")


def test_the_grid_follows_from_the_patch_size_or_the_other_way_round():
    assert patch_grid(224, None, 14) == ((224, 224), (16, 16), (14, 14))
    assert patch_grid((32, 64), None, (4, 8)) == ((32, 64), (8, 8), (4, 8))
    assert patch_grid((32, 64), (8, 16), None) == ((32, 64), (8, 16), (4, 4))


@pytest.mark.parametrize(
    ("patch_size", "grid_size", "message"),
    [
        (5, None, "patch_size 5x5 does not divide image_size 16x16"),
        (None, 3, "grid_size 3x3 does not divide image_size 16x16"),
        (None, None, "patch_size .* or grid_size"),
        (4, 4, "patch_size .* or grid_size"),
    ],
)
def test_patches_that_do_not_tile_the_image_are_refused(patch_size, grid_size, message):
    with pytest.raises(ValueError, match=message):
        patch_grid(16, patch_size, grid_size)


def test_sincos2d_is_the_published_table():
    """Against the formula for single entries, with ω = 10000^(-i / (D/4 - 1))."""
    table = sincos2d((3, 5), 16)
    assert table.shape == (15, 16)
    for row, column, i in [(0, 0, 0), (2, 4, 1), (1, 3, 3)]:
        omega = 10000 ** (-i / 3)
        x, y = column * omega, row * omega
        entry = table[row * 5 + column]
        assert entry[[i, 4 + i, 8 + i, 12 + i]].tolist() == pytest.approx(
            [np.sin(x), np.cos(x), np.sin(y), np.cos(y)], abs=1e-5
        )


def test_sincos1d_is_the_table_of_the_first_transformer():
    table = sincos1d((2, 3), 8)
    for index in range(6):
        for i in range(4):
            angle = index / 10000 ** (2 * i / 8)
            assert table[index, 2 * i : 2 * i + 2].tolist() == pytest.approx(
                [np.sin(angle), np.cos(angle)], abs=1e-5
            )


def test_widths_that_do_not_fit_are_refused():
    for wrong in (30, 4):
        with pytest.raises(ValueError, match="position=sincos2d needs a hidden_size"):
            sincos2d((2, 2), wrong)
    with pytest.raises(ValueError, match="position=sincos1d needs an even hidden_size"):
        sincos1d((2, 2), 7)
    with pytest.raises(ValueError, match="position=rope2d needs heads whose width 4 divides"):
        rope2d((2, 2), 10, num_prefix=0)


def test_fixed_positions_by_name():
    assert torch.equal(fixed_positions("sincos2d", (3, 5), 16), sincos2d((3, 5), 16)[None])
    assert torch.equal(fixed_positions("sincos1d", (3, 5), 16), sincos1d((3, 5), 16)[None])
    assert fixed_positions("none", (3, 5), 16) is None
    assert fixed_positions("rope2d", (3, 5), 16) is None
    with pytest.raises(ValueError, match="position must be learned, sincos2d"):
        fixed_positions("sine", (3, 5), 16)


def test_rope_makes_attention_depend_on_the_offset_alone():
    rotation = rope2d((6, 7), 16, num_prefix=1)
    query, key = torch.randn(2, 16)

    def rotated(vector, row, column):
        return rotate(vector.expand(1, 1, 43, 16), rotation)[0, 0, 1 + row * 7 + column]

    def score(row, column, other_row, other_column):
        return float(rotated(query, row, column) @ rotated(key, other_row, other_column))

    assert score(0, 0, 2, 3) == pytest.approx(score(3, 2, 5, 5), abs=1e-4)
    assert score(0, 0, 2, 3) != pytest.approx(score(0, 0, 3, 2), abs=1e-3)
    # The prefix is not rotated.
    assert torch.equal(rotate(query.expand(1, 1, 43, 16), rotation)[0, 0, 0], query)


def test_the_derivative_of_a_rotation_is_exact():
    rotation = rope2d((2, 2), 8, num_prefix=1)
    x, gradient = torch.randn(2, 3, 2, 5, 8, dtype=torch.float64)
    x.requires_grad_()
    turn = partial(rotate, rotation=rotation.double())
    assert torch.autograd.gradcheck(turn, x)
    assert torch.autograd.gradgradcheck(turn, x)

    def derivative(dtype):
        inputs = x.detach().bfloat16().to(dtype).requires_grad_()
        given = gradient.bfloat16().to(dtype)
        return torch.autograd.grad(rotate(inputs, rotation), inputs, given)[0]

    # Rounded once, at the end
    assert torch.equal(derivative(torch.bfloat16), derivative(torch.float32).bfloat16())


def test_rotations_of_dinov3_are_of_places_in_the_image():
    """Four patches of a finer grid have their middle in the middle of the patch they replace."""
    coarse, fine = rope_dinov3((3, 5), 16, 0), rope_dinov3((6, 10), 16, 0)
    # Small enough to be angles: those of the lowest frequency, of row and of column
    for channel in (6, 14):
        angles = [
            torch.atan2(table[1, :, channel], table[0, :, channel]).reshape(rows, columns)
            for table, rows, columns in ((coarse, 3, 5), (fine, 6, 10))
        ]
        means = angles[1].reshape(3, 2, 5, 2).mean(dim=(1, 3))
        torch.testing.assert_close(means, angles[0], atol=1e-5, rtol=1e-4)
    # The middle patch of an odd grid is at the origin
    assert torch.equal(coarse[:, 7], torch.stack([torch.ones(16), torch.zeros(16)]))
    with pytest.raises(ValueError, match="rope_dinov3 needs heads whose width 4 divides, got 6"):
        rope_dinov3((2, 2), 6, 0)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((7, 7), (4, 6)), ((3, 5), (6, 2))])
def test_positions_are_resized_as_timm_does(old, new):
    positions = torch.randn(1, 1 + old[0] * old[1], 8)
    expected = resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=1)
    torch.testing.assert_close(resize_positions(positions, old, new), expected)
    assert torch.equal(resize_positions(positions, old, new, "linear")[:, 0], positions[:, 0])


def test_linear_resizing_keeps_the_corners():
    positions = torch.randn(1, 12, 8)
    resized = resize_positions(positions, (3, 4), (5, 9), "linear").reshape(5, 9, 8)
    grid = positions.reshape(3, 4, 8)
    for row, column in [(0, 0), (0, -1), (-1, 0), (-1, -1)]:
        torch.testing.assert_close(resized[row, column], grid[row, column])
    torch.testing.assert_close(resize_positions(positions, (3, 4), (3, 4), "linear"), positions)


def test_another_interpolation_is_refused():
    with pytest.raises(ValueError, match="interpolation must be bicubic or linear, got nearest"):
        resize_positions(torch.randn(1, 4, 8), (2, 2), (3, 3), "nearest")
