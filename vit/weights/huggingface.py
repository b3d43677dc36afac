"""Hugging Face's ViT and its folders (transformers/models/vit).

The files hold one set of names; since transformers 5 the models compute with another one, which a
file may hold too.
"""

from pathlib import Path
from typing import Any

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
from vit.weights.names import BLOCK, CLS, PATCHES, POSITIONS, QKV, to_ours, to_theirs

# A ViTModel's names, and those of a model with a task around it
MARKS = (
    "embeddings.patch_embeddings.projection.weight",
    "vit.embeddings.patch_embeddings.projection.weight",
)

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
    "silu": "silu",
}

# Of masked image modeling, and an old buffer
IGNORED = ("embeddings.mask_token", "embeddings.position_ids", "decoder.")


def read(path: Path, tensors: dict[str, Tensor]) -> Weights:
    """`path` is the file; config.json and preprocessor_config.json beside it are used.

    Raises CheckpointError for architectures and settings that this project doesn't have.
    """
    config_path = path.parent / "config.json"
    config = read_config(config_path)
    if config.get("model_type") != "vit":  # of another library
        config = {}
    used, left_over = sort_out(tensors)
    ours = to_ours(used, TABLE, path, "Hugging Face")
    model, assumed = describe(ours, path, known_arguments(config, config_path))
    return Weights(
        path,
        "Hugging Face",
        ours,
        model,
        assumed,
        preprocessing_of(path.parent / "preprocessor_config.json", model),
        class_names(config, model),
        left_over,
    )


def sort_out(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A classifier's tensors under the names of TABLE, and the full names of the others."""
    ignored = IGNORED
    if "classifier.weight" in tensors:
        ignored = (*IGNORED, "pooler.")  # ViTForImageClassification doesn't use it
    used, left_over = {}, []
    for name, tensor in tensors.items():
        short_name = name.removeprefix("vit.")
        if short_name.startswith(ignored):
            left_over.append(name)
        else:
            used[short_name] = tensor
    return used, tuple(left_over)


def known_arguments(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """What Hugging Face's config.json at `path` states of the model, and its defaults."""
    activation = config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS or config.get("pooler_act", "tanh") != "tanh":
        raise CheckpointError(
            f"{path}: hidden_act must be one of {', '.join(ACTIVATIONS)} and pooler_act tanh, "
            f"got {activation} and {config.get('pooler_act')}"
        )
    known: dict[str, Any] = {
        "activation": ACTIVATIONS[activation],
        "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
    }
    # A config.json may leave out what is as in ViT-B/16.
    if config:
        known["num_heads"] = config.get("num_attention_heads", 12)
        known["image_size"] = int_or_pair(as_pair(config.get("image_size", 224)))
    return known


def class_names(config: dict[str, Any], model: dict[str, Any]) -> list[str] | None:
    """The names in a config's id2label, or None where it has none or placeholders alone."""
    labels = config.get("id2label") or {}
    placeholders = {f"LABEL_{key}" for key in labels}
    if len(labels) != model.get("num_classes") or set(labels.values()) == placeholders:
        return None
    return [str(labels[key]) for key in sorted(labels, key=int)]


def preprocessing_of(path: Path, model: dict[str, Any]) -> Preprocessing:
    """The preprocessing in a preprocessor_config.json; without one, that of Hugging Face's default.

    Raises CheckpointError where it is not one of ours.
    """
    config = read_config(path)
    if not config:
        return squash_preprocessing(model)
    # `resample` holds Pillow's numbers.
    names = {int(number): name for name, number in PIL_RESAMPLING.items()}
    interpolation = names.get(config.get("resample", 2))
    if interpolation is None or not config.get("do_resize", True):
        raise CheckpointError(
            f"{path}: only a resize with resample 2 (bilinear) or 3 (bicubic) is known here"
        )
    image_size, eval_crop = resize_and_crop(config, path)
    channels = model["num_channels"]
    mean, std = (0.0,), (1.0,)
    if config.get("do_normalize", True):
        mean = tuple(config.get("image_mean", [0.5] * channels))
        std = tuple(config.get("image_std", [0.5] * channels))
    return Preprocessing(image_size, channels, mean, std, eval_crop, interpolation)


def resize_and_crop(config: dict[str, Any], path: Path) -> tuple[tuple[int, int], float | None]:
    """The image size and the crop, as Preprocessing has them, of a preprocessor_config.json.

    Raises CheckpointError where images would come out in many shapes.
    """
    size = config.get("size", 224)
    if isinstance(size, int):
        size = {"height": size, "width": size}
    if config.get("do_center_crop"):
        crop = config.get("crop_size", 224)
        height, width = as_pair(crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        edge = size.get("shortest_edge")
        if edge is None or height != width:
            raise CheckpointError(
                f"{path}: a center crop needs a size by its shortest_edge and a square crop_size"
            )
        return (height, width), height / edge
    if {"height", "width"} <= size.keys():
        return (size["height"], size["width"]), None
    raise CheckpointError(
        f"{path}: size {size} without a center crop makes images of many shapes; "
        "give height and width"
    )


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
    preprocessing = weights.preprocessing or squash_preprocessing(weights.model)
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
        # Resize the shorter side first, then cut the center out.
        edge = int(min(height, width) / preprocessing.eval_crop)
        config["size"] = {"shortest_edge": edge}
        config["do_center_crop"] = True
        config["crop_size"] = {"height": height, "width": width}
    return config


def per_channel(values: tuple[float, ...], num_channels: int) -> list[float]:
    """One number for each channel: averaged for gray, repeated for RGB."""
    if num_channels == 1:
        return [sum(values) / len(values)]
    return list(values) * (num_channels // len(values))
