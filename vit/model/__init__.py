"""The Vision Transformer and its parts; vision_transformer.py is the place to start reading."""

from vit.model.vision_transformer import (
    MLP,
    Attention,
    Block,
    Embeddings,
    Encoder,
    PatchEmbedding,
    Pooler,
    Trace,
    VisionTransformer,
)

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Embeddings",
    "Encoder",
    "PatchEmbedding",
    "Pooler",
    "Trace",
    "VisionTransformer",
]
