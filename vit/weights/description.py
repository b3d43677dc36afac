"""What every format's `read` gives and `write` takes, and what tensors say about their model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit.config.model import MODEL_SETTINGS_OF_WEIGHTS
from vit.data.preprocessing import Preprocessing
from vit.errors import CheckpointError
from vit.model.positions import fixed_positions
from vit.model.vision_transformer import VisionTransformer
from vit.weights.names import CLS, DISTILL, PATCHES, POSITIONS, PROBE, REGISTERS, ROOT, list_some
from vit.weights.stems import (
    CONV_KERNEL,
    describe_stem,
    first_kernel,
    stride_of,
    unseen_settings,
)

# Widths whose heads are not 64 wide: {hidden_size: num_heads} of Zhai et al. 2022
# (arXiv:2106.04560), table 2
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}
HEAD_WIDTH = 64

# Arguments that a format must be able to express, and the value that needs no expressing
PLAIN = {
    "distill_token": False,
    "num_registers": 0,
    "gated_mlp": False,
    "pre_norm": False,
    "fc_norm": False,
    "qk_norm": False,
    "layer_scale": None,
    "pruned_heads": None,
    "resnet_stages": None,
    "conv_stem": None,
    "representation_size": None,
    "global_pool": "cls",
    "cls_token": True,
    "layer_norm_eps": 1e-6,
    "activation": "gelu",
    "qkv_bias": True,
    "position": "learned",
}

# Settings that are expressed with positions and with stems, or not needed without them
WITH_OTHERS = ("cls_position", "resnet_style", "conv_stem_strides")

FIRST_BLOCK = "encoder.blocks.0."

# Settings that change what a model computes and that no shape shows; after a mean also fc_norm
UNSEEN = ("num_heads", "layer_norm_eps", "activation", "global_pool")

# Those that shapes and names do show, and that must agree with what a file states
SEEN = (
    "hidden_size",
    "num_layers",
    "intermediate_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
    "qk_norm",
    "gated_mlp",
    "cls_token",
    "distill_token",
    "num_registers",
    "pre_norm",
    "representation_size",
    "resnet_stages",
    "conv_stem",
)

# How many dimensions the tensors have whose shapes are read
DIMENSIONS = {
    PATCHES + "projection.weight": 4,
    ROOT: 4,
    CLS: 3,
    DISTILL: 3,
    PROBE: 3,
    REGISTERS: 3,
    POSITIONS: 3,
    FIRST_BLOCK + "attention.query.weight": 2,
    FIRST_BLOCK + "attention.query_norm.weight": 1,
    FIRST_BLOCK + "mlp.fc1.weight": 2,
    FIRST_BLOCK + "mlp.fc2.weight": 2,
    "encoder.norm.weight": 1,
    "pooler.dense.weight": 2,
    "head.weight": 2,
}


@dataclass(frozen=True)
class Weights:
    """Weights of any format, under this project's names.

    path, format    where they come from
    tensors         under the names of VisionTransformer.state_dict()
    model           the keyword arguments of the VisionTransformer they fit; without num_classes
                    where there is no head
    assumed         those keys of `model` that the file doesn't state, only a convention
    convention      the architecture whose settings were assumed
    preprocessing   how these weights expect images; None where the file doesn't state it
    classes         names in the order of the logits, or None
    left_over       tensors of the file that a classifier has no use for
    header          of this project's checkpoints
    """

    path: Path
    format: str
    tensors: dict[str, Tensor]
    model: dict[str, Any]
    assumed: tuple[str, ...] = ()
    convention: str = "a plain ViT"
    preprocessing: Preprocessing | None = None
    classes: list[str] | None = None
    left_over: tuple[str, ...] = ()
    header: dict[str, Any] | None = None

    def grid(self) -> tuple[int, int]:
        """The (rows, columns) of patches."""
        return divide(as_pair(self.model["image_size"]), as_pair(self.model["patch_size"]))

    def assumptions(self) -> list[str]:
        """A sentence for every setting that was assumed."""
        return [
            f"{key}={self.model[key]} is assumed, as in {self.convention}; "
            "the file doesn't state it"
            for key in self.assumed
        ]


def as_pair(size: Any) -> tuple[int, int]:
    """(height, width) of a size that is one number or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def int_or_pair(size: tuple[int, int]) -> int | list[int]:
    """The inverse of as_pair, as configurations hold sizes."""
    return size[0] if size[0] == size[1] else list(size)


