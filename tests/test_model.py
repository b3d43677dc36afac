import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vit.model.cost import WholeSequence, count_macs
from vit.model.initialization import whiten_patches
from vit.model.positions import patch_grid
from vit.model.vision_transformer import (
    MLP,
    Attention,
    Block,
    Embeddings,
    Encoder,
    PatchEmbedding,
    VisionTransformer,
    attend,
)

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_classes": 10,
}


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "patch", "parameters"),
    [
        (192, 12, 3, 16, 5_717_416),
        (384, 12, 6, 16, 22_050_664),
        (768, 12, 12, 16, 86_567_656),
        (768, 12, 12, 32, 88_224_232),
        (1024, 24, 16, 16, 304_326_632),
        (1024, 24, 16, 32, 306_535_400),
        (1280, 32, 16, 14, 632_045_800),
    ],
)
def test_parameter_counts_are_those_of_the_papers(hidden, layers, heads, patch, parameters):
    with torch.device("meta"):
        model = VisionTransformer(
            image_size=224,
            patch_size=patch,
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_classes=1000,
        )
    assert model.num_parameters() == parameters


@pytest.mark.parametrize("layers", [2, 12, 24, 32])
def test_encoder_of_any_depth(layers):
    with torch.device("meta"):
        encoder = Encoder([Block(64, 4, 128) for _ in range(layers)], hidden_size=64)
        assert encoder(torch.empty(3, 17, 64)).shape == (3, 17, 64)
    assert len(encoder.blocks) == layers


def test_shapes_of_the_papers_figure():
    model = VisionTransformer(
        image_size=224, patch_size=16, hidden_size=768, num_layers=2, num_heads=12, num_classes=100
    )
    images = torch.randn(2, 3, 224, 224)
    assert model.embeddings.patch_embedding(images).shape == (2, 196, 768)
    assert model.embeddings(images).shape == (2, 197, 768)
    assert model.encoder(model.embeddings(images)).shape == (2, 197, 768)
    assert model(images).shape == (2, 100)


@pytest.mark.parametrize(
    ("image_size", "patch_size"), [(16, 4), ((16, 24), 8), ((16, 24), (4, 6)), ([32, 16], [16, 2])]
)
def test_patch_embedding_is_a_strided_convolution_and_flatten_and_linear(image_size, patch_size):
    embedding = PatchEmbedding(image_size, patch_size, num_channels=3, hidden_size=20)
    images = torch.randn(2, 3, *embedding.image_size)
    expected = embedding.projection(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedding(images), expected)
    height, width = embedding.patch_size
    flat = F.unfold(images, (height, width), stride=(height, width)).transpose(1, 2)
    linear = nn.Linear(3 * height * width, 20)
    linear.weight.data, linear.bias.data = (
        embedding.projection.weight.flatten(1),
        embedding.projection.bias,
    )
    torch.testing.assert_close(embedding(images), linear(flat))


def test_number_of_patches_a_side_instead_of_their_size():
    assert patch_grid(224, None, 14) == ((224, 224), (16, 16), (14, 14))
    assert patch_grid((32, 64), None, (4, 8)) == ((32, 64), (8, 8), (4, 8))
    torch.manual_seed(0)
    by_grid = VisionTransformer(**{**SMALL, "patch_size": None, "grid_size": 4})
    torch.manual_seed(0)
    by_size = VisionTransformer(**SMALL)
    assert all(
        torch.equal(a, b)
        for a, b in zip(by_grid.state_dict().values(), by_size.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"patch_size": 5}, "patch_size 5x5 does not divide image_size 16x16"),
        ({"patch_size": None, "grid_size": 3}, "grid_size 3x3 does not divide"),
        ({"patch_size": None}, "patch_size .* or grid_size"),
        ({"grid_size": 4}, "patch_size .* or grid_size"),
        ({"patch_size": 0}, "patch_size must be a positive"),
        ({"image_size": (16, 16, 3)}, "image_size must be"),
        ({"num_heads": 0}, "num_heads must be positive"),
        ({"num_heads": 5}, "num_heads must be positive and divide hidden_size 32, got 5"),
        ({"num_layers": 0}, "num_layers"),
        ({"activation": "tanh"}, "activation must be one of gelu"),
        ({"global_pool": "max"}, "global_pool must be cls .* or mean"),
        ({"init": "zeros"}, "init must be one of jax"),
    ],
)
def test_impossible_models_are_refused_by_name(change, told):
    with pytest.raises(ValueError, match=told):
        VisionTransformer(**{**SMALL, **change})


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 3, 16, 16\), got \(1, 3, 16, 20\)"):
        VisionTransformer(**SMALL)(torch.randn(1, 3, 16, 20))


