"""Operations with a strength for each image, against torchvision's with one strength for all."""

import itertools
import platform

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as ops

from vit.augment import batch_operations
from vit.augment.batch_operations import (
    BATCH_OPERATIONS,
    apply_drawn,
    gaussian_kernels,
    warp_matrix,
)
from vit.augment.operations import (
    GEOMETRIC_OPERATIONS,
    DrawnOperation,
    OperationSettings,
    apply_operation,
    fill_color,
    shear_degrees,
)

SETTINGS = {
    "nearest, black": OperationSettings(),
    "nearest, gray": OperationSettings(fill=(128, 128, 128), origin=0.5),
    "bicubic, colored": OperationSettings(
        fill=(124, 116, 104), interpolation=InterpolationMode.BICUBIC
    ),
}
FACTORS = [0.0, 0.1, 0.5, 1.0, 1.27, 1.9, 2.0]
SHEARS = [-0.3, -0.11, 0.0, 0.07, 0.15, 0.29, 0.3]
DISTANCES = [-14.5, -3.0, -0.7, 0.0, 1.3, 8.0, 14.5]
STRENGTHS = {
    "brightness": FACTORS,
    "saturation": FACTORS,
    "contrast": FACTORS,
    "gray_contrast": FACTORS,
    "sharpness": FACTORS,
    "posterize": [0, 1, 3, 4, 5, 7, 8],
    "solarize": [0.0, 1.0, 25.5, 127.9, 128.0, 255.0, 256.0],
    "solarize_add": [0, 1, 50, 99, 110, 127, 128],
    "blur": [0.1, 0.3, 0.7, 1.0, 1.2, 1.7, 2.0],
    "shear_x": SHEARS,
    "shear_y": SHEARS,
    "translate_x": DISTANCES,
    "translate_y": DISTANCES,
    "rotate": [-30.0, -11.3, -1.0, 0.0, 4.5, 17.0, 30.0],
    "cutout": [0, 1, 3, 4, 6, 9, 40],
}
COUNT = len(FACTORS)
# How many levels a single image from a file may differ by, which Pillow blends in integers
PILLOW_LEVELS = {"contrast": 1, "saturation": 1, "autocontrast": 1, "grayscale": 1}
# And how large a part of its pixels, where two neighbors are equally near
PILLOW_PIXELS = {"rotate": 0.005, "shear_x": 0.05, "shear_y": 0.05}
# Other processors may round a multiply-add twice, and add in another order
ROUNDED_PIXELS = 0.0 if platform.machine() == "x86_64" else 0.001