def divide(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """The (rows, columns) of patches in an image."""
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]


def tiled_size(image_size: tuple[int, int], patch_size: tuple[int, int]) -> int | list[int]:
    """The largest image size, up to the stated one, that whole patches tile.

    Other libraries leave the last pixels of a side out: SigLIP's so400m takes 27 patches of 14 px
    from 384 px, which are 378 here. A size below a patch stays as it is, to be refused by name.
    """
    rows, columns = divide(image_size, patch_size)
    if not rows or not columns:
        return int_or_pair(image_size)
    return int_or_pair((rows * patch_size[0], columns * patch_size[1]))


def squash_preprocessing(model: dict[str, Any]) -> Preprocessing:
    """The preprocessing of the paper's authors and of Hugging Face, for a model of these arguments.

    The whole image is squashed to the model's size (bilinear), mean and std are 0.5.
    """
    half = (0.5,) * model["num_channels"]
    size = as_pair(model["image_size"])
    return Preprocessing(size, model["num_channels"], half, half, None, "bilinear")


def input_preprocessing(weights: Weights) -> Preprocessing:
    """The preprocessing to export with weights, at the size of the model's images.

    The file's may be of smaller images than its positions, as of DINOv2.
    """
    preprocessing = weights.preprocessing or squash_preprocessing(weights.model)
    return replace(preprocessing, image_size=as_pair(weights.model["image_size"]))


