"""Google's .npz of JAX arrays: vit_jax (also the AugReg files, hybrids too) and big_vision.

Names and shapes: vit_jax/models_vit.py and models_resnet.py (github.com/google-research/vision_transformer),
big_vision/models/vit.py (github.com/google-research/big_vision). Steiner et al. 2022 (arXiv:2106.10270) is AugReg.
Kernels are (in, out), of attention (D, H, K) and (H, K, D), of convolutions (height, width, in, out).
"""

import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit.errors import CheckpointError
from vit.weights.description import Weights, describe, squash, with_learned_positions
from vit.weights.names import (
    CLS,
    PATCHES,
    POSITIONS,
    flat_units,
    place_unit,
    to_ours,
    to_theirs,
    unit_map,
)

MARK = "embedding/kernel"


PREFIXES = (
    "opt/target/",
    "params/",
    "",
)  # of vit_jax's and big_vision's whole states, and of files of weights alone


BLOCK, OURS = "Transformer.encoderblock_{}.", "encoder.blocks.{}."


ATTENTION, MLP = BLOCK + "MultiHeadDotProductAttention_{}.", BLOCK + "MlpBlock_{}."


TABLE = {
    "embedding": PATCHES + "projection",
    "cls": CLS,
    "Transformer.encoder_norm": "encoder.norm",
    "pre_logits": "pooler.dense",
    "head": "head",
    BLOCK + "LayerNorm_0": OURS + "norm1",
    **{ATTENTION + part: OURS + f"attention.{part}" for part in ("query", "key", "value")},
    ATTENTION + "out": OURS + "attention.projection",
    MLP + "Dense_0": OURS + "mlp.fc1",
    MLP + "Dense_1": OURS + "mlp.fc2",
    # big_vision's before vit_jax's, which are written
    "pos_embedding": POSITIONS,
    "Transformer.pos_embedding": POSITIONS,
    "Transformer.posembed_input.pos_embedding": POSITIONS,
    BLOCK + "LayerNorm_1": OURS + "norm2",
    BLOCK + "LayerNorm_2": OURS + "norm2",
    "conv_root": PATCHES + "stem.conv",
    "gn_root": PATCHES + "stem.norm",
    **unit_map("gn", "conv_proj", "gn_proj"),
}


KINDS = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Raises CheckpointError where the file is cut short or holds Python objects, which are not loaded."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            f"{path}: not a whole .npz of arrays ({error}); download it again"
        ) from None


def to_tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind == "V":  # numpy has no bfloat16 and shows it as two bytes
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).float()
    return torch.from_numpy(np.array(array, dtype=np.float32))


def read(path: Path, arrays: dict[str, np.ndarray]) -> Weights:
    prefix = next((prefix for prefix in PREFIXES if prefix + MARK in arrays), "")
    arrays = {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
    if pooling := [name for name in arrays if name.startswith(("MAPHead_0/", "probe"))]:
        raise CheckpointError(
            f"{path}: pools by attention (big_vision's MAPHead, {pooling[0]}); only models with a class "
            "token or a mean can be loaded"
        )
    for name in [
        name for name in arrays if name.startswith("Transformer/encoderblock/")
    ]:  # all blocks stacked in one array
        for number, array in enumerate(arrays.pop(name)):
            arrays[name.replace("encoderblock/", f"encoderblock_{number}/")] = array
    heads = next(
        (array.shape[1] for name, array in arrays.items() if name.endswith("query/kernel")), 0
    )
    tensors, units = {}, flat_units(list(arrays), r"^block(\d+)/unit(\d+)/")
    for name, array in arrays.items():
        *stem, last = units.get(name, name).replace("/", ".").split(".")
        tensors[".".join([*stem, KINDS.get(last, last)])] = to_torch(to_tensor(array), name)
    tensors = to_ours(tensors, TABLE, path, ".npz")
    told: dict[str, Any] = {
        "num_heads": heads,
        "activation": "gelu_tanh",
        "layer_norm_eps": 1e-6,
    }  # flax's defaults
    if POSITIONS not in tensors:
        told["position"] = "sincos2d"  # big_vision computes these and stores none
    model, assumed = describe(tensors, path, **told)
    return Weights(path, "Google's .npz", tensors, model, assumed, squash(model))


def to_torch(tensor: Tensor, name: str) -> Tensor:
    """JAX's order of axes to PyTorch's; `name` is theirs."""
    if "MultiHeadDotProductAttention" in name:
        if name.endswith("bias"):
            return tensor.flatten()
        return (tensor.flatten(0, 1) if "/out/" in name else tensor.flatten(1)).T.contiguous()
    if name.endswith("kernel"):
        return (tensor.permute(3, 2, 0, 1) if tensor.dim() == 4 else tensor.T).contiguous()
    return tensor.flatten() if name.endswith(("scale", "bias")) else tensor


def to_jax(tensor: Tensor, name: str, heads: int) -> np.ndarray:
    """The inverse of to_torch. Group norms get back their (1, 1, 1, C)."""
    if "MultiHeadDotProductAttention" in name:
        if "/out/" in name:
            tensor = tensor.T.unflatten(0, (heads, -1)) if name.endswith("kernel") else tensor
        else:
            tensor = (
                tensor.T.unflatten(1, (heads, -1))
                if name.endswith("kernel")
                else tensor.unflatten(0, (heads, -1))
            )
    elif name.endswith("kernel"):
        tensor = tensor.permute(2, 3, 1, 0) if tensor.dim() == 4 else tensor.T
    elif "/gn" in f"/{name}":
        tensor = tensor.reshape(1, 1, 1, -1)
    return np.ascontiguousarray(tensor.float().numpy())


def write(weights: Weights, out: Path) -> list[str]:
    """vit_jax's names. Returns notes for the user; raises CheckpointError where the model doesn't fit."""
    weights = with_learned_positions(
        weights,
        "Google's .npz",
        "representation_size",
        "resnet_stages",
        "global_pool",
        "cls_token",
        "activation",
    )
    model = weights.model
    if model["cls_token"] and model["global_pool"] == "mean":
        raise CheckpointError(
            f"{weights.path}: Google's .npz has no place for a class token beside global_pool=mean; "
            "--format safetensors and onnx do"
        )
    table = {
        theirs.replace("Attention_{}", "Attention_1").replace("MlpBlock_{}", "MlpBlock_3"): ours
        for theirs, ours in TABLE.items()
    }
    arrays = {}
    for name, tensor in to_theirs(weights.tensors, table).items():
        name = place_unit(name, model["resnet_stages"] or [], "block{}.unit{}", first=1)
        name = re.sub(r"((?:_norm|LayerNorm_\d|gn_?\w+)\.)weight$", r"\1scale", name)
        name = re.sub("weight$", "kernel", name).replace(".", "/")
        arrays[name] = to_jax(tensor, name, model["num_heads"])
    with open(out, "wb") as file:
        np.savez(file, **arrays)
    return (
        []
        if model["activation"] == "gelu_tanh"
        else [
            f"an .npz doesn't tell the activation: this one is {model['activation']}, vit_jax computes gelu_tanh, timm gelu"
        ]
    )
