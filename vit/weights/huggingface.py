"""Hugging Face's ViT and its folders (transformers/models/vit).

The files hold one set of names; since transformers 5 the models compute with another one, which a
file may hold too.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vit.data.preprocessing import PIL_RESAMPLING, Preprocessing
from vit.errors import CheckpointError
from vit.files import write_json
from vit.weights.config_file import (
    COUNT,
    FLAG,
    INDEX,
    LABELS,
    NUMBERS,
    POSITIVE,
    SCALES,
    SIDES,
    SIZE,
    TEXT,
    ConfigFile,
    read_config_of,
    read_processor,
)
from vit.weights.description import (
    Weights,
    as_pair,
    describe,
    input_preprocessing,
    int_or_pair,
    squash_preprocessing,
    with_learned_positions,
)
from vit.weights.names import (
    BLOCK,
    CLS,
    PATCHES,
    POSITIONS,
    QKV,
    to_ours,
    to_theirs,
    without_prefix,
)

# Before the names of a model with a task around it; ViT-MSN and ViT-MAE have ViT's
PREFIXES = ("vit.", "ijepa.")
PROJECTION = "embeddings.patch_embeddings.projection.weight"
MARKS = (PROJECTION, *(prefix + PROJECTION for prefix in PREFIXES))
CONVENTION = "Hugging Face's ViT"

NEW_BLOCK = "layers.{}."
STORED_BLOCK = "encoder.layer.{}."

TABLE = {
    "embeddings.patch_embeddings.projection": PATCHES + "projection",
    "embeddings.cls_token": CLS,
    "embeddings.position_embeddings": POSITIONS,
    "layernorm": "encoder.norm",
    "pooler.dense": "pooler.dense",
    "classifier": "head",
    **{NEW_BLOCK + f"attention.{part[0]}_proj": BLOCK + f"attention.{part}" for part in QKV},
    NEW_BLOCK + "attention.o_proj": BLOCK + "attention.projection",
    NEW_BLOCK + "layernorm_before": BLOCK + "norm1",
    NEW_BLOCK + "layernorm_after": BLOCK + "norm2",
    NEW_BLOCK + "mlp.fc1": BLOCK + "mlp.fc1",
    NEW_BLOCK + "mlp.fc2": BLOCK + "mlp.fc2",
    # The stored names come last, so they are written: every version reads them.
    **{STORED_BLOCK + f"attention.attention.{part}": BLOCK + f"attention.{part}" for part in QKV},
    STORED_BLOCK + "attention.output.dense": BLOCK + "attention.projection",
    STORED_BLOCK + "layernorm_before": BLOCK + "norm1",
    STORED_BLOCK + "layernorm_after": BLOCK + "norm2",
    STORED_BLOCK + "intermediate.dense": BLOCK + "mlp.fc1",
    STORED_BLOCK + "output.dense": BLOCK + "mlp.fc2",
}

# {hidden_act: ours}; of several the last is written
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
}

# {model_type: its default layer_norm_eps}, of those that compute what ViT does
EPSILONS = {"vit": 1e-12, "vit_msn": 1e-6, "vit_mae": 1e-12, "ijepa": 1e-12}

# {field: (ours, what it holds)}; the tensors show these too
SIZES = {
    "hidden_size": ("hidden_size", COUNT),
    "num_hidden_layers": ("num_layers", COUNT),
    "intermediate_size": ("intermediate_size", COUNT),
    "patch_size": ("patch_size", SIZE),
    "num_channels": ("num_channels", COUNT),
}

# Steps of a preprocessing that are read here, and that change nothing for an RGB image
STEPS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb")

# Of masked image modeling, and an old buffer
IGNORED = ("embeddings.mask_token", "embeddings.position_ids", "decoder.")


def read(path: Path, tensors: dict[str, Tensor]) -> Weights:
    """`path` is the file; config.json and read_processor()'s file beside it are used.

    Raises CheckpointError for architectures and settings that this project doesn't have.
    """
    config = read_config_of("model_type", "Hugging Face", path)
    known = known_arguments(config)
    used, left_over = sort_out(tensors, IGNORED, PREFIXES, path)
    ours = to_ours(used, TABLE, path, "Hugging Face")
    model, assumed = describe(ours, path, known, EPSILONS["vit"])
    return Weights(
        path,
        "Hugging Face",
        ours,
        model,
        assumed,
        CONVENTION,
        preprocessing_of(read_processor(path.parent), model),
        class_names(config, model),
        left_over,
    )


def sort_out(
    tensors: Mapping[str, Tensor], ignored: tuple[str, ...], prefixes: Sequence[str], path: Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of an image model without their prefix, and the full names of the others.

    ignored: how the names of the others begin after a prefix, if they have one.
    """
    if any(name.endswith("classifier.weight") for name in tensors):
        ignored = (*ignored, "pooler.")  # …ForImageClassification doesn't use it
    ignored = tuple(prefix + name for prefix in ("", *prefixes) for name in ignored)
    left_over = tuple(name for name in tensors if name.startswith(ignored))
    used = {name: tensor for name, tensor in tensors.items() if name not in left_over}
    return without_prefix(used, prefixes, path), left_over


