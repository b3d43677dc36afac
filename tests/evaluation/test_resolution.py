"""A model at another resolution: as a new model of that size with the same weights."""

import pytest
import torch

from vit.data.preprocessing import Preprocessing
from vit.errors import ConfigError
from vit.evaluation.resolution import at_image_size, with_changed_input
from vit.model.positions import resize_positions
from vit.model.vision_transformer import VisionTransformer

SIZES = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
POSITIONS = "embeddings.position_embedding"


def make_model(**settings):
    torch.manual_seed(0)
    model = VisionTransformer(num_classes=3, **{**SIZES, **settings}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.classes = ["a", "b", "c"]
    patches = model.embeddings.patch_embedding
    model.preprocessing = Preprocessing(patches.image_size, 3, (0.5,), (0.25,), 0.8, "bicubic")
    return model


@pytest.mark.parametrize("size", [16, (8, 20)])
@pytest.mark.parametrize("position", ["learned", "sincos2d", "sincos1d", "rope2d", "none"])
def test_the_weights_stay_and_positions_fit_the_grid(position, size):
    settings = {**SIZES, "position": position}
    model = make_model(position=position)
    resized = at_image_size(model, {"name": "tiny", "init": "jax", **settings}, size)
    expected = VisionTransformer(num_classes=3, **{**settings, "image_size": size}).eval()
    tensors = model.state_dict()
    if position == "learned":
        grid = expected.embeddings.patch_embedding.grid_size
        tensors[POSITIONS] = resize_positions(tensors[POSITIONS], (2, 2), grid)
    expected.load_state_dict(tensors)
    height, width = expected.embeddings.patch_embedding.image_size
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        assert torch.equal(resized(images), expected(images))
    assert resized.preprocessing.image_size == (height, width)
    assert resized.preprocessing.eval_crop == 0.8
    assert resized.classes == model.classes
    assert not resized.training


def test_the_same_size_changes_nothing():
    model = make_model()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(at_image_size(model, SIZES, 8)(images), model(images))
    assert with_changed_input(model, SIZES, {"data.root": "x"}) is model


def test_a_grid_keeps_the_size_of_its_patches():
    settings = {**SIZES, "patch_size": None, "grid_size": 2, "pruned_heads": {"0": [1]}}
    model = make_model(patch_size=None, grid_size=2, pruned_heads={0: [1]})
    resized = with_changed_input(model, settings, {"model.image_size": 12, "data.eval_crop": None})
    patches = resized.embeddings.patch_embedding
    assert (patches.patch_size, patches.grid_size) == ((4, 4), (3, 3))
    assert resized.preprocessing.eval_crop is None


@pytest.mark.parametrize("size", [10, "large", 0])
def test_sizes_that_the_patches_do_not_tile(size):
    with pytest.raises(ConfigError, match=rf"model\.image_size={size}: "):
        at_image_size(make_model(), SIZES, size)
