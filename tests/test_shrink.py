"""Large images made smaller once."""

import pytest
from helpers import make_images
from PIL import Image

from vit.errors import ConfigError, DataError
from vit.shrink import main


def test_large_images_become_smaller_and_small_ones_are_copied(tmp_path, capsys):
    source, out = tmp_path / "my images", tmp_path / "out"
    make_images(source, {"train": 2})
    small = (source / "train" / "cat" / "0.jpg").read_bytes()
    Image.new("RGB", (900, 600), "red").save(source / "train" / "cat" / "large.jpeg")
    Image.new("RGB", (900, 600)).save(source / "train" / "cat" / "browser.JFIF", "JPEG")
    Image.new("RGBA", (300, 500), "blue").save(source / "train" / "dog" / "tall.png")
    main([str(source), str(out), "--short-side", "200", "--workers", "2"])
    assert "7 images" in capsys.readouterr().out
    assert (out / "train" / "cat" / "0.jpg").read_bytes() == small
    for name in ("large.jpeg", "browser.JFIF"):
        with Image.open(out / "train" / "cat" / name) as image:
            assert (image.format, image.size) == ("JPEG", (300, 200))
    with Image.open(out / "train" / "dog" / "tall.png.jpg") as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (200, 333), "RGB")
    assert len([path for path in out.rglob("*") if path.is_file()]) == 7


def test_a_second_start_leaves_what_is_written(tmp_path):
    make_images(tmp_path / "in", {"train": 2})
    Image.new("RGB", (300, 500)).save(tmp_path / "in" / "tall.png")
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--short-side", "200"]
    main([*arguments, "--workers", "1"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert len(before) > 5
    main([*arguments, "--workers", "1"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_linked_folders_are_written_once(tmp_path):
    make_images(tmp_path / "store", {".": 2}, classes=("cat",))
    make_images(tmp_path / "in", {"train": 1})
    (tmp_path / "in" / "train" / "cat" / "more").symlink_to(tmp_path / "store" / "cat")
    (tmp_path / "in" / "train" / "again").symlink_to("..")
    main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"])
    written = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.jpg")]
    names = ["train/cat/0.jpg", "train/cat/more/0.jpg", "train/cat/more/1.jpg", "train/dog/0.jpg"]
    assert sorted(map(str, written)) == names


def test_unreadable_images_are_named_and_the_others_written(tmp_path):
    make_images(tmp_path / "in", {"train": 2})
    (tmp_path / "in" / "train" / "cat" / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"(?s)bad\.jpg: .*\n1 images were left out$"):
        main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"])
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 4


def test_images_of_formats_that_are_not_read_are_named(tmp_path):
    make_images(tmp_path / "in", {"train": 2})
    (tmp_path / "in" / "train" / "cat" / "phone.HEIC").touch()
    message = r"train/cat/phone\.HEIC: images of this format .*\n1 images were left out$"
    with pytest.raises(DataError, match=message):
        main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"])
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 4


def test_mistakes_are_refused(tmp_path):
    make_images(tmp_path / "in", {"train": 1})
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="in/small: lies in"):
        main([str(tmp_path / "in"), str(tmp_path / "in" / "small")])
    with pytest.raises(DataError, match="nothing: no such folder"):
        main([str(tmp_path / "nothing"), str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="file/out: can't write there"):
        main([str(tmp_path / "in"), str(tmp_path / "file" / "out"), "--workers", "1"])


@pytest.mark.parametrize("option", ["--quality=101", "--short-side=0", "--workers=0"])
def test_options_out_of_range_are_refused(tmp_path, option, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "in"), str(tmp_path / "out"), option])
    assert ended.value.code == 2
    assert option.partition("=")[0] in capsys.readouterr().err
