"""Other libraries' ways to hold the same model, brought to this project's.

Each function takes tensors under this project's names, and returns all of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit.errors import CheckpointError
from vit.weights.names import BLOCK, DISTILL, PATCHES, POSITIONS, QKV

FIRST_BIAS = BLOCK.format(0) + "attention.query.bias"


def adapt_common(
    tensors: dict[str, Tensor], known: Mapping[str, Any], path: Path
) -> dict[str, Tensor]:
    """All that timm and Hugging Face hold in the same other way; known: what config.json states.

    Raises CheckpointError as pair_channels does.
    """
    tensors = with_key_bias(join_gates(with_patch_bias(tensors)))
    if known.get("position") == "rope_dinov3":
        tensors = pair_channels(tensors, known["num_heads"], path)
    return fold_distill_position(tensors)


def with_patch_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the patch embedding a bias of zero where it has none, as in CLIP."""
    kernel, name = tensors.get(PATCHES + "projection.weight"), PATCHES + "projection.bias"
    if kernel is None or name in tensors:
        return tensors
    return tensors | {name: torch.zeros(kernel.shape[:1], dtype=kernel.dtype)}


def with_key_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give keys a bias of zero where queries alone have one, as in DINOv3.

    A bias of the keys adds the same number to all scores of a query, which softmax ignores.
    """
    added = {}
    for name, tensor in tensors.items():
        if name.endswith("attention.query.bias"):
            key = name.replace(".query.", ".key.")
            if key not in tensors:
                added[key] = torch.zeros_like(tensor)
    return tensors | added


def join_gates(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the two first layers of a gated MLP into one: the gate, then what it gates."""
    joined = {}
    for name, tensor in tensors.items():
        if ".mlp.gate." in name:
            parts = [tensor, tensors[name.replace(".gate.", ".value.")]]
            joined[name.replace(".gate.", ".fc1.")] = torch.cat(parts)
        elif ".mlp.value." not in name:
            joined[name] = tensor
    return joined


def pair_channels(tensors: dict[str, Tensor], num_heads: int, path: Path) -> dict[str, Tensor]:
    """Reorder the queries' and keys' channels for rotate(), which rotates neighbors (2i, 2i + 1).

    Of other libraries' heads of width K it rotates (i, i + K/2). The products of queries and keys
    stay the same. Raises CheckpointError where num_heads does not fit.
    """
    reordered = dict(tensors)
    for name, tensor in tensors.items():
        if ".attention." in name and any(f".{part}." in name for part in QKV[:2]):
            if tensor.shape[0] % (2 * num_heads):
                raise CheckpointError(f"{path}: {name} has no {num_heads} heads of an even width")
            halves = tensor.unflatten(0, (num_heads, 2, -1))  # (H, 2, K/2, …)
            reordered[name] = halves.transpose(1, 2).flatten(0, 2).contiguous()
    return reordered


def fold_distill_position(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the distillation token's position to the token: here it has none.

    It stands between those of the class token and of the patches.
    """
    if DISTILL not in tensors or POSITIONS not in tensors:
        return tensors
    positions = tensors[POSITIONS]
    return tensors | {
        DISTILL: tensors[DISTILL] + positions[:, 1:2],
        POSITIONS: torch.cat([positions[:, :1], positions[:, 2:]], dim=1),
    }
