"""What every format's `read` gives and `write` takes, and what can be told of a model from its tensors alone."""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit.data.preprocessing import Preprocessing
from vit.errors import CheckpointError
from vit.model.positions import sincos1d, sincos2d
from vit.weights.names import CLS, PATCHES, POSITIONS, ROOT, list_some

HEADS = {
    1152: 16,
    1280: 16,
    1408: 16,
    1664: 16,
    1792: 16,
}  # Zhai et al. 2022 (arXiv:2106.04560), table 2; elsewhere 64 wide


# What a convention must be able to say, and the value that needs no saying
PLAIN = {
    "num_registers": 0,
    "qk_norm": False,
    "layer_scale": None,
    "pruned_heads": None,
    "resnet_stages": None,
    "representation_size": None,
    "global_pool": "cls",
    "cls_token": True,
    "layer_norm_eps": 1e-6,
    "activation": "gelu",
    "qkv_bias": True,
    "position": "learned",
}


@dataclass(frozen=True)
class Weights:
    """Weights of any format, by this project's names.

    path, format    where they come from
    tensors         by the names of VisionTransformer.state_dict()
    model           the keyword arguments of the VisionTransformer they fit; without num_classes where there is no head
    assumed         keys of `model` that the file doesn't tell and a convention does
    preprocessing   how these weights want to see pictures; None where the file doesn't tell
    classes         names in the order of the logits, or None
    left_over       tensors of the file that have no use in classification
    header          of our own checkpoints
    """

    path: Path
    format: str
    tensors: dict[str, Tensor]
    model: dict[str, Any]
    assumed: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    classes: list[str] | None = None
    left_over: tuple[str, ...] = ()
    header: dict[str, Any] | None = None

    def grid(self) -> tuple[int, int]:
        (height, width), (P, Q) = (
            as_pair(self.model["image_size"]),
            as_pair(self.model["patch_size"]),
        )
        return height // P, width // Q


def as_pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def int_or_pair(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; {} where there is no file. Raises CheckpointError where it isn't JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not readable as JSON ({error}); repair it, or move the weights elsewhere"
        ) from None


def squash(model: dict[str, Any]) -> Preprocessing:
    """As the authors' code and Hugging Face see pictures: squashed to the model's size (bilinear), mean and std 0.5."""
    half = (0.5,) * model["num_channels"]
    return Preprocessing(
        as_pair(model["image_size"]), model["num_channels"], half, half, None, "bilinear"
    )


def count_blocks(tensors: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[2] for name in tensors if name.startswith("encoder.blocks.")})


