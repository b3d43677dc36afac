"""Runs of train.py that benchmarks start as processes of their own."""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def train_command(overrides: Sequence[str], folder: Path) -> list[str]:
    """Return the command of a training with the run folder `folder`, to be started in ROOT."""
    return [sys.executable, "train.py", *overrides, f"hydra.run.dir={folder}"]
