"""Weights, explanations, frozen backbones and pictures of attention on the command line: real processes."""

import json

import pytest
import timm
import torch
from helpers import TINY, make_images, run, train
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit.checkpoints.file import read_checkpoint
from vit.model.positions import resize_positions
from vit.weights.loading import read

SMALL = ["model=vit_ti16", "model.image_size=32", "model.patch_size=8", "model.num_layers=2"]


@pytest.fixture
def timm_file(tmp_path):
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=2
    )
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    return tmp_path / "timm.safetensors"


def test_fine_tuning_and_a_linear_probe_from_foreign_weights(tmp_path, timm_file):
    make_images(tmp_path / "pictures", {"train": 20, "test": 6}, ("cat", "dog", "fox"))
    options = [
        "data=folder",
        "data.root=pictures",
        *SMALL,
        "model.layer_norm_eps=1e-5",
        "train.epochs=2",
        "train.batch_size=8",
        "optimizer.lr=0.01",
        "runtime.workers=0",
        "train.ema_decay=0",
        f"pretrained={timm_file}",
    ]
    done = train(tmp_path, *options, "train.freeze=backbone", "hydra.run.dir=probe")
    assert done.returncode == 0, done.stderr
    assert "timm" in done.stdout
    assert "head.weight" in done.stdout  # freshly initialised: other classes
    trained, header = read_checkpoint(tmp_path / "probe" / "checkpoints" / "last.safetensors")
    assert (
        header["config"]["model"]["layer_norm_eps"] == 1e-5
    )  # given on the command line, so not the file's 1e-6
    for name, tensor in read(timm_file).tensors.items():
        assert torch.equal(trained[f"model/{name}"], tensor) == (not name.startswith("head."))
    assert not any("encoder" in name for name in trained if name.startswith("optimizer/"))
    done = train(tmp_path, *options, "model.num_heads=6", "hydra.run.dir=wrong")
    assert (
        done.returncode == 0 or "of another model" in done.stderr
    )  # timm's file doesn't tell its heads
    done = train(tmp_path, *options, "model.num_layers=3", "hydra.run.dir=wrong layers")
    assert done.returncode == 2
    assert "weights of another model" in done.stderr
    assert done.stderr.count("\n") == 1


def test_foreign_weights_are_evaluated(tmp_path, timm_file):
    make_images(tmp_path / "pictures", {"train": 10, "test": 6})
    done = run(
        "evaluate.py",
        f"pretrained={timm_file}",
        "data=folder",
        "data.root=pictures",
        "out=.",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "no preprocessing" in done.stdout
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["n"] == 12
    done = run("evaluate.py", f"pretrained={timm_file}", cwd=tmp_path)
    assert done.returncode == 2
    assert "data=NAME" in done.stderr


def test_explain_prints_the_shapes_and_stops(tmp_path):
    done = train(
        tmp_path,
        "explain=true",
        "model=vit_b16",
        "data=imagenet",
        "train.batch_size=32",
        "model.num_layers=2",
        "model.representation_size=768",
    )
    assert done.returncode == 0, done.stderr
    for part in (
        "(32, 3, 224, 224)",
        "(32, 196, 768)",
        "(32, 197, 768)",
        "(32, 768)",
        "(32, 1000)",
        "GMACs",
        "GiB",
    ):
        assert part in done.stdout
    assert list(tmp_path.glob("**/*.*")) == []


def test_attention_is_drawn_while_training(tmp_path):
    done = train(tmp_path, *TINY, "train.epochs=2", "train.attention_every=1", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(
        str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}
    ).Reload()
    assert [event.step for event in events.Images("pictures/attention on validation images")] == [
        9,
        18,
    ]


def test_positions_are_resized_either_way(tmp_path, timm_file):
    make_images(tmp_path / "pictures", {"train": 10, "test": 2})
    options = [
        "data=folder",
        "data.root=pictures",
        *SMALL,
        "model.image_size=48",
        "train.steps=1",
        "train.batch_size=4",
        "runtime.workers=0",
        "schedule.warmup=0",
        "train.freeze=backbone",
        f"pretrained={timm_file}",
    ]
    positions = {}
    for way in ("bicubic", "linear"):
        done = train(tmp_path, *options, f"pretrained_positions={way}", f"hydra.run.dir={way}")
        assert done.returncode == 0, done.stderr
        assert "from 4x4 to 6x6" in done.stdout
        tensors, _ = read_checkpoint(tmp_path / way / "checkpoints" / "last.safetensors")
        positions[way] = tensors["model/embeddings.position_embedding"]
        expected = resize_positions(
            read(timm_file).tensors["embeddings.position_embedding"], (4, 4), (6, 6), way
        )
        assert torch.equal(positions[way], expected)
    assert not torch.equal(positions["bicubic"], positions["linear"])
