"""Operations against references: torchvision, timm, Pillow, big_vision's formulas in NumPy."""

import random

import numpy as np
import pytest
import timm.data.auto_augment as timm_augment
import torch
from PIL import Image, ImageFilter, ImageOps
from reference_names import TIMM_NAMES, TORCHVISION_NAMES
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2

from vit.augment.batch_operations import apply_drawn
from vit.augment.operations import DrawnOperation, OperationSettings, apply_operation
from vit.augment.policies import POLICIES, build_policies, draw_operation
from vit.augment.spaces import BIG_VISION_OPERATIONS, TIMM_OPERATIONS, torchvision_operations

DEFAULT = OperationSettings()
BIG_VISION = build_policies("randaugment_big_vision", None, None, 0.0)[0].settings
TIMM = build_policies("randaugment_timm", None, None, 0.0)[0].settings


def make_pixels(count=4, channels=3, height=32, width=40):
    """Smooth colors with some noise: histograms with gaps, all values, edges that rotations cut."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, channels, 5, 5, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
    noise = torch.randint(-9, 10, smooth.shape, generator=generator)
    return (smooth + noise).clamp(0, 255).to(torch.uint8)


def make_image(**size):
    return v2.functional.to_pil_image(make_pixels(1, **size)[0])


def apply(image, operation, level, negative, settings):
    """The operation at a level, with either sign, the cutout at a fixed position."""
    height, width = v2.functional.get_size(image)
    numbers = [0.0, 0.1 if negative else 0.9, 0.0, 0.0, 0.5, 0.25]
    drawn = draw_operation(operation, level, numbers, height, width)
    if isinstance(image, torch.Tensor):
        return apply_drawn(image, [[drawn]] * len(image), settings)
    return apply_operation(image, drawn, settings)


@pytest.mark.parametrize("bins", [10, 31])
@pytest.mark.parametrize("name", sorted(TORCHVISION_NAMES.keys() - {"identity"}))
@pytest.mark.parametrize("kind", ["batch", "image"])
@pytest.mark.usefixtures("plain_grids")
def test_torchvisions_operations(kind, name, bins):
    """At several magnitudes, both signs, on a batch and on an image: to the bit."""
    reference = v2.RandAugment() if bins == 31 else v2.AutoAugment(AutoAugmentPolicy.CIFAR10)
    if TORCHVISION_NAMES[name] not in reference._AUGMENTATION_SPACE:
        assert (name, bins) == ("invert", 31)
        return
    images = make_pixels() if kind == "batch" else make_image()
    magnitudes, signed = reference._AUGMENTATION_SPACE[TORCHVISION_NAMES[name]]
    operation = torchvision_operations(bins)[name]
    assert operation.signed == signed
    values = magnitudes(bins, 32, 40)
    for magnitude in (0, bins // 3, bins - 1):
        for negative in (False, True) if signed else (False,):
            strength = 0.0 if values is None else float(values[magnitude])
            expected = reference._apply_image_or_video_transform(
                images,
                TORCHVISION_NAMES[name],
                -strength if negative else strength,
                InterpolationMode.NEAREST,
                {torch.Tensor: None, Image.Image: None},
            )
            ours = apply(images, operation, magnitude / (bins - 1), negative, DEFAULT)
            same = torch.equal if kind == "batch" else np.array_equal
            assert same(ours, expected)


@pytest.mark.parametrize("magnitude", [0, 4.7, 9, 10])
@pytest.mark.parametrize("operation", TIMM_OPERATIONS, ids=lambda operation: operation.name)
def test_timms_operations(monkeypatch, operation, magnitude):
    """On an image, as timm's transforms work, the two signs taken together.

    A shear's tangent may be rounded differently.
    """
    image = make_image()
    if (operation.name, magnitude) == ("posterize", 10):
        # No bits: new Pillows refuse what timm asks for, old ones gave black
        assert not np.asarray(apply(image, operation, 1.0, False, TIMM)).any()
        return
    reference = timm_augment.AugmentOp(
        TIMM_NAMES[operation.name],
        prob=1.0,
        magnitude=magnitude,
        hparams={
            "img_mean": TIMM.fill,
            "translate_pct": 0.45,
            "interpolation": Image.Resampling.BICUBIC,
        },
    )
    theirs = []
    for sign in (0.1, 0.9):
        monkeypatch.setattr(random, "random", lambda sign=sign: sign)
        theirs.append(np.asarray(reference(image)))
    ours = [
        np.asarray(apply(image, operation, magnitude / 10, negative, TIMM))
        for negative in (False, True)
    ]
    assert len({out.tobytes() for out in ours}) == len({out.tobytes() for out in theirs})
    allowed = 1 if operation.name.startswith("shear") else 0
    for out in ours:
        assert min(np.abs(out.astype(int) - other).max() for other in theirs) <= allowed


def big_vision_color(image, name, level):
    """A color operation at `level` of 10 on uint8 (height, width, 3), as defined, or None."""
    values = image.astype(np.float64)
    factor = 1.8 * level / 10 + 0.1
    height, width = image.shape[:2]
    if name == "invert":
        return 255 - image
    if name == "posterize":
        shift = 8 - int(level / 10 * 4)
        return (image >> shift) << shift
    if name == "solarize":
        return np.where(image < int(level / 10 * 256), image, 255 - image)
    if name == "solarize_add":
        return np.where(image < 128, np.minimum(values + int(level / 10 * 110), 255), values)
    if name == "brightness":
        return np.clip(values * factor, 0, 255)
    if name == "gray_contrast":
        gray = min(255, height * width // 256)
        return np.clip(gray + (values - gray) * factor, 0, 255)
    if name == "saturation":
        gray = np.floor(values @ [0.2989, 0.587, 0.114])[..., None]
        return np.clip(gray + (values - gray) * factor, 0, 255)
    if name == "autocontrast":
        return np.asarray(ImageOps.autocontrast(Image.fromarray(image)))
    if name == "equalize":
        return np.asarray(ImageOps.equalize(Image.fromarray(image)))
    if name == "sharpness":
        smooth = np.asarray(Image.fromarray(image).filter(ImageFilter.SMOOTH)).astype(float)
        return np.clip(smooth + (image - smooth) * (0.18 * level + 0.1), 0, 255)
    return None


def big_vision_geometry(image, name, level, negative):
    """A geometric operation, likewise; what comes from outside the image is gray."""
    height, width = image.shape[:2]
    if name == "cutout":
        half, row, column = int(level / 10 * 40), height // 2, width // 4
        out = image.copy()
        out[max(0, row - half) : row + half, max(0, column - half) : column + half] = 128
        return out
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    sign = -1 if negative else 1
    if name == "translate_x":
        columns = columns + sign * 100 * level / 10
    elif name == "shear_x":
        columns = columns + sign * 0.3 * level / 10 * rows
    elif name == "translate_y":
        rows = rows + sign * 100 * level / 10
    elif name == "shear_y":
        rows = rows + sign * 0.3 * level / 10 * columns
    else:
        assert name == "rotate"
        angle = np.radians(sign * 30 * level / 10)
        y, x = rows - (height - 1) / 2, columns - (width - 1) / 2
        rows = y * np.cos(angle) + x * np.sin(angle) + (height - 1) / 2
        columns = x * np.cos(angle) - y * np.sin(angle) + (width - 1) / 2
    rows, columns = np.round(rows).astype(int), np.round(columns).astype(int)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    moved = image[rows.clip(0, height - 1), columns.clip(0, width - 1)]
    return np.where(inside[..., None], moved, 128)


@pytest.mark.parametrize("level", [2, 7, 10])
@pytest.mark.parametrize("operation", BIG_VISION_OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize("kind", ["batch", "image"])
def test_big_visions_operations(kind, operation, level):
    image = np.asarray(make_image(height=120, width=140))
    if kind == "batch":
        given = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    else:
        given = Image.fromarray(image)
    color = big_vision_color(image, operation.name, level)
    if color is not None:
        references = [color]
    else:
        references = [
            big_vision_geometry(image, operation.name, level, negative)
            for negative in (False, True)
        ]
    # Rounding to whole levels differs by one; of a gray and the result by two
    allowed = 2.01 if operation.name == "saturation" else 1.01
    # Nearest neighbors half way may be either; 0.3 x 5 lies half way
    half_way = 0.06 if level == 10 else 0.02
    is_warped = operation.name.startswith(("rotate", "shear", "translate"))
    for negative in (False, True):
        out = apply(given, operation, level / 10, negative, BIG_VISION)
        ours = out[0].permute(1, 2, 0).numpy() if kind == "batch" else np.asarray(out)
        differs = [
            (np.abs(ours - other.astype(float)) > allowed).any(-1).mean() for other in references
        ]
        assert min(differs) < (half_way if is_warped else 0.002), differs
    if operation.name in ("shear_x", "rotate", "translate_y"):
        assert (ours == 128).all(-1).mean() > 0.02


def test_three_augments_operations_are_pillows():
    image = make_image(height=60, width=60)
    gray = np.asarray(apply_operation(image, DrawnOperation("grayscale"), DEFAULT), int)
    assert np.abs(gray - np.asarray(image.convert("L").convert("RGB"), int)).max() <= 1
    solarized = apply_operation(image, DrawnOperation("solarize", 128.0), DEFAULT)
    assert np.array_equal(solarized, ImageOps.solarize(image))
    blurred = np.asarray(apply_operation(image, DrawnOperation("blur", 1.5), DEFAULT), float)
    pillow = np.asarray(image.filter(ImageFilter.GaussianBlur(1.5)), float)
    assert np.abs(blurred - pillow)[6:-6, 6:-6].mean() < 1.0
    assert np.abs(pillow - np.asarray(image, float)).mean() > 1.0


@pytest.mark.parametrize("name", POLICIES)
def test_every_operation_works_on_gray_and_leaves_its_input_alone(name):
    """One channel and three, a batch and an image; the same type and size come back."""
    (policy,) = build_policies(name, None, None, 0.0)
    generator = torch.Generator().manual_seed(2)
    numbers = torch.rand(300, policy.num_random, generator=generator).tolist()
    for channels in (1, 3):
        batch = make_pixels(2, channels)
        image = v2.functional.to_pil_image(batch[0])
        batch_before, image_before = batch.clone(), np.asarray(image).copy()
        for own in numbers:
            for operation in policy.draw(own, 32, 40):
                batch_out = apply_drawn(batch, [[operation], []], policy.settings)
                assert torch.equal(batch_out[1], batch[1])
                image_out = apply_operation(image, operation, policy.settings)
                assert (batch_out.shape, batch_out.dtype) == (batch.shape, torch.uint8)
                assert (image_out.size, image_out.mode) == (image.size, image.mode)
        assert torch.equal(batch, batch_before)
        assert np.array_equal(image, image_before)
