"""Attention maps and rollout."""

import pytest
import torch

from vit.model.attention_maps import head_maps, mean_maps, rollout, trace_images
from vit.model.vision_transformer import VisionTransformer


def build(**changes):
    torch.manual_seed(0)
    arguments = {
        "image_size": (16, 24),
        "patch_size": 8,
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_classes": 2,
        "init": "trunc_normal",
        "init_range": 0.3,
        **changes,
    }
    return VisionTransformer(**arguments).eval()


def test_rollout_of_matrices_made_by_hand():
    # Two heads with the mean [[0, 1], [1, 0]]: half stays, half is swapped
    swap = torch.tensor([[[[0.0, 1], [1, 0]], [[0.0, 1], [1, 0]]]])
    split = torch.tensor([[[[1.0, 0], [1, 0]], [[0.0, 1], [1, 0]]]])  # mean [[.5, .5], [1, 0]]
    torch.testing.assert_close(rollout([swap]), torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]))
    torch.testing.assert_close(rollout([split]), torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]))
    # The later layer on the left: [[.75, .25], [.5, .5]] · [[1, 0], [.5, .5]]
    first = torch.tensor([[[[1.0, 0], [1, 0]]]])
    torch.testing.assert_close(
        rollout([first, split]), torch.tensor([[[0.875, 0.125], [0.75, 0.25]]])
    )
    torch.testing.assert_close(
        rollout([split, first]), torch.tensor([[[0.75, 0.25], [0.625, 0.375]]])
    )
    # Rows that don't sum to one are normalized
    torch.testing.assert_close(rollout([3 * split]), torch.tensor([[[0.625, 0.375], [0.75, 0.25]]]))


def test_rollout_of_no_attention_is_the_identity():
    identity = torch.eye(5).expand(2, 3, 5, 5)
    torch.testing.assert_close(rollout([identity] * 4), torch.eye(5).expand(2, 5, 5))
    uniform = torch.full((1, 2, 4, 4), 0.25)
    rolled = rollout([uniform] * 3)[0]
    torch.testing.assert_close(rolled, torch.eye(4) / 8 + torch.full((4, 4), 7 / 32))


@pytest.mark.parametrize(("changes", "prefix"), [({}, 1), ({"num_registers": 2}, 3)])
def test_maps_are_the_class_tokens_rows(changes, prefix):
    model = build(**changes)
    trace = model.trace(torch.randn(2, 3, 16, 24))
    maps = head_maps(trace, model)
    assert [layer.shape for layer in maps] == [(2, 4, 2, 3)] * 3
    row = trace.attentions[1][1, 2, 0, prefix:]
    torch.testing.assert_close(maps[1][1, 2].flatten(), row)
    torch.testing.assert_close(mean_maps(trace, model)[:, 1], maps[1].mean(dim=1))


@pytest.mark.parametrize("cls_token", [True, False])
def test_with_mean_pooling_maps_are_the_mean_over_the_patches(cls_token):
    model = build(global_pool="mean", cls_token=cls_token)
    trace = model.trace(torch.randn(2, 3, 16, 24))
    start = int(cls_token)
    expected = trace.attentions[2][0, 3, start:, start:].mean(dim=0)
    torch.testing.assert_close(head_maps(trace, model)[2][0, 3].flatten(), expected)


@pytest.mark.parametrize("training", [True, False])
def test_images_are_traced_in_evaluation_mode_and_the_mode_is_restored(training):
    model = build(dropout=0.5).train(training)
    # A frozen part computes as in evaluation while the rest is trained
    model.embeddings.eval()
    modes = [module.training for module in model.modules()]
    images = torch.randn(2, 3, 16, 24)
    trace = trace_images(model, images)
    assert [module.training for module in model.modules()] == modes
    assert not trace.logits.requires_grad
    torch.testing.assert_close(trace.logits, model.eval().trace(images).logits)