def make_pixels(channels, height=32, width=40):
    """Smooth colors with noise, of which one image has a single level and one is gray."""
    generator = torch.Generator().manual_seed(4)
    coarse = torch.rand(COUNT, channels, 5, 5, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
    noise = torch.randint(-9, 10, smooth.shape, generator=generator)
    pixels = (smooth + noise).clamp(0, 255).to(torch.uint8)
    pixels[2] = 77
    pixels[4] = pixels[4, :1]
    return pixels


def drawn_operations(name):
    """An operation at all its strengths; every cutout has a position of its own."""
    operations = []
    for number, strength in enumerate(STRENGTHS.get(name, [0.0] * COUNT)):
        position = (number / COUNT, 0.9 - number / COUNT) if name == "cutout" else (0.0, 0.0)
        operations.append(DrawnOperation(name, strength, position))
    return operations


def torchvisions(image, operation, settings):
    """torchvision's function for tensors on a batch of one image, or its definition in integers."""
    name, strength, position = operation
    height, width = image.shape[-2:]
    fill = fill_color(image.shape[1], settings)
    nearest = settings.interpolation == InterpolationMode.NEAREST
    warped = {
        "interpolation": InterpolationMode.NEAREST if nearest else InterpolationMode.BILINEAR,
        "fill": fill,
    }
    moved = int(strength) if nearest else strength
    sheared = {"angle": 0.0, "scale": 1.0, "center": [settings.origin] * 2} | warped
    size = [2 * int(torch.tensor(3.0 * strength).ceil()) + 1] * 2 if name == "blur" else []
    if name == "gray_contrast":
        gray = min(255, height * width // 256)
        return (gray + (image.float() - gray) * strength).clamp(0, 255).to(torch.uint8)
    if name == "solarize_add":
        return torch.where(image < 128, (image.int() + strength).clamp(max=255), image).byte()
    if name == "cutout":
        out = image.clone()
        row, column = int(position[0] * height), int(position[1] * width)
        rows = slice(max(0, row - strength), row + strength)
        columns = slice(max(0, column - strength), column + strength)
        out[..., rows, columns] = torch.tensor(fill or [0], dtype=torch.uint8)[:, None, None]
        return out
    if name == "solarize" and strength > 255:
        return image
    if name == "grayscale" and image.shape[1] == 1:
        return image
    functions = {
        "brightness": lambda: ops.adjust_brightness(image, strength),
        "saturation": lambda: ops.adjust_saturation(image, strength),
        "contrast": lambda: ops.adjust_contrast(image, strength),
        "sharpness": lambda: ops.adjust_sharpness(image, strength),
        "posterize": lambda: ops.posterize(image, strength),
        "solarize": lambda: ops.solarize(image, strength),
        "invert": lambda: ops.invert(image),
        "autocontrast": lambda: ops.autocontrast(image),
        "equalize": lambda: ops.equalize(image),
        "grayscale": lambda: ops.rgb_to_grayscale(image, 3),
        "blur": lambda: ops.gaussian_blur(image, size, [strength, strength]),
        "rotate": lambda: ops.rotate(image, strength, **warped),
        "shear_x": lambda: ops.affine(
            image, translate=[0, 0], shear=[shear_degrees(strength), 0.0], **sheared
        ),
        "shear_y": lambda: ops.affine(
            image, translate=[0, 0], shear=[0.0, shear_degrees(strength)], **sheared
        ),
        "translate_x": lambda: ops.affine(image, translate=[moved, 0], shear=[0.0, 0.0], **sheared),
        "translate_y": lambda: ops.affine(image, translate=[0, moved], shear=[0.0, 0.0], **sheared),
    }
    return functions[name]()


def cases():
    """Every operation, and those that move pixels with all settings."""
    for name in BATCH_OPERATIONS:
        for title in SETTINGS if name in GEOMETRIC_OPERATIONS else ["nearest, black"]:
            yield name, title


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "title"), cases())
@pytest.mark.usefixtures("plain_grids")
def test_each_strength_gives_torchvisions_pixels(name, title, channels):
    """To the bit, in a batch in which every image has another strength."""
    settings = SETTINGS[title]
    pixels = make_pixels(channels)
    before = pixels.clone()
    operations = drawn_operations(name)
    together = apply_drawn(pixels, [[operation] for operation in operations], settings)
    assert torch.equal(pixels, before)
    for image, operation, out in zip(pixels, operations, together, strict=True):
        expected = torchvisions(image[None], operation, settings)[0]
        difference = (out.int() - expected.int()).abs()
        assert difference.max() <= (ROUNDED_PIXELS > 0), operation
        assert (difference > 0).float().mean() <= ROUNDED_PIXELS, operation
    if (name, channels) not in {("saturation", 1), ("grayscale", 1)}:
        assert not torch.equal(together, pixels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", BATCH_OPERATIONS)
def test_a_batch_looks_like_single_images_from_files(name, channels):
    """What Pillow makes of an image: the same up to its own rounding."""
    settings = SETTINGS["nearest, gray"]
    pixels = make_pixels(channels)
    operations = drawn_operations(name)
    together = apply_drawn(pixels, [[operation] for operation in operations], settings)
    for image, operation, out in zip(pixels, operations, together, strict=True):
        alone = apply_operation(ops.to_pil_image(image), operation, settings)
        difference = (out.int() - ops.pil_to_tensor(alone).int()).abs()
        too_large = (difference > PILLOW_LEVELS.get(name, 0)).float().mean()
        assert too_large <= PILLOW_PIXELS.get(name, 0.0), operation


def test_operations_are_applied_in_each_images_own_order():
    pixels = make_pixels(3)[:3]
    posterize, invert = DrawnOperation("posterize", 1), DrawnOperation("invert")
    settings = OperationSettings()
    drawn = [[posterize, invert], [invert, posterize], []]
    out = apply_drawn(pixels, drawn, settings)
    assert torch.equal(out[0], 255 - (pixels[0] & 128))
    assert torch.equal(out[1], (255 - pixels[1]) & 128)
    assert torch.equal(out[2], pixels[2])


def mixed_operations():
    """All operations at all strengths, in an order in which none follows itself."""
    columns = [drawn_operations(name) for name in BATCH_OPERATIONS]
    return list(itertools.chain.from_iterable(zip(*columns, strict=True)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("at_once", [1, 5, 1000])
def test_pixels_do_not_depend_on_what_else_is_in_the_batch(monkeypatch, channels, at_once):
    """Nor on how many images are changed at once."""
    operations = mixed_operations()
    settings = SETTINGS["bicubic, colored"]
    pixels = make_pixels(channels)[torch.arange(len(operations)) % COUNT]
    alone = [
        apply_drawn(image[None], [[operation]], settings)
        for image, operation in zip(pixels, operations, strict=True)
    ]
    monkeypatch.setattr(batch_operations, "CACHED_NUMBERS", at_once * pixels[0].numel())
    together = apply_drawn(pixels, [[operation] for operation in operations], settings)
    assert torch.equal(together, torch.cat(alone))


def test_images_without_operations_are_not_worked_on(monkeypatch):
    sizes = []

    def note(images, drawn, settings):
        sizes.append((len(images), [operation.name for operation in drawn]))

    for name in ("invert", "solarize", "saturation"):
        monkeypatch.setitem(BATCH_OPERATIONS, name, note)
    nothing = [DrawnOperation("identity"), DrawnOperation("solarize", 256.0)]
    drawn = [[nothing[0]], [DrawnOperation("invert")], [nothing[1]], [], []]
    apply_drawn(make_pixels(3)[:5], drawn, OperationSettings())
    assert sizes == [(1, ["invert"])]
    apply_drawn(make_pixels(1)[:1], [[DrawnOperation("saturation", 0.5)]], OperationSettings())
    assert len(sizes) == 1


@pytest.mark.parametrize("side", [1, 2, 3])
def test_tiny_images_are_sharpened_like_torchvisions(side):
    pixels = make_pixels(3, side, side)
    operations = drawn_operations("sharpness")
    out = apply_drawn(pixels, [[operation] for operation in operations], OperationSettings())
    for image, operation, own in zip(pixels, operations, out, strict=True):
        assert torch.equal(own, ops.adjust_sharpness(image, operation.strength))


def test_gaussian_kernels_are_normalized_and_as_wide_as_their_sigma():
    kernels = gaussian_kernels([0.1, 2.0, 1.0])
    assert kernels.shape == (3, 13)
    torch.testing.assert_close(kernels.sum(1), torch.ones(3))
    assert torch.equal(kernels, kernels.flip(1))
    assert (kernels[:, 6] > 0).all()
    assert [(row > 0).sum() for row in kernels] == [3, 13, 7]
    positions = torch.arange(13) - 6.0
    variances = (kernels * positions**2).sum(1)
    assert variances[1] == pytest.approx(4.0, rel=0.05)
    assert variances[2] == pytest.approx(1.0, rel=0.05)


def test_warps_say_where_pixels_come_from():
    settings = OperationSettings()
    assert warp_matrix(DrawnOperation("translate_x", 3.7), 8, 10, settings) == (
        *(1.0, 0.0, -3.0),
        *(0.0, 1.0, 0.0),
    )
    # About the corner, four pixels above the middle
    sheared = warp_matrix(DrawnOperation("shear_x", 0.5), 8, 10, settings)
    assert sheared == pytest.approx((1.0, 0.5, 2.0, 0.0, 1.0, 0.0))
    turned = warp_matrix(DrawnOperation("rotate", 30.0), 8, 10, settings)
    half, root = 0.5, 0.75**0.5
    assert turned == pytest.approx((root, -half, 0.0, half, root, 0.0))
