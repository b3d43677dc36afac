"""Attention heads: how important they are, and how they are removed.

Heads go by their original numbers, also in a model that has lost some before. Axis letters:
L layers, H heads, D width of the model, K width of one head.

Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?" (arXiv:1905.10650),
section 4.1.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from vit.model.vision_transformer import Attention, VisionTransformer


def attention_modules(model: "VisionTransformer") -> list["Attention"]:
    """The attention of every block, in order."""
    return [cast("Attention", block.attention) for block in model.encoder.blocks]


def num_original_heads(attention: "Attention") -> int:
    """How many heads there were before any was removed."""
    # Pruning cuts the projection's columns, so its rows still have the original width.
    return attention.projection.out_features // attention.head_size


def removed_heads(model: "VisionTransformer") -> dict[int, list[int]]:
    """{layer: heads that were removed}, without the layers that have kept all of theirs.

    It has the form of the model's argument `pruned_heads`.
    """
    removed = {}
    for layer, attention in enumerate(attention_modules(model)):
        missing = set(range(num_original_heads(attention))) - set(attention.heads)
        if missing:
            removed[layer] = sorted(missing)
    return removed


def split_head_mask(model: "VisionTransformer", mask: Tensor | None, count: int) -> list:
    """The mask of every layer, (H,) or (B, H) each, or None for all of them.

    mask: a factor for every head by its original number, (H,) for all layers, (L, H), or (B, L, H)
    for each of `count` images. Raises ValueError, which names these shapes, for another.
    """
    layers = attention_modules(model)
    if mask is None:
        return [None] * len(layers)
    L, H = len(layers), num_original_heads(layers[0])
    if tuple(mask.shape) not in ((H,), (L, H), (count, L, H)):
        raise ValueError(
            f"head_mask must be ({H},) for all layers, ({L}, {H}), or ({count}, {L}, {H}) for each "
            f"image: images, layers, heads; got {tuple(mask.shape)}"
        )
    return [mask] * L if mask.dim() == 1 else list(mask.unbind(-2))


def select_heads(attention: "Attention", mask: Tensor, count: int) -> Tensor:
    """The factors of the heads that are left, to multiply (B, H, N, N) by.

    mask: by the original numbers, (H,) or (B, H) for each of `count` images. Raises ValueError,
    which names these shapes, for another.
    """
    H = num_original_heads(attention)
    if tuple(mask.shape) not in ((H,), (count, H)):
        raise ValueError(
            f"head_mask must be ({H},), or ({count}, {H}) for each image: images, heads; "
            f"got {tuple(mask.shape)}"
        )
    return mask[..., attention.heads, None, None]


def importance(model: "VisionTransformer", batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """How much each head matters to the loss on batches of (images, labels).

    Returns (L, H) in float64, NaN for heads that were removed before. The score of a head is the
    mean over the images of |∂loss/∂mask|, where the mask that scales the head is 1; the scores of a
    layer are divided by their ℓ2 norm. The model is put into evaluation mode and stays in it.
    Raises ValueError where there are no images.
    """
    model.eval()
    num_layers = len(model.encoder.blocks)
    num_heads = num_original_heads(attention_modules(model)[0])
    sums = torch.zeros(num_layers, num_heads, dtype=torch.float64)
    num_images = 0
    for images, labels in batches:
        # Every image has its own mask, so that one backward pass gives the gradient of each image.
        mask = torch.ones(len(images), num_layers, num_heads, device=images.device)
        mask.requires_grad_()
        # A sum and no mean: the gradient of an image must not depend on the batch it is in.
        loss = F.cross_entropy(model.trace(images, mask).logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, mask)
        sums += gradient.abs().sum(dim=0).cpu()
        num_images += len(images)
    if num_images == 0:
        raise ValueError("no images to measure the heads' importance on")
    scores = F.normalize(sums / num_images, dim=1)
    for layer, heads in removed_heads(model).items():
        scores[layer, heads] = torch.nan
    return scores


def least_important(scores: Tensor, fraction: float) -> dict[int, list[int]]:
    """{layer: heads}: the given fraction of all heads, those with the lowest scores.

    scores: (L, H), NaN for heads that are not there. Every layer keeps at least one head, so a
    large fraction gives fewer than it asks for. Raises ValueError unless the fraction is between 0
    and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    heads_left = (~scores.isnan()).sum(dim=1).tolist()
    requested = round(fraction * sum(heads_left))
    chosen: dict[int, list[int]] = {}
    # NaN comes last. The sort is stable, so that of equal scores the first are taken everywhere.
    for index in scores.flatten().argsort(stable=True).tolist():
        layer, head = divmod(index, scores.shape[1])
        if requested == 0 or scores[layer, head].isnan():
            break
        if heads_left[layer] > 1:
            chosen.setdefault(layer, []).append(head)
            heads_left[layer] -= 1
            requested -= 1
    return {layer: sorted(chosen[layer]) for layer in sorted(chosen)}


def remove_heads(model: "VisionTransformer", heads: Mapping[int, Sequence[int]]) -> None:
    """Remove {layer: heads} for good.

    The rows of query, key and value and the columns of the projection that belong to them are cut
    out. The parameters are new ones, so build the optimizer afterwards. Raises ValueError, and
    changes nothing, where a layer or a head does not exist, a head was removed before, or a layer
    would be left without any.
    """
    layers = attention_modules(model)
    # All are checked before the first is changed.
    for layer, numbers in heads.items():
        if not 0 <= layer < len(layers):
            raise ValueError(
                f"no layer {layer} to remove heads from; there are 0 to {len(layers) - 1}"
            )
        check_removable(layers[layer], numbers, layer)
    for layer, numbers in heads.items():
        attention = layers[layer]
        keep_heads(attention, [head for head in attention.heads if head not in numbers])


def check_removable(attention: "Attention", heads: Sequence[int], layer: int) -> None:
    """Raise ValueError, which names the layer, where these heads can't be removed from it."""
    remaining = "it has " + ", ".join(str(head) for head in attention.heads)
    for head in heads:
        if head not in range(num_original_heads(attention)):
            raise ValueError(f"layer {layer} has no head {head} to remove; {remaining}")
        if head not in attention.heads:
            raise ValueError(f"head {head} of layer {layer} was removed before; {remaining}")
    if set(heads) >= set(attention.heads):
        raise ValueError(f"layer {layer} must keep at least one head; {remaining}")


def keep_heads(attention: "Attention", heads: Sequence[int]) -> None:
    """Cut an attention down to some of the heads it has."""
    K = attention.head_size
    slots = torch.tensor([attention.heads.index(head) for head in heads])
    # Head i has the rows i·K to (i + 1)·K of the matrices, and the same columns of the projection.
    rows = (slots[:, None] * K + torch.arange(K)).flatten()
    rows = rows.to(attention.query.weight.device)

    for matrix in (attention.query, attention.key, attention.value):
        matrix.weight = select(matrix.weight, 0, rows)
        if matrix.bias is not None:
            matrix.bias = select(matrix.bias, 0, rows)
        matrix.out_features = len(rows)
    attention.projection.weight = select(attention.projection.weight, 1, rows)
    attention.projection.in_features = len(rows)
    attention.heads = list(heads)


def select(parameter: Tensor, dim: int, indices: Tensor) -> nn.Parameter:
    """A new parameter with some rows (dim 0) or columns (dim 1) of another; frozen if that was."""
    values = parameter.detach().index_select(dim, indices)
    return nn.Parameter(values, requires_grad=parameter.requires_grad)
