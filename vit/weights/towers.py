"""Hugging Face's image models beside ViT: DeiT, DINOv2, DINOv3, and the image towers of CLIP and
SigLIP, alone or in a file with the text tower.

What their tensors mean is in config.json, so they are read with one alone. Names:
transformers/models/<model_type>/modeling_<model_type>.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vit.errors import CheckpointError
from vit.weights import huggingface
from vit.weights.adapting import adapt_common
from vit.weights.config_file import (
    COUNT,
    FLAG,
    POSITIVE,
    SIZE,
    TEXT,
    ConfigFile,
    read_config,
    read_processor,
)
from vit.weights.description import Weights, as_pair, describe, int_or_pair
from vit.weights.names import (
    BLOCK,
    CLS,
    DISTILL,
    PATCHES,
    POSITIONS,
    PROBE,
    QKV,
    REGISTERS,
    split_qkv,
    to_ours,
)

# Of masked image modeling, buffers, and everything that is of the text tower
IGNORED = (
    "embeddings.mask_token",
    "embeddings.position_ids",
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
    "logit_bias",
)

BLOCK_OF_VIT = "encoder.layer.{}."
DEIT = huggingface.TABLE | {
    "embeddings.distillation_token": DISTILL,
    "cls_classifier": "head",
    "distillation_classifier": "head_distill",
}
DINOV2 = huggingface.TABLE | {
    "embeddings.register_tokens": REGISTERS,
    **{BLOCK_OF_VIT + part: BLOCK + part for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")},
    BLOCK_OF_VIT + "layer_scale1.lambda1": BLOCK + "scale1.factor",
    BLOCK_OF_VIT + "layer_scale2.lambda1": BLOCK + "scale2.factor",
    BLOCK_OF_VIT + "mlp.weights_in": BLOCK + "mlp.fc1",
    BLOCK_OF_VIT + "mlp.weights_out": BLOCK + "mlp.fc2",
}
DINOV3 = {
    "embeddings.patch_embeddings": PATCHES + "projection",
    "embeddings.cls_token": CLS,
    "embeddings.register_tokens": REGISTERS,
    "norm": "encoder.norm",
    "layer.{}.norm1": BLOCK + "norm1",
    "layer.{}.norm2": BLOCK + "norm2",
    **{f"layer.{{}}.attention.{part[0]}_proj": BLOCK + f"attention.{part}" for part in QKV},
    "layer.{}.attention.o_proj": BLOCK + "attention.projection",
    "layer.{}.layer_scale1.lambda1": BLOCK + "scale1.factor",
    "layer.{}.layer_scale2.lambda1": BLOCK + "scale2.factor",
    "layer.{}.mlp.up_proj": BLOCK + "mlp.fc1",
    "layer.{}.mlp.down_proj": BLOCK + "mlp.fc2",
}
GATED = DINOV3 | {
    "layer.{}.mlp.gate_proj": BLOCK + "mlp.gate",
    "layer.{}.mlp.up_proj": BLOCK + "mlp.value",
}
# CLIP's and SigLIP's tensors without the first axis, (D,) and (N, D), and their names with it
FLAT = {
    "embeddings.class_embedding": "embeddings.class_token",
    "embeddings.position_embedding.weight": "embeddings.positions",
}
BLOCK_OF_TOWER = "encoder.layers.{}."
TOWER = {
    "embeddings.class_token": CLS,
    "embeddings.patch_embedding": PATCHES + "projection",
    "embeddings.positions": POSITIONS,
    "pre_layrnorm": "embeddings.norm",
    "post_layernorm": "encoder.norm",
    "classifier": "head",
    **{BLOCK_OF_TOWER + f"layer_norm{number}": BLOCK + f"norm{number}" for number in (1, 2)},
    **{BLOCK_OF_TOWER + f"mlp.fc{number}": BLOCK + f"mlp.fc{number}" for number in (1, 2)},
    **{BLOCK_OF_TOWER + f"self_attn.{part[0]}_proj": BLOCK + f"attention.{part}" for part in QKV},
    BLOCK_OF_TOWER + "self_attn.out_proj": BLOCK + "attention.projection",
    "head.probe": PROBE,
    **{f"head.attention.{part}": f"attention_pool.{part}" for part in QKV},
    "head.attention.out_proj": "attention_pool.projection",
    "head.layernorm": "attention_pool.norm",
    "head.mlp.fc1": "attention_pool.mlp.fc1",
    "head.mlp.fc2": "attention_pool.mlp.fc2",
}


@dataclass(frozen=True)
class Family:
    """The models of one model_type.

    prefix      before the names of the image model
    table       their names and ours
    defaults    what its config.json may leave out: hidden_act, layer_norm_eps, …
    settings    of a config.json and the tensors, what is not common to all
    """

    prefix: str
    table: Mapping[str, str]
    defaults: Mapping[str, Any]
    settings: Callable[[ConfigFile, Mapping[str, Tensor]], dict[str, Any]]


def of_deit(config: ConfigFile, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"global_pool": "cls"}


def of_dinov2(config: ConfigFile, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Its classifier takes the mean of the patches beside the class token."""
    gated = {"activation": "silu"} if config.get("use_swiglu_ffn", FLAG, False) else {}
    pool = "cls_mean" if "classifier.weight" in tensors else "cls"
    return {"global_pool": pool, **gated}


