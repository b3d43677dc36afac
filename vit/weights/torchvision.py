"""torchvision's vit_b_16 and its relatives, as a .pth of their state_dict.

Names: torchvision/models/vision_transformer.py.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit.data.preprocessing import Preprocessing
from vit.errors import CheckpointError
from vit.weights.description import Weights, as_pair, describe, with_learned_positions
from vit.weights.names import (
    BLOCK,
    CLS,
    PATCHES,
    POSITIONS,
    QKV,
    join_qkv,
    split_qkv,
    to_ours,
    to_theirs,
)

MARKS = ("conv_proj.weight",)
CONVENTION = "torchvision's VisionTransformer"

FUSED = "in_proj_"  # query, key and value in one tensor
THEIR_BLOCK = "encoder.layers.encoder_layer_{}."

TABLE = {
    "conv_proj": PATCHES + "projection",
    "class_token": CLS,
    "encoder.pos_embedding": POSITIONS,
    "encoder.ln": "encoder.norm",
    "heads.pre_logits": "pooler.dense",
    "heads.head": "head",
    THEIR_BLOCK + "ln_1": BLOCK + "norm1",
    THEIR_BLOCK + "ln_2": BLOCK + "norm2",
    **{THEIR_BLOCK + f"self_attention.{part}": BLOCK + f"attention.{part}" for part in QKV},
    THEIR_BLOCK + "self_attention.out_proj": BLOCK + "attention.projection",
    # Older files have linear_1 and linear_2; the names of today come last, so they are written.
    THEIR_BLOCK + "mlp.linear_1": BLOCK + "mlp.fc1",
    THEIR_BLOCK + "mlp.linear_2": BLOCK + "mlp.fc2",
    THEIR_BLOCK + "mlp.0": BLOCK + "mlp.fc1",
    THEIR_BLOCK + "mlp.3": BLOCK + "mlp.fc2",
}

# ImageNet's
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Image sizes of the weights fine-tuned from SWAG (Singh et al. 2022, arXiv:2201.08371), which see
# the whole shorter side
SWAG = (384, 512, 518)


def read(path: Path, tensors: dict[str, Tensor]) -> Weights:
    """Raises CheckpointError for another architecture."""
    ours = to_ours(split_qkv(tensors, FUSED, path), TABLE, path, "torchvision")
    # Its class has no other activation and no other pooling.
    model, assumed = describe(ours, path, {"activation": "gelu", "global_pool": "cls"})
    preprocessing = preprocessing_of(model)
    return Weights(path, "torchvision", ours, model, assumed, CONVENTION, preprocessing)


def preprocessing_of(model: dict[str, Any]) -> Preprocessing | None:
    """What torchvision's *_Weights prescribe for this size of model and image.

    None where none were published. The files don't say which weights they are: for 224 px it is
    IMAGENET1K_V1 (IMAGENET1K_SWAG_LINEAR_V1 differ, which are the only ones of ViT-H/14).
    """
    size = model["image_size"]
    if model["num_channels"] != 3 or size not in (224, *SWAG):
        return None
    is_huge14 = (model["hidden_size"], model["patch_size"]) == (1280, 14)
    if size in SWAG or is_huge14:
        return Preprocessing(as_pair(size), 3, MEAN, STD, 1.0, "bicubic")
    # ViT-L/16 alone was evaluated at another size.
    is_large16 = (model["hidden_size"], model["patch_size"]) == (1024, 16)
    resized = 242 if is_large16 else 256
    return Preprocessing(as_pair(size), 3, MEAN, STD, size / resized, "bilinear")


def write(weights: Weights, out: Path) -> list[str]:
    """Write a .pth for load_state_dict.

    Returns a note that says which model to load it into. Raises CheckpointError where the model is
    none of torchvision's.
    """
    weights = with_learned_positions(weights, "torchvision", "representation_size")
    model = weights.model
    is_square = isinstance(model["image_size"], int) and isinstance(model["patch_size"], int)
    if model["num_channels"] != 3 or not is_square:
        raise CheckpointError(
            f"{weights.path}: torchvision's model takes 3 channels and square images and patches, "
            f"this one {model['num_channels']}, {model['image_size']}, {model['patch_size']}; "
            "--format safetensors and onnx can express it"
        )
    tensors = to_theirs(weights.tensors, TABLE, weights.path)
    torch.save(join_qkv(tensors, FUSED), out)
    arguments = {
        "image_size": model["image_size"],
        "patch_size": model["patch_size"],
        "num_layers": model["num_layers"],
        "num_heads": model["num_heads"],
        "num_classes": model["num_classes"],
        "representation_size": model["representation_size"],
        "hidden_dim": model["hidden_size"],
        "mlp_dim": model["intermediate_size"],
    }
    call = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return [
        f"open with torchvision.models.VisionTransformer({call}).load_state_dict(torch.load(FILE))"
    ]
