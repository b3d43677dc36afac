"""The parts beyond the first paper: hybrid stem, positions, registers, pooler, stochastic depth and their company."""

import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from vit.model.positions import resize_positions, rope2d, rotate, sincos1d, sincos2d
from vit.model.resnet_stem import ResNetStem
from vit.model.vision_transformer import VisionTransformer
from vit.training.step import draw_drop_path

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_classes": 10,
    "init": "trunc_normal",
    "init_range": 0.2,
}


def build(**changes):
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, **changes})


def images(count=2, channels=3, height=16, width=16):
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layers", [2, 12])
@pytest.mark.parametrize("classes", [100, 1000])
def test_shapes_from_pixels_to_logits_with_a_pooler(layers, classes):
    with torch.device("meta"):
        model = VisionTransformer(
            image_size=224,
            patch_size=16,
            hidden_size=768,
            num_layers=layers,
            num_heads=12,
            num_classes=classes,
            representation_size=768,
        )
        trace = model.trace(torch.empty(32, 3, 224, 224))
    assert trace.hidden_states[0].shape == (32, 197, 768)
    assert len(trace.hidden_states) == layers + 1
    assert trace.sequence.shape == (32, 197, 768)
    assert trace.pooled.shape == (32, 768)
    assert trace.logits.shape == (32, classes)
    assert [attention.shape for attention in trace.attentions] == [(32, 12, 197, 197)] * layers


@pytest.mark.parametrize(
    ("stages", "patch", "width", "layers", "heads", "name"),
    [
        ([3, 4, 9], 16, 768, 12, 12, "vit_base_r50_s16_224"),
        ([2, 2, 2, 2], 32, 384, 12, 6, "vit_small_r26_s32_224"),
        ([3, 4, 6, 3], 32, 1024, 24, 16, "vit_large_r50_s32_224"),
    ],
)
def test_hybrids_have_the_parameters_of_timms(stages, patch, width, layers, heads, name):
    with torch.device("meta"):
        model = VisionTransformer(
            image_size=224,
            patch_size=patch,
            hidden_size=width,
            num_layers=layers,
            num_heads=heads,
            num_classes=1000,
            resnet_stages=stages,
        )
        reference = timm.create_model(name, num_classes=1000)
        assert model.embeddings.patch_embedding(torch.empty(1, 3, 224, 224)).shape == (
            1,
            (224 // patch) ** 2,
            width,
        )
    assert model.num_parameters() == sum(parameter.numel() for parameter in reference.parameters())
    assert model.embeddings.patch_embedding.projection.kernel_size == (1, 1)


@pytest.mark.parametrize("style", ["jax", "timm"])
def test_standardised_convolutions_ignore_shift_and_scale_of_their_weights(style):
    stem = ResNetStem(3, [1, 1], style).double()
    expected = stem(images(height=33, width=48).double())
    assert expected.shape == (2, 512, 5, 6)
    with torch.no_grad():
        stem.blocks[0].conv2.weight.mul_(3).add_(0.7)
    torch.testing.assert_close(
        stem(images(height=33, width=48).double()), expected, rtol=1e-2, atol=1e-3
    )


def test_the_grid_of_a_hybrid_must_fit_its_stride():
    with pytest.raises(ValueError, match="multiple of the ResNet's stride 16"):
        build(resnet_stages=[1, 1, 1], patch_size=8)
    with pytest.raises(ValueError, match="resnet_style must be one of jax, timm"):
        build(resnet_stages=[1], resnet_style="keras")


def test_sincos2d_is_the_published_table():
    """Against the formula written out for single entries: x, then y; sin, then cos; ω = 10000^(-i / (D/4 - 1))."""
    table = sincos2d((3, 5), 16)
    assert table.shape == (15, 16)
    for row, column, i in [(0, 0, 0), (2, 4, 1), (1, 3, 3)]:
        omega = 10000 ** (-i / 3)
        entry = table[row * 5 + column]
        assert entry[[i, 4 + i, 8 + i, 12 + i]].tolist() == pytest.approx(
            [
                np.sin(column * omega),
                np.cos(column * omega),
                np.sin(row * omega),
                np.cos(row * omega),
            ],
            abs=1e-5,
        )


def test_sincos1d_is_the_transformers_table():
    table = sincos1d((2, 3), 8)
    for place in range(6):
        for i in range(4):
            angle = place / 10000 ** (2 * i / 8)
            assert table[place, 2 * i : 2 * i + 2].tolist() == pytest.approx(
                [np.sin(angle), np.cos(angle)], abs=1e-5
            )


def test_rope_makes_attention_depend_on_the_offset_alone():
    rotation = rope2d((6, 7), 16, num_prefix=1)
    query, key = torch.randn(2, 16)

    def score(row, column, other_row, other_column):
        q, k = (
            rotate(vector.expand(1, 1, 43, 16), rotation)[0, 0, 1 + r * 7 + c]
            for vector, r, c in ((query, row, column), (key, other_row, other_column))
        )
        return float(q @ k)

    assert score(0, 0, 2, 3) == pytest.approx(score(3, 2, 5, 5), abs=1e-4)
    assert score(0, 0, 2, 3) != pytest.approx(score(0, 0, 3, 2), abs=1e-3)
    assert torch.equal(rotate(query.expand(1, 1, 43, 16), rotation)[0, 0, 0], query)


@pytest.mark.parametrize("position", ["none", "learned", "sincos2d", "sincos1d", "rope2d"])
def test_only_without_positions_the_order_of_patches_is_nothing(position):
    model = build(position=position).eval()
    x = images()
    moved = x.roll(4, dims=3).roll(8, dims=2)  # whole patches change places
    same = torch.allclose(model(x), model(moved), atol=1e-4)
    assert same == (position == "none")
    assert ("embeddings.position_embedding" in model.state_dict()) == (position == "learned")


@pytest.mark.parametrize(
    ("changes", "positions", "tokens"),
    [
        ({}, 17, 17),
        ({"cls_position": False}, 16, 17),
        ({"cls_token": False, "global_pool": "mean"}, 16, 16),
        ({"num_registers": 4}, 17, 21),
        ({"num_registers": 4, "cls_token": False, "global_pool": "mean"}, 16, 20),
    ],
)
def test_class_token_registers_and_their_positions(changes, positions, tokens):
    model = build(**changes)
    assert model.embeddings.position_embedding.shape == (1, positions, 32)
    trace = model.trace(images())
    assert trace.sequence.shape == (2, tokens, 32)
    if changes.get("global_pool") == "mean":
        torch.testing.assert_close(trace.pooled, trace.sequence[:, tokens - 16 :].mean(1))
    else:
        torch.testing.assert_close(trace.pooled, trace.sequence[:, 0])


def test_pooling_the_class_token_needs_one():
    with pytest.raises(ValueError, match="global_pool must be cls"):
        build(cls_token=False)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((7, 7), (4, 6)), ((3, 5), (6, 2))])
