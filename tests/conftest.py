"""What the tests share: running the command line as a user does, and small pictures on disk."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
# Seconds, not minutes
TINY = [
    "experiment=digits",
    "augment=none",
    "model.num_layers=2",
    "model.hidden_size=64",
    "train.batch_size=128",
]


def run(
    script: str, *arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 240
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
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_pictures(
    root: Path, splits: dict[str, int], classes: tuple[str, ...] = ("cat", "dog"), size=(40, 30)
) -> Path:
    """Coloured noise as JPEGs, root/<split>/<class>/<number>.jpg; the class sets the hue, so that it can be learnt."""
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


@pytest.fixture(autouse=True)
def clean_log():
    """A run within a test's own process leaves its handlers at the log; the next test must not write to them."""
    yield
    log = logging.getLogger("vit")
    for handler in log.handlers:
        handler.close()
    log.handlers, log.propagate, log.disabled = [], True, False


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of one short run on digits, for all tests that only look at it."""
    folder = tmp_path_factory.mktemp("digits")
    done = train(folder, *TINY, "train.epochs=8", "optimizer.lr=0.003", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout
