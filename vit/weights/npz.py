"""Google's .npz of JAX arrays: vit_jax (also the AugReg files, hybrids too) and big_vision.

Names and shapes: vit_jax/models_vit.py and models_resnet.py in
github.com/google-research/vision_transformer, big_vision/models/vit.py in
github.com/google-research/big_vision. Steiner et al. 2022 (arXiv:2106.10270) is AugReg.

Kernels of linear layers are (in, out), of query, key and value (D, H, K), of the attention's output
(H, K, D), of convolutions (height, width, in, out). D is the model's width, H the number of heads,
K the width of one.
"""

import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit.errors import CheckpointError
from vit.weights.description import (
    Weights,
    describe,
    squash_preprocessing,
    with_learned_positions,
)
from vit.weights.names import (
    BLOCK,
    CLS,
    PATCHES,
    POSITIONS,
    QKV,
    flatten_units,
    list_some,
    to_ours,
    to_theirs,
    unflatten_unit,
    unit_map,
)

MARK = "embedding/kernel"
CONVENTION = "vit_jax and big_vision"

# Flax's defaults, and the ResNet that is theirs
SETTINGS = {
    "activation": "gelu_tanh",
    "layer_norm_eps": 1e-6,
    "resnet_style": "jax",
    "fc_norm": False,
}

BLOCKS = "Transformer/encoderblock"  # before _3/ for one, or / for all of them stacked

# Before every name in vit_jax's and big_vision's whole training states; files of weights have none
PREFIXES = ("opt/target/", "params/", "")

THEIR_BLOCK = "Transformer.encoderblock_{}."
THEIR_ATTENTION = THEIR_BLOCK + "MultiHeadDotProductAttention_{}."
THEIR_MLP = THEIR_BLOCK + "MlpBlock_{}."

# With . for / and PyTorch's endings, see rename()
TABLE = {
    "embedding": PATCHES + "projection",
    "cls": CLS,
    "Transformer.encoder_norm": "encoder.norm",
    "pre_logits": "pooler.dense",
    "head": "head",
    THEIR_BLOCK + "LayerNorm_0": BLOCK + "norm1",
    **{THEIR_ATTENTION + part: BLOCK + f"attention.{part}" for part in QKV},
    THEIR_ATTENTION + "out": BLOCK + "attention.projection",
    THEIR_MLP + "Dense_0": BLOCK + "mlp.fc1",
    THEIR_MLP + "Dense_1": BLOCK + "mlp.fc2",
    # big_vision's names before vit_jax's: the last one is written.
    "pos_embedding": POSITIONS,
    "Transformer.pos_embedding": POSITIONS,
    "Transformer.posembed_input.pos_embedding": POSITIONS,
    THEIR_BLOCK + "LayerNorm_1": BLOCK + "norm2",
    THEIR_BLOCK + "LayerNorm_2": BLOCK + "norm2",
    "conv_root": PATCHES + "stem.conv",
    "gn_root": PATCHES + "stem.norm",
    **unit_map("gn", "conv_proj", "gn_proj"),
}

# JAX's endings and PyTorch's
ENDINGS = {"kernel": "weight", "scale": "weight", "bias": "bias"}

Arrays = dict[str, np.ndarray]

# What numpy raises for files that are cut short, or hold objects
UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def read_arrays(path: Path) -> Arrays:
    """All arrays of an .npz.

    Raises CheckpointError where it is cut short or holds Python objects, which are never loaded.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path}: not a whole .npz of arrays ({error}); download it again"
        ) from None


def read(path: Path, arrays: Arrays) -> Weights:
    """Raises CheckpointError for other architectures, as those that pool by attention."""
    arrays, left_over = strip_state_prefix(arrays)
    pooling = [name for name in arrays if name.startswith(("MAPHead_0/", "probe"))]
    if pooling:
        raise CheckpointError(
            f"{path}: pools by attention (big_vision's MAPHead, {pooling[0]}); only models with a "
            "class token or a mean can be loaded"
        )
    arrays = unstack_blocks(arrays)
    tensors = to_ours(rename(arrays, path), TABLE, path, ".npz")
    known: dict[str, Any] = SETTINGS | {"num_heads": count_heads(arrays, path)}
    if POSITIONS not in tensors:
        known["position"] = "sincos2d"  # big_vision computes these and stores none
    model, assumed = describe(tensors, path, known)
    preprocessing = squash_preprocessing(model)
    return Weights(
        path,
        "Google's .npz",
        tensors,
        model,
        assumed,
        CONVENTION,
        preprocessing,
        left_over=left_over,
    )


def read_block(arrays: Mapping[str, Any], n: int, path: Path) -> Weights:
    """Block n out of the arrays of a model; an open np.load(file) reads no others from the disk.

    path: what to call them in messages. Raises CheckpointError for other arrays than Google's, and
    where there is no such block.
    """
    names = [name for name in arrays if BLOCKS in name]
    prefix = names[0].partition(BLOCKS)[0] if names else ""
    single, stacked = f"{prefix}{BLOCKS}_{n}/", f"{prefix}{BLOCKS}/"
    block: Arrays = {}
    try:
        for name in names:
            short_name = name.removeprefix(prefix)
            if name.startswith(single):
                block[short_name] = np.asarray(arrays[name])
            elif name.startswith(stacked) and 0 <= n < len(arrays[name]):
                short_name = short_name.replace("encoderblock/", f"encoderblock_{n}/")
                block[short_name] = np.asarray(arrays[name][n])
    # A file that is closed or cut short, or objects in it
    except (*UNREADABLE, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from None
    if not block:
        raise CheckpointError(f"{path}: no block {n} among {list_some(list(arrays)) or 'nothing'}")
    tensors = to_ours(rename(block, path), TABLE, path, ".npz")
    heads = count_heads(block, path)
    # Without a query it is no whole block, which is found where it is put into one.
    settings = SETTINGS | ({"num_heads": heads} if heads else {})
    return Weights(path, "Google's .npz", tensors, settings)


def strip_state_prefix(arrays: Arrays) -> tuple[Arrays, tuple[str, ...]]:
    """The weights alone, out of a whole training state too, and the names of the rest of it."""
    prefix = next((prefix for prefix in PREFIXES if prefix + MARK in arrays), "")
    weights = {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
    return weights, tuple(name for name in arrays if not name.startswith(prefix))


def unstack_blocks(arrays: Arrays) -> Arrays:
    """Give each block its own arrays, where big_vision has stacked all blocks in one array."""
    unstacked = {}
    for name, array in arrays.items():
        if name.startswith(f"{BLOCKS}/") and array.ndim > 0:
            for number, block in enumerate(array):
                unstacked[name.replace("encoderblock/", f"encoderblock_{number}/")] = block
        else:
            unstacked[name] = array
    return unstacked


def count_heads(arrays: Arrays, path: Path) -> int:
    """The number of heads, by the shape (D, H, K) of the queries' kernels.

    Raises CheckpointError where the blocks have several numbers of heads.
    """
    # JAX keeps the heads as an axis, so no convention is needed.
    queries = [array for name, array in arrays.items() if name.endswith("query/kernel")]
    counts = {query.shape[1] for query in queries}
    if len(counts) > 1:
        raise CheckpointError(f"{path}: blocks with {sorted(counts)} heads; all must have as many")
    return counts.pop() if counts else 0


def rename(arrays: Arrays, path: Path) -> dict[str, Tensor]:
    """Arrays as tensors in PyTorch's layout, under the names that TABLE translates.

    Raises CheckpointError for arrays of other types and dimensions than Google's.
    """
    units = flatten_units(list(arrays), r"^block(\d+)/unit(\d+)/")
    tensors = {}
    for name, array in arrays.items():
        *stem, ending = units.get(name, name).replace("/", ".").split(".")
        new_name = ".".join([*stem, ENDINGS.get(ending, ending)])
        is_query = "MultiHeadDotProductAttention" in name and name.endswith("kernel")
        if not is_float(array) or (is_query and array.ndim != 3):
            raise CheckpointError(
                f"{path}: {name} is an array of {array.dtype} of shape {array.shape}, which none "
                "of vit_jax's or big_vision's is"
            )
        tensors[new_name] = to_torch(to_tensor(array), name)
    return tensors


def is_float(array: np.ndarray) -> bool:
    """Whether an array holds floating-point numbers; numpy shows bfloat16 as two bytes."""
    return array.dtype.kind == "f" or (array.dtype.kind == "V" and array.itemsize == 2)


def to_tensor(array: np.ndarray) -> Tensor:
    """A float32 tensor of an array, which may hold bfloat16."""
    if array.dtype.kind == "V":
        # A scalar can't be seen as another type
        bits = torch.from_numpy(np.atleast_1d(array).view(np.int16).copy())
        return bits.view(torch.bfloat16).float().reshape(array.shape)
    return torch.from_numpy(np.array(array, dtype=np.float32))


def to_torch(tensor: Tensor, name: str) -> Tensor:
    """Bring a tensor from JAX's layout to PyTorch's; `name` is theirs."""
    is_kernel = name.endswith("kernel")
    if "MultiHeadDotProductAttention" in name and is_kernel:
        # The output's (H, K, D), else (D, H, K)
        matrix = tensor.flatten(0, 1) if "/out/" in name else tensor.flatten(1)
        return matrix.T.contiguous()
    if is_kernel and tensor.dim() == 4:
        return tensor.permute(3, 2, 0, 1).contiguous()
    if is_kernel and tensor.dim() == 2:
        return tensor.T.contiguous()
    if name.endswith(("scale", "bias")):
        return tensor.flatten()
    return tensor


def to_jax(tensor: Tensor, name: str, num_heads: int) -> np.ndarray:
    """The inverse of to_torch. Group norms get back their (1, 1, 1, C)."""
    is_kernel = name.endswith("kernel")
    is_attention = "MultiHeadDotProductAttention" in name
    if is_attention and "/out/" in name:
        if is_kernel:
            tensor = tensor.T.unflatten(0, (num_heads, -1))
    elif is_attention:
        if is_kernel:
            tensor = tensor.T.unflatten(1, (num_heads, -1))
        else:
            tensor = tensor.unflatten(0, (num_heads, -1))
    elif is_kernel:
        tensor = tensor.permute(2, 3, 1, 0) if tensor.dim() == 4 else tensor.T
    elif "/gn" in f"/{name}":
        tensor = tensor.reshape(1, 1, 1, -1)
    return np.ascontiguousarray(tensor.float().numpy())


def write(weights: Weights, out: Path) -> list[str]:
    """Write arrays under vit_jax's names.

    Returns notes for the user. Raises CheckpointError where the format can't express the model.
    """
    supported = (
        "representation_size",
        "resnet_stages",
        "global_pool",
        "cls_token",
        "activation",
    )
    weights = with_learned_positions(weights, "Google's .npz", *supported)
    model = weights.model
    if model["cls_token"] and model["global_pool"] == "mean":
        raise CheckpointError(
            f"{weights.path}: Google's .npz can't express a class token beside global_pool=mean; "
            "--format safetensors and onnx can"
        )
    arrays = {}
    for name, tensor in to_theirs(weights.tensors, written_table(), weights.path).items():
        jax_name = to_jax_name(name, model["resnet_stages"] or [])
        arrays[jax_name] = to_jax(tensor, jax_name, model["num_heads"])
    with open(out, "wb") as file:  # given a path, numpy would add .npz to it
        np.savez(file, **arrays)
    if model["activation"] == "gelu_tanh":
        return []
    return [
        f"an .npz doesn't tell the activation: this one is {model['activation']}, vit_jax "
        "computes gelu_tanh, timm gelu"
    ]


def written_table() -> dict[str, str]:
    """TABLE with vit_jax's numbers of the parts in a block."""
    # In reading any number will do: vit_jax has 1 and 3, big_vision 0.
    table = {}
    for theirs, ours in TABLE.items():
        theirs = theirs.replace("Attention_{}", "Attention_1").replace("MlpBlock_{}", "MlpBlock_3")
        table[theirs] = ours
    return table


def to_jax_name(name: str, stages: list[int]) -> str:
    """A name of TABLE as vit_jax writes it: with / and JAX's endings."""
    name = unflatten_unit(name, stages, "block{}.unit{}", first=1)
    # Norms have scales, everything else has kernels.
    name = re.sub(r"((?:_norm|LayerNorm_\d|gn_?\w+)\.)weight$", r"\1scale", name)
    return re.sub("weight$", "kernel", name).replace(".", "/")
