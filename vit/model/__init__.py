"""The Vision Transformer and its parts; vision_transformer.py is the place to start reading."""

from vit.model.mlp import MLP
from vit.model.pooling import AttentionPool, Pooler
from vit.model.vision_transformer import (
    Attention,
    Block,
    Embeddings,
    Encoder,
    PatchEmbedding,
    Trace,
    VisionTransformer,
)

__all__ = [
    "MLP",
    "Attention",
    "AttentionPool",
    "Block",
    "Embeddings",
    "Encoder",
    "PatchEmbedding",
    "Pooler",
    "Trace",
    "VisionTransformer",
]
