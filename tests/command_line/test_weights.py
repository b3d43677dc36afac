"""Weights of other libraries on the command line: fine-tuned, probed, evaluated, resized."""

import json

import pytest
import timm
import torch
from helpers import error_line, make_images, run, train
from safetensors.torch import save_file

from vit.checkpoints.file import read_checkpoint
from vit.model.positions import resize_positions
from vit.weights.loading import read

MODES = ("bicubic", "linear")
SMALL = [
    "data=folder",
    "data.root=images",
    "model=vit_ti16",
    "model.image_size=32",
    "model.patch_size=8",
    "model.num_layers=2",
    "runtime.workers=0",
]


@pytest.fixture
def timm_file(tmp_path):
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=2
    )
    path = tmp_path / "timm.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.mark.slow
def test_a_linear_probe_of_foreign_weights(tmp_path, timm_file):
    """Only the head changes; the command line's settings win over the file's."""
    make_images(tmp_path / "images", {"train": 20, "test": 6}, ("cat", "dog", "fox"))
    options = [
        *SMALL,
        "model.layer_norm_eps=1e-5",
        "train.epochs=2",
        "train.batch_size=8",
        "optimizer.lr=0.01",
        "train.ema_decay=0",
        f"pretrained={timm_file}",
    ]
    done = train(tmp_path, *options, "train.freeze=backbone", "hydra.run.dir=probe")
    assert done.returncode == 0, done.stderr
    assert "timm" in done.stdout
    assert "head.weight" in done.stdout  # new, since the classes are others
    trained, header = read_checkpoint(tmp_path / "probe" / "checkpoints" / "last.safetensors")
    assert header["config"]["model"]["layer_norm_eps"] == 1e-5  # the file's is 1e-6
    for name, tensor in read(timm_file).tensors.items():
        kept = torch.equal(trained[f"model/{name}"], tensor)
        assert kept == (not name.startswith("head."))
    assert not any("encoder" in name for name in trained if name.startswith("optimizer/"))

    # timm's file does not say how many heads it has, so another number can be asked for
    done = train(tmp_path, *options, "model.num_heads=6", "train.steps=1", "hydra.run.dir=heads")
    assert done.returncode == 0, done.stderr
    done = train(tmp_path, *options, "model.num_layers=3", "hydra.run.dir=layers")
    assert timm_file.name in error_line(done)


def test_foreign_weights_are_evaluated(tmp_path, timm_file):
    make_images(tmp_path / "images", {"train": 10, "test": 6})
    weights = f"pretrained={timm_file}"
    done = run("evaluate.py", weights, *SMALL[:2], "out=.", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "preprocessing" in done.stdout  # the file has none
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["n"] == 12
    assert "data=" in error_line(run("evaluate.py", weights, cwd=tmp_path))


@pytest.mark.parametrize("mode", MODES)
def test_positions_are_resized(tmp_path, timm_file, mode):
    make_images(tmp_path / "images", {"train": 10, "test": 2})
    done = train(
        tmp_path,
        *SMALL,
        "model.image_size=48",
        "train.steps=1",
        "train.batch_size=4",
        "schedule.warmup=0",
        "train.freeze=backbone",
        f"pretrained={timm_file}",
        f"pretrained_positions={mode}",
        "hydra.run.dir=run",
    )
    assert done.returncode == 0, done.stderr
    assert "from 4x4 to 6x6" in done.stdout
    tensors, _ = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.safetensors")
    original = read(timm_file).tensors["embeddings.position_embedding"]
    expected = {way: resize_positions(original, (4, 4), (6, 6), way) for way in MODES}
    assert torch.equal(tensors["model/embeddings.position_embedding"], expected[mode])
    assert not torch.equal(expected["bicubic"], expected["linear"])