def test_positions_are_resized_as_timm_does(old, new):
    positions = torch.randn(1, 1 + old[0] * old[1], 8)
    expected = resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=1)
    torch.testing.assert_close(resize_positions(positions, old, new), expected)
    assert torch.equal(resize_positions(positions, old, new, "linear")[:, 0], positions[:, 0])


def test_linear_resize_keeps_the_corners():
    positions = torch.randn(1, 12, 8)
    resized = resize_positions(positions, (3, 4), (5, 9), "linear").reshape(5, 9, 8)
    grid = positions.reshape(3, 4, 8)
    for row, column in [(0, 0), (0, -1), (-1, 0), (-1, -1)]:
        torch.testing.assert_close(resized[row, column], grid[row, column])
    torch.testing.assert_close(resize_positions(positions, (3, 4), (3, 4), "linear"), positions)


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
    {"image_size": (16, 24)},
    {"pruned_heads": {0: [1], 2: [0, 3]}},
    {"activation": "quick_gelu"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_traced_and_the_fast_path_agree(changes):
    model = build(**changes).eval()
    x = images(width=24) if "image_size" in changes else images()
    trace = model.trace(x)
    torch.testing.assert_close(trace.logits, model(x), atol=1e-5, rtol=1e-4)
    for attention in trace.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    assert model.head.weight.grad is None
    trace.logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_hidden_states_are_the_blocks_outputs():
    model = build().eval()
    trace = model.trace(images())
    for number, block in enumerate(model.encoder.blocks):
        torch.testing.assert_close(
            block(trace.hidden_states[number]),
            trace.hidden_states[number + 1],
            atol=1e-5,
            rtol=1e-4,
        )
    torch.testing.assert_close(model.encoder.norm(trace.hidden_states[-1]), trace.sequence)


def test_head_masks():
    model = build().eval()
    x = images()
    ones = torch.ones(3, 4, requires_grad=True)
    logits = model.trace(x, ones).logits
    torch.testing.assert_close(logits, model(x), atol=1e-5, rtol=1e-4)
    logits.sum().backward()
    assert (ones.grad != 0).all()
    torch.testing.assert_close(
        model.trace(x, torch.tensor([1.0, 0, 1, 1])).logits,
        model.trace(x, torch.tensor([[1.0, 0, 1, 1]] * 3)).logits,
    )
    model.prune_heads({0: [1], 1: [1], 2: [1]})
    torch.testing.assert_close(
        model(x), build().eval().trace(x, torch.tensor([1.0, 0, 1, 1])).logits, atol=1e-5, rtol=1e-4
    )


def test_drop_path_is_drawn_per_image_and_scaled():
    keep = draw_drop_path(0.4, 5, 4000, seed=1, step=7)
    assert keep.shape == (4000, 5, 2)
    rates = torch.linspace(0, 0.4, 5)
    assert (keep == 0).float().mean((0, 2)).tolist() == pytest.approx(rates.tolist(), abs=0.02)
    for layer, rate in enumerate(rates.tolist()):
        assert keep[:, layer].unique().tolist() == pytest.approx(
            [0.0, 1 / (1 - rate)] if rate else [1.0]
        )
    assert torch.equal(keep[:64], draw_drop_path(0.4, 5, 64, seed=1, step=7))
    assert not torch.equal(keep, draw_drop_path(0.4, 5, 4000, seed=1, step=8))
    assert draw_drop_path(0.0, 5, 8, 1, 1) is None


def test_a_dropped_branch_leaves_the_residual_stream_alone():
    block = build().encoder.blocks[0]
    x = torch.randn(3, 5, 32)
    keep = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 1.0]])
    out = block(x, None, keep)
    assert torch.equal(out[0], x[0])
    torch.testing.assert_close(out[1], block(x)[1])
    middle = x[2] + 2 * block.attention(block.norm1(x))[2]
    torch.testing.assert_close(out[2], middle + block.mlp(block.norm2(middle)))


