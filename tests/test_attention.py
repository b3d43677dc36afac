"""Images of attention maps: python -m vit.attention."""

import os

import numpy as np
import pytest
import torch
from helpers import make_images
from PIL import Image

from vit.attention import main
from vit.checkpoints.file import write_checkpoint
from vit.checkpoints.model import build_model
from vit.data.preprocessing import Preprocessing
from vit.errors import run_command

SMALL = {
    "image_size": (16, 24),
    "patch_size": 8,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "init": "trunc_normal",
    "init_range": 0.3,
}


@pytest.fixture
def best(tmp_path):
    """A checkpoint that has lost a head, with a class that could be taken for a formula."""
    torch.manual_seed(0)
    config = {"model": {**SMALL, "name": "small", "pruned_heads": {"2": [1]}}}
    preprocessing = Preprocessing((16, 24), 3, (0.5,), (0.5,), None, "bilinear")
    header = {
        "kind": "best",
        "config": config,
        "classes": ["cat", "$5 dog $"],
        "preprocessing": preprocessing.to_dict(),
    }
    path = tmp_path / "best.safetensors"
    write_checkpoint(path, build_model(config["model"], 2).state_dict(), header)
    return path


def draw(*arguments) -> int:
    return run_command("vit.attention", lambda: main([str(argument) for argument in arguments]))


def test_the_command_draws_grids(best, tmp_path, capsys):
    images = make_images(tmp_path / "images", {"train": 5})
    (images / "notes.txt").write_text("not an image")
    # Bytes that are no Unicode, as in an archive of another system
    black = tmp_path / os.fsdecode(b"a$b$\xe9.png")
    Image.fromarray(np.zeros((9, 9), dtype=np.uint8)).save(black)
    out = tmp_path / "maps"
    assert draw(best, black, "--limit", 9, "--out", out, images) == 0
    printed = capsys.readouterr().out
    assert "9 of 11" in printed
    files = {path.name for path in out.iterdir()}
    heads = {f"heads_{number}.png" for number in range(1, 10)}
    assert files == {"attention_1-8.png", "attention_9-9.png", *heads}
    assert all(str(out / file) in printed for file in files)

    with Image.open(out / "attention_1-8.png") as grid:
        # The image and four maps of 192 × 128 px in each of eight rows
        assert grid.width > 5 * 192
        assert grid.height > 8 * 128
        pixels = np.asarray(grid.convert("RGB")).astype(int)
    # The first panel is the black image; the panels right of it are colored
    black_pixels = (pixels.sum(axis=2) == 0).sum()
    assert black_pixels > 0.9 * 192 * 128
    colored_pixels = (np.ptp(pixels, axis=2) > 60).sum()
    assert colored_pixels > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("empty", "empty: "),
        ("*.jpg", "*.jpg: "),
        ("text.jpg", "text.jpg: "),
        ("good.png --limit 0", "--limit "),
        ("good.png --out taken", "--out taken: "),
        ("good.png --out /proc/nowhere", "--out /proc/nowhere: "),
    ],
)
def test_a_mistake_is_one_line(best, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "taken").write_text("a file")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    assert draw(best, "--out", "maps", *arguments.split()) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"vit.attention: {message}")
    assert errors.count("\n") == 1


def test_a_missing_checkpoint(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    missing = tmp_path / "nowhere.safetensors"
    assert draw(missing, tmp_path / "good.png", "--out", tmp_path / "maps") == 2
    assert capsys.readouterr().err.startswith(f"vit.attention: {missing}: ")
