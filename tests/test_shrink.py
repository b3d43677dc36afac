"""Large pictures made smaller once."""

import pytest
from helpers import make_images
from PIL import Image

from vit.errors import ConfigError, DataError
from vit.shrink import main


def test_large_pictures_become_smaller_and_small_ones_are_copied(tmp_path, capsys):
    source, out = tmp_path / "my pictures", tmp_path / "out"
    make_images(source, {"train": 2})
    small = (source / "train" / "cat" / "0.jpg").read_bytes()
    Image.new("RGB", (900, 600), "red").save(source / "train" / "cat" / "large.jpeg")
    Image.new("RGBA", (300, 500), "blue").save(source / "train" / "dog" / "tall.png")
    main([str(source), str(out), "--short-side", "200", "--workers", "2"])
    assert "data.root=" in capsys.readouterr().out
    assert (out / "train" / "cat" / "0.jpg").read_bytes() == small
    with Image.open(out / "train" / "cat" / "large.jpeg") as image:
        assert (image.format, image.size) == ("JPEG", (300, 200))
    with Image.open(out / "train" / "dog" / "tall.png.jpg") as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (200, 333), "RGB")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    main([str(source), str(out), "--short-side", "200", "--workers", "1"])  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_unreadable_pictures_are_named_and_the_others_written(tmp_path):
    make_images(tmp_path / "in", {"train": 2})
    (tmp_path / "in" / "train" / "cat" / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(
        DataError, match=r"bad\.jpg: not a readable picture[^$]*1 pictures were left out"
    ):
        main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"])
    assert (
        len(list((tmp_path / "out").rglob("*.jpg")))
        == len(list((tmp_path / "in").rglob("*.jpg"))) - 1
    )


def test_mistakes_are_told(tmp_path):
    make_images(tmp_path / "in", {"train": 1})
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="lies in"):
        main([str(tmp_path / "in"), str(tmp_path / "in" / "small")])
    with pytest.raises(DataError, match="no pictures below it"):
        main([str(tmp_path / "nothing"), str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="can't write there"):
        main([str(tmp_path / "in"), str(tmp_path / "file" / "out"), "--workers", "1"])
    with pytest.raises(SystemExit):
        main([str(tmp_path / "in"), str(tmp_path / "out"), "--quality", "101"])