def describe(
    tensors: Mapping[str, Tensor],
    path: Path,
    known: Mapping[str, Any],
    layer_norm_eps: float = 1e-6,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Work out which VisionTransformer these tensors fit.

    known: the arguments that the file or its format states; they win over everything else.
    layer_norm_eps: what it usually is in this format, where the file doesn't state it.
    Returns its keyword arguments, and the names of those that only a convention states. Raises
    CheckpointError where a tensor is missing, contradicts what is known, or is of a part that this
    project's model doesn't have, where the number of positions fits no grid, and where nothing
    says what positions a model without stored ones computes.
    """
    check_parts(tensors, path)
    stem = describe_stem(tensors, known, path)
    model = describe_shapes(tensors, stem)
    check_stated(model, known, path)
    known = dict(known)
    # Only a norm of queries and keys shows a head's width in its shape.
    if model["qk_norm"] and "num_heads" not in known:
        head_width = tensors[FIRST_BLOCK + "attention.query_norm.weight"].shape[0]
        known["num_heads"] = model["hidden_size"] // max(head_width, 1)
    patch_size = as_pair(model["patch_size"])
    model |= {"layer_norm_eps": layer_norm_eps, **known}
    if "image_size" in known:
        model["image_size"] = tiled_size(as_pair(known["image_size"]), patch_size)

    assumed = [key for key in (*UNSEEN, *unseen_settings(stem)) if key not in known]
    if model["global_pool"] == "mean" and "fc_norm" not in known:
        assumed.append("fc_norm")
    check_position(POSITIONS in tensors, known.get("position"), path)
    if POSITIONS in tensors:
        count = tensors[POSITIONS].shape[1]
        model |= describe_positions(
            count, patch_size, known.get("image_size"), model["cls_token"], path
        )
    else:
        model.setdefault("cls_position", False)
    # Also where the positions can be of a square, they may be of as large an oblong.
    if "image_size" not in known:
        assumed.append("image_size")
    return model, tuple(assumed)


def check_parts(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError unless the tensors that describe() reads are there and as expected."""
    needed = [
        PATCHES + "projection.weight",
        "encoder.norm.weight",
        FIRST_BLOCK + "mlp.fc1.weight",
        FIRST_BLOCK + "mlp.fc2.weight",
        FIRST_BLOCK + "attention.query.weight",
    ]
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{path}: {list_some(missing)} missing (by this project's names), so it isn't a whole "
            "ViT; is the file complete?"
        )
    kernels = {name: 4 for name in tensors if CONV_KERNEL.fullmatch(name)}
    for name, dimensions in (DIMENSIONS | kernels).items():
        if name in tensors and tensors[name].dim() != dimensions:
            raise CheckpointError(
                f"{path}: {name} (by this project's name) is {tuple(tensors[name].shape)} instead "
                f"of {dimensions}-dimensional; only classifiers of images can be loaded"
            )


def check_stated(seen: Mapping[str, Any], known: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError where a stated setting is another than the tensors show.

    Then the file and the settings beside it are of two models.
    """
    for key in SEEN:
        if key not in known:
            continue
        stated: Any = known[key]
        shown: Any = seen[key]
        if key == "patch_size":
            stated = int_or_pair(as_pair(stated))
        if key in ("resnet_stages", "conv_stem"):
            stated = list(stated) or None
        if stated != shown:
            raise CheckpointError(
                f"{path}: {key} is {shown} by its tensors but stated as {stated}; the settings "
                "are of another model"
            )


def check_position(stored: bool, stated: str | None, path: Path) -> None:
    """Raise CheckpointError where positions are stored or not against what is stated.

    A file without positions is of a model that computes them or has none, which only a statement
    can tell: to take the one for the other would be another function.
    """
    if stored and stated not in (None, "learned"):
        raise CheckpointError(f"{path}: holds learned positions but states position={stated}")
    if not stored and stated in (None, "learned"):
        raise CheckpointError(
            f"{path}: holds no positions, and nothing says whether its model computes them (rotary "
            "ones, sines and cosines) or has none; its own library has to load it"
        )


def describe_shapes(tensors: Mapping[str, Tensor], stem: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the tensors' names and shapes state, and conventions for the others.

    stem: those of them that describe_stem gives.
    """
    kernel = tensors[PATCHES + "projection.weight"]
    hidden_size = kernel.shape[0]
    # A hybrid's kernel covers features, each of which stands for stride × stride pixels.
    stride = stride_of(stem)
    patch_size = (kernel.shape[2] * stride, kernel.shape[3] * stride)
    intermediate_size = tensors[FIRST_BLOCK + "mlp.fc2.weight"].shape[1]
    # The halves of the first layer are multiplied with each other
    is_gated = tensors[FIRST_BLOCK + "mlp.fc1.weight"].shape[0] == 2 * intermediate_size
    model: dict[str, Any] = {
        "image_size": 224,
        "patch_size": int_or_pair(patch_size),
        "num_channels": tensors[first_kernel(tensors)].shape[1],
        "hidden_size": hidden_size,
        "num_layers": count_blocks(tensors),
        "num_heads": HEADS.get(hidden_size, max(1, hidden_size // HEAD_WIDTH)),
        "intermediate_size": intermediate_size,
        "activation": "silu" if is_gated else "gelu",
        "gated_mlp": is_gated,
        "qkv_bias": FIRST_BLOCK + "attention.query.bias" in tensors,
        "qk_norm": FIRST_BLOCK + "attention.query_norm.weight" in tensors,
        "layer_scale": 1e-5 if FIRST_BLOCK + "scale1.factor" in tensors else None,
        "cls_token": CLS in tensors,
        "distill_token": DISTILL in tensors,
        "pre_norm": "embeddings.norm.weight" in tensors,
        "global_pool": shown_pooling(tensors, hidden_size),
        "fc_norm": False,
        "num_registers": 0,
        "representation_size": None,
        **stem,
    }
    if REGISTERS in tensors:
        model["num_registers"] = tensors[REGISTERS].shape[1]
    if "pooler.dense.weight" in tensors:
        model["representation_size"] = tensors["pooler.dense.weight"].shape[0]
    if "head.weight" in tensors:
        model["num_classes"] = tensors["head.weight"].shape[0]
    return model


def shown_pooling(tensors: Mapping[str, Tensor], hidden_size: int) -> str:
    """The pooling that the tensors show, or that models with such tensors usually have."""
    if PROBE in tensors:
        return "map"
    head = tensors.get("pooler.dense.weight", tensors.get("head.weight"))
    if head is not None and CLS in tensors and head.shape[1] == 2 * hidden_size:
        return "cls_mean"
    return "cls" if CLS in tensors else "mean"


def count_blocks(tensors: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[2] for name in tensors if name.startswith("encoder.blocks.")})


def describe_positions(
    count: int,
    patch_size: tuple[int, int],
    image_size: Any,
    has_cls_token: bool,
    path: Path,
) -> dict[str, Any]:
    """The arguments that the number of learned positions states.

    image_size: pixels, or None where the file doesn't state it; then the grid has to be square.
    Raises CheckpointError where the number fits no grid, with or without the class token's.
    """
    described: dict[str, Any] = {"position": "learned"}
    if image_size is not None:
        rows, columns = divide(as_pair(image_size), patch_size)
        surplus = count - rows * columns
        reason = f" in {image_size} px"
    else:
        side = math.isqrt(count)
        if side**2 != count:
            side = math.isqrt(max(count - 1, 0))  # the class token has a position too
        surplus = count - side**2
        described["image_size"] = int_or_pair((side * patch_size[0], side * patch_size[1]))
        reason = (
            "; only square grids are known by their number, others need a config.json beside the "
            "file"
        )
    if surplus not in (0, 1) or (surplus == 1 and not has_cls_token):
        height, width = patch_size
        raise CheckpointError(
            f"{path}: {count} positions fit no grid of patches of {height}x{width} px{reason}"
        )
    described["cls_position"] = surplus == 1
    return described


def with_learned_positions(weights: Weights, format_name: str, *supported: str) -> Weights:
    """The same function with a learned position for every patch and the class token.

    That is how the models of other projects have it. supported: keys of PLAIN that the format can
    express. Raises CheckpointError where there is no head, or a setting that it can't express.
    """
    require_head(weights)
    weights = store_fixed_positions(weights)
    check_expressible(weights, format_name, supported)
    if weights.model["cls_token"] and not weights.model["cls_position"]:
        positions = with_zero_position(weights.tensors[POSITIONS])
        return with_positions(weights, positions, cls_position=True)
    return weights


def require_head(weights: Weights) -> None:
    """Raise CheckpointError where the weights have no head."""
    if "head.weight" not in weights.tensors:
        raise CheckpointError(f"{weights.path}: holds no head, so there is no classifier to export")


def store_fixed_positions(weights: Weights) -> Weights:
    """Turn computed positions, or none, into learned ones of the same values."""
    position = weights.model["position"]
    if position not in ("sincos2d", "sincos1d", "none"):
        return weights
    rows, columns = weights.grid()
    width = weights.model["hidden_size"]
    positions = fixed_positions(position, (rows, columns), width)
    if positions is None:
        positions = torch.zeros(1, rows * columns, width)
    return with_positions(weights, positions, cls_position=False)


def with_positions(weights: Weights, positions: Tensor, cls_position: bool) -> Weights:
    """The weights with these learned positions."""
    return replace(
        weights,
        tensors=weights.tensors | {POSITIONS: positions},
        model=weights.model | {"position": "learned", "cls_position": cls_position},
    )


def with_zero_position(positions: Tensor) -> Tensor:
    """Positions (1, n, D) with a zero one for the class token before them, (1, n + 1, D)."""
    return torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)


def check_expressible(weights: Weights, format_name: str, supported: tuple[str, ...]) -> None:
    """Raise CheckpointError, which names them, for settings that a format can't express."""
    problems = [
        f"{key}={weights.model[key]}"
        for key, plain in PLAIN.items()
        if key not in supported and (weights.model.get(key) or None) != (plain or None)
    ]
    # A setting that no format knows of, so that none leaves it out in silence
    defaults = VisionTransformer.__init__.__kwdefaults__ or {}
    for key in MODEL_SETTINGS_OF_WEIGHTS:
        value = weights.model.get(key, defaults[key])
        if key not in PLAIN and key not in WITH_OTHERS and value != defaults[key]:
            problems.append(f"{key}={value}")
    if problems:
        raise CheckpointError(
            f"{weights.path}: {format_name} can't express {', '.join(problems)}; "
            "--format safetensors and onnx can"
        )
