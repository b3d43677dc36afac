"""How the weights of a new model are initialized."""

import math

import pytest
import torch
import torch.nn.functional as F

from vit.model.initialization import NAMES, whiten_patches
from vit.model.vision_transformer import VisionTransformer

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_classes": 10,
}
WIDE = {**SMALL, "hidden_size": 256}


def test_the_initialization_of_the_authors():
    torch.manual_seed(0)
    model = VisionTransformer(**{**WIDE, "patch_size": 8})
    assert model.head.weight.abs().max() == 0
    assert model.embeddings.cls_token.abs().max() == 0
    assert model.embeddings.position_embedding.std().item() == pytest.approx(0.02, rel=0.1)
    kernel = model.embeddings.patch_embedding.projection.weight
    assert kernel.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.02)

    fc1 = model.encoder.blocks[0].mlp.fc1
    bound = math.sqrt(6 / (256 + 1024))
    assert bound * 0.99 < fc1.weight.abs().max() <= bound
    assert fc1.bias.std().item() == pytest.approx(1e-6, rel=0.2)

    query = model.encoder.blocks[0].attention.query
    bound = math.sqrt(6 / 512)
    assert bound * 0.99 < query.weight.abs().max() <= bound
    assert query.bias.abs().max() == 0


def test_the_later_parts():
    """A zero head for the distillation token, whose token is drawn; the query of a pooling is."""
    torch.manual_seed(0)
    model = VisionTransformer(**SMALL, distill_token=True)
    assert model.head_distill is not None
    assert not model.head_distill.weight.any()
    assert model.embeddings.distill_token is not None
    assert 0.01 < model.embeddings.distill_token.std() < 0.04
    largest = (6 / (SMALL["hidden_size"] + 1)) ** 0.5
    for init, low, high in (("jax", 0.8 * largest, largest), ("trunc_normal", 0.032, 0.1)):
        model = VisionTransformer(**SMALL, global_pool="map", init=init)
        assert model.attention_pool is not None
        assert low < model.attention_pool.probe.abs().max() <= high


def test_xavier():
    torch.manual_seed(0)
    model = VisionTransformer(**WIDE, init="xavier")
    bound = math.sqrt(6 / (256 + 10))
    assert bound * 0.95 < model.head.weight.abs().max() <= bound
    assert model.encoder.blocks[0].mlp.fc1.bias.std().item() == pytest.approx(1e-6, rel=0.2)


def test_truncated_normal():
    torch.manual_seed(0)
    model = VisionTransformer(**WIDE, init="trunc_normal", init_range=0.02, num_registers=4)
    fc2 = model.encoder.blocks[1].mlp.fc2
    # As wide as timm's and Hugging Face's, whose cut at ±2 is far outside
    assert fc2.weight.abs().max() <= 0.1
    theirs = torch.nn.init.trunc_normal_(torch.empty(1024, 256), std=0.02)
    assert fc2.weight.std().item() == pytest.approx(theirs.std().item(), rel=0.01)
    assert fc2.bias.abs().max() == 0
    for token in (model.embeddings.cls_token, model.embeddings.registers):
        assert 0 < token.abs().max() <= 0.1