def test_embeddings_put_the_class_token_first_and_add_positions():
    embeddings = Embeddings(PatchEmbedding(16, 4, 3, 32), 32)
    nn.init.normal_(embeddings.cls_token)
    nn.init.normal_(embeddings.position_embedding)
    images = torch.randn(5, 3, 16, 16)
    out = embeddings(images)
    torch.testing.assert_close(
        out[:, 0], (embeddings.cls_token[:, 0] + embeddings.position_embedding[:, 0]).expand(5, -1)
    )
    torch.testing.assert_close(
        out[:, 1:], embeddings.patch_embedding(images) + embeddings.position_embedding[:, 1:]
    )


@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_torchs_multihead_attention(bias):
    attention = Attention(32, 4, qkv_bias=bias)
    reference = nn.MultiheadAttention(32, 4, batch_first=True)
    matrices = (attention.query, attention.key, attention.value)
    reference.in_proj_weight.data = torch.cat([m.weight for m in matrices])
    reference.in_proj_bias.data = torch.cat([m.bias for m in matrices]) if bias else torch.zeros(96)
    reference.out_proj.weight.data, reference.out_proj.bias.data = (
        attention.projection.weight,
        attention.projection.bias,
    )
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(attention(x), reference(x, x, x)[0], atol=1e-6, rtol=1e-5)


