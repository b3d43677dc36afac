"""The model from pixels to logits: its parts against torch's own, its paths against each other."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
    "num_layers": 3,
    "num_heads": 4,
    "num_classes": 10,
}


def build(**changes):
    """A small model whose weights are large enough for every part to matter."""
    torch.manual_seed(0)
    weights = {"init": "trunc_normal", "init_range": 0.2}
    return VisionTransformer(**{**SMALL, **weights, **changes})


def images(count=2, channels=3, height=16, width=16):
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("hidden_size", "num_layers", "num_heads", "patch_size", "num_parameters"),
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
def test_parameter_counts_are_those_of_the_papers(
    hidden_size, num_layers, num_heads, patch_size, num_parameters
):
    with torch.device("meta"):
        model = VisionTransformer(
            image_size=224,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_classes=1000,
        )
    assert model.num_parameters() == num_parameters


@pytest.mark.parametrize("num_layers", [2, 12, 24, 32])
def test_an_encoder_of_any_depth(num_layers):
    with torch.device("meta"):
        encoder = Encoder([Block(64, 4, 128) for _ in range(num_layers)], hidden_size=64)
        assert encoder(torch.empty(3, 17, 64)).shape == (3, 17, 64)
    assert len(encoder.blocks) == num_layers


def test_the_shapes_of_the_papers_figure():
    model = VisionTransformer(
        image_size=224, patch_size=16, hidden_size=768, num_layers=2, num_heads=12, num_classes=100
    )
    batch = torch.randn(2, 3, 224, 224)
    assert model.embeddings.patch_embedding(batch).shape == (2, 196, 768)
    assert model.embeddings(batch).shape == (2, 197, 768)
    assert model.encoder(model.embeddings(batch)).shape == (2, 197, 768)
    assert model(batch).shape == (2, 100)


@pytest.mark.parametrize("num_layers", [2, 12])
@pytest.mark.parametrize("num_classes", [100, 1000])
def test_shapes_from_pixels_to_logits_with_a_pooler(num_layers, num_classes):
    with torch.device("meta"):
        model = VisionTransformer(
            image_size=224,
            patch_size=16,
            hidden_size=768,
            num_layers=num_layers,
            num_heads=12,
            num_classes=num_classes,
            representation_size=768,
        )
        trace = model.trace(torch.empty(32, 3, 224, 224))
    assert trace.hidden_states[0].shape == (32, 197, 768)
    assert len(trace.hidden_states) == num_layers + 1
    assert trace.sequence.shape == (32, 197, 768)
    assert trace.pooled.shape == (32, 768)
    assert trace.logits.shape == (32, num_classes)
    shapes = [attention.shape for attention in trace.attentions]
    assert shapes == [(32, 12, 197, 197)] * num_layers


@pytest.mark.parametrize(
    ("image_size", "patch_size"), [(16, 4), ((16, 24), 8), ((16, 24), (4, 6)), ([32, 16], [16, 2])]
)
def test_patch_embedding_is_a_strided_convolution_and_flatten_and_linear(image_size, patch_size):
    embedding = PatchEmbedding(image_size, patch_size, num_channels=3, hidden_size=20)
    batch = torch.randn(2, 3, *embedding.image_size)
    convolved = embedding.projection(batch).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedding(batch), convolved)

    height, width = embedding.patch_size
    flat = F.unfold(batch, (height, width), stride=(height, width)).transpose(1, 2)
    linear = nn.Linear(3 * height * width, 20)
    linear.weight.data = embedding.projection.weight.flatten(1)
    linear.bias.data = embedding.projection.bias
    torch.testing.assert_close(embedding(batch), linear(flat))


def test_the_number_of_patches_a_side_instead_of_their_size():
    torch.manual_seed(0)
    by_grid = VisionTransformer(**{**SMALL, "patch_size": None, "grid_size": 4}).state_dict()
    torch.manual_seed(0)
    by_size = VisionTransformer(**SMALL).state_dict()
    assert by_grid.keys() == by_size.keys()
    assert all(torch.equal(by_grid[name], by_size[name]) for name in by_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "patch_size 5x5 does not divide image_size 16x16"),
        ({"patch_size": None, "grid_size": 3}, "grid_size 3x3 does not divide"),
        ({"patch_size": None}, "patch_size .* or grid_size"),
        ({"grid_size": 4}, "patch_size .* or grid_size"),
        ({"patch_size": 0}, "patch_size must be a positive"),
        ({"image_size": (16, 16, 3)}, "image_size must be"),
        ({"num_heads": 0}, "num_heads must be positive"),
        ({"num_heads": 5}, "num_heads must be positive and divide hidden_size 32, got 5"),
        ({"num_layers": 0}, "num_layers.* must be positive"),
        ({"num_channels": 0}, "num_channels.* must be positive"),
        ({"num_classes": 0}, "num_classes.* must be positive"),
        ({"activation": "tanh"}, "activation must be one of gelu"),
        ({"position": "sine"}, "position must be learned, .*, got sine"),
        ({"global_pool": "max"}, "global_pool must be cls .* or map, got max"),
        ({"cls_token": False}, "global_pool must be cls .*with cls_token"),
        ({"cls_token": False, "global_pool": "cls_mean"}, "global_pool must be .*with cls_token"),
        ({"distill_token": True, "global_pool": "mean"}, "distill_token needs global_pool=cls"),
        ({"fc_norm": True}, "fc_norm needs global_pool=mean, got cls"),
        ({"position": "rope_dinov3", "patch_dropout": 0.5}, "patch_dropout .*not rope_dinov3"),
        ({"init": "zeros"}, "init must be one of jax"),
        ({"patch_dropout": 0.5, "position": "rope2d"}, "patch_dropout .* rope2d"),
    ],
    ids=str,
)
def test_impossible_models_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**{**SMALL, **changes})


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 3, 16, 16\), got \(1, 3, 16, 20\)"):
        VisionTransformer(**SMALL)(torch.randn(1, 3, 16, 20))


def test_embeddings_put_the_class_token_first_and_add_positions():
    embeddings = Embeddings(PatchEmbedding(16, 4, 3, 32), 32)
    nn.init.normal_(embeddings.cls_token)
    nn.init.normal_(embeddings.position_embedding)
    batch = torch.randn(5, 3, 16, 16)
    tokens, positions = embeddings(batch), embeddings.position_embedding
    cls_token = (embeddings.cls_token[:, 0] + positions[:, 0]).expand(5, -1)
    torch.testing.assert_close(tokens[:, 0], cls_token)
    patches = embeddings.patch_embedding(batch) + positions[:, 1:]
    torch.testing.assert_close(tokens[:, 1:], patches)


@pytest.mark.parametrize(
    ("changes", "num_positions", "num_tokens"),
    [
        ({}, 17, 17),
        ({"cls_position": False}, 16, 17),
        ({"cls_token": False, "global_pool": "mean"}, 16, 16),
        ({"num_registers": 4}, 17, 21),
        ({"num_registers": 4, "cls_token": False, "global_pool": "mean"}, 16, 20),
    ],
)
def test_class_token_registers_and_their_positions(changes, num_positions, num_tokens):
    model = build(**changes)
    assert model.embeddings.position_embedding.shape == (1, num_positions, 32)
    trace = model.trace(images())
    assert trace.sequence.shape == (2, num_tokens, 32)
    if changes.get("global_pool") == "mean":
        pooled = trace.sequence[:, num_tokens - 16 :].mean(1)
    else:
        pooled = trace.sequence[:, 0]
    torch.testing.assert_close(trace.pooled, pooled)


@pytest.mark.parametrize("position", ["none", "learned", "sincos2d", "sincos1d", "rope2d"])
def test_the_order_of_patches_matters_unless_there_are_no_positions(position):
    model = build(position=position).eval()
    batch = images()
    moved = batch.roll(4, dims=3).roll(8, dims=2)  # whole patches change places
    same = torch.allclose(model(batch), model(moved), atol=1e-4)
    assert same == (position == "none")
    assert ("embeddings.position_embedding" in model.state_dict()) == (position == "learned")


def test_patch_dropout_leaves_patches_out_in_training_alone():
    model = build(patch_dropout=0.5, num_registers=1)
    assert model.embeddings(images()).shape == (2, 2 + 8, 32)
    whole = model.embeddings.eval()(images())
    assert whole.shape == (2, 18, 32)
    kept = model.embeddings.train()(images())
    assert all(any(torch.equal(row, other) for other in whole[0]) for row in kept[0])


@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_torchs_multihead_attention(bias):
    attention = Attention(32, 4, qkv_bias=bias)
    reference = nn.MultiheadAttention(32, 4, batch_first=True)
    matrices = (attention.query, attention.key, attention.value)
    reference.in_proj_weight.data = torch.cat([m.weight for m in matrices])
    reference.in_proj_bias.data = torch.cat([m.bias for m in matrices]) if bias else torch.zeros(96)
    reference.out_proj.load_state_dict(attention.projection.state_dict())
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


def test_qk_norm_bounds_the_scores():
    expected = build(qk_norm=True).eval().trace(images()).attentions[0]
    model = build(qk_norm=True).eval()
    with torch.no_grad():
        model.encoder.blocks[0].attention.query.weight.mul_(1000)
    scaled = model.trace(images()).attentions[0]
    torch.testing.assert_close(scaled, expected, atol=1e-4, rtol=1e-3)


def test_a_block_is_torchs_pre_norm_encoder_layer():
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


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu", "silu"])
def test_an_mlp_is_two_linear_layers_around_its_activation(name):
    functions = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
    functions["gelu_tanh"] = nn.GELU(approximate="tanh")
    mlp, x = MLP(8, 16, name), torch.randn(4, 8)
    torch.testing.assert_close(mlp(x), mlp.fc2(functions[name](mlp.fc1(x))))


def test_layer_scale_starts_at_its_value():
    model = build(layer_scale=1e-4)
    assert model.encoder.blocks[1].scale2.factor.unique().tolist() == pytest.approx([1e-4])
    trace = model.trace(images())
    torch.testing.assert_close(trace.hidden_states[0], trace.hidden_states[-1], atol=0.02, rtol=0)


def test_a_dropped_branch_leaves_the_residual_stream_alone():
    block = build().encoder.blocks[0]
    x = torch.randn(3, 5, 32)
    keep = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 1.0]])
    out = block(x, None, keep)
    assert torch.equal(out[0], x[0])
    torch.testing.assert_close(out[1], block(x)[1])
    middle = x[2] + 2 * block.attention(block.norm1(x))[2]
    torch.testing.assert_close(out[2], middle + block.mlp(block.norm2(middle)))


def test_recomputed_activations_give_the_same_gradients():
    batch, gradients = images(), []
    for checkpointing in (False, True):
        model = build().train()
        model.encoder.checkpointing = checkpointing
        model(batch).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_pooling(pool):
    model, batch = build(global_pool=pool).double().eval(), images().double()
    sequence = model.encoder(model.embeddings(batch))
    pooled = sequence[:, 0] if pool == "cls" else sequence[:, 1:].mean(1)
    torch.testing.assert_close(model(batch), model.head(pooled))


VARIANTS = [
    {},
    {"position": "rope2d"},
    {"qk_norm": True},
    {"layer_scale": 0.1},
    {"num_registers": 2},
    {"representation_size": 24},
    {"qkv_bias": False},
    {"cls_token": False, "global_pool": "mean"},
    {"resnet_stages": [1], "patch_size": 4},
    {"conv_stem": [16, 32], "conv_stem_strides": [1, 2]},
    {"image_size": (16, 24)},
    {"pruned_heads": {0: [1], 2: [0, 3]}},
    {"activation": "quick_gelu"},
    {"distill_token": True},
    {"distill_token": True, "num_registers": 1},
    {"gated_mlp": True, "activation": "silu"},
    {"pre_norm": True},
    {"global_pool": "mean", "fc_norm": True},
    {"global_pool": "map"},
    {"global_pool": "map", "cls_token": False, "representation_size": 24},
    {"global_pool": "cls_mean"},
    {"position": "rope_dinov3", "num_registers": 1},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_traced_and_the_fast_path_agree(changes):
    model = build(**changes).eval()
    batch = images(width=24) if "image_size" in changes else images()
    trace = model.trace(batch)
    torch.testing.assert_close(trace.logits, model(batch), atol=1e-5, rtol=1e-4)
    for attention in trace.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    assert model.head.weight.grad is None
    trace.logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_features_are_what_the_head_sees(changes):
    model = build(**changes).eval()
    batch = images(width=24) if "image_size" in changes else images()
    features = model.features(batch)
    assert features.shape == (2, model.head.in_features)
    torch.testing.assert_close(features, model.trace(batch).pooled, atol=1e-5, rtol=1e-4)
    # A second head has an input of its own
    if model.head_distill is None:
        torch.testing.assert_close(model.head(features), model(batch))


def test_features_of_the_class_token_leave_out_the_last_blocks_patches():
    model, rows = build().eval(), []
    for block in model.encoder.blocks:
        block.mlp.register_forward_hook(lambda mlp, inputs, output: rows.append(output.shape[1]))
    model.features(images())
    assert rows == [17, 17, 1]


def test_hidden_states_are_the_blocks_outputs():
    model = build().eval()
    trace = model.trace(images())
    for n, block in enumerate(model.encoder.blocks):
        output = block(trace.hidden_states[n])
        torch.testing.assert_close(output, trace.hidden_states[n + 1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.encoder.norm(trace.hidden_states[-1]), trace.sequence)


def test_head_masks():
    model, batch = build().eval(), images()
    ones = torch.ones(3, 4, requires_grad=True)
    logits = model.trace(batch, ones).logits
    torch.testing.assert_close(logits, model(batch), atol=1e-5, rtol=1e-4)
    logits.sum().backward()
    assert (ones.grad != 0).all()

    without_one = torch.tensor([1.0, 0, 1, 1])
    for_all_layers = model.trace(batch, without_one).logits
    for_each_layer = model.trace(batch, without_one.expand(3, 4)).logits
    torch.testing.assert_close(for_all_layers, for_each_layer)
    model.prune_heads({0: [1], 1: [1], 2: [1]})
    torch.testing.assert_close(model(batch), for_all_layers, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("embedding_dropout", "embeddings.dropout"),
        ("projection_dropout", "encoder.blocks.0.attention.dropout"),
        ("mlp_dropout", "encoder.blocks.0.mlp.dropout"),
    ],
)
def test_every_dropout_has_a_module(name, module):
    modules = [
        "embeddings.dropout",
        "encoder.blocks.0.attention.dropout",
        "encoder.blocks.0.mlp.dropout",
    ]

    def rates(**changes):
        model = build(**changes)
        return [model.get_submodule(other).p for other in modules]

    assert rates(**{name: 0.3}) == [0.3 if other == module else 0.0 for other in modules]
    assert rates(**{name: 0.0}, dropout=0.2)[modules.index(module)] == 0.0
    assert rates(dropout=0.2) == [0.2] * 3


def test_gray_images():
    model = build(num_channels=1)
    assert model(images(channels=1)).shape == (2, 10)
    assert isinstance(model.embeddings.patch_embedding.projection, nn.Conv2d)
    assert model.embeddings.patch_embedding.projection.in_channels == 1
