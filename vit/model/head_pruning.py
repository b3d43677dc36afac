"""Attention heads: how important they are, and their removal.

Heads go by their original numbers, also in a model that lost some before.
Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?" (arXiv:1905.10650), section 4.1.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from vit.model.vision_transformer import Attention, VisionTransformer


def attention_modules(model: "VisionTransformer") -> list["Attention"]:
    return [cast("Attention", block.attention) for block in model.encoder.blocks]


def num_original_heads(attention: "Attention") -> int:
    """How many heads there were before any was removed."""
    return attention.projection.out_features // attention.head_size


def removed_heads(model: "VisionTransformer") -> dict[int, list[int]]:
    """{layer: heads it lost}, layers that have all theirs left out: what `pruned_heads` of a configuration holds."""
    lost = {
        layer: sorted(set(range(num_original_heads(attention))) - set(attention.heads))
        for layer, attention in enumerate(attention_modules(model))
    }
    return {layer: heads for layer, heads in lost.items() if heads}


def importance(model: "VisionTransformer", batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """How much each head matters to the loss on (images, labels) batches, (L, H) in float64; NaN for heads removed before.

    The mean over samples of |∂loss/∂mask| where the head's mask is 1, each layer divided by its ℓ2 norm. Every sample has
    masks of its own, so one backward pass gives the gradient of each. The model is put into evaluation mode and left so.
    Raises ValueError where there is no batch.
    """
    model.eval()
    layers, heads = len(model.encoder.blocks), num_original_heads(attention_modules(model)[0])
    sums, samples = torch.zeros(layers, heads, dtype=torch.float64), 0
    for images, labels in batches:
        mask = torch.ones(len(images), layers, heads, device=images.device, requires_grad=True)
        loss = F.cross_entropy(model.trace(images, mask).logits, labels, reduction="sum")
        sums += torch.autograd.grad(loss, mask)[0].abs().sum(dim=0).cpu()
        samples += len(images)
    if samples == 0:
        raise ValueError("no images to measure the heads' importance on")
    scores = F.normalize(sums / samples, dim=1)
    for layer, lost in removed_heads(model).items():
        scores[layer, lost] = torch.nan
    return scores


def least_important(scores: Tensor, fraction: float) -> dict[int, list[int]]:
    """{layer: heads}, the share of the heads with the lowest scores (L, H); NaN: not there. One at least stays in each layer,
    so a large share gives fewer. Raises ValueError unless fraction is between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    left = (~scores.isnan()).sum(dim=1).tolist()
    wanted = round(fraction * sum(left))
    chosen: dict[int, list[int]] = {}
    for place in scores.flatten().argsort(stable=True).tolist():  # NaN comes last
        layer, head = divmod(place, scores.shape[1])
        if wanted == 0 or scores[layer, head].isnan():
            break
        if left[layer] > 1:
            chosen.setdefault(layer, []).append(head)
            left[layer], wanted = left[layer] - 1, wanted - 1
    return {layer: sorted(chosen[layer]) for layer in sorted(chosen)}


def remove_heads(model: "VisionTransformer", heads: Mapping[int, Sequence[int]]) -> None:
    """Remove {layer: heads} for good: their rows of query, key and value, their columns of the projection.

    The parameters are new ones: build the optimizer afterwards. Raises ValueError, and changes nothing, where a layer or a
    head does not exist, a head was removed before, or a layer would keep none.
    """
    layers = attention_modules(model)
    for layer, numbers in heads.items():
        if not 0 <= layer < len(layers):
            raise ValueError(
                f"no layer {layer} to remove heads from; there are 0 to {len(layers) - 1}"
            )
        attention = layers[layer]
        for head in numbers:
            if head not in range(num_original_heads(attention)):
                raise ValueError(
                    f"layer {layer} has no head {head} to remove; it has {join_numbers(attention.heads)}"
                )
            if head not in attention.heads:
                raise ValueError(
                    f"head {head} of layer {layer} was removed before; it has {join_numbers(attention.heads)}"
                )
        if set(numbers) >= set(attention.heads):
            raise ValueError(
                f"layer {layer} must keep one head at least; it has {join_numbers(attention.heads)}"
            )
    for layer, numbers in heads.items():
        keep_heads(layers[layer], [head for head in layers[layer].heads if head not in numbers])


def join_numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def keep_heads(attention: "Attention", heads: Sequence[int]) -> None:
    """Cut an attention down to some of the heads it has."""
    places = torch.tensor(
        [attention.heads.index(head) for head in heads], device=attention.query.weight.device
    )
    rows = (
        places[:, None] * attention.head_size
        + torch.arange(attention.head_size, device=places.device)
    ).flatten()

    def cut(parameter: Tensor, dim: int) -> nn.Parameter:
        return nn.Parameter(
            parameter.detach().index_select(dim, rows), requires_grad=parameter.requires_grad
        )

    for matrix in (attention.query, attention.key, attention.value):
        matrix.weight, matrix.out_features = cut(matrix.weight, 0), len(rows)
        if matrix.bias is not None:
            matrix.bias = cut(matrix.bias, 0)
    attention.projection.weight, attention.projection.in_features = (
        cut(attention.projection.weight, 1),
        len(rows),
    )
    attention.heads = list(heads)
