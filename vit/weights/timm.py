"""timm's VisionTransformer and its hybrids: a bare state_dict, or a folder of Hugging Face's hub.

Names: timm/models/vision_transformer.py and vision_transformer_hybrid.py.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vit.data.preprocessing import PIL_RESAMPLING, Preprocessing
from vit.errors import CheckpointError
from vit.files import write_json
from vit.weights.description import (
    Weights,
    as_pair,
    describe,
    int_or_pair,
    read_config,
    squash_preprocessing,
    with_learned_positions,
)
from vit.weights.names import (
    BLOCK,
    CLS,
    PATCHES,
    POSITIONS,
    QKV,
    REGISTERS,
    flatten_units,
    join_qkv,
    split_qkv,
    to_ours,
    to_theirs,
    unflatten_unit,
    unit_map,
)

MARKS = ("patch_embed.proj.weight",)

FUSED = "qkv."  # query, key and value in one tensor
BACKBONE = "patch_embed.backbone."  # before the names of a hybrid's ResNet
THEIR_BLOCK = "blocks.{}."

TABLE = {
    "patch_embed.proj": PATCHES + "projection",
    "cls_token": CLS,
    "reg_token": REGISTERS,
    "pos_embed": POSITIONS,
    "norm": "encoder.norm",
    "head": "head",
    **{THEIR_BLOCK + f"attn.{part}": BLOCK + f"attention.{part}" for part in QKV},
    THEIR_BLOCK + "attn.q_norm": BLOCK + "attention.query_norm",
    THEIR_BLOCK + "attn.k_norm": BLOCK + "attention.key_norm",
    THEIR_BLOCK + "attn.proj": BLOCK + "attention.projection",
    **{THEIR_BLOCK + part: BLOCK + part for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")},
    # DeiT-III's own files have gamma_1; timm's names come last, so they are written.
    THEIR_BLOCK + "gamma_1": BLOCK + "scale1.factor",
    THEIR_BLOCK + "gamma_2": BLOCK + "scale2.factor",
    THEIR_BLOCK + "ls1.gamma": BLOCK + "scale1.factor",
    THEIR_BLOCK + "ls2.gamma": BLOCK + "scale2.factor",
    "stem.conv": PATCHES + "stem.conv",
    "stem.norm": PATCHES + "stem.norm",
    **unit_map("norm", "downsample.conv", "downsample.norm"),
}

# Those with the same name here
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")

# timm's name for a hybrid with these stages
HYBRIDS = {
    (3, 4, 9): "vit_base_r50_s16_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}


def read(path: Path, tensors: dict[str, Tensor]) -> Weights:
    """`path` is the file; a config.json of timm's beside it is used.

    Raises CheckpointError for architectures and settings that this project doesn't have.
    """
    if "fc_norm.weight" in tensors:
        raise CheckpointError(
            f"{path}: timm weights with fc_norm take the mean before the norm, which this "
            "project's model doesn't; only those with a class token, or with fc_norm=False, can be "
            "loaded"
        )
    config_path = path.parent / "config.json"
    config = read_config(config_path)
    if "architecture" not in config:  # of another library
        config = {}
    ours = to_ours(split_qkv(rename(tensors), FUSED), TABLE, path, "timm")
    ours = fold_register_positions(ours)
    model, assumed = describe(ours, path, known_arguments(config, config_path))
    pretrained = config.get("pretrained_cfg", config)
    classes = pretrained.get("label_names") or config.get("label_names")
    preprocessing = preprocessing_of(pretrained)
    return Weights(path, "timm", ours, model, assumed, preprocessing, classes)


def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of TABLE: a hybrid's units are numbered through all stages."""
    pattern = r"^patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\."
    units = flatten_units(list(tensors), pattern)
    return {
        units.get(name, name.removeprefix(BACKBONE)): tensor for name, tensor in tensors.items()
    }


