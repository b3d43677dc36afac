"""Fine-tuned .bin files of github.com/jeonsworld/ViT-pytorch (models/modeling.py)."""

from pathlib import Path

from torch import Tensor

from vit.errors import CheckpointError
from vit.weights.description import Weights, describe, squash_preprocessing
from vit.weights.names import BLOCK, CLS, PATCHES, POSITIONS, QKV, to_ours

MARKS = ("transformer.embeddings.patch_embeddings.weight",)
CONVENTION = "ViT-pytorch's ViT-B, L and H"

THEIR_BLOCK = "transformer.encoder.layer.{}."

TABLE = {
    "transformer.embeddings.patch_embeddings": PATCHES + "projection",
    "transformer.embeddings.cls_token": CLS,
    "transformer.embeddings.position_embeddings": POSITIONS,
    "transformer.encoder.encoder_norm": "encoder.norm",
    "head": "head",
    THEIR_BLOCK + "attention_norm": BLOCK + "norm1",
    THEIR_BLOCK + "ffn_norm": BLOCK + "norm2",
    **{THEIR_BLOCK + f"attn.{part}": BLOCK + f"attention.{part}" for part in QKV},
    THEIR_BLOCK + "attn.out": BLOCK + "attention.projection",
    THEIR_BLOCK + "ffn.fc1": BLOCK + "mlp.fc1",
    THEIR_BLOCK + "ffn.fc2": BLOCK + "mlp.fc2",
}


def read(path: Path, tensors: dict[str, Tensor]) -> Weights:
    """Raises CheckpointError for its hybrids, and for other architectures."""
    if any(".hybrid_model." in name for name in tensors):
        raise CheckpointError(
            f"{path}: a hybrid of ViT-pytorch, whose ResNet pads and standardizes in another way "
            "than the authors'; load the authors' .npz instead"
        )
    ours = to_ours(tensors, TABLE, path, "ViT-pytorch")
    # Its code has no others.
    known = {"activation": "gelu", "layer_norm_eps": 1e-6, "global_pool": "cls"}
    model, assumed = describe(ours, path, known)
    preprocessing = squash_preprocessing(model)
    return Weights(path, "ViT-pytorch", ours, model, assumed, CONVENTION, preprocessing)
