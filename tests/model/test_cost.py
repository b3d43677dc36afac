"""What a model costs, and the shapes of its parts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vit.model.cost import WholeSequence, count_macs, stage_shapes, training_flops
from vit.model.vision_transformer import VisionTransformer

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_classes": 10,
}
OBLONG = {**SMALL, "image_size": (16, 32), "hidden_size": 48, "num_layers": 3}


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("sizes", [SMALL, OBLONG], ids=["square", "oblong"])
def test_macs_are_those_of_all_tokens_and_forward_leaves_out_what_is_not_pooled(sizes, pool):
    """The class token needs the keys and values of all, but the last MLP for itself alone."""
    with torch.device("meta"):
        meta = VisionTransformer(**sizes, global_pool=pool)
        images = torch.empty(1, 3, *meta.embeddings.patch_embedding.image_size)
    flops = {}
    for name, run in (("trace", meta.trace), ("forward", meta)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(images)
        flops[name] = counter.get_total_flops()
    assert 2 * count_macs(VisionTransformer(**sizes, global_pool=pool)) == flops["trace"]

    N, D = meta.embeddings.patch_embedding.num_patches + 1, sizes["hidden_size"]
    M = meta.encoder.blocks[0].mlp.fc1.out_features
    left_out = (N - 1) * (2 * N * D + D * D + 2 * D * M)
    expected = 2 * left_out if pool == "cls" else 0
    assert flops["trace"] - flops["forward"] == expected


@pytest.mark.parametrize("dropped", [0.0, 0.5])
def test_training_counts_the_multiply_adds_that_are_really_done(dropped):
    """6 FLOPs each; dropped patches, and all but the class token after the last attention, are
    left out."""
    model = VisionTransformer(**SMALL, patch_dropout=dropped)
    D, L, classes = 32, 2, 10
    M, patches = 4 * D, 16
    N = round(patches * (1 - dropped)) + 1
    embedding = patches * D * 3 * 4 * 4
    qkv, attention, output, mlp = 3 * N * D * D, 2 * N * N * D, N * D * D, 2 * N * D * M
    blocks = L * (qkv + attention + output + mlp)
    left_out = (N - 1) * (2 * N * D + D * D + 2 * D * M)
    macs = embedding + blocks - left_out + classes * D
    assert training_flops(model) == 6 * macs
    # A backward pass of the head alone
    head_only = training_flops(model) // 3 + 4 * classes * D
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    assert training_flops(model) == head_only


def test_gradients_are_those_of_all_tokens():
    torch.manual_seed(0)
    model = VisionTransformer(**SMALL).double()
    images = torch.randn(4, 3, 16, 16).double()
    labels = torch.tensor([0, 1, 2, 1])
    gradients = []
    for run in (model, WholeSequence(model)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(run(images), labels).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_shapes_are_listed_in_the_order_of_the_pass_with_the_first_and_the_last_block():
    model = VisionTransformer(**OBLONG, representation_size=20)
    shapes = dict(stage_shapes(model, batch_size=5))
    assert shapes["embeddings.patch_embedding (PatchEmbedding)"] == (5, 32, 48)
    assert shapes["embeddings (Embeddings)"] == (5, 33, 48)
    assert shapes["encoder.blocks.0.mlp.fc1 (Linear)"] == (5, 33, 192)
    assert shapes["encoder.blocks.2 (Block)"] == (5, 33, 48)
    assert not any("blocks.1" in name for name in shapes)
    assert list(shapes)[-3:] == [
        "pooler.dense (Linear)",
        "pooler (Pooler)",
        "head (Linear)",
    ]
    assert shapes["head (Linear)"] == (5, 10)


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_model_as_it_was(training):
    model = VisionTransformer(**SMALL).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_macs(model)
    stage_shapes(model, 2)
    assert model.training == training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