def known_arguments(config: ConfigFile) -> dict[str, Any]:
    """What Hugging Face's config.json states of the model, and the defaults of its model_type.

    Raises CheckpointError for model types and settings that this project doesn't have.
    """
    model_type = config.get("model_type", TEXT)
    if model_type is None:
        return {}
    if model_type not in EPSILONS:
        raise CheckpointError(
            f"{config.path}: Hugging Face's {model_type} can't be loaded, only "
            f"{', '.join(EPSILONS)} (docs/weights.md)"
        )
    activation = config.get("hidden_act", TEXT, "gelu")
    pooler_activation = config.get("pooler_act", TEXT, "tanh")
    if activation not in ACTIVATIONS or pooler_activation != "tanh":
        raise CheckpointError(
            f"{config.path}: hidden_act must be one of {', '.join(ACTIVATIONS)} and pooler_act "
            f"tanh, got {activation} and {pooler_activation}"
        )
    # A config.json may leave out what is as in ViT-B/16.
    known: dict[str, Any] = {
        "activation": ACTIVATIONS[activation],
        "layer_norm_eps": config.get("layer_norm_eps", POSITIVE, EPSILONS[model_type]),
        "num_heads": config.get("num_attention_heads", COUNT, 12),
        "image_size": int_or_pair(as_pair(config.get("image_size", SIZE, 224))),
        "qkv_bias": config.get("qkv_bias", FLAG, True),
        # I-JEPA alone has no class token
        "cls_token": model_type != "ijepa",
        "global_pool": "mean" if model_type == "ijepa" else "cls",
        "fc_norm": False,
    }
    sizes = {ours: config.get(theirs, kind) for theirs, (ours, kind) in SIZES.items()}
    return known | {key: size for key, size in sizes.items() if size is not None}


def class_names(config: ConfigFile, model: dict[str, Any]) -> list[str] | None:
    """The names in a config's id2label, or None where it has none or placeholders alone."""
    labels = config.get("id2label", LABELS, {})
    placeholders = {f"LABEL_{key}" for key in labels}
    if len(labels) != model.get("num_classes") or set(labels.values()) == placeholders:
        return None
    return [labels[key] for key in sorted(labels, key=int)]


def preprocessing_of(
    config: ConfigFile, model: dict[str, Any], by_shortest_edge: bool = False
) -> Preprocessing:
    """The preprocessing that read_processor() gave; without one, that of Hugging Face's default.

    by_shortest_edge: see resize_and_crop. Raises CheckpointError where it is not one of ours.
    """
    if not config:
        return squash_preprocessing(model)
    check_steps(config)
    # `resample` holds Pillow's numbers.
    names = {int(number): name for name, number in PIL_RESAMPLING.items()}
    interpolation = names.get(config.get("resample", INDEX, 2))
    if interpolation is None or not config.get("do_resize", FLAG, True):
        raise CheckpointError(
            f"{config.path}: only a resize with resample 2 (bilinear) or 3 (bicubic) is known here"
        )
    image_size, eval_crop = resize_and_crop(config, by_shortest_edge)
    channels = model["num_channels"]
    mean, std = [0.0], [1.0]
    if config.get("do_normalize", FLAG, True):
        mean = config.get("image_mean", NUMBERS, [0.5] * channels)
        std = config.get("image_std", SCALES, [0.5] * channels)
    if not {len(mean), len(std)} <= {1, channels}:
        raise CheckpointError(
            f"{config.path}: image_mean {mean} and image_std {std} must have {channels} numbers "
            "each, as the weights have channels"
        )
    return Preprocessing(image_size, channels, tuple(mean), tuple(std), eval_crop, interpolation)


def check_steps(config: ConfigFile) -> None:
    """Raise CheckpointError for steps of a preprocessing that this project's doesn't have."""
    for key in config.fields:
        if key.startswith("do_") and key not in STEPS and config.get(key, FLAG):
            raise CheckpointError(f"{config.path}: {key} is not known here; set it to false")
    if "crop_pct" in config:
        raise CheckpointError(f"{config.path}: crop_pct is not known here; give size and crop_size")
    factor = config.get("rescale_factor", POSITIVE, 1 / 255)
    if not config.get("do_rescale", FLAG, True) or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise CheckpointError(
            f"{config.path}: only pixels scaled to 0..1 (do_rescale, rescale_factor 1/255) are "
            "known here"
        )


