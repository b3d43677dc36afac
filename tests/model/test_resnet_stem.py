"""The ResNet before the patches of the hybrids."""

import pytest
import timm
import torch
import torch.nn.functional as F

from vit.model.resnet_stem import ResNetStem, StdConv2d, same_padding
from vit.model.vision_transformer import VisionTransformer


@pytest.mark.parametrize(
    ("stages", "patch_size", "hidden_size", "num_layers", "num_heads", "name"),
    [
        ([3, 4, 9], 16, 768, 12, 12, "vit_base_r50_s16_224"),
        ([2, 2, 2, 2], 32, 384, 12, 6, "vit_small_r26_s32_224"),
        ([3, 4, 6, 3], 32, 1024, 24, 16, "vit_large_r50_s32_224"),
    ],
)
def test_hybrids_have_the_parameters_of_timms(
    stages, patch_size, hidden_size, num_layers, num_heads, name
):
    with torch.device("meta"):
        model = VisionTransformer(
            image_size=224,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_classes=1000,
            resnet_stages=stages,
        )
        reference = timm.create_model(name, num_classes=1000)
        patches = model.embeddings.patch_embedding(torch.empty(1, 3, 224, 224))
    assert patches.shape == (1, (224 // patch_size) ** 2, hidden_size)
    assert model.num_parameters() == sum(parameter.numel() for parameter in reference.parameters())
    assert model.embeddings.patch_embedding.projection.kernel_size == (1, 1)


@pytest.mark.parametrize("style", ["jax", "timm"])
def test_standardized_convolutions_ignore_shift_and_scale_of_their_weights(style):
    stem = ResNetStem(3, [1, 1], style).double()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 33, 48, generator=generator).double()
    expected = stem(images)
    assert expected.shape == (2, 512, 5, 6)
    with torch.no_grad():
        stem.blocks[0].conv2.weight.mul_(3).add_(0.7)
    torch.testing.assert_close(stem(images), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("style", ["jax", "timm"])
def test_the_styles_keep_the_deviation_off_zero_in_two_ways(style):
    convolution = StdConv2d(2, 3, 3, style=style).double()
    with torch.no_grad():
        convolution.weight.mul_(1e-4)  # so small that the epsilon counts
    weight = convolution.weight
    mean = weight.mean(dim=(1, 2, 3), keepdim=True)
    variance = weight.var(dim=(1, 2, 3), correction=0, keepdim=True)
    deviations = {"jax": variance.sqrt() + 1e-5, "timm": (variance + 1e-8).sqrt()}
    images = torch.randn(1, 2, 5, 5).double()
    expected = F.conv2d(images, (weight - mean) / deviations[style], padding=1)
    torch.testing.assert_close(convolution(images), expected)


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (33, 7, 2), (9, 1, 4)]
)
def test_same_padding_rounds_up_and_puts_the_odd_pixel_after(size, kernel, stride):
    row = torch.ones(1, 1, 1, size)
    padded = same_padding(row, kernel, stride)[0, 0].sum(dim=0) > 0
    outputs = (len(padded) - kernel) // stride + 1
    assert outputs == -(-size // stride)
    before = int(padded.int().argmax())
    after = len(padded) - size - before
    assert after - before in (0, 1)


def test_the_patches_of_a_hybrid_must_fit_its_stride():
    sizes = {
        "image_size": 16,
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 4,
        "num_classes": 10,
    }
    with pytest.raises(ValueError, match="multiple of the stem's stride 16"):
        VisionTransformer(**sizes, resnet_stages=[1, 1, 1], patch_size=8)
    with pytest.raises(ValueError, match="resnet_style must be one of jax, timm"):
        VisionTransformer(**sizes, resnet_stages=[1], patch_size=4, resnet_style="keras")
