import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from vit.augment.image import Crop
from vit.augment.policies import build_policies
from vit.data.image_files import decode_jpeg, open_image
from vit.data.preprocessing import Preprocessing
from vit.data.training_transform import TrainingTransform, cut_out, possible_shrink
from vit.errors import DataError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def gradient(width=40, height=30):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)


def random_crops(path, size, seeds, channels=3):
    preprocessing = Preprocessing(size, channels, *IMAGENET, 0.875, "bilinear")
    transform = TrainingTransform(preprocessing, [0.08, 1.0], 0.5)
    crops = []
    for seed in seeds:
        torch.manual_seed(seed)
        crops.append(transform(path, 0, 0).int())
    return torch.stack(crops)


def test_the_generator_decides(tmp_path):
    preprocessing = Preprocessing((32, 32), 3, *IMAGENET, 0.875, "bicubic")
    policies = build_policies("randaugment", 2, 9, 0.3)
    transform = TrainingTransform(preprocessing, [0.08, 1.0], 0.5, policies)
    path = tmp_path / "image.png"
    Image.fromarray(gradient(100, 80)).save(path)

    def augmented(seed):
        torch.manual_seed(seed)
        return transform(path, 0, 0)

    assert augmented(1).shape == (3, 32, 32)
    assert augmented(1).dtype == torch.uint8
    assert torch.equal(augmented(1), augmented(1))
    assert not torch.equal(augmented(1), augmented(2))


def test_without_changes_the_pixels_are_those_of_evaluation(tmp_path):
    preprocessing = Preprocessing((32, 32), 3, *IMAGENET, 0.875, "bicubic")
    Image.fromarray(gradient(100, 80)).save(tmp_path / "image.png")
    plain = TrainingTransform(preprocessing, None, 0.0)(tmp_path / "image.png", 0, 0)
    assert torch.equal(plain, preprocessing.read_pixels(tmp_path / "image.png"))


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 3), ("RGB", 1), ("CMYK", 3)])
def test_random_crops_of_a_jpeg_are_those_of_its_pixels(tmp_path, mode, channels):
    """A JPEG is decoded smaller where the crop allows; a PNG of the same pixels always whole."""
    Image.fromarray(gradient(801, 603)).convert(mode).save(tmp_path / "a.jpg", quality=95)
    open_image(tmp_path / "a.jpg").save(tmp_path / "a.png")
    for size in ((24, 32), (60, 60), (160, 160)):
        jpeg = random_crops(tmp_path / "a.jpg", size, range(12), channels)
        png = random_crops(tmp_path / "a.png", size, range(12), channels)
        assert (jpeg - png).abs().float().mean() < 2
        assert (jpeg - png).abs().max() < 16


def test_a_jpeg_is_decoded_smaller_but_never_below_the_crop(tmp_path, monkeypatch):
    Image.fromarray(gradient(803, 601)).save(tmp_path / "a.jpg")
    shrinks = []
    resize = transforms.resize

    def watched_decode(image, channels, shrink):
        pixels = decode_jpeg(image, channels, shrink)
        assert pixels.shape == (3, -(-601 // shrink), -(-803 // shrink))
        shrinks.append(shrink)
        return pixels

    def watched_resize(pixels, size, *rest, **more):
        smallest_factor = min(pixels.shape[1] / size[0], pixels.shape[2] / size[1])
        assert shrinks[-1] == 1 or smallest_factor >= 1
        return resize(pixels, size, *rest, **more)

    monkeypatch.setattr("vit.data.training_transform.decode_jpeg", watched_decode)
    monkeypatch.setattr("vit.data.training_transform.transforms.resize", watched_resize)
    random_crops(tmp_path / "a.jpg", (40, 40), range(40))
    assert set(shrinks) == {4, 8}  # crops have at least 8 % of the area: 197 px a side
    shrinks.clear()
    random_crops(tmp_path / "a.jpg", (224, 224), range(40))
    assert set(shrinks) == {1, 2}


@pytest.mark.parametrize(
    ("crop_size", "shrink"), [((99, 400), 1), ((100, 400), 2), ((200, 399), 2), ((400, 800), 8)]
)
def test_the_shorter_side_limits_the_shrink(crop_size, shrink):
    assert possible_shrink(Crop(0, 0, *crop_size), (50, 100)) == shrink


def test_a_crop_at_the_edge_of_a_smaller_image_stays_inside():
    pixels = torch.zeros(3, 76, 101)  # of an image of 601 x 801 px, an eighth of its size
    assert cut_out(pixels, Crop(401, 601, 200, 200), 8).shape == (3, 25, 25)
    assert cut_out(pixels, Crop(0, 0, 601, 801), 8).shape == (3, 75, 100)


def save_rotated(path):
    """A JPEG that EXIF says to turn by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient(120, 60)).save(path, exif=exif, quality=95)


def test_rotated_jpegs_are_cropped_upright(tmp_path):
    save_rotated(tmp_path / "rotated.jpg")
    open_image(tmp_path / "rotated.jpg").save(tmp_path / "upright.png")
    rotated = random_crops(tmp_path / "rotated.jpg", (32, 32), range(6))
    upright = random_crops(tmp_path / "upright.png", (32, 32), range(6))
    assert torch.equal(rotated, upright)


@pytest.mark.parametrize("orientation", [6, 9])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_crops_are_those_of_the_upright_image_in_every_format(tmp_path, suffix, orientation):
    """Pillow turns a TIFF itself, and before that calls it as high as it will be wide.

    Orientations beyond 8 are nobody's.
    """
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(gradient(160, 40)).save(path, exif=exif)
    open_image(path).save(tmp_path / "upright.png")
    turned = random_crops(path, (32, 32), range(6))
    upright = random_crops(tmp_path / "upright.png", (32, 32), range(6))
    # libjpeg-turbo's fast decoder is a few levels beside Pillow
    assert (turned - upright).abs().max() <= (8 if suffix == "jpg" else 0)


def test_unreadable_files_are_named(tmp_path):
    save_rotated(tmp_path / "rotated.jpg")
    Image.fromarray(gradient(120, 60)).save(tmp_path / "whole.jpg", quality=95)
    for name in ("rotated.jpg", "whole.jpg"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"cut_{name}").write_bytes(content[: len(content) * 2 // 3])
    for name in ("cut_rotated.jpg", "cut_whole.jpg", "missing.jpg"):
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            random_crops(tmp_path / name, (32, 32), range(1))
