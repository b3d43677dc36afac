"""Attention as maps over the image: by head, by layer, and rolled out through all layers.

Axis letters: B batch, L layers, H heads, N tokens, R × S rows × columns of the patch grid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vit.model.vision_transformer import Trace, VisionTransformer


def shows_class_token(model: VisionTransformer) -> bool:
    """Whether the class token stands for the pooled output, or else the mean of the patches.

    Of cls_mean it is the class token, of map the mean.
    """
    return model.global_pool in ("cls", "cls_mean")


def pooled_row(matrices: Tensor, model: VisionTransformer) -> Tensor:
    """How much the pooled output attends to every patch: (…, N, N) → (…, R, S).

    matrices: attention of the token in the row to the token in the column. What stands for the
    pooled output: see shows_class_token; of two class tokens the first.
    """
    prefix = model.embeddings.num_prefix
    if shows_class_token(model):
        row = matrices[..., 0, :]
    else:
        row = matrices[..., prefix:, :].mean(dim=-2)
    return row[..., prefix:].unflatten(-1, model.embeddings.patch_embedding.grid_size)


def head_maps(trace: Trace, model: VisionTransformer) -> list[Tensor]:
    """The map of every head, a (B, H, R, S) for each layer; pruned layers have fewer heads."""
    return [pooled_row(probabilities, model) for probabilities in trace.attentions]


def mean_maps(trace: Trace, model: VisionTransformer) -> Tensor:
    """The mean of each layer's head maps, (B, L, R, S)."""
    return torch.stack([maps.mean(dim=1) for maps in head_maps(trace, model)], dim=1)


def rollout(layers: Sequence[Tensor]) -> Tensor:
    """How much of every input token reaches every output token, (B, N, N).

    layers: L attention probabilities of (B, H, N, N). A layer mixes tokens by ½ A + ½ I, where A is
    the mean of its heads and I stands for the residual connection; rows are normalized to sum to
    one. The layers multiply, the last on the left.

    Source: Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers" (arXiv:2005.00928),
    section 3; the paper's figure 6 (Dosovitskiy et al. 2021) is drawn with it.
    """
    identity = torch.eye(layers[0].shape[-1], dtype=layers[0].dtype, device=layers[0].device)
    reached = identity
    for probabilities in layers:
        mixing = (probabilities.mean(dim=1) + identity) / 2
        reached = mixing / mixing.sum(dim=-1, keepdim=True) @ reached
    return reached


@torch.no_grad()
def trace_images(model: VisionTransformer, images: Tensor) -> Trace:
    """Trace a batch of images in evaluation mode; every module's mode is restored afterwards."""
    # Not by model.train(): frozen parts of a model that is trained are in evaluation mode
    in_training = [module for module in model.modules() if module.training]
    trace = model.eval().trace(images)
    for module in in_training:
        module.training = True
    return trace