def test_the_range_of_truncated_normal_is_that_of_deit_unless_given():
    states = []
    for changes in ({}, {"init_range": None}, {"init_range": 0.02}):
        torch.manual_seed(3)
        model = VisionTransformer(**SMALL, init="trunc_normal", **changes)
        states.append(model.state_dict())
    for state in states[1:]:
        assert all(torch.equal(states[0][name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("init", sorted(set(NAMES) - {"trunc_normal"}))
def test_a_range_is_refused_where_it_would_do_nothing(init):
    """Also the default one: who gives it expects it to count."""
    for init_range in (0.05, 0.02):
        with pytest.raises(ValueError, match=f"init_range belongs to .*init={init}"):
            VisionTransformer(**SMALL, position="rope2d", init=init, init_range=init_range)
    with pytest.raises(ValueError, match="init_range must be positive, got 0"):
        VisionTransformer(**SMALL, init="trunc_normal", init_range=0)


@pytest.mark.parametrize("init", NAMES)
def test_the_same_seed_gives_the_same_weights(init):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        model = VisionTransformer(**SMALL, position="rope2d", init=init)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="init must be one of jax"):
        VisionTransformer(**SMALL, init="zeros")


def test_local_heads_start_at_each_of_the_nine_neighbors():
    """A head looks most at one of the 3 x 3 patches around its own, and each head at another."""
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=32,
        patch_size=4,
        hidden_size=288,
        num_layers=2,
        num_heads=9,
        num_classes=10,
        position="rope2d",
        init="local",
        cls_token=False,
        global_pool="mean",
    )
    for attention in model.trace(torch.randn(16, 3, 32, 32)).attentions:
        # (heads; row and column of the patch that looks; row and column of what it looks at)
        maps = attention.mean(0).detach().reshape(9, 8, 8, 8, 8)
        around = [
            maps[:, row, column, row - 2 : row + 3, column - 2 : column + 3]
            for row in range(2, 6)
            for column in range(2, 6)
        ]
        by_offset = torch.stack(around).mean(0)
        strongest = by_offset.flatten(1).max(1)
        offsets = {(int(index) // 5 - 2, int(index) % 5 - 2) for index in strongest.indices}
        assert offsets == {(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)}
        assert strongest.values.min() > 8 / 64  # evenly spread it would be 1/64


@pytest.mark.parametrize(
    "changes", [{"position": "learned"}, {"position": "rope_dinov3"}, {"qkv_bias": False}], ids=str
)
def test_local_heads_need_rotations_and_biases(changes):
    arguments = {**SMALL, "position": "rope2d", **changes}
    with pytest.raises(ValueError, match="init=local needs position=rope2d and qkv_bias=true"):
        VisionTransformer(**arguments, init="local")


@pytest.mark.parametrize("width", [24, 48, 96])
def test_whitened_patches_are_uncorrelated(width):
    torch.manual_seed(0)
    images = F.interpolate(torch.randn(500, 3, 4, 4), (16, 16), mode="bicubic")
    images = images + 0.3 * torch.randn(500, 3, 16, 16)
    model = VisionTransformer(**{**SMALL, "hidden_size": width})
    whiten_patches(model, images)
    outputs = model.embeddings.patch_embedding(images).flatten(0, 1).detach()
    covariance = outputs.T.cov()
    if width <= 48:
        assert covariance.diagonal().mean() == pytest.approx(1.0, abs=0.15)
        assert (covariance - covariance.diagonal().diag()).abs().max() < 0.15
    else:
        # More channels than the 48 numbers of a patch can't all be uncorrelated: then the
        # covariance is twice a projection P, and so half its square.
        half_square = covariance @ covariance / 2
        assert half_square.diagonal().mean() == pytest.approx(1.0, abs=0.15)
        torch.testing.assert_close(half_square, covariance, atol=0.25, rtol=0)


@pytest.mark.parametrize("width", [16, 32])
def test_the_first_convolution_of_a_stem_is_whitened(width):
    """Of all 3 x 3 patches, also those that overlap."""
    torch.manual_seed(0)
    images = F.interpolate(torch.randn(300, 3, 4, 4), (16, 16), mode="bicubic")
    images = images + 0.3 * torch.randn(300, 3, 16, 16)
    model = VisionTransformer(**SMALL, conv_stem=[width, 32], conv_stem_strides=[1, 2])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whiten_patches(model, images)
    name = "embeddings.patch_embedding.stem.layers.0.conv.weight"
    state = model.state_dict()
    assert [key for key in state if not torch.equal(state[key], before[key])] == [name]

    outputs = F.conv2d(images, state[name]).permute(0, 2, 3, 1).flatten(0, 2)
    covariance = outputs.T.cov()
    if width == 16:
        expected = torch.eye(16)
    else:
        # More channels than the 27 numbers of a patch: a projection, scaled to unit variances
        filters = state[name].flatten(1).double()
        assert torch.linalg.matrix_rank(filters) == 27
        projection = filters @ torch.linalg.pinv(filters)
        expected = (projection * 32 / 27).float()
    # The floor takes a little of the variance
    torch.testing.assert_close(covariance, expected, atol=0.15, rtol=0)


def test_a_hybrid_has_no_pixels_to_whiten():
    model = VisionTransformer(**SMALL, resnet_stages=[1])
    with pytest.raises(ValueError, match=r"train\.whiten_patches needs patches of pixels"):
        whiten_patches(model, torch.randn(4, 3, 16, 16))