def test_explicit_and_fused_attention_agree():
    query, key, value = torch.randn(3, 2, 4, 9, 8).unbind()
    fused = attend(query, key, value, 0.0)
    explicit = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), 0.0)
    expected = (query @ key.mT / math.sqrt(8)).softmax(-1) @ value
    torch.testing.assert_close(fused, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(explicit.float(), expected, atol=0.03, rtol=0.03)


def test_attention_dropout_acts_in_training_alone():
    attention = Attention(32, 4, attention_dropout=0.5)
    x = torch.randn(2, 9, 32)
    assert not torch.allclose(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


def test_block_is_torchs_pre_norm_encoder_layer():
    block = Block(32, 4, 64, layer_norm_eps=1e-5)
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    matrices = (block.attention.query, block.attention.key, block.attention.value)
    layer.self_attn.in_proj_weight.data = torch.cat([m.weight for m in matrices])
    layer.self_attn.in_proj_bias.data = torch.cat([m.bias for m in matrices])
    for ours, theirs in [
        (block.attention.projection, layer.self_attn.out_proj),
        (block.mlp.fc1, layer.linear1),
        (block.mlp.fc2, layer.linear2),
        (block.norm1, layer.norm1),
        (block.norm2, layer.norm2),
    ]:
        theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(block(x), layer(x), atol=1e-6, rtol=1e-5)


def test_mlp_activations_are_torchs():
    x = torch.randn(4, 8)
    for name, function in {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
    }.items():
        mlp = MLP(8, 16, name)
        torch.testing.assert_close(mlp(x), mlp.fc2(function(mlp.fc1(x))))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_pooling(pool):
    model = VisionTransformer(**SMALL, global_pool=pool, init="trunc_normal").eval()
    images = torch.randn(3, 3, 16, 16)
    sequence = model.encoder(model.embeddings(images))
    pooled = sequence[:, 0] if pool == "cls" else sequence[:, 1:].mean(1)
    torch.testing.assert_close(model(images), model.head(pooled))


def test_initialisation_of_the_authors():
    torch.manual_seed(0)
    model = VisionTransformer(**{**SMALL, "hidden_size": 256, "patch_size": 8})
    assert model.head.weight.abs().max() == 0
    assert model.embeddings.cls_token.abs().max() == 0
    assert model.embeddings.position_embedding.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.embeddings.patch_embedding.projection.weight.std().item() == pytest.approx(
        1 / math.sqrt(3 * 64), rel=0.02
    )
    fc1 = model.encoder.blocks[0].mlp.fc1
    bound = math.sqrt(6 / (256 + 1024))
    assert bound * 0.99 < fc1.weight.abs().max() <= bound
    assert fc1.bias.std().item() == pytest.approx(1e-6, rel=0.2)
    query = model.encoder.blocks[0].attention.query
    assert math.sqrt(6 / 512) * 0.99 < query.weight.abs().max() <= math.sqrt(6 / 512)
    assert query.bias.abs().max() == 0


def test_local_heads_start_at_each_of_the_nine_places():
    """At the start a head looks most at one patch of the 3 x 3 around its own, whichever that is, and each head at another."""
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
        maps = (
            attention.mean(0).detach().reshape(9, 8, 8, 8, 8)
        )  # heads; row and column of who looks, and of what is seen
        around = torch.stack(
            [
                maps[:, row, column, row - 2 : row + 3, column - 2 : column + 3]
                for row in range(2, 6)
                for column in range(2, 6)
            ]
        ).mean(0)  # by the difference of places
        strongest = around.flatten(1).max(1)
        places = {(int(place) // 5 - 2, int(place) % 5 - 2) for place in strongest.indices}
        assert places == {(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)}
        assert strongest.values.min() > 8 / 64  # evenly spread it would be 1/64
    for changes in ({"position": "learned"}, {"position": "rope2d", "qkv_bias": False}):
        with pytest.raises(ValueError, match="init=local needs position=rope2d and qkv_bias=true"):
            VisionTransformer(**SMALL, **changes, init="local")


@pytest.mark.parametrize("width", [24, 48, 96])
def test_whitened_patches_are_uncorrelated(width):
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.randn(500, 3, 4, 4), (16, 16), mode="bicubic")
    images = images + 0.3 * torch.randn(500, 3, 16, 16)
    model = VisionTransformer(**{**SMALL, "image_size": 16, "patch_size": 4, "hidden_size": width})
    whiten_patches(model, images)
    outputs = model.embeddings.patch_embedding(images).flatten(0, 1).detach()
    covariance = outputs.T.cov() if width <= 48 else (outputs.T.cov() @ outputs.T.cov() / 2)
    # More channels than the 48 numbers of a patch can't all be uncorrelated: then twice a projection
    assert covariance.diagonal().mean() == pytest.approx(1.0, abs=0.15)
    if width <= 48:
        assert (covariance - covariance.diagonal().diag()).abs().max() < 0.15
    else:
        torch.testing.assert_close(covariance, outputs.T.cov(), atol=0.25, rtol=0)


def test_other_initialisations():
    torch.manual_seed(0)
    xavier = VisionTransformer(**{**SMALL, "hidden_size": 256}, init="xavier")
    bound = math.sqrt(6 / (256 + 10))
    assert bound * 0.95 < xavier.head.weight.abs().max() <= bound
    assert xavier.encoder.blocks[0].mlp.fc1.bias.std().item() == pytest.approx(1e-6, rel=0.2)
    normal = VisionTransformer(
        **{**SMALL, "hidden_size": 256}, init="trunc_normal", init_range=0.02
    )
    weight = normal.encoder.blocks[1].mlp.fc2.weight
    assert weight.abs().max() <= 0.04
    assert weight.std().item() == pytest.approx(0.02 * 0.8796, rel=0.02)
    assert normal.encoder.blocks[1].mlp.fc2.bias.abs().max() == 0


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize(
    "size", [SMALL, {**SMALL, "image_size": (16, 32), "hidden_size": 48, "num_layers": 3}]
)
def test_macs_are_those_of_all_tokens_and_forward_leaves_out_what_nobody_looks_at(size, pool):
    """Of the last block the class token needs everybody's keys and values, and projection and MLP of its own alone."""
    with torch.device("meta"):
        meta = VisionTransformer(**size, global_pool=pool)
        images = torch.empty(1, 3, *meta.embeddings.patch_embedding.image_size)
    flops = []
    for run in (meta.trace, meta):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(images)
        flops.append(counter.get_total_flops())
    assert 2 * count_macs(VisionTransformer(**size, global_pool=pool)) == flops[0]
    N, D = meta.embeddings.patch_embedding.num_patches + 1, size["hidden_size"]
    M = meta.encoder.blocks[0].mlp.fc1.out_features
    left_out = (N - 1) * (2 * N * D + D * D + 2 * D * M)
    assert flops[0] - flops[1] == (2 * left_out if pool == "cls" else 0)


def test_gradients_are_those_of_all_tokens():
    torch.manual_seed(0)
    model = VisionTransformer(**SMALL).double()
    images, labels = (
        torch.randn(4, 3, *model.embeddings.patch_embedding.image_size).double(),
        torch.tensor([0, 1, 2, 1]),
    )
    found = []
    for run in (model, WholeSequence(model)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(run(images), labels).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-14)