def test_layer_scale_starts_at_its_value():
    model = build(layer_scale=1e-4)
    assert model.encoder.blocks[1].scale2.factor.unique().tolist() == pytest.approx([1e-4])
    trace = model.trace(images())
    torch.testing.assert_close(trace.hidden_states[0], trace.hidden_states[-1], atol=0.02, rtol=0)


def test_qk_norm_bounds_the_scores():
    model = build(qk_norm=True).eval()
    with torch.no_grad():
        model.encoder.blocks[0].attention.query.weight.mul_(1000)
    scaled = model.trace(images()).attentions[0]
    torch.testing.assert_close(
        scaled, build(qk_norm=True).eval().trace(images()).attentions[0], atol=1e-4, rtol=1e-3
    )


def test_patch_dropout_leaves_patches_out_in_training_alone():
    model = build(patch_dropout=0.5, num_registers=1)
    assert model.embeddings(images()).shape == (2, 2 + 8, 32)
    whole = model.embeddings.eval()(images())
    assert whole.shape == (2, 18, 32)
    kept = model.embeddings.train()(images())
    assert all(any(torch.equal(row, other) for other in whole[0]) for row in kept[0])
    with pytest.raises(ValueError, match="rope2d"):
        build(patch_dropout=0.5, position="rope2d")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("embedding_dropout", "embeddings.dropout"),
        ("projection_dropout", "encoder.blocks.0.attention.dropout"),
        ("mlp_dropout", "encoder.blocks.0.mlp.dropout"),
    ],
)
def test_every_dropout_has_its_place(name, place):
    places = [
        "embeddings.dropout",
        "encoder.blocks.0.attention.dropout",
        "encoder.blocks.0.mlp.dropout",
    ]
    rates = {other: build(**{name: 0.3}).get_submodule(other).p for other in places}
    assert rates == {other: 0.3 if other == place else 0.0 for other in places}
    assert build(**{name: 0.0}, dropout=0.2).get_submodule(place).p == 0.0
    assert [build(dropout=0.2).get_submodule(other).p for other in places] == [0.2] * 3


def test_other_channels():
    model = build(num_channels=1)
    assert model(images(channels=1)).shape == (2, 10)
    assert isinstance(model.embeddings.patch_embedding.projection, nn.Conv2d)
    assert model.embeddings.patch_embedding.projection.in_channels == 1
