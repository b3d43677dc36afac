"""Put weights into a model that exists already, and report what became of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit.checkpoints.model import first_differences, tensor_differences
from vit.errors import CheckpointError
from vit.model.activations import build_activation
from vit.model.head_pruning import attention_modules
from vit.model.positions import resize_positions
from vit.model.resnet_stem import ResNetStem
from vit.model.stems import Stem
from vit.model.vision_transformer import Block, VisionTransformer
from vit.weights.description import Weights, with_zero_position
from vit.weights.names import CLS, POSITIONS, list_some
from vit.weights.stems import first_kernel

HEADS = ("head.weight", "head.bias", "head_distill.weight", "head_distill.bias")


@dataclass(frozen=True)
class Report:
    """What became of the weights; str() is for people.

    weights     what was loaded
    used        names of the tensors that were copied into the model
    resized     what was changed to fit the model, in words
    fresh       names of the model's tensors that start anew
    left_over   names of the file's tensors that were not used
    notes       differences that change what the model computes, in words
    """

    weights: Weights
    used: list[str]
    resized: list[str]
    fresh: list[str]
    left_over: list[str]
    notes: list[str]

    def __str__(self) -> str:
        lines = [f"{self.weights.path} ({self.weights.format}): {len(self.used)} tensors used"]
        if self.resized:
            lines.append(f"  resized: {'; '.join(self.resized)}")
        if self.fresh:
            lines.append(f"  newly initialized: {list_some(self.fresh)}")
        if self.left_over:
            lines.append(f"  not used: {list_some(self.left_over)}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def check_complete(weights: Weights) -> None:
    """Raise CheckpointError unless the tensors are all those of the model they describe.

    Otherwise a part that no other check looks for would be dropped or start anew unnoticed.
    """
    tensors = weights.tensors
    whole_numbers = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if whole_numbers:
        raise CheckpointError(
            f"{weights.path}: {list_some(whole_numbers)} {tensors[whole_numbers[0]].dtype}, not "
            "floating-point numbers; quantized weights can't be loaded"
        )
    # Without a head the number of classes is open
    arguments = {"num_classes": 1, **weights.model}
    # A number of heads that is only assumed, and may be wrong, changes no tensor's shape
    if "num_heads" in weights.assumed:
        arguments["num_heads"] = 1
    try:
        with torch.device("meta"):
            model = VisionTransformer(**arguments)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{weights.path}: no model fits these weights ({error})") from None
    expected = model.state_dict()
    if not any(name in tensors for name in HEADS):
        expected = {name: tensor for name, tensor in expected.items() if name not in HEADS}
    differences = tensor_differences(expected, tensors, "is no part of the model", "the model's")
    if differences:
        raise CheckpointError(
            f"{weights.path}: not the weights of one whole model: "
            f"{first_differences(differences, 4)}"
        )


def load_into(
    model: VisionTransformer,
    weights: Weights,
    classes: Sequence[str] | None = None,
    position_resize: str = "bicubic",
) -> Report:
    """Copy weights into a model, in place.

    Positions are resized to the model's grid (position_resize: see resize_positions), the first
    convolution is brought to its number of channels. The head starts anew, at zero, where the model
    has another number of classes, or other `classes` than the file states; then a pooler may start
    anew too. Raises CheckpointError, which names the first differences, and leaves the model as it
    was, where any other tensor is missing, too many or of another shape.
    """
    expected = model.state_dict()
    tensors, resized = adapt_embeddings(model, weights, position_resize)
    replaced = replaced_tensors(expected, tensors, weights, classes)
    left_over = [*weights.left_over, *(name for name in replaced if name in tensors)]
    fresh = [name for name in replaced if name in expected]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in replaced}

    # Everything that doesn't start anew has to be there and to fit.
    targets = {name: tensor for name, tensor in expected.items() if name not in replaced}
    differences = size_differences(model, weights)
    differences += tensor_differences(targets, tensors, "is no part of the model", "the model's")
    if differences:
        raise CheckpointError(
            f"{weights.path}: weights of another model than this: "
            f"{first_differences(differences, 4)}"
        )
    zeros = {name: torch.zeros_like(expected[name]) for name in fresh if name in HEADS}
    # strict=False for a pooler that starts anew: it keeps its initial weights.
    model.load_state_dict(tensors | zeros, strict=False)
    return Report(weights, list(tensors), resized, fresh, left_over, setting_notes(model, weights))


def replaced_tensors(
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    weights: Weights,
    classes: Sequence[str] | None,
) -> list[str]:
    """The names of the heads, and of a pooler that doesn't fit, where the heads start anew."""
    if has_same_classes(expected, tensors, weights, classes):
        return []
    names = [*expected, *(name for name in tensors if name not in expected)]
    heads = [name for name in names if name in HEADS]
    # The pooler belongs to the old head, but is worth keeping where it fits.
    pooler = [name for name in names if name.startswith("pooler.")]
    fits = all(
        name in expected and name in tensors and tensors[name].shape == expected[name].shape
        for name in pooler
    )
    return heads if fits else [*heads, *pooler]


