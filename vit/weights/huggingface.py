"""Hugging Face's ViT (transformers/models/vit): the names it stores, those it computes with since 5.x, and its folders."""

import json
from pathlib import Path
from typing import Any

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
from vit.weights.names import CLS, PATCHES, POSITIONS, to_ours, to_theirs

MARK = "embeddings.patch_embeddings.projection.weight"


PARTS = ("query", "key", "value")


NEW, OLD, OURS = "layers.{}.", "encoder.layer.{}.", "encoder.blocks.{}."


TABLE = {
    "embeddings.patch_embeddings.projection": PATCHES + "projection",
    "embeddings.cls_token": CLS,
    "embeddings.position_embeddings": POSITIONS,
    "layernorm": "encoder.norm",
    "pooler.dense": "pooler.dense",
    "classifier": "head",
    **{NEW + f"attention.{part[0]}_proj": OURS + f"attention.{part}" for part in PARTS},
    NEW + "attention.o_proj": OURS + "attention.projection",
    NEW + "layernorm_before": OURS + "norm1",
    NEW + "layernorm_after": OURS + "norm2",
    NEW + "mlp.fc1": OURS + "mlp.fc1",
    NEW + "mlp.fc2": OURS + "mlp.fc2",
    # The stored names come last, to be the ones that are written: every version reads them.
    **{OLD + f"attention.attention.{part}": OURS + f"attention.{part}" for part in PARTS},
    OLD + "attention.output.dense": OURS + "attention.projection",
    OLD + "layernorm_before": OURS + "norm1",
    OLD + "layernorm_after": OURS + "norm2",
    OLD + "intermediate.dense": OURS + "mlp.fc1",
    OLD + "output.dense": OURS + "mlp.fc2",
}


ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
    **{name: name for name in ("gelu", "quick_gelu", "relu", "silu")},
}


IGNORED = (
    "embeddings.mask_token",
    "embeddings.position_ids",
    "decoder.",
)  # of masked image modelling, and an old buffer


def read(path: Path, tensors: dict[str, Tensor]) -> Weights:
    """`path` is the file; config.json and preprocessor_config.json are looked for beside it."""
    config = read_json(path.parent / "config.json")
    config = config if config.get("model_type") == "vit" else {}
    ignored = IGNORED + (
        ("pooler.",) if "classifier.weight" in tensors else ()
    )  # ViTForImageClassification has none
    names = {name: name.removeprefix("vit.") for name in tensors}
    left_over = tuple(name for name in tensors if names[name].startswith(ignored))
    ours = to_ours(
        {names[name]: tensor for name, tensor in tensors.items() if name not in left_over},
        TABLE,
        path,
        "Hugging Face",
    )
    activation = config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS or config.get("pooler_act", "tanh") != "tanh":
        raise CheckpointError(
            f"{path.parent / 'config.json'}: hidden_act must be one of {', '.join(ACTIVATIONS)} "
            f"and pooler_act tanh, got {activation} and {config.get('pooler_act')}"
        )
    told: dict[str, Any] = {
        "activation": ACTIVATIONS[activation],
        "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
    }
    if config:
        told |= {
            "num_heads": config.get("num_attention_heads", 12),
            "image_size": int_or_pair(as_pair(config.get("image_size", 224))),
        }
    model, assumed = describe(ours, path, **told)
    labels, classes = config.get("id2label") or {}, None
    if len(labels) == model.get("num_classes") and set(labels.values()) != {
        f"LABEL_{key}" for key in labels
    }:
        classes = [str(labels[key]) for key in sorted(labels, key=int)]
    return Weights(
        path,
        "Hugging Face",
        ours,
        model,
        assumed,
        preprocessing_of(path, model),
        classes,
        left_over,
    )


def preprocessing_of(path: Path, model: dict[str, Any]) -> Preprocessing:
    """Of preprocessor_config.json, or as Hugging Face's processor does without one."""
    file = path.parent / "preprocessor_config.json"
    config, channels = read_json(file), model["num_channels"]
    if not config:
        return squash(model)
    interpolation = {int(number): name for name, number in PIL_RESAMPLING.items()}.get(
        config.get("resample", 2)
    )
    size, crop = config.get("size", 224), config.get("crop_size", 224)
    size = {"height": size, "width": size} if isinstance(size, int) else size
    if interpolation is None or not config.get("do_resize", True):
        raise CheckpointError(
            f"{file}: only a resize with resample 2 (bilinear) or 3 (bicubic) is known here"
        )
    eval_crop = None
    if config.get("do_center_crop"):
        height, width = as_pair(crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        edge = size.get("shortest_edge")
        if edge is None or height != width:
            raise CheckpointError(
                f"{file}: a centre crop needs a size by its shortest_edge and a square crop_size"
            )
        eval_crop = height / edge
    elif {"height", "width"} <= size.keys():
        height, width = size["height"], size["width"]
    else:
        raise CheckpointError(
            f"{file}: size {size} without a centre crop makes pictures of many shapes; give height and width"
        )
    normalize = config.get("do_normalize", True)
    mean = tuple(config.get("image_mean", [0.5] * channels)) if normalize else (0.0,)
    std = tuple(config.get("image_std", [0.5] * channels)) if normalize else (1.0,)
    return Preprocessing((height, width), channels, mean, std, eval_crop, interpolation)


def write(weights: Weights, out: Path) -> list[str]:
    """A folder for ViTForImageClassification.from_pretrained. Raises CheckpointError where the model doesn't fit."""
    weights = with_learned_positions(
        weights,
        "Hugging Face's ViTForImageClassification",
        "layer_norm_eps",
        "activation",
        "qkv_bias",
    )
    model = weights.model
    tensors = {
        name if name.startswith("classifier.") else f"vit.{name}": tensor
        for name, tensor in to_theirs(weights.tensors, TABLE).items()
    }
    classes = weights.classes or [f"LABEL_{number}" for number in range(model["num_classes"])]
    hidden_act = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[model["activation"]]
    config = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_act": hidden_act,
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
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2))
    (out / "preprocessor_config.json").write_text(json.dumps(processor_config(weights), indent=2))
    return []


def processor_config(weights: Weights) -> dict[str, Any]:
    seen = weights.preprocessing or squash(weights.model)
    (height, width), channels = seen.image_size, seen.num_channels
    mean, std = (
        [sum(values) / len(values)] if channels == 1 else list(values) * (channels // len(values))
        for values in (seen.mean, seen.std)
    )
    config = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        "rescale_factor": 1 / 255,
        "resample": int(PIL_RESAMPLING[seen.interpolation]),
        "size": {"height": height, "width": width},
    }
    if seen.eval_crop is not None:
        config |= {
            "size": {"shortest_edge": int(min(height, width) / seen.eval_crop)},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }
    return config
