import pickle

import numpy as np
import pytest
import timm.data
import torch
from PIL import ExifTags, Image

from benchmarks.emulated_device import emulated_device
from vit.data.image_files import to_pixels
from vit.data.preprocessing import Preprocessing

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def gradient(width=40, height=30):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    ("crop", "interpolation", "size"),
    [
        (0.875, "bicubic", (500, 375)),
        (0.9, "bicubic", (333, 500)),
        (1.0, "bilinear", (300, 220)),
        (0.875, "bilinear", (100, 90)),
    ],
)
def test_evaluation_pixels_are_timms(crop, interpolation, size):
    image = Image.fromarray(gradient(*size))
    reference = timm.data.create_transform(
        224,
        is_training=False,
        crop_pct=crop,
        interpolation=interpolation,
        mean=IMAGENET[0],
        std=IMAGENET[1],
    )
    ours = Preprocessing((224, 224), 3, *IMAGENET, crop, interpolation)
    torch.testing.assert_close(ours(image), reference(image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (40, 400), (30, 31)])
@pytest.mark.parametrize("image_size", [(32, 48), (48, 32), (32, 32)])
def test_a_crop_always_fits_into_the_resized_image(size, image_size):
    preprocessing = Preprocessing(image_size, 3, (0.5,), (0.5,), 1.0, "bilinear")
    width, height = preprocessing.size_before_crop(*size)
    assert height >= image_size[0]
    assert width >= image_size[1]
    image = preprocessing.resize_and_crop(Image.fromarray(gradient(*size)))
    assert (image.height, image.width) == image_size


@pytest.mark.parametrize("size", [(3, 3000), (2000, 1), (1, 7)])
def test_of_a_long_strip_the_center_alone_is_resized(monkeypatch, size):
    """Resized as a whole, one of 1 x 16,384 px takes 4 GB."""
    preprocessing = Preprocessing((32, 48), 3, (0.5,), (0.5,), 0.875, "bicubic")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    whole = np.asarray(preprocessing.resize_and_crop(image), dtype=int)
    monkeypatch.setattr("vit.data.preprocessing.MAX_PIXELS", 1)
    center = np.asarray(preprocessing.resize_and_crop(image), dtype=int)
    assert np.abs(center - whole).max() <= 1


def test_without_a_crop_the_image_is_squashed():
    preprocessing = Preprocessing((16, 24), 3, (0.5,), (0.25,), None, "bilinear")
    image = Image.fromarray(gradient())
    out = preprocessing(image)
    assert out.shape == (3, 16, 24)
    expected = np.asarray(image.resize((24, 16), Image.Resampling.BILINEAR)) / 255
    torch.testing.assert_close(
        preprocessing.denormalize(out[None])[0].permute(1, 2, 0).double(),
        torch.from_numpy(expected),
        atol=1e-6,
        rtol=1e-5,
    )


def test_a_checkpoint_stores_it_as_plain_values():
    preprocessing = Preprocessing((16, 24), 3, (0.5,), (0.25,), None, "bilinear")
    assert preprocessing.to_dict()["image_size"] == [16, 24]
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing


def test_a_path_gives_the_pixels_of_its_image(tmp_path):
    preprocessing = Preprocessing((16, 24), 1, (0.5,), (0.25,), 0.875, "bilinear")
    Image.fromarray(gradient()).save(tmp_path / "image.png")
    from_path = preprocessing(tmp_path / "image.png")
    assert torch.equal(from_path, preprocessing(Image.fromarray(gradient())))
    pixels = preprocessing.read_pixels(tmp_path / "image.png")
    assert (pixels.shape, pixels.dtype) == ((1, 16, 24), torch.uint8)
    assert torch.equal(from_path, preprocessing.to_input(pixels[None])[0])


def test_an_opened_image_is_turned_upright_as_its_file_is(tmp_path):
    preprocessing = Preprocessing((16, 24), 3, (0.5,), (0.5,), None, "bilinear")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(gradient()).save(tmp_path / "phone.png", exif=exif)
    with Image.open(tmp_path / "phone.png") as image:
        assert torch.equal(preprocessing(image), preprocessing(tmp_path / "phone.png"))
    upright = Image.fromarray(gradient()).transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(preprocessing(upright), preprocessing(tmp_path / "phone.png"))


def test_channels_are_matched():
    gray = Preprocessing((8, 8), 1, (0.2, 0.4, 0.6), (1.0, 1.0, 1.0), None, "bilinear")
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    expected = torch.full((1, 1, 8, 8), 1 - 0.4)
    torch.testing.assert_close(gray.to_input(white), expected, atol=1.1 / 255, rtol=0)
    color = Preprocessing((8, 8), 3, (0.5,), (0.5,), None, "bilinear")
    assert color.to_input(white[:, :1]).shape == (1, 3, 8, 8)
    assert color.to_input(white[:, :1]).unique().tolist() == [1.0]


def test_the_pixels_themselves_stay_unchanged():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    before = pixels.clone()
    Preprocessing((8, 8), 3, (0.5,), (0.25,), None, "bilinear").to_input(pixels)
    assert torch.equal(pixels, before)


def test_small_images_are_enlarged_as_pillow_does():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    preprocessing = Preprocessing((224, 224), 3, (0.0,), (1.0,), None, "bilinear")
    ours = preprocessing.to_input(to_pixels(image)[None])[0]
    torch.testing.assert_close(ours, preprocessing(image), atol=1.01 / 255, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_on_the_cpu_pixels_are_divided_and_normalized_step_by_step(channels):
    preprocessing = Preprocessing((6, 6), channels, *IMAGENET, None, "bilinear")
    pixels = torch.randint(0, 256, (4, channels, 6, 6), dtype=torch.uint8)
    mean, std = (torch.tensor(values) for values in IMAGENET)
    if channels == 1:
        mean, std = mean.mean(), std.mean()
    expected = (pixels.float() / 255 - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)
    for _ in range(2):
        assert torch.equal(preprocessing.to_input(pixels), expected)


@pytest.mark.parametrize("side", [6, 9])
def test_on_a_gpu_pixels_are_normalized_without_a_wait(side):
    preprocessing = Preprocessing((9, 9), 3, *IMAGENET, None, "bicubic")
    pixels = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8)
    expected = preprocessing.to_input(pixels)
    with emulated_device("cuda") as emulated:
        on_device = pixels.to("cuda")
        preprocessing.to_input(on_device)
        emulated.waits.clear()
        emulated.copies.clear()
        emulated.kernels.clear()
        images = preprocessing.to_input(on_device)
        assert not emulated.waits
        assert not emulated.copies
        assert emulated.kernels.total() <= (2 if side == 9 else 3)
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=1e-6)


def test_workers_are_given_no_tensor_of_the_device():
    preprocessing = Preprocessing((9, 9), 3, *IMAGENET, None, "bicubic")
    preprocessing.to_input(torch.zeros(1, 3, 9, 9, dtype=torch.uint8))
    assert preprocessing.sent
    again = pickle.loads(pickle.dumps(preprocessing))
    assert again == preprocessing
    assert not again.sent
