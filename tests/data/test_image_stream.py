"""Images named on a command line: their order, their pixels, errors in their positions."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from vit.data.image_stream import find_images, stream_batches
from vit.data.preprocessing import Preprocessing
from vit.errors import DataError

PREPROCESSING = Preprocessing((16, 24), 3, (0.5,), (0.5,), None, "bilinear")


@pytest.fixture
def folder(tmp_path):
    """b.png, a.png, sub/c.png, sub/notes.txt and a hidden image."""
    generator = np.random.default_rng(0)
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.png", "sub/c.png", ".hidden.png"):
        pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "sub" / "notes.txt").write_text("not an image")
    return tmp_path


def found(*names) -> list[str]:
    """What find_images yields, errors as their messages."""
    return [str(item) for item in find_images([str(name) for name in names])]


def test_files_come_before_subfolders(folder):
    inside = [str(folder / name) for name in ("a.png", "b.png", "sub/c.png")]
    assert found(folder) == inside
    assert found(folder / "sub", folder) == [inside[-1], *inside]


def test_linked_folders_are_read_once(folder):
    inside = [str(folder / name) for name in ("a.png", "b.png", "sub/c.png")]
    (folder / "root").mkdir()
    (folder / "root" / "more").symlink_to("../sub")
    (folder / "sub" / "again").symlink_to(".")
    (folder / "sub" / "up").symlink_to("..")
    assert found(folder) == inside
    assert found(folder / "root") == [str(folder / "root" / "more" / "c.png")]


def test_matches_of_a_pattern_are_sorted_and_reach_below(folder):
    inside = [str(folder / name) for name in ("a.png", "b.png", "sub/c.png")]
    assert found(folder / "**" / "*.png") == inside
    assert found(folder / "s*") == inside[-1:]
    assert found(folder / "*.png") == inside[:2]


def test_a_file_whose_name_looks_like_a_pattern(folder):
    os.rename(folder / "a.png", folder / "[a]*.png")
    assert found(folder / "[a]*.png") == [str(folder / "[a]*.png")]


def test_what_is_not_there_is_an_error_in_its_position(folder):
    (folder / "empty").mkdir()
    names = ["a.png", "empty", "x*.png", "missing.png"]
    first, empty, pattern, missing = find_images([str(folder / name) for name in names])
    assert first == str(folder / "a.png")
    assert isinstance(empty, DataError)
    assert str(empty).startswith(f"{folder / 'empty'}: ")
    assert isinstance(pattern, DataError)
    assert str(pattern).startswith(f"{folder / 'x*.png'}: ")
    assert missing == str(folder / "missing.png")  # whoever opens it will see


def test_an_image_of_a_format_that_is_not_read_is_an_error(folder):
    (folder / "sub" / "phone.heic").touch()
    image, phone = found(folder / "sub")
    assert image == str(folder / "sub" / "c.png")
    assert phone.startswith(f"{folder / 'sub' / 'phone.heic'}: images of this format can't be read")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_the_pixels_of_evaluation(folder, workers):
    paths = [str(folder / "a.png"), str(folder / "missing.png"), str(folder / "b.png")]
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:100])
    items = [*paths, DataError("nothing: here"), str(folder / "cut.png")]
    first, second = stream_batches(iter(items), PREPROCESSING, 3, workers)
    assert first.paths == [paths[0], paths[2]]
    assert first.pixels.dtype == torch.uint8
    inputs = PREPROCESSING.to_input(first.pixels)
    torch.testing.assert_close(inputs[1], PREPROCESSING(folder / "b.png"))
    assert [str(error).split(": ")[0] for error in first.errors] == [paths[1]]
    assert second.paths == []
    assert second.pixels is None
    errors = [str(error).split(": ")[0] for error in second.errors]
    assert errors == ["nothing", str(folder / "cut.png")]


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (batch,) = stream_batches(iter([str(tmp_path / "pipe.png")]), PREPROCESSING, 8, 0)
    assert str(tmp_path / "pipe.png") in str(batch.errors[0])


def test_paths_are_not_collected_beforehand():
    """The first batch comes before the last path is known."""
    requested = []

    def paths():
        for number in range(10_000):
            requested.append(number)
            yield f"/nowhere/{number}.png"

    batch = next(stream_batches(paths(), PREPROCESSING, 8, 0))
    assert len(batch.errors) == 8
    assert len(requested) < 100
