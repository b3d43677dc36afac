import numpy as np
import pytest
from PIL import Image

from vit.data.image_files import (
    decode_jpeg,
    describe_unsupported,
    find_image_files,
    is_image_file,
    iter_image_files,
    open_image,
    open_lazily,
    open_tar_member,
    to_pixels,
)
from vit.errors import DataError


def gradient(width=40, height=30):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)


def save_rotated(path, width=40, height=30, **options):
    """A JPEG that EXIF says to turn by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient(width, height)).save(path, exif=exif, **options)


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
def test_images_of_every_mode_become_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(gradient()).convert(mode).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    if mode in ("RGB", "RGBA", "P", "CMYK"):
        difference = np.abs(np.asarray(image, dtype=int) - gradient()).mean()
        assert difference < (20 if mode == "P" else 8)  # a palette has 256 colors
    assert open_image(path, num_channels=1).mode == "L"


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = np.asarray(open_image(tmp_path / "deep.png", 1), dtype=int)
    assert np.abs(pixels - values // 257).max() <= 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("largest", [200, 65535])
def test_sixteen_bits_are_scaled_alike_in_either_order_of_the_bytes(tmp_path, order, largest):
    values = np.linspace(2, largest, 256).astype(f"{order}u2").reshape(16, 16)
    mode = "I;16" if order == "<" else "I;16B"
    Image.frombytes(mode, (16, 16), values.tobytes()).save(tmp_path / "deep.tiff")
    with Image.open(tmp_path / "deep.tiff") as image:
        assert image.mode == mode
    pixels = np.asarray(open_image(tmp_path / "deep.tiff", 1))
    assert np.array_equal(pixels, (values.astype(float) * 255 / 65535).round())


@pytest.mark.parametrize(("largest", "expected"), [(1.0, 255), (200.0, 200), (65535.0, 255)])
def test_floats_are_scaled_by_their_range(tmp_path, largest, expected):
    Image.fromarray(np.full((4, 4), largest, dtype=np.float32)).save(tmp_path / "float.tiff")
    assert np.unique(open_image(tmp_path / "float.tiff", 1)).tolist() == [expected]


def test_transparent_becomes_white(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_rotation_in_exif_is_applied(tmp_path):
    save_rotated(tmp_path / "rotated.jpg")
    assert open_image(tmp_path / "rotated.jpg").size == (30, 40)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_that_cannot_be_read_does_not_cost_the_image(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(gradient()).save(path, exif=b"Exif\0\0no TIFF", dpi=(72, 72))
    assert open_image(path).size == (40, 30)


def test_unreadable_files_are_named(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(gradient(200, 200)).save(whole)
    contents = {"cut.jpg": whole.read_bytes()[:900], "empty.png": b"", "text.jpg": b"no image"}
    for name, content in contents.items():
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


def test_a_jpeg_is_decoded_fast_and_smaller(tmp_path):
    Image.fromarray(gradient(803, 601)).save(tmp_path / "a.jpg", quality=95)
    with open_lazily(tmp_path / "a.jpg") as image:
        whole = decode_jpeg(image, 3)
        assert (whole.int() - to_pixels(open_image(tmp_path / "a.jpg")).int()).abs().max() < 8
        assert decode_jpeg(image, 3, shrink=4).shape == (3, 151, 201)
        assert decode_jpeg(image, 1, shrink=8).shape == (1, 76, 101)


def test_what_is_no_plain_jpeg_is_left_to_pillow(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "image.png")
    Image.fromarray(gradient()).convert("CMYK").save(tmp_path / "cmyk.jpg")
    save_rotated(tmp_path / "rotated.jpg")
    for name in ("image.png", "cmyk.jpg", "rotated.jpg"):
        with open_lazily(tmp_path / name) as image:
            assert decode_jpeg(image, 3) is None


def test_a_path_may_name_a_member_of_a_tar_file(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    assert open_tar_member(f"{tmp_path}/a.tar!3+4").read() == b"3456"
    with pytest.raises(DataError, match=r"a\.tar!x"):
        open_image(f"{tmp_path}/a.tar!x")


def test_hidden_files_and_other_extensions_are_no_images():
    assert is_image_file("a.JPEG")
    assert not is_image_file(".a.jpg")
    assert not is_image_file("a.txt")


def fail(message):
    pytest.fail(f"warned of nothing: {message}")


def test_files_and_folders_are_found_in_order(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for name in ("folder/b.png", "folder/deep/a.jpg", "folder/notes.txt", "single.dat"):
        (tmp_path / name).write_bytes(b"")
    expected = [tmp_path / "single.dat", tmp_path / "folder/b.png", tmp_path / "folder/deep/a.jpg"]
    assert find_image_files([tmp_path / "single.dat", tmp_path / "folder"], fail) == expected
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images"):
        find_image_files([tmp_path / "empty"], fail)
    with pytest.raises(DataError, match="nothing: no such file or folder"):
        find_image_files([tmp_path / "nothing"], fail)


def test_a_named_file_of_a_format_that_is_not_read_says_what_to_do(tmp_path):
    file = tmp_path / "a.HEIC"
    with pytest.raises(DataError, match="No such file"):
        open_image(file)
    file.write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(DataError, match=r"a\.HEIC: images of this format .*; convert it to JPEG"):
        open_image(file)


@pytest.mark.parametrize(
    ("name", "kind"), [("saved.jfif", "JPEG"), ("GREY.PGM", "PPM"), ("web.avif", "AVIF")]
)
def test_rarer_names_of_images_count(tmp_path, name, kind):
    Image.new("L", (5, 4), 77).save(tmp_path / name, format=kind)
    (path,) = iter_image_files(tmp_path)
    assert open_image(path).getpixel((0, 0)) == pytest.approx((77, 77, 77), abs=2)


def test_images_of_formats_that_are_not_read_are_told(tmp_path):
    for name in ("b.HEIC", "a.heic", "raw.nef", ".hidden.heic", "notes.txt"):
        (tmp_path / name).touch()
    unsupported = []
    assert list(iter_image_files(tmp_path, unsupported)) == []
    assert sorted(unsupported) == [str(tmp_path / name) for name in ("a.heic", "b.HEIC", "raw.nef")]
    with pytest.raises(
        DataError, match=r"its 3 \.heic and \.nef files can't be read; convert them"
    ):
        find_image_files([tmp_path], fail)
    (tmp_path / "c.jpg").touch()
    warnings = []
    assert find_image_files([tmp_path], warnings.append) == [tmp_path / "c.jpg"]
    assert warnings == [f"{tmp_path}: 3 .heic and .nef files can't be read; convert them to JPEG"]
    assert describe_unsupported(["x.dng"]) == "1 .dng file can't be read; convert it to JPEG"
