"""Attention heads: scored, masked, removed."""

import copy

import pytest
import torch
import torch.nn.functional as F

from vit.checkpoints.model import build_model
from vit.model.cost import count_macs
from vit.model.head_pruning import importance, least_important, removed_heads
from vit.model.vision_transformer import VisionTransformer

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_classes": 5,
    "init": "trunc_normal",
    "init_range": 0.3,
}


def build(**changes):
    """A model with weights so large that every head matters."""
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, **changes}).eval()


def batch(count=6):
    """(images, labels)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 16, 16, generator=generator), torch.arange(count) % 5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True},
        {"qkv_bias": False},
        {"position": "rope2d"},
        {"global_pool": "mean", "num_registers": 2},
    ],
    ids=str,
)
def test_masked_and_pruned_logits_agree_also_when_pruned_twice(changes):
    model, images = build(**changes), batch()[0]
    pruned, mask = copy.deepcopy(model), torch.ones(3, 4)
    for heads in ({0: [1, 3], 2: [0]}, {0: [2], 1: [3], 2: [3]}):
        before = pruned(images)
        pruned.prune_heads(heads)
        for layer, numbers in heads.items():
            mask[layer, numbers] = 0
        masked = model.trace(images, mask).logits
        assert (masked - before).abs().max() > 1e-3
        torch.testing.assert_close(pruned(images), masked, atol=1e-4, rtol=1e-4)
        traced = pruned.trace(images, torch.ones(3, 4)).logits
        torch.testing.assert_close(traced, masked, atol=1e-4, rtol=1e-4)
    assert removed_heads(pruned) == {0: [1, 2, 3], 1: [3], 2: [0, 3]}

    rebuilt = build(**changes, pruned_heads={0: [1, 2, 3], 1: [3], 2: [0, 3]})
    assert torch.equal(rebuilt(images), pruned(images))

    # A mask goes by the original numbers, whatever was removed before
    one_more = torch.ones(3, 4)
    one_more[2, 1] = mask[2, 1] = 0
    torch.testing.assert_close(
        pruned.trace(images, one_more).logits,
        model.trace(images, mask).logits,
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    "shape", [(), (3,), (5,), (5, 4), (4, 3), (2, 4), (1, 3, 4), (3, 3, 5), (6, 4, 3), (1, 6, 3, 4)]
)
def test_masks_of_other_shapes_are_refused(shape):
    model, images = build(), batch(6)[0]
    with pytest.raises(ValueError, match=r"\(4,\) .* \(3, 4\), or \(6, 3, 4\)") as caught:
        model.trace(images, torch.ones(shape))
    assert str(shape) in str(caught.value)


def test_masks_of_one_attention():
    attention = build().encoder.blocks[0].attention
    x = torch.randn(2, 5, 32)
    for shape in ((4,), (2, 4)):
        attention.trace(x, None, torch.ones(shape))
    for shape in ((), (1,), (3,), (3, 4), (2, 3), (2, 1, 4)):
        with pytest.raises(ValueError, match=r"head_mask must be \(4,\), or \(2, 4\)"):
            attention.trace(x, None, torch.ones(shape))


def test_a_mask_for_each_image():
    model, images = build(), batch(3)[0]
    masks = torch.rand(3, 3, 4)
    one_by_one = [
        model.trace(image[None], mask).logits for image, mask in zip(images, masks, strict=True)
    ]
    together = model.trace(images, masks).logits
    torch.testing.assert_close(together, torch.cat(one_by_one), atol=1e-5, rtol=1e-5)


def test_what_a_head_costs():
    model = build()
    pruned = copy.deepcopy(model)
    pruned.prune_heads({0: [1, 3], 2: [0]})
    N, D, K = 17, 32, 8
    assert model.num_parameters() - pruned.num_parameters() == 3 * (4 * D * K + 3 * K)
    assert count_macs(model) - count_macs(pruned) == 3 * (4 * N * D * K + 2 * N * N * K)
    with torch.device("meta"):
        assert build(pruned_heads={0: [1, 3], 2: [0]}).num_parameters() == pruned.num_parameters()


def test_frozen_parameters_stay_frozen():
    model = build()
    attention = model.encoder.blocks[0].attention
    attention.key.requires_grad_(False)
    model.prune_heads({0: [1]})
    assert attention.query.weight.requires_grad
    assert not attention.key.weight.requires_grad
    assert not attention.key.bias.requires_grad


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({0: [0], 3: [1]}, "no layer 3 to remove heads from; there are 0 to 2"),
        ({-1: [0]}, "no layer -1"),
        ({0: [0], 1: [4]}, "layer 1 has no head 4 to remove; it has 0, 1, 2, 3"),
        ({1: [-1]}, "layer 1 has no head -1"),
        ({2: [2]}, "head 2 of layer 2 was removed before; it has 0, 1, 3"),
        ({1: [0, 1, 2, 3]}, "layer 1 must keep at least one head"),
        ({2: [0, 1, 3]}, "layer 2 must keep at least one head; it has 0, 1, 3"),
    ],
)
def test_impossible_removals_are_refused_and_change_nothing(heads, message):
    model = build(pruned_heads={2: [2]})
    with pytest.raises(ValueError, match=message):
        model.prune_heads(heads)
    assert removed_heads(model) == {2: [2]}


def test_a_configuration_may_hold_layers_as_text():
    settings = {**SMALL, "name": "small"}
    del settings["num_classes"]
    model = build_model({**settings, "pruned_heads": {"0": [1, 3], "2": [0]}}, 5)
    assert removed_heads(model) == {0: [1, 3], 2: [0]}
    for wrong in ([0, 1], {"first": [0]}, {0: 1}):
        with pytest.raises(ValueError, match=r"pruned_heads must be \{layer: \[heads\]\}"):
            build_model({**settings, "pruned_heads": wrong}, 5)


def test_importance_is_the_mean_of_the_gradients_of_single_images():
    model, (images, labels) = build(), batch()
    total = torch.zeros(3, 4)
    for image, label in zip(images, labels, strict=True):
        mask = torch.ones(3, 4, requires_grad=True)
        F.cross_entropy(model.trace(image[None], mask).logits, label[None]).backward()
        total += mask.grad.abs()
    expected = total / total.norm(dim=1, keepdim=True)
    scores = importance(model, [(images[:4], labels[:4]), (images[4:], labels[4:])])
    torch.testing.assert_close(scores.float(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores.norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_importance_by_finite_differences():
    model, (images, labels) = build().double(), batch()
    images = images.double()

    def losses(layer, head, change):
        mask = torch.ones(3, 4, dtype=torch.float64)
        mask[layer, head] += change
        with torch.no_grad():
            logits = model.trace(images, mask).logits
            return F.cross_entropy(logits, labels, reduction="none")

    slopes = torch.zeros(3, 4, dtype=torch.float64)
    for layer in range(3):
        for head in range(4):
            difference = losses(layer, head, 1e-4) - losses(layer, head, -1e-4)
            slopes[layer, head] = (difference / 2e-4).abs().mean()
    expected = slopes / slopes.norm(dim=1, keepdim=True)
    scores = importance(model, [(images, labels)])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_a_head_that_adds_nothing_has_no_importance():
    model = build()
    value = model.encoder.blocks[1].attention.value
    with torch.no_grad():
        value.weight[16:24] = 0
        value.bias[16:24] = 0
    scores = importance(model, [batch()])
    assert scores[1, 2] == 0
    assert (scores > 0).sum() == 11
    with torch.no_grad():
        value.weight.zero_()
        value.bias.zero_()
    # 0, and not NaN, which is for heads that are gone
    assert importance(model, [batch()])[1].tolist() == [0, 0, 0, 0]


def test_removed_heads_have_no_score():
    scores = importance(build(pruned_heads={0: [1, 3], 2: [0]}), [batch()])
    assert scores.isnan().nonzero().tolist() == [[0, 1], [0, 3], [2, 0]]
    assert scores.nan_to_num().norm(dim=1).tolist() == pytest.approx([1, 1, 1])


def test_importance_needs_images():
    with pytest.raises(ValueError, match="no images"):
        importance(build(), [])


def test_the_least_important_heads_but_never_a_whole_layer():
    nan = float("nan")
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.9, nan, 0.25], [nan, nan, nan, 0.01]])
    assert least_important(scores, 0.4) == {0: [0, 1], 1: [3]}  # 3 of 8; layer 2's only head stays
    assert least_important(scores, 0.99) == {0: [0, 1, 2], 1: [0, 3]}
    assert least_important(scores, 0.01) == {}
    for fraction in (0, 1, -0.5, nan):
        with pytest.raises(ValueError, match="fraction must be between 0 and 1"):
            least_important(scores, fraction)
