import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from vit.data.training_transform import TrainingTransform
from vit.augment.policies import build_policies
from vit.data.image_files import decode_jpeg, open_image, to_pixels
from vit.data.preprocessing import Preprocessing
from vit.errors import DataError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def gradient(width=40, height=30):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"),
        ("L", "png"),
        ("LA", "png"),
        ("P", "png"),
        ("RGBA", "png"),
        ("CMYK", "jpg"),
        ("1", "png"),
        ("L", "jpg"),
        ("RGB", "webp"),
        ("RGB", "gif"),
    ],
)
def test_pictures_of_every_mode_become_rgb(tmp_path, mode, suffix):
    original = Image.fromarray(gradient())
    path = tmp_path / f"picture.{suffix}"
    original.convert(mode).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    if mode in ("RGB", "RGBA", "P", "CMYK"):
        difference = np.abs(np.asarray(image, dtype=int) - gradient()).mean()
        assert difference < (20 if mode == "P" else 8)  # a palette has 256 colours
    assert open_image(path, num_channels=1).mode == "L"


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = np.asarray(open_image(tmp_path / "deep.png", 1), dtype=int)
    assert np.abs(pixels - values // 257).max() <= 1


def test_transparent_becomes_white(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_rotation_in_exif_is_applied(tmp_path):
    image = Image.fromarray(gradient())
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (30, 40)


def test_unreadable_files_are_named(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(gradient(200, 200)).save(whole)
    cases = {"cut.jpg": whole.read_bytes()[:900], "empty.png": b"", "text.jpg": b"not a picture"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            open_image(tmp_path / name)
    with pytest.raises(DataError, match=r"missing\.jpg"):
        open_image(tmp_path / "missing.jpg")


@pytest.mark.parametrize("side", [10001, 20000])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, side):
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match=r"bomb\.png: more than 100,000,000 pixels"):
        open_image(tmp_path / "bomb.png")


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


def test_squash_and_store_and_look_at():
    preprocessing = Preprocessing((16, 24), 3, (0.5,), (0.25,), None, "bilinear")
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing
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


def test_channels_are_matched():
    grey = Preprocessing((8, 8), 1, (0.2, 0.4, 0.6), (1.0, 1.0, 1.0), None, "bilinear")
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    torch.testing.assert_close(
        grey.to_input(white), torch.full((1, 1, 8, 8), 0.6), atol=1.1 / 255, rtol=0
    )
    colour = Preprocessing((8, 8), 3, (0.5,), (0.5,), None, "bilinear")
    assert colour.to_input(white[:, :1]).shape == (1, 3, 8, 8)
    assert colour.to_input(white[:, :1]).unique().tolist() == [1.0]


def test_small_images_are_enlarged_as_pillow_does():
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    preprocessing = Preprocessing((224, 224), 3, (0.0,), (1.0,), None, "bilinear")
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    torch.testing.assert_close(
        preprocessing.to_input(pixels)[0], preprocessing(image), atol=1.01 / 255, rtol=0
    )


def test_training_transform_repeats_from_the_seed(tmp_path):
    preprocessing = Preprocessing((32, 32), 3, *IMAGENET, 0.875, "bicubic")
    transform = TrainingTransform(
        preprocessing, [0.08, 1.0], 0.5, build_policies("randaugment", 2, 9, 0.3)
    )
    path = tmp_path / "picture.png"
    Image.fromarray(gradient(100, 80)).save(path)

    def draw(seed):
        torch.manual_seed(seed)
        return transform(path)

    assert draw(1).shape == (3, 32, 32)
    assert draw(1).dtype == torch.uint8
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    plain = TrainingTransform(preprocessing, None, 0.0)(path)
    assert torch.equal(plain, to_pixels(preprocessing.resize_and_crop(open_image(path))))


def random_pieces(path, size, seeds, channels=3):
    preprocessing = Preprocessing(size, channels, *IMAGENET, 0.875, "bilinear")
    transform = TrainingTransform(preprocessing, [0.08, 1.0], 0.5)
    pieces = []
    for seed in seeds:
        torch.manual_seed(seed)
        pieces.append(transform(path).int())
    return torch.stack(pieces)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 3), ("RGB", 1), ("CMYK", 3)])
def test_random_pieces_of_a_jpeg_are_those_of_its_pixels(tmp_path, mode, channels):
    """Whole, at a half, a quarter or an eighth of its size, as the piece allows; a PNG of the same pixels always whole."""
    Image.fromarray(gradient(801, 603)).convert(mode).save(tmp_path / "a.jpg", quality=95)
    open_image(tmp_path / "a.jpg").save(tmp_path / "a.png")
    for size in ((24, 32), (60, 60), (160, 160)):
        jpeg, png = (
            random_pieces(tmp_path / name, size, range(12), channels) for name in ("a.jpg", "a.png")
        )
        assert (jpeg - png).abs().float().mean() < 2
        assert (jpeg - png).abs().max() < 16


def test_a_jpeg_is_decoded_smaller_but_never_below_the_piece(tmp_path, monkeypatch):
    Image.fromarray(gradient(803, 601)).save(tmp_path / "a.jpg")
    seen = []

    def watched(image, channels, shrink):
        pixels = decode_jpeg(image, channels, shrink)
        assert pixels.shape == (3, -(-601 // shrink), -(-803 // shrink))
        seen.append((shrink, pixels.shape[1:]))
        return pixels

    monkeypatch.setattr("vit.augment.image.decode_jpeg", watched)
    resize = transforms.resize

    def watched_resize(pixels, size, *rest, **more):
        assert seen[-1][0] == 1 or min(pixels.shape[1] / size[0], pixels.shape[2] / size[1]) >= 1
        return resize(pixels, size, *rest, **more)

    monkeypatch.setattr("vit.augment.image.transforms.resize", watched_resize)
    random_pieces(tmp_path / "a.jpg", (40, 40), range(40))
    assert {shrink for shrink, _ in seen} == {
        4,
        8,
    }  # pieces have at least 8 % of the area: 197 px a side
    seen.clear()
    random_pieces(tmp_path / "a.jpg", (224, 224), range(40))
    assert {shrink for shrink, _ in seen} == {1, 2}


def test_turned_and_damaged_jpegs_take_the_slow_way(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient(120, 60)).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    open_image(tmp_path / "turned.jpg").save(tmp_path / "upright.png")
    pieces = [
        random_pieces(tmp_path / name, (32, 32), range(6)) for name in ("turned.jpg", "upright.png")
    ]
    assert torch.equal(*pieces)
    whole = (tmp_path / "turned.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=r"cut\.jpg: not a readable picture"):
        random_pieces(tmp_path / "cut.jpg", (32, 32), range(1))
    with pytest.raises(DataError, match=r"missing\.jpg"):
        random_pieces(tmp_path / "missing.jpg", (32, 32), range(1))
