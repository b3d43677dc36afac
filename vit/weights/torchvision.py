"""torchvision's vit_b_16 and its kin (torchvision/models/vision_transformer.py), saved as a .pth state_dict."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit.data.preprocessing import Preprocessing
from vit.errors import CheckpointError
from vit.weights.description import Weights, as_pair, describe, with_learned_positions
from vit.weights.names import CLS, PATCHES, POSITIONS, join_qkv, split_qkv, to_ours, to_theirs

MARK = "conv_proj.weight"


FUSED = "in_proj_"


BLOCK = "encoder.layers.encoder_layer_{}."


TABLE = {
    "conv_proj": PATCHES + "projection",
    "class_token": CLS,
    "encoder.pos_embedding": POSITIONS,
    "encoder.ln": "encoder.norm",
    "heads.pre_logits": "pooler.dense",
    "heads.head": "head",
    BLOCK + "ln_1": "encoder.blocks.{}.norm1",
    BLOCK + "ln_2": "encoder.blocks.{}.norm2",
    **{
        BLOCK + "self_attention." + part: f"encoder.blocks.{{}}.attention.{part}"
        for part in ("query", "key", "value")
    },
    BLOCK + "self_attention.out_proj": "encoder.blocks.{}.attention.projection",
    BLOCK + "mlp.0": "encoder.blocks.{}.mlp.fc1",
    BLOCK + "mlp.3": "encoder.blocks.{}.mlp.fc2",
    BLOCK + "mlp.linear_1": "encoder.blocks.{}.mlp.fc1",
    BLOCK + "mlp.linear_2": "encoder.blocks.{}.mlp.fc2",
}


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


SWAG = (
    384,
    512,
    518,
)  # sizes of the weights fine-tuned from SWAG (Singh et al. 2022), which see the whole shorter side


def preprocessing_of(model: dict[str, Any]) -> Preprocessing | None:
    """What torchvision's *_Weights prescribe for this size of model and image; None where none were published.

    The files don't say which weights they are: for 224 px it is IMAGENET1K_V1 (IMAGENET1K_SWAG_LINEAR_V1 differ).
    """
    size = model["image_size"]
    if model["num_channels"] != 3 or size not in (224, *SWAG):
        return None
    if size in SWAG:
        return Preprocessing(as_pair(size), 3, MEAN, STD, 1.0, "bicubic")
    resized = 242 if (model["hidden_size"], model["patch_size"]) == (1024, 16) else 256
    return Preprocessing(as_pair(size), 3, MEAN, STD, size / resized, "bilinear")


def read(path: Path, tensors: dict[str, Tensor]) -> Weights:
    ours = to_ours(split_qkv(tensors, FUSED), TABLE, path, "torchvision")
    model, assumed = describe(ours, path, activation="gelu", layer_norm_eps=1e-6)
    return Weights(path, "torchvision", ours, model, assumed, preprocessing_of(model))


def write(weights: Weights, out: Path) -> list[str]:
    """A .pth for load_state_dict. Returns what to build it with; raises CheckpointError where the model doesn't fit."""
    weights = with_learned_positions(weights, "torchvision", "representation_size")
    model = weights.model
    if (
        model["num_channels"] != 3
        or not isinstance(model["image_size"], int)
        or not isinstance(model["patch_size"], int)
    ):
        raise CheckpointError(
            f"{weights.path}: torchvision's model takes 3 channels and square images and patches, this one "
            f"{model['num_channels']}, {model['image_size']}, {model['patch_size']}; safetensors and onnx do"
        )
    table = {theirs: ours for theirs, ours in TABLE.items() if ".mlp.linear_" not in theirs}
    torch.save(join_qkv(to_theirs(weights.tensors, table), FUSED), out)
    arguments = {
        key: model[key]
        for key in (
            "image_size",
            "patch_size",
            "num_layers",
            "num_heads",
            "num_classes",
            "representation_size",
        )
    }
    arguments |= {"hidden_dim": model["hidden_size"], "mlp_dim": model["intermediate_size"]}
    return [
        "open with torchvision.models.VisionTransformer("
        + ", ".join(f"{key}={value}" for key, value in arguments.items())
        + ").load_state_dict(torch.load(FILE))"
    ]