def of_dinov3(config: ConfigFile, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Raises CheckpointError for other frequencies than DINOv3's."""
    theta = config.get("rope_theta", POSITIVE, 100)
    if theta != 100:
        raise CheckpointError(f"{config.path}: rope_theta must be 100, got {theta}")
    return {"global_pool": "cls", "position": "rope_dinov3"}


def of_clip(config: ConfigFile, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Raises CheckpointError for its classifier, whose mean is of tokens without the last norm."""
    if "classifier.weight" in tensors:
        raise CheckpointError(
            f"{config.path}: Hugging Face's CLIPForImageClassification can't be loaded, only the "
            "image tower without its classifier"
        )
    return {"global_pool": "cls"}


def of_siglip(config: ConfigFile, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Its classifier takes the mean, and leaves the pooling by attention aside."""
    has_pool = "head.probe" in tensors and "classifier.weight" not in tensors
    return {"global_pool": "map" if has_pool else "mean"}


CLIP_DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SIGLIP_DEFAULTS = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


def gelu(layer_norm_eps: float) -> dict[str, Any]:
    return {"hidden_act": "gelu", "layer_norm_eps": layer_norm_eps}


FAMILIES = {
    "deit": Family("deit.", DEIT, gelu(1e-12), of_deit),
    "dinov2": Family("dinov2.", DINOV2, gelu(1e-6), of_dinov2),
    "dinov2_with_registers": Family("dinov2_with_registers.", DINOV2, gelu(1e-6), of_dinov2),
    "dinov3_vit": Family("model.", DINOV3, gelu(1e-5), of_dinov3),
    "clip": Family("vision_model.", TOWER, CLIP_DEFAULTS, of_clip),
    "clip_vision_model": Family("vision_model.", TOWER, CLIP_DEFAULTS, of_clip),
    "siglip": Family("vision_model.", TOWER, SIGLIP_DEFAULTS, of_siglip),
    "siglip_vision_model": Family("vision_model.", TOWER, SIGLIP_DEFAULTS, of_siglip),
}

# By which their files are told from others', after the prefix
MARKS = (
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
    "embeddings.patch_embedding.weight",
)


def family_of(path: Path, tensors: Mapping[str, Tensor]) -> Family | None:
    """The family that the config.json beside a file names, or None where it is another's file."""
    model_type = read_config(path.parent / "config.json").get("model_type", TEXT)
    family = FAMILIES.get(model_type or "")
    if family is None:
        return None
    found = any(prefix + mark in tensors for mark in MARKS for prefix in ("", family.prefix))
    return family if found else None


def read(path: Path, tensors: dict[str, Tensor], family: Family) -> Weights:
    """`path` is the file; config.json and read_processor()'s file beside it are used.

    Raises CheckpointError for settings that this project doesn't have.
    """
    file = read_config(path.parent / "config.json")
    # That of the image tower, where there are two
    config = file.part("vision_config") if "vision_config" in file else file
    used, left_over = huggingface.sort_out(tensors, IGNORED, (family.prefix,), path)
    used = with_first_axis(split_qkv(used, "in_proj_", path))
    known = known_arguments(config, family) | family.settings(config, used)
    if known["global_pool"] == "mean":
        unused = [name for name in used if name.startswith("head.")]
        left_over = (*left_over, *(family.prefix + name for name in unused))
        used = {name: tensor for name, tensor in used.items() if name not in unused}
    table = GATED if config.get("use_gated_mlp", FLAG, False) else family.table
    ours = adapt(to_ours(used, table, path, "Hugging Face"), known, path)
    model, assumed = describe(ours, path, known)
    # Without the file it is unknown: each of these families has a normalization of its own
    processor, preprocessing = read_processor(path.parent), None
    if processor:
        preprocessing = huggingface.preprocessing_of(processor, model, by_shortest_edge=True)
    classes = huggingface.class_names(file, model)
    convention = f"Hugging Face's {file.get('model_type', TEXT)}"
    return Weights(
        path,
        "Hugging Face",
        ours,
        model,
        assumed,
        convention,
        preprocessing,
        classes,
        left_over,
    )


def with_first_axis(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors, those of FLAT with a first axis of one."""
    shaped = {}
    for name, tensor in tensors.items():
        if name in FLAT and tensor.dim() in (1, 2):
            shaped[FLAT[name]] = tensor.reshape(1, -1, tensor.shape[-1])
        else:
            shaped[name] = tensor
    return shaped


def known_arguments(config: ConfigFile, family: Family) -> dict[str, Any]:
    """What a config.json states of any of these models; raises CheckpointError for others."""
    activation = config.get("hidden_act", TEXT, family.defaults["hidden_act"])
    if activation not in huggingface.ACTIVATIONS:
        raise CheckpointError(
            f"{config.path}: hidden_act must be one of {', '.join(huggingface.ACTIVATIONS)}, got "
            f"{activation}"
        )
    known: dict[str, Any] = {
        "activation": huggingface.ACTIVATIONS[activation],
        "layer_norm_eps": config.get("layer_norm_eps", POSITIVE, family.defaults["layer_norm_eps"]),
        "num_heads": config.get("num_attention_heads", COUNT, 12),
        "image_size": int_or_pair(as_pair(config.get("image_size", SIZE, 224))),
        "fc_norm": False,
    }
    sizes = {
        ours: config.get(theirs, kind)
        for theirs, (ours, kind) in huggingface.SIZES.items()
        # DINOv2 makes it of mlp_ratio, and SwiGLU's is smaller
        if theirs != "intermediate_size"
    }
    return known | {key: size for key, size in sizes.items() if size is not None}


def adapt(tensors: dict[str, Tensor], known: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Bring what these models hold in another way to this project's."""
    # A model without registers has a tensor of none
    if REGISTERS in tensors and tensors[REGISTERS].numel() == 0:
        tensors = {name: tensor for name, tensor in tensors.items() if name != REGISTERS}
    tensors = adapt_common(tensors, known, path)
    if DISTILL in tensors and "head_distill.weight" not in tensors:
        # DeiT's other models carry the token along and read the class token alone
        tensors = {
            REGISTERS if name == DISTILL else name: tensor for name, tensor in tensors.items()
        }
    return tensors