def describe(
    tensors: Mapping[str, Tensor], path: Path, **told: Any
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the VisionTransformer's keyword arguments that fit these tensors, those of them that only a convention tells).

    told: what the file says itself. Raises CheckpointError where a tensor is missing or positions are of no square grid.
    """
    needed = [
        PATCHES + "projection.weight",
        "encoder.norm.weight",
        "encoder.blocks.0.mlp.fc1.weight",
        "encoder.blocks.0.attention.query.weight",
    ]
    if missing := [name for name in needed if name not in tensors]:
        raise CheckpointError(
            f"{path}: {list_some(missing)} missing (by this project's names), so it isn't a whole ViT; "
            "is the file complete?"
        )
    kernel = tensors[PATCHES + "projection.weight"]
    width = kernel.shape[0]
    first_units = [
        int(name.split(".")[4]) for name in tensors if name.endswith("downsample.0.weight")
    ]
    units = len(
        {name.split(".")[4] for name in tensors if name.startswith(PATCHES + "stem.blocks.")}
    )
    starts = [*sorted(first_units), units]
    stages = [after - before for before, after in itertools.pairwise(starts)] or None
    if ROOT in tensors and stages is None:
        raise CheckpointError(
            f"{path}: a hybrid with a ResNet's root alone (R+Ti/16); only those with stages can be loaded"
        )
    stride = 2 ** (len(stages) + 1) if stages else 1
    patch = (kernel.shape[2] * stride, kernel.shape[3] * stride)
    model: dict[str, Any] = {
        "image_size": 224,
        "patch_size": int_or_pair(patch),
        "num_channels": (tensors[ROOT] if stages else kernel).shape[1],
        "hidden_size": width,
        "num_layers": count_blocks(tensors),
        "num_heads": HEADS.get(width, width // 64),
        "intermediate_size": tensors["encoder.blocks.0.mlp.fc1.weight"].shape[0],
        "activation": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": "encoder.blocks.0.attention.query.bias" in tensors,
        "qk_norm": "encoder.blocks.0.attention.query_norm.weight" in tensors,
        "layer_scale": 1e-5 if "encoder.blocks.0.scale1.factor" in tensors else None,
        "cls_token": CLS in tensors,
        "global_pool": "cls" if CLS in tensors else "mean",
        "num_registers": tensors["embeddings.registers"].shape[1]
        if "embeddings.registers" in tensors
        else 0,
        "representation_size": tensors["pooler.dense.weight"].shape[0]
        if "pooler.dense.weight" in tensors
        else None,
        "resnet_stages": stages,
        "resnet_style": "jax",
    }
    if "head.weight" in tensors:
        model["num_classes"] = tensors["head.weight"].shape[0]
    if model["qk_norm"]:
        told.setdefault(
            "num_heads", width // tensors["encoder.blocks.0.attention.query_norm.weight"].shape[0]
        )
    model |= told
    assumed = [key for key in ("num_heads", "layer_norm_eps", "activation") if key not in told]
    if POSITIONS in tensors:
        count = tensors[POSITIONS].shape[1]
        if "image_size" in told:
            (height, breadth), (P, Q) = as_pair(told["image_size"]), patch
            extra = count - (height // P) * (breadth // Q)
        else:
            extra = next(
                (extra for extra in (0, 1) if math.isqrt(count - extra) ** 2 == count - extra), -1
            )
            model["image_size"] = int_or_pair(
                (math.isqrt(count - extra) * patch[0], math.isqrt(count - extra) * patch[1])
            )
        if extra not in (0, 1) or (extra and not model["cls_token"]):
            raise CheckpointError(
                f"{path}: {count} positions fit no grid of patches of {patch[0]}x{patch[1]} px"
                + (
                    f" in {told['image_size']} px"
                    if "image_size" in told
                    else "; only square ones are told "
                    "by their number, others need a config.json beside the file"
                )
            )
        model |= {"position": "learned", "cls_position": extra == 1}
    else:
        model = {"position": "none", "cls_position": False} | model
        assumed += [] if "image_size" in told else ["image_size"]
    return model, tuple(assumed)


def with_learned_positions(weights: Weights, name: str, *supported: str) -> Weights:
    """The same function with a learnt position for every patch and the class token, as other projects' models have.

    supported: keys of PLAIN that the format has a place for. Raises CheckpointError, naming the others that are in use.
    """
    model, tensors = dict(weights.model), dict(weights.tensors)
    if "head.weight" not in tensors:
        raise CheckpointError(f"{weights.path}: holds no head, so there is no classifier to export")
    position = model["position"]
    if position in ("sincos2d", "sincos1d", "none"):
        rows, columns = weights.grid()
        table = {"sincos2d": sincos2d, "sincos1d": sincos1d}.get(
            position, lambda grid, D: torch.zeros(grid[0] * grid[1], D)
        )
        tensors[POSITIONS] = table((rows, columns), model["hidden_size"])[None]
        model |= {"position": "learned", "cls_position": False}
    problems = [
        f"{key}={model[key]}"
        for key, plain in PLAIN.items()
        if key not in supported and (model.get(key) or None) != (plain or None)
    ]
    if problems:
        raise CheckpointError(
            f"{weights.path}: {name} has no place for {', '.join(problems)}; safetensors and onnx have"
        )
    if model["cls_token"] and not model["cls_position"]:
        tensors[POSITIONS] = torch.cat(
            [torch.zeros_like(tensors[POSITIONS][:, :1]), tensors[POSITIONS]], dim=1
        )
        model["cls_position"] = True
    return Weights(
        weights.path,
        weights.format,
        tensors,
        model,
        weights.assumed,
        weights.preprocessing,
        weights.classes,
    )