def has_same_classes(
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    weights: Weights,
    classes: Sequence[str] | None,
) -> bool:
    """Whether the file's head is for the model's classes: as many, and the same names if known."""
    # Of DeiT's two heads neither is for the same classes without the other
    in_file, in_model = (
        {name: part[name].shape[:1] for name in HEADS if name in part}
        for part in (tensors, expected)
    )
    if not in_file or in_file != in_model:
        return False
    if classes is None or weights.classes is None:
        return True
    return list(classes) == weights.classes


def size_differences(model: VisionTransformer, weights: Weights) -> list[str]:
    """Sizes that the file states and the model has otherwise, in words."""
    # These first: with another depth or width nearly every tensor would be named.
    sizes = {
        "num_layers": len(model.encoder.blocks),
        "hidden_size": model.hidden_size,
        "num_heads": model.hidden_size // attention_modules(model)[0].head_size,
    }
    return [
        f"{key} is {weights.model[key]} in the file, {size} in the model"
        for key, size in sizes.items()
        if size != weights.model[key] and key not in weights.assumed
    ]


def setting_notes(model: VisionTransformer, weights: Weights) -> list[str]:
    """Settings that were assumed, and those the weights were trained with and the model has not.

    The shapes fit, but the model computes something else with them. In words, for the report.
    """
    trained = weights.model
    notes = weights.assumptions()
    block = model.encoder.blocks[0]
    assert isinstance(block, Block)
    notes += block_notes(block, trained)
    notes += stem_notes(model.embeddings.patch_embedding.stem, trained)
    fc_norm = not model.encoder.norm_last
    if fc_norm != trained["fc_norm"]:
        notes.append(f"trained with fc_norm={trained['fc_norm']}, the model has {fc_norm}")
    if model.global_pool != trained["global_pool"]:
        notes.append(
            f"trained with global_pool={trained['global_pool']}, the model has {model.global_pool}"
        )
    return notes


def stem_notes(stem: Stem | None, trained: Mapping[str, Any]) -> list[str]:
    """The setting of a stem that is another than its weights were trained with, in words."""
    if stem is None:
        return []
    is_resnet = isinstance(stem, ResNetStem)
    key = "resnet_style" if is_resnet else "conv_stem_strides"
    value = stem.conv.style if is_resnet else stem.strides
    if value == trained[key]:
        return []
    return [f"trained with {key}={trained[key]}, the model has {value}"]


def block_notes(block: Block, trained: Mapping[str, Any]) -> list[str]:
    """Settings of a block that are others than its weights were trained with, in words."""
    notes = []
    # The modules' text holds their settings too, such as the kind of GELU.
    activation = str(block.mlp.activation)
    if activation != str(build_activation(trained["activation"])):
        notes.append(
            f"trained with activation={trained['activation']}, the model computes {activation}"
        )
    epsilon = block.norm1.eps
    if epsilon != trained["layer_norm_eps"]:
        notes.append(
            f"trained with layer_norm_eps={trained['layer_norm_eps']:g}, the model has {epsilon:g}"
        )
    return notes


def adapt_embeddings(
    model: VisionTransformer, weights: Weights, position_resize: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Fit positions and the first convolution to the model.

    Returns all tensors, and what was changed, in words.
    """
    tensors, changes = dict(weights.tensors), []
    embeddings = model.embeddings
    if POSITIONS in tensors and isinstance(embeddings.position_embedding, nn.Parameter):
        changes += adapt_cls_position(model, weights, tensors)
        old, new = weights.grid(), embeddings.patch_embedding.grid_size
        # A square that was assumed may as well be an oblong of as many patches.
        is_same = "image_size" in weights.assumed and math.prod(old) == math.prod(new)
        if old != new and not is_same:
            tensors[POSITIONS] = resize_positions(tensors[POSITIONS], old, new, position_resize)
            changes.append(f"{POSITIONS} from {old[0]}x{old[1]} to {new[0]}x{new[1]}")

    name = first_kernel(tensors)
    kernel = tensors[name]
    old, new = kernel.shape[1], embeddings.patch_embedding.num_channels
    if old != new:
        tensors[name] = adapt_channels(kernel, new)
        changes.append(f"{name} from {old} to {new} channels")
    return tensors, changes


def adapt_cls_position(
    model: VisionTransformer, weights: Weights, tensors: dict[str, Tensor]
) -> list[str]:
    """Give the class token a position as the model has it, in `tensors`; says what was changed."""
    positions = tensors[POSITIONS]
    in_file, in_model = weights.model["cls_position"], model.embeddings.cls_position
    if in_file and not in_model and model.embeddings.cls_token is not None:
        # The model adds no position to the class token, so the token itself takes it.
        tensors[CLS] = tensors[CLS] + positions[:, :1]
        tensors[POSITIONS] = positions[:, 1:]
        return ["the class token's position added to the token"]
    if in_model and not in_file and CLS in tensors:
        tensors[POSITIONS] = with_zero_position(positions)
        return ["a zero position for the class token"]
    return []


def adapt_channels(kernel: Tensor, num_channels: int) -> Tensor:
    """A first convolution (out, C, height, width) for images of another number of channels.

    For gray the kernels are summed, as for R = G = B; else they are repeated, and scaled so that
    equal channels give the same sum as before.
    """
    if num_channels == 1:
        return kernel.sum(dim=1, keepdim=True)
    old = kernel.shape[1]
    repeats = -(-num_channels // old)  # rounded up
    repeated = kernel.repeat(1, repeats, 1, 1)[:, :num_channels]
    return repeated * (old / num_channels)
