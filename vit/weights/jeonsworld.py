"""Fine-tuned .bin files of github.com/jeonsworld/ViT-pytorch (models/modeling.py)."""

from pathlib import Path

from torch import Tensor

from vit.errors import CheckpointError
from vit.weights.description import Weights, describe, squash
from vit.weights.names import CLS, PATCHES, POSITIONS, to_ours

MARK = "transformer.embeddings.patch_embeddings.weight"


BLOCK = "transformer.encoder.layer.{}."


TABLE = {
    MARK.removesuffix(".weight"): PATCHES + "projection",
    "transformer.embeddings.cls_token": CLS,
    "transformer.embeddings.position_embeddings": POSITIONS,
    "transformer.encoder.encoder_norm": "encoder.norm",
    "head": "head",
    BLOCK + "attention_norm": "encoder.blocks.{}.norm1",
    BLOCK + "ffn_norm": "encoder.blocks.{}.norm2",
    BLOCK + "attn.out": "encoder.blocks.{}.attention.projection",
    **{
        BLOCK + "attn." + part: f"encoder.blocks.{{}}.attention.{part}"
        for part in ("query", "key", "value")
    },
    BLOCK + "ffn.fc1": "encoder.blocks.{}.mlp.fc1",
    BLOCK + "ffn.fc2": "encoder.blocks.{}.mlp.fc2",
}


def read(path: Path, tensors: dict[str, Tensor]) -> Weights:
    if any(".hybrid_model." in name for name in tensors):
        raise CheckpointError(
            f"{path}: a hybrid of ViT-pytorch, whose ResNet pads and standardises otherwise than the "
            "authors'; load the authors' .npz instead"
        )
    ours = to_ours(tensors, TABLE, path, "ViT-pytorch")
    model, assumed = describe(ours, path, activation="gelu", layer_norm_eps=1e-6)
    return Weights(path, "ViT-pytorch", ours, model, assumed, squash(model))
