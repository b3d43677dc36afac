"""Parts of a model that are not trained.

A frozen part gives fixed features. It gets neither gradients nor an optimizer's state, so it costs
no backward pass; it is not decayed, its average does not move; and it computes as in evaluation,
without dropout, stochastic depth and dropped patches.
"""

from collections.abc import Sequence

from torch import nn

from vit.model.vision_transformer import VisionTransformer


def backbone_of(model: VisionTransformer) -> list[nn.Module]:
    """Return all modules of a model but its heads, for a linear probe."""
    parts = (model.embeddings, model.encoder, model.attention_pool, model.pooler)
    return [part for part in parts if part is not None]


def first_blocks_of(model: VisionTransformer, count: int) -> list[nn.Module]:
    """Return the modules of a model up to its first `count` blocks: the embeddings and these."""
    return [model.embeddings, *list(model.encoder.blocks)[:count]]


def freeze(parts: Sequence[nn.Module]) -> None:
    """Let the parameters of these modules get no gradients."""
    for part in parts:
        part.requires_grad_(False)


def describe_parameters(model: VisionTransformer) -> str:
    """Count a model's parameters for people: "85,806,346 (42,537,226 of them trained)"."""
    count = model.num_parameters()
    trained = sum(item.numel() for item in model.parameters() if item.requires_grad)
    return f"{count:,}" if trained == count else f"{count:,} ({trained:,} of them trained)"
