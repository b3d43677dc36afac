"""Checkpoints of untrained models, as a run would have left them, to be judged on other images."""

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from composing import configured
from PIL import Image

from vit.checkpoints.file import write_checkpoint
from vit.checkpoints.model import build_model
from vit.config.config import to_dict
from vit.config.data import data_arguments
from vit.data.datasets import load_data
from vit.data.preprocessing import Preprocessing
from vit.model.vision_transformer import VisionTransformer

CPU = torch.device("cpu")
SMALL = (
    "model=vit_nano4",
    "model.num_channels=3",
    "model.image_size=16",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
)


def write_best(path: Path, classes: list[str], *overrides: str) -> VisionTransformer:
    """Write RUN/checkpoints/best.safetensors of a model whose every parameter is random.

    overrides: of train.py, such as data=folder and data.root=FOLDER, which gives the training
    images where it is there.
    """
    config = configured(*SMALL, *overrides)
    torch.manual_seed(0)
    model = build_model(to_dict(config)["model"], len(classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    patches = model.embeddings.patch_embedding
    model.preprocessing = Preprocessing(
        patches.image_size, 3, (0.5,), (0.25,), config.data.eval_crop, config.data.interpolation
    )
    model.classes = classes
    header = {
        "kind": "best",
        "config": to_dict(config),
        "classes": classes,
        "preprocessing": model.preprocessing.to_dict(),
        "precision": "fp32",
    }
    if config.data.root is not None and Path(config.data.root).is_dir():
        sizes = {"image_size": patches.image_size, "device": CPU}
        data = load_data(**data_arguments(config.data, 3), **sizes)
        header["data"] = data.train.fingerprint()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, model.state_dict(), header)
    return model.eval()


def lose_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every process that decodes image files be killed, as a system short of memory does."""
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("only a fork has what is changed here")
    parent = os.getpid()

    def end(preprocessing: Preprocessing, path: str) -> torch.Tensor:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("this process has been killed")

    monkeypatch.setattr(Preprocessing, "read_pixels", end)


def write_noise(path: Path, seed: int, size: tuple[int, int] = (31, 24)) -> None:
    """Write an image of smooth colored noise; size: (width, height) in pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


def write_classes(root: Path, names: list[str], count: int = 2) -> Path:
    """Write root/<name>/<number>.png, different images of different shapes."""
    for label, name in enumerate(names):
        for number in range(count):
            seed = 1000 * label + number
            write_noise(root / name / f"{number}.png", seed, (31 + seed % 7, 24 + seed % 5))
    return root
