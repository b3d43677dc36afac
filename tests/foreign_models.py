"""Models of other libraries with random weights, and this project's in other formats."""

import numpy as np
import timm
import torch
import torchvision
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from vit.checkpoints.file import write_checkpoint
from vit.data.preprocessing import Preprocessing
from vit.model.vision_transformer import VisionTransformer

SIZES = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12)}  # hidden_size, num_heads
TOLERANCE = 1e-5


def shaken(model: nn.Module) -> nn.Module:
    """Make every parameter random, so that none stands in for another by being zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(noise * spread_of(name, parameter) + is_scale)
    return model.eval()


def spread_of(name: str, parameter: nn.Parameter) -> float:
    """The standard deviation of a random parameter."""
    if "fc1" in name or "mlp.0" in name:
        return 2 / parameter.shape[-1] ** 0.5  # far enough from 0 for the kinds of GELU to differ
    if ("att" in name or "fc2" in name) and parameter.dim() > 1:
        # Tokens attend to some more than to others, so that heads and rotations make a difference
        return 1 / parameter.shape[-1] ** 0.5
    if "pos" in name or "token" in name:
        return 0.2
    return 0.02 if parameter.dim() > 1 else 0.1


def images(size: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))


def difference(ours: nn.Module, theirs: nn.Module, size: int = 64) -> float:
    """The largest difference between the logits of two models on the same images, in their type."""
    batch = images(size).to(next(ours.parameters()).dtype)
    with torch.inference_mode():
        outputs = theirs(batch)
        logits = outputs.logits if hasattr(outputs, "logits") else outputs
        return (ours(batch) - logits).abs().max().item()


def hf_model(size: str = "Ti", patch: int = 16, kind=ViTForImageClassification, **changes):
    width, heads = SIZES[size]
    config = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "image_size": 64,
        "patch_size": patch,
    }
    if "id2label" not in changes:
        config["num_labels"] = 5
    return shaken(kind(ViTConfig(**{**config, **changes})))


def timm_model(name: str = "vit_tiny_patch16_224", **changes) -> nn.Module:
    arguments = {"depth": 2, "num_classes": 5, "img_size": 64, **changes}
    return shaken(timm.create_model(name, **arguments))


def torchvision_model(
    size: str = "Ti", patch: int = 16, representation_size: int | None = None
) -> nn.Module:
    width, heads = SIZES[size]
    model = torchvision.models.VisionTransformer(
        image_size=64,
        patch_size=patch,
        num_layers=2,
        num_heads=heads,
        hidden_dim=width,
        mlp_dim=4 * width,
        num_classes=5,
        representation_size=representation_size,
    )
    return shaken(model)


def own_model(**changes) -> VisionTransformer:
    arguments = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 1,
        "num_classes": 5,
        **changes,
    }
    return shaken(VisionTransformer(**arguments))  # pyright: ignore


def own_checkpoint(path, model, kind="best", **config):
    """Write a checkpoint of own_model(**config); of the last kind only the average is right."""
    settings = {
        "name": "x",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 1,
        **config,
    }
    preprocessing = Preprocessing((32, 32), 3, (0.5,), (0.5,), None, "bilinear")
    header = {
        "kind": kind,
        "config": {"model": settings},
        "classes": list("abcde"),
        "precision": "fp32",
        "preprocessing": preprocessing.to_dict(),
    }
    tensors = model.state_dict()
    if kind == "last":
        average = {f"average/{name}": tensor for name, tensor in tensors.items()}
        latest = {f"model/{name}": tensor * 2 for name, tensor in tensors.items()}
        tensors = average | latest
    write_checkpoint(path, tensors, header)


def jax_arrays(model: VisionTransformer, big_vision: bool = False) -> dict[str, np.ndarray]:
    """Our tensors under Google's published names and shapes, written without vit/weights/npz.py."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays = {
        "embedding/kernel": jax_kernel(state["embeddings.patch_embedding.projection.weight"]),
        "embedding/bias": state["embeddings.patch_embedding.projection.bias"],
        "Transformer/encoder_norm/scale": state["encoder.norm.weight"],
        "Transformer/encoder_norm/bias": state["encoder.norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    if "embeddings.cls_token" in state:
        arrays["cls"] = state["embeddings.cls_token"]
    if "embeddings.position_embedding" in state:
        name = "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"
        arrays[name] = state["embeddings.position_embedding"]
    if "pooler.dense.weight" in state:
        arrays["pre_logits/kernel"] = state["pooler.dense.weight"].T
        arrays["pre_logits/bias"] = state["pooler.dense.bias"]
    heads = len(model.encoder.blocks[0].attention.heads)
    for number in range(len(model.encoder.blocks)):
        arrays |= jax_block(state, number, heads, big_vision)
    if model.embeddings.patch_embedding.stem is not None:
        arrays |= jax_stem(state, [3, 4, 9])
    return arrays


def jax_kernel(weight: np.ndarray) -> np.ndarray:
    """A convolution's weight (out, in, height, width) as (height, width, in, out)."""
    return weight.transpose(2, 3, 1, 0)


def jax_block(
    state: dict[str, np.ndarray], number: int, heads: int, big_vision: bool
) -> dict[str, np.ndarray]:
    attention, mlp, norm = ("0", "0", "1") if big_vision else ("1", "3", "2")
    ours, theirs = f"encoder.blocks.{number}.", f"Transformer/encoderblock_{number}/"
    arrays = {}
    for part in ("query", "key", "value"):
        weight = state[f"{ours}attention.{part}.weight"]
        name = f"{theirs}MultiHeadDotProductAttention_{attention}/{part}/"
        arrays[name + "kernel"] = weight.T.reshape(len(weight), heads, -1)
        arrays[name + "bias"] = state[f"{ours}attention.{part}.bias"].reshape(heads, -1)
    weight = state[ours + "attention.projection.weight"]
    name = f"{theirs}MultiHeadDotProductAttention_{attention}/out/"
    arrays[name + "kernel"] = weight.T.reshape(heads, -1, len(weight))
    arrays[name + "bias"] = state[ours + "attention.projection.bias"]
    for dense, layer in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        name = f"{theirs}MlpBlock_{mlp}/{dense}/"
        arrays[name + "kernel"] = state[f"{ours}mlp.{layer}.weight"].T
        arrays[name + "bias"] = state[f"{ours}mlp.{layer}.bias"]
    for layer_norm, layer in (("0", "norm1"), (norm, "norm2")):
        name = f"{theirs}LayerNorm_{layer_norm}/"
        arrays[name + "scale"] = state[f"{ours}{layer}.weight"]
        arrays[name + "bias"] = state[f"{ours}{layer}.bias"]
    return arrays


def jax_stem(state: dict[str, np.ndarray], stages: list[int]) -> dict[str, np.ndarray]:
    stem = "embeddings.patch_embedding.stem."
    arrays = {
        "conv_root/kernel": jax_kernel(state[stem + "conv.weight"]),
        "gn_root/scale": state[stem + "norm.weight"].reshape(1, 1, 1, -1),
        "gn_root/bias": state[stem + "norm.bias"].reshape(1, 1, 1, -1),
    }
    number = 0
    for stage, num_units in enumerate(stages, start=1):
        for unit in range(1, num_units + 1):
            arrays |= jax_unit(state, f"{stem}blocks.{number}.", f"block{stage}/unit{unit}/")
            number += 1
    return arrays


def jax_unit(state: dict[str, np.ndarray], ours: str, theirs: str) -> dict[str, np.ndarray]:
    parts = [(f"conv{i}", f"conv{i}", f"gn{i}", f"norm{i}") for i in (1, 2, 3)]
    if ours + "downsample.0.weight" in state:
        parts.append(("downsample.0", "conv_proj", "gn_proj", "downsample.1"))
    arrays = {}
    for conv, jax_conv, jax_norm, norm in parts:
        arrays[f"{theirs}{jax_conv}/kernel"] = jax_kernel(state[f"{ours}{conv}.weight"])
        scale, bias = state[f"{ours}{norm}.weight"], state[f"{ours}{norm}.bias"]
        arrays[f"{theirs}{jax_norm}/scale"] = scale.reshape(1, 1, 1, -1)
        arrays[f"{theirs}{jax_norm}/bias"] = bias.reshape(1, 1, 1, -1)
    return arrays
