"""timm's VisionTransformer and its hybrids: a bare state_dict, or a folder of Hugging Face's hub.

Names: timm/models/vision_transformer.py and vision_transformer_hybrid.py.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vit.errors import CheckpointError
from vit.files import write_json
from vit.weights.adapting import adapt_common
from vit.weights.config_file import read_config_of
from vit.weights.description import (
    Weights,
    as_pair,
    check_parts,
    describe,
    divide,
    input_preprocessing,
    with_learned_positions,
)
from vit.weights.names import (
    BLOCK,
    CLS,
    DISTILL,
    PATCHES,
    POSITIONS,
    PROBE,
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
from vit.weights.timm_config import ACTIVATIONS, TimmConfig

MARKS = ("patch_embed.proj.weight",)
CONVENTION = "timm's VisionTransformer"

FUSED = "qkv."  # query, key and value in one tensor
BACKBONE = "patch_embed.backbone."  # before the names of a hybrid's ResNet
THEIR_BLOCK = "blocks.{}."

# Of the pooling by attention, whose names are the same
POOL_PARTS = ("key", "value", "norm", "mlp.fc1", "mlp.fc2")

TABLE = {
    "patch_embed.proj": PATCHES + "projection",
    "cls_token": CLS,
    "dist_token": DISTILL,
    "reg_token": REGISTERS,
    "pos_embed": POSITIONS,
    "norm_pre": "embeddings.norm",
    # A model has one of them; what the name says is read in read()
    "fc_norm": "encoder.norm",
    "norm": "encoder.norm",
    "head": "head",
    "head_dist": "head_distill",
    "attn_pool.latent": PROBE,
    **{f"attn_pool.{part}": f"attention_pool.{part}" for part in POOL_PARTS},
    "attn_pool.q": "attention_pool.query",
    "attn_pool.proj": "attention_pool.projection",
    **{THEIR_BLOCK + f"attn.{part}": BLOCK + f"attention.{part}" for part in QKV},
    THEIR_BLOCK + "attn.q_norm": BLOCK + "attention.query_norm",
    THEIR_BLOCK + "attn.k_norm": BLOCK + "attention.key_norm",
    THEIR_BLOCK + "attn.proj": BLOCK + "attention.projection",
    **{THEIR_BLOCK + part: BLOCK + part for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")},
    THEIR_BLOCK + "mlp.fc1_g": BLOCK + "mlp.gate",
    THEIR_BLOCK + "mlp.fc1_x": BLOCK + "mlp.value",
    # DeiT-III's own files have gamma_1; timm's names come last, so they are written.
    THEIR_BLOCK + "gamma_1": BLOCK + "scale1.factor",
    THEIR_BLOCK + "gamma_2": BLOCK + "scale2.factor",
    THEIR_BLOCK + "ls1.gamma": BLOCK + "scale1.factor",
    THEIR_BLOCK + "ls2.gamma": BLOCK + "scale2.factor",
    "stem.conv": PATCHES + "stem.conv",
    "stem.norm": PATCHES + "stem.norm",
    **unit_map("norm", "downsample.conv", "downsample.norm"),
}

# Ours, of which check_unambiguous looks for one in the first block
FIRST_SCALE = BLOCK.format(0) + "scale1.factor"
FIRST_BIAS = BLOCK.format(0) + "attention.query.bias"

# timm's name for a hybrid with these stages
HYBRIDS = {
    (3, 4, 9): "vit_base_r50_s16_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}


def read(path: Path, tensors: dict[str, Tensor]) -> Weights:
    """`path` is the file; a config.json of timm's beside it is used.

    Raises CheckpointError for architectures and settings that this project doesn't have, and for
    tensors without a config.json that two of timm's models have under the same names.
    """
    config = TimmConfig(read_config_of("architecture", "timm", path))
    known = config.known_arguments()
    ours = to_ours(split_qkv(rename(tensors), FUSED, path), TABLE, path, "timm")
    if config.architecture is None:
        check_unambiguous(tensors, ours, path)
    ours = adapt(ours, known, path)
    shown = {"resnet_style": "timm", "fc_norm": "fc_norm.weight" in tensors}
    if shown["fc_norm"]:
        shown["global_pool"] = "mean"
    model, assumed = describe(ours, path, shown | known)
    classes = config.classes(model.get("num_classes"))
    preprocessing = config.preprocessing(model["num_channels"])
    return Weights(path, "timm", ours, model, assumed, CONVENTION, preprocessing, classes)


def adapt(tensors: dict[str, Tensor], known: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Bring what timm holds in another way to this project's; known: what config.json states."""
    return fold_register_positions(adapt_common(tensors, known, path), known, path)


