"""What the tests share: running the command line as a user does, and small images on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
# A run of seconds, not minutes
TINY = [
    "experiment=digits",
    "augment=none",
    "model.num_layers=2",
    "model.hidden_size=64",
    "train.batch_size=128",
]


def run(
    script: str,
    *arguments: str,
    cwd: Path,
    env: dict[str, str] | None = None,
    timeout: float = 240,
):
    """The finished process of `python script arguments…` in the folder cwd."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
    )


def train(cwd: Path, *arguments: str, **options):
    return run("train.py", *arguments, cwd=cwd, **options)


def rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_images(
    root: Path,
    splits: dict[str, int],
    classes: tuple[str, ...] = ("cat", "dog"),
    size: tuple[int, int] = (40, 30),
) -> Path:
    """Write colored noise as JPEGs, root/<split>/<class>/<number>.jpg.

    The class sets the hue, so that it can be learned. splits: images of each class by split;
    size: (width, height) in pixels.
    """
    generator = np.random.default_rng(0)
    for split, count in splits.items():
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
                pixels[..., label % 3] += 120
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return root
