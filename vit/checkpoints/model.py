"""TODO: say what this file is for."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit.checkpoints.file import read_checkpoint, require_header_keys
from vit.checkpoints.run import BEST
from vit.data.preprocessing import Preprocessing
from vit.errors import CheckpointError, ConfigError
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.processes import shard_like


def strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def build_model(config: dict[str, Any], num_classes: int) -> VisionTransformer:
    """The model of a configuration's `model` node, as plain values; raises ValueError as VisionTransformer does."""
    arguments = {key: value for key, value in config.items() if key != "name"}
    if arguments.get("pruned_heads") is not None:  # older checkpoints have no such key
        arguments["pruned_heads"] = parse_pruned_heads(arguments["pruned_heads"])
    return VisionTransformer(num_classes=num_classes, **arguments)


def parse_pruned_heads(pruned_heads: Any) -> dict[int, list[int]]:
    """{layer: heads} with the layers as numbers again, which are words after JSON; raises ValueError where it is no such."""
    try:
        return {
            int(layer): [int(head) for head in heads] for layer, heads in dict(pruned_heads).items()
        }
    except (TypeError, ValueError):
        raise ValueError(f"pruned_heads must be {{layer: [heads]}}, got {pruned_heads}") from None


def tensor_differences(
    expected: dict[str, Tensor], tensors: dict[str, Tensor], too_many: str, wanted: str
) -> list[str]:
    """What is missing, what is too many and what is of another shape, in words, of which the last two are given."""
    return [
        *(f"{name} is missing" for name in expected if name not in tensors),
        *(f"{name} {too_many}" for name in tensors if name not in expected),
        *(
            f"{name} is {tuple(tensors[name].shape)}, {wanted} {tuple(expected[name].shape)}"
            for name in expected
            if name in tensors and tensors[name].shape != expected[name].shape
        ),
    ]


def first_differences(differences: list[str], count: int) -> str:
    more = [f"and {len(differences) - count} more"] if len(differences) > count else []
    return "; ".join(differences[:count] + more)


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a model of the same shapes; raises CheckpointError with the first differences, changing nothing."""
    targets = model.state_dict()
    differences = tensor_differences(
        targets, tensors, "belongs to no part of this model", "expected"
    )
    if differences:
        raise CheckpointError(
            f"{source}: weights of another model: {first_differences(differences, 3)}"
        )
    model.load_state_dict(
        {name: shard_like(tensor, targets[name]) for name, tensor in tensors.items()}
    )


def build_from_header(
    path: Path | str, tensors: dict[str, Tensor], header: dict[str, Any]
) -> VisionTransformer:
    """The model that a header describes with these weights, as load() gives it. Raises CheckpointError, naming the path, where
    the header describes none, or the weights are of another."""
    require_header_keys(header, path, "config", "classes", "preprocessing")
    try:
        model = build_model(header["config"]["model"], len(header["classes"]))
        preprocessing = Preprocessing.from_dict(header["preprocessing"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its header describes no model of this version ({error})"
        ) from None
    load_weights(model, tensors, str(path))
    model.classes, model.preprocessing = header["classes"], preprocessing
    return model.eval()


def load_with_header(path: Path | str) -> tuple[VisionTransformer, dict[str, Any]]:
    """load() and the file's header, which is read but once."""
    tensors, header = read_checkpoint(path)
    if require_header_keys(header, path, "kind")["kind"] != "best":
        raise CheckpointError(
            f"{path}: holds the whole state of a run, to resume from; use {BEST} beside it"
        )
    return build_from_header(path, tensors, header), header


def load(path: Path | str) -> VisionTransformer:
    """The model of a best checkpoint, in evaluation mode on the CPU, with two attributes more:

    classes         the class names in the order of the logits
    preprocessing   a vit.data.preprocessing.Preprocessing: preprocessing(picture or path) → (C, height, width), ready for the model

    Raises CheckpointError where the file is missing, damaged or not a best checkpoint.
    """
    return load_with_header(path)[0]


def model_on_shapes(settings: dict, num_classes: int = 2) -> VisionTransformer:
    """The model without its numbers; raises ConfigError where it is impossible."""
    try:
        with torch.device("meta"):
            return build_model(settings, num_classes)
    except ValueError as error:
        raise ConfigError(f"model={settings['name']}: {error}") from None
