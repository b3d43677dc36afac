"""timm's VisionTransformer and its hybrids (timm/models/vision_transformer.py, vision_transformer_hybrid.py), as a bare
state_dict or as a folder of the Hugging Face hub."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vit.data.preprocessing import PIL_RESAMPLING, Preprocessing
from vit.errors import CheckpointError
from vit.weights.description import (
    Weights,
    as_pair,
    describe,
    int_or_pair,
    read_json,
    squash,
    with_learned_positions,
)
from vit.weights.names import (
    CLS,
    PATCHES,
    POSITIONS,
    flat_units,
    join_qkv,
    place_unit,
    split_qkv,
    to_ours,
    to_theirs,
    unit_map,
)

MARK = "patch_embed.proj.weight"


FUSED, BACKBONE = "qkv.", "patch_embed.backbone."


BLOCK, OURS = "blocks.{}.", "encoder.blocks.{}."


TABLE = {
    "patch_embed.proj": PATCHES + "projection",
    "cls_token": CLS,
    "reg_token": "embeddings.registers",
    "pos_embed": POSITIONS,
    "norm": "encoder.norm",
    "head": "head",
    **{BLOCK + f"attn.{part}": OURS + f"attention.{part}" for part in ("query", "key", "value")},
    BLOCK + "attn.q_norm": OURS + "attention.query_norm",
    BLOCK + "attn.k_norm": OURS + "attention.key_norm",
    BLOCK + "attn.proj": OURS + "attention.projection",
    **{BLOCK + part: OURS + part for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")},
    **{BLOCK + f"gamma_{i}": OURS + f"scale{i}.factor" for i in (1, 2)},  # DeiT-III's own files
    **{BLOCK + f"ls{i}.gamma": OURS + f"scale{i}.factor" for i in (1, 2)},
    "stem.conv": PATCHES + "stem.conv",
    "stem.norm": PATCHES + "stem.norm",
    **unit_map("norm", "downsample.conv", "downsample.norm"),
}


ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")


HYBRIDS = {
    (3, 4, 9): "vit_base_r50_s16_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}


def read(path: Path, tensors: dict[str, Tensor]) -> Weights:
    """`path` is the file; a config.json beside it with timm's `architecture` is used."""
    config = read_json(path.parent / "config.json")
    config = config if "architecture" in config else {}
    if "fc_norm.weight" in tensors:
        raise CheckpointError(
            f"{path}: timm weights with fc_norm take the mean before the norm, which this project's model "
            "doesn't; only those with a class token, or with fc_norm=False, can be loaded"
        )
    names = flat_units(list(tensors), r"^patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.")
    named = {
        names.get(name, name.removeprefix(BACKBONE)): tensor for name, tensor in tensors.items()
    }
    ours = to_ours(split_qkv(named, FUSED), TABLE, path, "timm")
    fold_register_positions(ours)
    arguments = config.get("model_args", {})
    activation = arguments.get("act_layer", "gelu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{path.parent / 'config.json'}: act_layer {activation} is not known here; known: "
            f"{', '.join(ACTIVATIONS)}"
        )
    told: dict[str, Any] = {
        "activation": activation,
        "layer_norm_eps": 1e-6,
        "resnet_style": "timm",
    }
    told |= {"num_heads": arguments["num_heads"]} if "num_heads" in arguments else {}
    told |= (
        {"image_size": int_or_pair(as_pair(arguments["img_size"]))}
        if "img_size" in arguments
        else {}
    )
    if config.get("global_pool", "token") == "avg":
        told["global_pool"] = "mean"
    model, assumed = describe(ours, path, **told)
    seen = config.get("pretrained_cfg", config)
    classes = seen.get("label_names") or config.get("label_names")
    return Weights(path, "timm", ours, model, assumed, preprocessing_of(seen, model), classes)


