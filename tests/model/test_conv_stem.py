"""The few convolutions before the patches of the lighter hybrids."""

import pytest
import torch
from small_training import batch, make_model, make_state, make_step
from torch import nn

from vit.model.conv_stem import ConvStem
from vit.model.cost import count_macs, stage_shapes

SMALL = {"conv_stem": [16, 32], "conv_stem_strides": [2, 1]}


def stem_of(channels=(32, 16, 48), strides=(1, 2, 2)) -> ConvStem:
    """A stem in float64 whose norms are no identities."""
    torch.manual_seed(0)
    stem = ConvStem(3, channels, strides).double()
    with torch.no_grad():
        for parameter in stem.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return stem


def images(count: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 16, 24, generator=generator, dtype=torch.float64)


def test_it_is_convolutions_group_norms_and_gelus():
    stem = stem_of()
    reference = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=1, padding=1, bias=False),
        nn.GroupNorm(2, 32, eps=1e-6),
        nn.GELU(),
        nn.Conv2d(32, 16, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(1, 16, eps=1e-6),
        nn.GELU(),
        nn.Conv2d(16, 48, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(3, 48, eps=1e-6),
        nn.GELU(),
    ).double()
    pairs = zip(reference.parameters(), stem.parameters(), strict=True)
    for theirs, ours in pairs:
        theirs.data.copy_(ours.data)
    features = stem(images())
    assert features.shape == (5, 48, 4, 6) == (5, stem.out_channels, 16 // stem.stride, 6)
    assert torch.equal(features, reference(images()))


def test_strides_are_two_unless_given():
    assert ConvStem(1, [16, 16, 32]).strides == [2, 2, 2]
    assert ConvStem(1, [16, 16, 32]).stride == 8


@pytest.mark.parametrize("kernel", [1, 2])
def test_the_projection_cuts_patches_of_features(kernel):
    model = make_model(torch.float64, patch_size=2 * kernel, **SMALL)
    embedding = model.embeddings.patch_embedding
    assert embedding.projection.weight.shape == (16, 32, kernel, kernel)
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = embedding.projection(embedding.stem(pixels)).flatten(2).mT
    torch.testing.assert_close(embedding(pixels), expected)


def test_the_features_of_an_image_do_not_depend_on_the_others():
    stem = stem_of().train()
    together = stem(images())
    alone = torch.cat([stem(image[None]) for image in images()])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_micro_batches_leave_a_step_as_it_is():
    models = []
    for micro_batch_size in (None, 5):
        state = make_state(make_model(torch.float64, **SMALL, init="trunc_normal"))
        step = make_step(state, micro_batch_size=micro_batch_size)
        pixels, labels = batch(0)
        step(pixels.double(), labels)
        models.append(state.model)
    pairs = zip(*(model.named_parameters() for model in models), strict=True)
    for (name, whole), (_, parts) in pairs:
        torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-12, msg=name)
    start = make_model(torch.float64, **SMALL, init="trunc_normal").embeddings
    for before, after in zip(start.parameters(), models[0].embeddings.parameters(), strict=True):
        assert not torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_a_gradient(dtype):
    model = make_model(**SMALL, init="local", position="rope2d")
    nn.init.normal_(model.head.weight)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is torch.bfloat16):
        logits = model(batch(0)[0])
    logits.float().logsumexp(1).sum().backward()
    for name, parameter in model.embeddings.patch_embedding.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert parameter.grad.count_nonzero() > 0.9 * parameter.numel(), name


def test_its_kernels_are_lecun_normal():
    first, second = make_model(
        conv_stem=[256, 128], conv_stem_strides=[2, 1]
    ).embeddings.patch_embedding.stem.convolutions()
    assert first.weight.std().item() == pytest.approx(27**-0.5, rel=0.03)
    assert second.weight.std().item() == pytest.approx((9 * 256) ** -0.5, rel=0.03)


def test_its_cost_and_its_shape_are_listed():
    plain, hybrid = make_model(patch_size=2), make_model(patch_size=2, **SMALL)
    convolutions = 4 * 4 * 9 * (3 * 16 + 16 * 32)
    projections = 4 * 4 * 16 * (32 - 3 * 2 * 2)
    assert count_macs(hybrid) - count_macs(plain) == convolutions + projections
    shapes = dict(stage_shapes(hybrid, batch_size=5))
    assert shapes["embeddings.patch_embedding.stem (ConvStem)"] == (5, 32, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_stem": [16, 24]}, r"conv_stem must be multiples of 16, got \[16, 24\]"),
        ({"conv_stem": [0]}, "conv_stem must be multiples of 16"),
        ({**SMALL, "conv_stem_strides": [1]}, r"each of the 2 convolutions .* got \[1\]"),
        ({**SMALL, "conv_stem_strides": [1, 3]}, r"must be 1 or 2 .* got \[1, 3\]"),
        ({"conv_stem": [16, 16, 16]}, r"patch_size \(4, 4\) must be a multiple .* stride 8"),
        ({"conv_stem_strides": [1]}, "conv_stem_strides does nothing without conv_stem"),
        ({"conv_stem": [16], "resnet_stages": [1]}, "resnet_stages and conv_stem are two stems"),
    ],
    ids=str,
)
def test_impossible_stems_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes)
