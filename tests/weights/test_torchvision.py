"""Weights of torchvision: loaded here they give the logits and the pixels they give there."""

import numpy as np
import pytest
import torch
import torchvision
from foreign_models import SIZES, TOLERANCE, difference, torchvision_model
from PIL import Image

from vit.weights.loading import build, read


@pytest.mark.parametrize("representation_size", [None, 48])
@pytest.mark.parametrize("patch", [16, 32])
@pytest.mark.parametrize("size", SIZES)
def test_the_same_logits(tmp_path, size, patch, representation_size):
    theirs = torchvision_model(size, patch, representation_size)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    assert difference(build(tmp_path / "vit.pth"), theirs) < TOLERANCE


def test_the_names_of_older_files(tmp_path):
    theirs = torchvision_model()
    older = {
        name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): tensor
        for name, tensor in theirs.state_dict().items()
    }
    torch.save(older, tmp_path / "vit.pth")
    assert difference(build(tmp_path / "vit.pth"), theirs) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_b_16", (300, 200)),
        ("vit_l_16", (211, 300)),
        ("vit_b_16", (161, 200)),
        ("vit_h_14", (300, 200)),
    ],
)
def test_the_same_pixels(tmp_path, name, size):
    # ViT-H/14 has no others of 224 px
    version = "IMAGENET1K_SWAG_LINEAR_V1" if name == "vit_h_14" else "IMAGENET1K_V1"
    weights = torchvision.models.get_model_weights(name)[version]
    width = {"vit_b_16": 768, "vit_l_16": 1024, "vit_h_14": 1280}[name]
    patch = int(name.rpartition("_")[2])
    theirs = torchvision.models.VisionTransformer(224, patch, 1, 16, width, 64)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    ours = read(tmp_path / "x.pth").preprocessing(image)
    assert (ours - weights.transforms()(image)).abs().max() < 1e-5


def test_a_size_that_nothing_was_published_for_has_no_preprocessing(tmp_path):
    torch.save(torchvision_model().state_dict(), tmp_path / "x.pth")
    assert read(tmp_path / "x.pth").preprocessing is None