def resize_and_crop(
    config: ConfigFile, by_shortest_edge: bool
) -> tuple[tuple[int, int], float | None]:
    """The image size and the crop, as Preprocessing has them, of a preprocessor_config.json.

    by_shortest_edge: before a crop, a size of one number is that of the shorter side, as in CLIP's
    older files and DeiT's evaluation (Hugging Face's DeiT squashes images to it).
    Raises CheckpointError where images would come out in many shapes.
    """
    size = sides_of(config, "size")
    if config.get("do_center_crop", FLAG, False):
        crop = sides_of(config, "crop_size")
        height, width = crop.get("height", COUNT), crop.get("width", COUNT)
        edge = size.get("shortest_edge", COUNT)
        side = size.get("height", COUNT)
        if by_shortest_edge and edge is None and side == size.get("width", COUNT):
            edge = side
        if edge is None or height is None or height != width:
            raise CheckpointError(
                f"{config.path}: a center crop needs a size by its shortest_edge and a square "
                "crop_size"
            )
        return (height, width), height / edge
    if "height" in size and "width" in size:
        return (size.get("height", COUNT), size.get("width", COUNT)), None
    raise CheckpointError(
        f"{config.path}: size {size.fields} without a center crop makes images of many shapes; "
        "give height and width"
    )


def sides_of(config: ConfigFile, key: str) -> ConfigFile:
    """A size as an object: one number or two stand for height and width."""
    size = config.get(key, SIDES, 224)
    if isinstance(size, dict):
        return ConfigFile(config.path, size)
    height, width = as_pair(size)
    return ConfigFile(config.path, {"height": height, "width": width})


def write(weights: Weights, out: Path) -> list[str]:
    """Write a folder for ViTForImageClassification.from_pretrained.

    Returns notes for the user: none. Raises CheckpointError where Hugging Face has no such model.
    """
    supported = ("layer_norm_eps", "activation", "qkv_bias")
    format_name = "Hugging Face's ViTForImageClassification"
    weights = with_learned_positions(weights, format_name, *supported)
    tensors = {}
    for name, tensor in to_theirs(weights.tensors, TABLE, weights.path).items():
        prefix = "" if name.startswith("classifier.") else "vit."
        tensors[prefix + name] = tensor
    out.mkdir()
    # transformers refuses safetensors that don't say whose tensors they hold.
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    write_json(out / "config.json", new_config(weights))
    write_json(out / "preprocessor_config.json", new_processor_config(weights))
    return []


def new_config(weights: Weights) -> dict[str, Any]:
    """The config.json that Hugging Face builds the model of."""
    model = weights.model
    hidden_acts = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    classes = weights.classes or [f"LABEL_{number}" for number in range(model["num_classes"])]
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_act": hidden_acts[model["activation"]],
        "hidden_size": model["hidden_size"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"],
        "intermediate_size": model["intermediate_size"],
        "layer_norm_eps": model["layer_norm_eps"],
        "qkv_bias": model["qkv_bias"],
        "image_size": model["image_size"],
        "patch_size": model["patch_size"],
        "num_channels": model["num_channels"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
    }


def new_processor_config(weights: Weights) -> dict[str, Any]:
    """The preprocessor_config.json that Hugging Face builds the image processor of."""
    preprocessing = input_preprocessing(weights)
    height, width = preprocessing.image_size
    config = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": per_channel(preprocessing.mean, preprocessing.num_channels),
        "image_std": per_channel(preprocessing.std, preprocessing.num_channels),
        "rescale_factor": 1 / 255,
        "resample": int(PIL_RESAMPLING[preprocessing.interpolation]),
        "size": {"height": height, "width": width},
    }
    if preprocessing.eval_crop is not None:
        # By its shorter side an image of another shape would not cover an oblong
        if height != width:
            raise CheckpointError(
                f"{weights.path}: Hugging Face can't express eval_crop="
                f"{preprocessing.eval_crop:g} with images of {height}x{width} px; --format "
                "safetensors and onnx can"
            )
        # Resize the shorter side first, then cut the center out.
        edge, _ = preprocessing.size_before_crop(width, height)
        config["size"] = {"shortest_edge": edge}
        config["do_center_crop"] = True
        config["crop_size"] = {"height": height, "width": width}
    return config


def per_channel(values: tuple[float, ...], num_channels: int) -> list[float]:
    """One number for each channel: averaged for gray, repeated for RGB."""
    if num_channels == 1:
        return [sum(values) / len(values)]
    return list(values) * (num_channels // len(values))