def check_unambiguous(
    tensors: Mapping[str, Tensor], ours: Mapping[str, Tensor], path: Path
) -> None:
    """Raise CheckpointError for names that several of timm's models with other functions have."""
    advice = "put timm's config.json, which names the architecture, beside the file"
    if any(name.endswith(".attn.q_bias") for name in tensors):
        raise CheckpointError(
            f"{path}: q_bias is in DINOv3 and EVA, whose rotary positions are not in the file; "
            f"{advice}"
        )
    if POSITIONS not in ours:
        raise CheckpointError(
            f"{path}: timm weights without pos_embed, as of DINOv3, EVA and RoPE-ViT, whose rotary "
            f"positions are not in the file; {advice}"
        )
    if "embeddings.norm.weight" in ours or PROBE in ours:
        part = "norm_pre (CLIP)" if "embeddings.norm.weight" in ours else "attn_pool (SigLIP)"
        raise CheckpointError(
            f"{path}: timm's models with {part} have the same names but not the same activation; "
            f"{advice}"
        )
    if any(name.endswith(".gamma_1") for name in tensors):
        raise CheckpointError(
            f"{path}: gamma_1 is in DeiT-III's own files and in those of timm's RoPE-ViT "
            f"(vit_*_rope_ape_*), whose rotary positions are not in the file; {advice}"
        )
    if "fc_norm.weight" in tensors and CLS not in ours and REGISTERS not in ours:
        raise CheckpointError(
            f"{path}: timm's models with fc_norm and patches alone may have their norms after the "
            f"branches (vit_*_rpn_*), under the same names; {advice}"
        )
    plain = REGISTERS not in ours and FIRST_SCALE not in ours and FIRST_BIAS in ours
    if CLS not in ours and plain:
        raise CheckpointError(
            f"{path}: timm's models without a class token (vit_*_gap_*, vit_*_siglip_gap_*) have "
            f"these names but not the same activation and heads; {advice}"
        )


def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of TABLE: a hybrid's units are numbered through all stages."""
    pattern = r"^patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\."
    units = flatten_units(list(tensors), pattern)
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(BACKBONE + "stem."):
            name = name.removeprefix(BACKBONE)
        name = units.get(name, name)
        # EVA's classes keep them beside the fused matrix, and there is none of the key
        for part in ("query", "value"):
            name = name.replace(f".attn.{part[0]}_bias", f".attn.{part}.bias")
        if name.startswith("attn_pool.kv."):
            for part, piece in zip(("key", "value"), tensor.chunk(2), strict=True):
                renamed[name.replace(".kv.", f".{part}.")] = piece.clone()
        else:
            renamed[name] = tensor
    return renamed


def fold_register_positions(
    tensors: dict[str, Tensor], known: Mapping[str, Any], path: Path
) -> dict[str, Tensor]:
    """Add the registers' positions, where they have some, to the registers: here they have none.

    In timm they stand between the positions of the class token and of the patches. Raises
    CheckpointError where their number fits a grid with them and without.
    """
    if REGISTERS not in tensors or POSITIONS not in tensors:
        return tensors
    check_parts(tensors, path)
    registers, positions = tensors[REGISTERS], tensors[POSITIONS]
    num_registers, num_cls = registers.shape[1], int(CLS in tensors)
    num_positions = positions.shape[1]
    num_patches = num_positions - num_cls - num_registers
    if "image_size" in known:
        kernel = tensors[PATCHES + "projection.weight"]
        rows, columns = divide(as_pair(known["image_size"]), (kernel.shape[2], kernel.shape[3]))
        with_them, without = num_patches == rows * columns, num_positions == rows * columns
    else:
        with_them, without = is_square(num_patches), is_square(num_positions)
    if with_them and without:
        raise CheckpointError(
            f"{path}: {num_positions} positions are of a grid of patches, or of a smaller one with "
            f"{num_cls + num_registers} tokens before it; timm's config.json with "
            "model_args.img_size beside the file would tell"
        )
    if not with_them:
        return tensors
    parts = positions.split([num_cls, num_registers, num_patches], dim=1)
    cls_position, register_positions, patch_positions = parts
    return tensors | {
        REGISTERS: registers + register_positions,
        POSITIONS: torch.cat([cls_position, patch_positions], dim=1),
    }


def is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


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
    if weights.model["global_pool"] not in ("cls", "mean"):
        raise CheckpointError(
            f"{weights.path}: timm can't express global_pool={weights.model['global_pool']}; "
            "--format safetensors and onnx can"
        )
    if weights.model["activation"] not in ACTIVATIONS:
        raise CheckpointError(
            f"{weights.path}: timm can't express activation={weights.model['activation']}; "
            "--format safetensors and onnx can"
        )
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
    preprocessing = input_preprocessing(weights)
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
