"""Each policy's changes against its own reference: torchvision, timm, and big_vision's arithmetic written out in NumPy."""

import random
from collections import Counter

import numpy as np
import pytest
import timm.data.auto_augment as timm_augment
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2

from vit.augment.operations import DrawnOperation, apply_operation
from vit.augment.policies import (
    AUTOAUGMENT_CIFAR10,
    BIG_VISION_OPERATIONS,
    NUMBERS_A_CHANGE,
    TIMM_OPERATIONS,
    build_policies,
    color_jitter_policy,
    draw_operation,
    torchvision_operations,
)

TORCHVISION_NAMES = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "saturation": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
}
TIMM_NAMES = {
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "saturation": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}
(TORCHVISION,), (BIG_VISION,), (TIMM,), (AUTO,), (THREE,) = (
    build_policies(name, 2 if "rand" in name else None, None, 0.0)
    for name in (
        "randaugment",
        "randaugment_big_vision",
        "randaugment_timm",
        "autoaugment",
        "three_augment",
    )
)


def pixels(count=4, channels=3, height=32, width=40):
    """Smooth colours with some noise: histograms with gaps, all values, edges that rotations cut."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, channels, 5, 5, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
    return (
        (smooth + torch.randint(-9, 10, smooth.shape, generator=generator))
        .clamp(0, 255)
        .to(torch.uint8)
    )


def picture(**size):
    return v2.functional.to_pil_image(pixels(1, **size)[0])


def with_changes(image, operation, level, negative, policy):
    height, width = v2.functional.get_size(image)
    numbers = [0.0, 0.1 if negative else 0.9, 0.0, 0.0, 0.5, 0.25]
    return apply_operation(image, draw_operation(operation, level, numbers, height, width), policy)


@pytest.mark.parametrize("bins", [10, 31])
@pytest.mark.parametrize("name", [name for name in TORCHVISION_NAMES if name != "identity"])
@pytest.mark.parametrize("kind", ["batch", "picture"])
def test_torchvisions_operations(kind, name, bins):
    """At several magnitudes, both signs, on a batch and on a picture: to the bit."""
    reference = v2.RandAugment() if bins == 31 else v2.AutoAugment(AutoAugmentPolicy.CIFAR10)
    if TORCHVISION_NAMES[name] not in reference._AUGMENTATION_SPACE:
        assert (name, bins) == ("invert", 31)
        return
    images = pixels() if kind == "batch" else picture()
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
            ours = with_changes(images, operation, magnitude / (bins - 1), negative, TORCHVISION)
            assert (
                torch.equal(ours, expected) if kind == "batch" else np.array_equal(ours, expected)
            )


def test_torchvisions_choices():
    reference = v2.RandAugment()
    numbers = torch.rand(
        20000, TORCHVISION.numbers, generator=torch.Generator().manual_seed(0)
    ).tolist()
    counts = Counter(
        TORCHVISION_NAMES[change.name]
        for own in numbers
        for change in TORCHVISION.draw(own, 32, 32)
    )
    assert set(counts) == set(reference._AUGMENTATION_SPACE)
    assert all(2857 * 0.9 < count < 2857 * 1.1 for count in counts.values())


def test_autoaugments_table_is_torchvisions():
    reference = v2.AutoAugment(AutoAugmentPolicy.CIFAR10)._policies
    ours = [
        tuple(
            (TORCHVISION_NAMES[name], probability, magnitude)
            for name, probability, magnitude in pair
        )
        for pair in AUTOAUGMENT_CIFAR10
    ]
    assert ours == [
        tuple((name, probability, magnitude or 0) for name, probability, magnitude in pair)
        for pair in reference
    ]


def test_autoaugment_follows_its_table():
    numbers = torch.rand(30000, AUTO.numbers, generator=torch.Generator().manual_seed(0))
    numbers[:, 0] = (9 + 0.5) / 25  # contrast 0.6 of magnitude 7, then sharpness 0.6 of magnitude 5
    drawn_changes = [AUTO.draw(own, 32, 32) for own in numbers.tolist()]
    counts = Counter(change.name for changes in drawn_changes for change in changes)
    assert counts["contrast"] / 30000 == pytest.approx(0.6, abs=0.01)
    assert counts["sharpness"] / 30000 == pytest.approx(0.6, abs=0.01)
    strengths = {
        round(change.strength, 4)
        for changes in drawn_changes
        for change in changes
        if change.name == "contrast"
    }
    assert strengths == {0.3, 1.7}


@pytest.mark.parametrize("magnitude", [0, 4.7, 9, 10])
@pytest.mark.parametrize("operation", TIMM_OPERATIONS, ids=lambda operation: operation.name)
def test_timms_operations(monkeypatch, operation, magnitude):
    """On a picture, as timm's transforms work, for the two signs taken together; a shear's tangent may round another way."""
    if (operation.name, magnitude) == (
        "posterize",
        10,
    ):  # no bits: new Pillows refuse what timm asks, old ones gave black
        assert not np.asarray(with_changes(picture(), operation, 1.0, False, TIMM)).any()
        return
    settings = {
        "img_mean": TIMM.fill,
        "translate_pct": 0.45,
        "interpolation": Image.Resampling.BICUBIC,
    }
    reference = timm_augment.AugmentOp(
        TIMM_NAMES[operation.name], prob=1.0, magnitude=magnitude, hparams=settings
    )
    theirs, image = [], picture()
    for sign in (0.1, 0.9):
        monkeypatch.setattr(random, "random", lambda sign=sign: sign)
        theirs.append(np.asarray(reference(image)))
    ours = [
        np.asarray(with_changes(image, operation, magnitude / 10, negative, TIMM))
        for negative in (False, True)
    ]
    assert len({image.tobytes() for image in ours}) == len({image.tobytes() for image in theirs})
    for image in ours:
        nearest = min(np.abs(image.astype(int) - other).max() for other in theirs)
        assert nearest <= (1 if operation.name.startswith("shear") else 0)


def test_timms_choices():
    assert [
        TIMM_NAMES[operation.name] for operation in TIMM_OPERATIONS
    ] == timm_augment._RAND_INCREASING_TRANSFORMS
    numbers = torch.rand(20000, TIMM.numbers, generator=torch.Generator().manual_seed(0)).tolist()
    changes = [change for own in numbers for change in TIMM.draw(own, 100, 100)]
    assert len(changes) / 40000 == pytest.approx(0.5, abs=0.01)
    levels = np.array(
        [abs(change.strength) / 30 * 10 for change in changes if change.name == "rotate"]
    )
    assert levels.mean() == pytest.approx(9, abs=0.1)  # a little below: cut at 10
    assert levels.max() == 10
    assert np.quantile(levels, 0.16) == pytest.approx(8.5, abs=0.1)


def big_vision(image, name, level, negative):
    """The operation at `level` of 10 on uint8 (height, width, 3), from its definition; None where only torchvision's rounding
    of the same formula differs."""
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
    if name == "grey_contrast":
        grey = min(255, height * width // 256)
        return np.clip(grey + (values - grey) * factor, 0, 255)
    if name == "saturation":
        grey = np.floor(values @ [0.2989, 0.587, 0.114])[..., None]
        return np.clip(grey + (values - grey) * factor, 0, 255)
    if name == "cutout":
        half, row, column = int(level / 10 * 40), height // 2, width // 4
        out = image.copy()
        out[max(0, row - half) : row + half, max(0, column - half) : column + half] = 128
        return out
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    sign = -1 if negative else 1
    if name in ("translate_x", "shear_x"):
        columns = columns + sign * (
            100 * level / 10 if name == "translate_x" else 0.3 * level / 10 * rows
        )
    elif name in ("translate_y", "shear_y"):
        rows = rows + sign * (
            100 * level / 10 if name == "translate_y" else 0.3 * level / 10 * columns
        )
    elif name == "rotate":
        angle = np.radians(sign * 30 * level / 10)
        y, x = rows - (height - 1) / 2, columns - (width - 1) / 2
        rows = y * np.cos(angle) + x * np.sin(angle) + (height - 1) / 2
        columns = x * np.cos(angle) - y * np.sin(angle) + (width - 1) / 2
    else:
        return None
    rows, columns = np.round(rows).astype(int), np.round(columns).astype(int)
    there = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return np.where(
        there[..., None], image[rows.clip(0, height - 1), columns.clip(0, width - 1)], 128
    )


@pytest.mark.parametrize("level", [2, 7, 10])
@pytest.mark.parametrize("operation", BIG_VISION_OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize("kind", ["batch", "picture"])
def test_big_visions_operations(kind, operation, level):
    image = np.asarray(picture(height=120, width=140))
    given = (
        torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
        if kind == "batch"
        else Image.fromarray(image)
    )
    candidates = [big_vision(image, operation.name, level, negative) for negative in (False, True)]
    for negative in (False, True):
        out = with_changes(given, operation, level / 10, negative, BIG_VISION)
        ours = out[0].permute(1, 2, 0).numpy() if kind == "batch" else np.asarray(out)
        if operation.name == "autocontrast":
            candidates = [np.asarray(ImageOps.autocontrast(Image.fromarray(image)))]
        elif operation.name == "equalize":
            candidates = [np.asarray(ImageOps.equalize(Image.fromarray(image)))]
        elif operation.name == "sharpness":
            smooth = np.asarray(Image.fromarray(image).filter(ImageFilter.SMOOTH)).astype(float)
            candidates = [np.clip(smooth + (image - smooth) * (0.18 * level + 0.1), 0, 255)]
        # Rounding to whole levels differs by one, of a grey and the result by two; nearest neighbours half way may be either
        allowed = 2.01 if operation.name == "saturation" else 1.01
        differs = [
            (np.abs(ours - other.astype(float)) > allowed).any(-1).mean() for other in candidates
        ]
        turned = operation.name.startswith(("rotate", "shear", "translate"))
        assert min(differs) < (0.002 if not turned else 0.06 if level == 10 else 0.02), (
            differs
        )  # 0.3 x 5 lies half way
    if operation.name in ("shear_x", "rotate", "translate_y"):
        assert (ours == 128).all(-1).mean() > 0.02


def test_big_visions_choices():
    assert len(BIG_VISION_OPERATIONS) == 16
    assert {
        draw_operation(operation, 1.0, [0, 0.9, 0, 0, 0, 0], 224, 224).strength
        for operation in BIG_VISION_OPERATIONS
        if operation.name in ("solarize", "posterize", "rotate", "translate_x")
    } == {256, 4, 30, 100}


def test_three_augments_are_pillows():
    image = picture(height=60, width=60)
    grey = apply_operation(image, DrawnOperation("greyscale"), THREE)
    assert (
        np.abs(np.asarray(grey, int) - np.asarray(image.convert("L").convert("RGB"), int)).max()
        <= 1
    )
    assert np.array_equal(
        apply_operation(image, DrawnOperation("solarize", 128.0), THREE), ImageOps.solarize(image)
    )
    blurred = np.asarray(apply_operation(image, DrawnOperation("blur", 1.5), THREE), float)
    pillow = np.asarray(image.filter(ImageFilter.GaussianBlur(1.5)), float)
    assert (
        np.abs(blurred - pillow)[6:-6, 6:-6].mean()
        < 1.0
        < np.abs(pillow - np.asarray(image, float)).mean()
    )
    numbers = torch.rand(9000, THREE.numbers, generator=torch.Generator().manual_seed(0)).tolist()
    drawn_changes = [change for own in numbers for change in THREE.draw(own, 9, 9)]
    assert all(
        count == pytest.approx(3000, rel=0.06)
        for count in Counter(change.name for change in drawn_changes).values()
    )
    radii = [change.strength for change in drawn_changes if change.name == "blur"]
    assert (min(radii), max(radii)) == (pytest.approx(0.1, abs=0.01), pytest.approx(2.0, abs=0.01))


def test_colour_jitter_is_torchvisions():
    draw, image = color_jitter_policy(0.3), picture()
    changes = draw([0.0, 0.5, 1.0, 0.9, 0.1, 0.5], 32, 40)
    assert changes == [
        DrawnOperation("contrast", 1.0),
        DrawnOperation("saturation", 1.3),
        DrawnOperation("brightness", 0.7),
    ]
    expected = v2.functional.adjust_brightness(v2.functional.adjust_saturation(image, 1.3), 0.7)
    for change in changes:
        image = apply_operation(image, change, THREE)
    assert np.array_equal(image, expected)
    assert {change.strength for change in color_jitter_policy(1.0)([0.0] * 6, 1, 1)} == {0.0}


@pytest.mark.parametrize("policy", [TORCHVISION, BIG_VISION, TIMM, AUTO, THREE])
def test_every_change_works_on_grey_and_leaves_its_input_alone(policy):
    """One channel and three, a batch and a picture; the same type and size come back."""
    numbers = torch.rand(300, policy.numbers, generator=torch.Generator().manual_seed(2)).tolist()
    for channels in (1, 3):
        batch = pixels(2, channels)
        single = v2.functional.to_pil_image(batch[0])
        kept, kept_single = batch.clone(), np.asarray(single).copy()
        for own in numbers:
            for change in policy.draw(own, 32, 40):
                out, shown = (
                    apply_operation(batch, change, policy),
                    apply_operation(single, change, policy),
                )
                assert (out.shape, out.dtype) == (batch.shape, torch.uint8)
                assert (shown.size, shown.mode) == (single.size, single.mode)
        assert torch.equal(batch, kept)
        assert np.array_equal(single, kept_single)


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match=r"augment\.policy must be one of none, randaugment"):
        build_policies("trivial", None, None, 0.0)
    assert build_policies("none", None, None, 0.0) == []
    assert len(build_policies("three_augment", None, None, 0.3)) == 2
    assert build_policies("randaugment", 3, 9, 0.0)[0].numbers == 3 * NUMBERS_A_CHANGE