def fold_register_positions(tensors: dict[str, Tensor]) -> None:
    """Where registers have positions too (after the class token's), add these to the registers, which here have none."""
    if "embeddings.registers" not in tensors or POSITIONS not in tensors:
        return
    registers, positions, cls = (
        tensors["embeddings.registers"],
        tensors[POSITIONS],
        int(CLS in tensors),
    )
    count = positions.shape[1] - cls - registers.shape[1]
    if count > 0 and int(count**0.5) ** 2 == count:
        first, own, patches = positions.split([cls, registers.shape[1], count], dim=1)
        tensors["embeddings.registers"] = registers + own
        tensors[POSITIONS] = torch.cat([first, patches], dim=1)


def preprocessing_of(seen: dict[str, Any], model: dict[str, Any]) -> Preprocessing | None:
    """Of a config.json's pretrained_cfg; None where there is none, or where it resizes as we don't."""
    crop, mode = seen.get("crop_pct", 0.875), seen.get("crop_mode", "center")
    known = {"mean", "std", "input_size", "interpolation"} <= seen.keys() and seen[
        "interpolation"
    ] in PIL_RESAMPLING
    if not known or mode == "border" or (mode == "squash" and crop != 1):
        return None
    channels, height, width = seen["input_size"]
    return Preprocessing(
        (height, width),
        channels,
        tuple(seen["mean"]),
        tuple(seen["std"]),
        None if mode == "squash" else crop,
        seen["interpolation"],
    )


def write(weights: Weights, out: Path) -> list[str]:
    """A folder for timm.create_model("local-dir:FOLDER", pretrained=True). Raises CheckpointError where the model doesn't
    fit. Returns notes for the user."""
    weights = with_learned_positions(
        weights,
        "timm",
        "num_registers",
        "qk_norm",
        "layer_scale",
        "resnet_stages",
        "global_pool",
        "cls_token",
        "activation",
        "qkv_bias",
    )
    model, tensors = weights.model, dict(weights.tensors)
    stages, registers = tuple(model["resnet_stages"] or ()), model["num_registers"]
    if stages and stages not in HYBRIDS:
        raise CheckpointError(
            f"{weights.path}: timm has no hybrid with resnet_stages={list(stages)}; it has "
            f"{', '.join(str(list(known)) for known in HYBRIDS)}"
        )
    if registers:
        first, patches = tensors[POSITIONS].tensor_split([int(model["cls_token"])], dim=1)
        tensors[POSITIONS] = torch.cat(
            [first, torch.zeros_like(patches[:, :1]).expand(-1, registers, -1), patches], dim=1
        )
    theirs = {
        re.sub(
            r"^(?=stem\.|stages\.)",
            BACKBONE,
            place_unit(name, list(stages), "stages.{}.blocks.{}", first=0),
        ): tensor
        for name, tensor in join_qkv(to_theirs(tensors, TABLE), FUSED).items()
    }
    mean = model["global_pool"] == "mean"
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
        "reg_tokens": registers,
        "act_layer": model["activation"],
        "global_pool": "avg" if mean else "token",
        "fc_norm": False,
    }
    if not stages:
        arguments["patch_size"] = model["patch_size"]
    seen = weights.preprocessing or squash(model)
    config = {
        "architecture": HYBRIDS[stages] if stages else "vit_base_patch16_224",
        "num_classes": model["num_classes"],
        "num_features": model["hidden_size"],
        "global_pool": arguments["global_pool"],
        "model_args": {key: value for key, value in arguments.items() if value is not None},
        "pretrained_cfg": {
            "input_size": [model["num_channels"], *seen.image_size],
            "num_classes": model["num_classes"],
            "mean": list(seen.mean),
            "std": list(seen.std),
            "interpolation": seen.interpolation,
            "fixed_input_size": True,
            "crop_pct": seen.eval_crop or 1.0,
            "crop_mode": "squash" if seen.eval_crop is None else "center",
            "pool_size": None,
            "classifier": "head",
            "first_conv": BACKBONE + "stem.conv" if stages else "patch_embed.proj",
            **({"label_names": weights.classes} if weights.classes else {}),
        },
    }
    out.mkdir()
    save_file(theirs, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return (
        [
            "timm standardises a hybrid's convolutions otherwise than these weights were trained with: its logits will differ "
            "a little"
        ]
        if stages and model["resnet_style"] != "timm"
        else []
    )