def fold_register_positions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the registers' positions, where they have some, to the registers: here they have none.

    In timm they stand between the positions of the class token and of the patches.
    """
    if REGISTERS not in tensors or POSITIONS not in tensors:
        return tensors
    registers, positions = tensors[REGISTERS], tensors[POSITIONS]
    num_registers, num_cls = registers.shape[1], int(CLS in tensors)
    # Where the rest is a square grid, the registers' positions are among them.
    num_patches = positions.shape[1] - num_cls - num_registers
    if num_patches <= 0 or int(num_patches**0.5) ** 2 != num_patches:
        return tensors
    parts = positions.split([num_cls, num_registers, num_patches], dim=1)
    cls_position, register_positions, patch_positions = parts
    return tensors | {
        REGISTERS: registers + register_positions,
        POSITIONS: torch.cat([cls_position, patch_positions], dim=1),
    }


def known_arguments(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """What timm's config.json at `path` states of the model, and timm's defaults."""
    arguments = config.get("model_args", {})
    activation = arguments.get("act_layer", "gelu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: act_layer {activation} is not known here; known: {', '.join(ACTIVATIONS)}"
        )
    known: dict[str, Any] = {
        "activation": activation,
        "layer_norm_eps": 1e-6,
        "resnet_style": "timm",
    }
    if "num_heads" in arguments:
        known["num_heads"] = arguments["num_heads"]
    if "img_size" in arguments:
        known["image_size"] = int_or_pair(as_pair(arguments["img_size"]))
    if config.get("global_pool") == "avg":
        known["global_pool"] = "mean"
    return known


def preprocessing_of(pretrained: dict[str, Any]) -> Preprocessing | None:
    """The preprocessing in a pretrained_cfg; None where it is not stated or not one of ours."""
    if not {"mean", "std", "input_size", "interpolation"} <= pretrained.keys():
        return None
    crop = pretrained.get("crop_pct", 0.875)
    mode = pretrained.get("crop_mode", "center")
    if pretrained["interpolation"] not in PIL_RESAMPLING:
        return None
    # A border is padded, and a squash to more than the model's size is cropped: ours does neither.
    if mode == "border" or (mode == "squash" and crop != 1):
        return None
    # timm names (C, height, width).
    channels, height, width = pretrained["input_size"]
    return Preprocessing(
        (height, width),
        channels,
        tuple(pretrained["mean"]),
        tuple(pretrained["std"]),
        None if mode == "squash" else crop,
        pretrained["interpolation"],
    )


def write(weights: Weights, out: Path) -> list[str]:
    """Write a folder for timm.create_model("local-dir:FOLDER", pretrained=True).

    Returns notes for the user. Raises CheckpointError where timm has no such model.
    """
    supported = (
        "num_registers",
        "qk_norm",
        "layer_scale",
        "resnet_stages",
        "global_pool",
        "cls_token",
        "activation",
        "qkv_bias",
    )
    weights = with_learned_positions(weights, "timm", *supported)
    stages = tuple(weights.model["resnet_stages"] or ())
    if stages and stages not in HYBRIDS:
        known = ", ".join(str(list(known)) for known in HYBRIDS)
        raise CheckpointError(
            f"{weights.path}: timm has no hybrid with resnet_stages={list(stages)}; it has {known}"
        )
    tensors = {}
    ours = with_register_positions(weights)
    for name, tensor in join_qkv(to_theirs(ours, TABLE, weights.path), FUSED).items():
        name = unflatten_unit(name, stages, "stages.{}.blocks.{}", first=0)
        if name.startswith(("stem.", "stages.")):
            name = BACKBONE + name
        tensors[name] = tensor
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    write_json(out / "config.json", new_config(weights, stages))
    if not stages or weights.model["resnet_style"] == "timm":
        return []
    return [
        "timm standardizes a hybrid's convolutions in another way than these weights were trained "
        "with: its logits will differ a little"
    ]


def with_register_positions(weights: Weights) -> dict[str, Tensor]:
    """The tensors with a zero position for every register, which timm has."""
    num_registers = weights.model["num_registers"]
    if not num_registers:
        return weights.tensors
    num_cls = int(weights.model["cls_token"])
    cls_position, patch_positions = weights.tensors[POSITIONS].tensor_split([num_cls], dim=1)
    zeros = torch.zeros_like(patch_positions[:, :1]).expand(-1, num_registers, -1)
    positions = torch.cat([cls_position, zeros, patch_positions], dim=1)
    return weights.tensors | {POSITIONS: positions}


def new_config(weights: Weights, stages: tuple[int, ...]) -> dict[str, Any]:
    """The config.json that timm builds the model of and reads its preprocessing from."""
    model = weights.model
    # create_model overrides every argument of the architecture that stands here.
    arguments = {
        "img_size": model["image_size"],
        "embed_dim": model["hidden_size"],
        "depth": model["num_layers"],
        "num_heads": model["num_heads"],
        "mlp_ratio": model["intermediate_size"] / model["hidden_size"],
        "qkv_bias": model["qkv_bias"],
        "qk_norm": model["qk_norm"],
        "init_values": model["layer_scale"],
        "class_token": model["cls_token"],
        "reg_tokens": model["num_registers"],
        "act_layer": model["activation"],
        "global_pool": "avg" if model["global_pool"] == "mean" else "token",
        "fc_norm": False,
    }
    if not stages:
        arguments["patch_size"] = model["patch_size"]
    return {
        "architecture": HYBRIDS[stages] if stages else "vit_base_patch16_224",
        "num_classes": model["num_classes"],
        "num_features": model["hidden_size"],
        "global_pool": arguments["global_pool"],
        "model_args": {key: value for key, value in arguments.items() if value is not None},
        "pretrained_cfg": new_pretrained_cfg(weights, is_hybrid=bool(stages)),
    }


def new_pretrained_cfg(weights: Weights, is_hybrid: bool) -> dict[str, Any]:
    """The part of a config.json that states the preprocessing and the classes."""
    preprocessing = weights.preprocessing or squash_preprocessing(weights.model)
    config: dict[str, Any] = {
        "input_size": [weights.model["num_channels"], *preprocessing.image_size],
        "num_classes": weights.model["num_classes"],
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "interpolation": preprocessing.interpolation,
        "fixed_input_size": True,
        "crop_pct": preprocessing.eval_crop or 1.0,
        "crop_mode": "squash" if preprocessing.eval_crop is None else "center",
        "pool_size": None,
        "classifier": "head",
        "first_conv": BACKBONE + "stem.conv" if is_hybrid else "patch_embed.proj",
    }
    if weights.classes:
        config["label_names"] = weights.classes
    return config
