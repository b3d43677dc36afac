"""TODO: say what this file is for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vit.model.vision_transformer import Trace, VisionTransformer


def pooled_row(matrices: Tensor, model: VisionTransformer) -> Tensor:
    """(…, N, N) attention from rows to columns → (…, R, S): how much the pooled output takes from every patch."""
    prefix, grid = model.embeddings.num_prefix, model.embeddings.patch_embedding.grid_size
    row = (
        matrices[..., 0, :]
        if model.global_pool == "cls"
        else matrices[..., prefix:, :].mean(dim=-2)
    )
    return row[..., prefix:].unflatten(-1, grid)


def head_maps(trace: Trace, model: VisionTransformer) -> list[Tensor]:
    """Every head's map, a (B, H, R, S) for each layer; pruned layers have fewer heads."""
    return [pooled_row(probabilities, model) for probabilities in trace.attentions]


def mean_maps(trace: Trace, model: VisionTransformer) -> Tensor:
    """The mean over each layer's heads, (B, L, R, S)."""
    return torch.stack([maps.mean(dim=1) for maps in head_maps(trace, model)], dim=1)


def rollout(layers: Sequence[Tensor]) -> Tensor:
    """How much of every input token reaches every output token, (B, N, N), from L of (B, H, N, N).

    A layer passes on ½ A + ½ I, A its heads' mean, rows summing to one; the residual connection is the I. The product of
    the layers, the last on the left.
    """
    identity = torch.eye(layers[0].shape[-1], dtype=layers[0].dtype, device=layers[0].device)
    reached = identity
    for probabilities in layers:
        passed = (probabilities.mean(dim=1) + identity) / 2
        reached = passed / passed.sum(dim=-1, keepdim=True) @ reached
    return reached


@torch.no_grad()
def trace_images(model: VisionTransformer, images: Tensor) -> Trace:
    """The model's trace in evaluation mode; its mode stays as it was."""
    training = model.training
    trace = model.eval().trace(images)
    model.train(training)
    return trace
