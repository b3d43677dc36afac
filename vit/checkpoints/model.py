"""The model of a configuration or a checkpoint, and its weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit.checkpoints.file import read_checkpoint, require_header_keys
from vit.data.preprocessing import Preprocessing
from vit.errors import CheckpointError, ConfigError
from vit.model.low_rank import merge_low_rank
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.processes import shard_like


def load(path: Path | str) -> VisionTransformer:
    """Return the model of a best checkpoint, in evaluation mode on the CPU.

    It has two more attributes:

    classes         the class names in the order of the logits
    preprocessing   a vit.data.preprocessing.Preprocessing, which turns an image or a path into
                    the model's input (C, height, width)

    Raises CheckpointError where the file is missing, damaged or not a best checkpoint.
    """
    return load_with_header(path)[0]


def load_with_header(path: Path | str) -> tuple[VisionTransformer, dict[str, Any]]:
    """Return (the model as load() gives it, the header of its file), reading the file once."""
    tensors, header = read_checkpoint(path)
    # Of a last checkpoint it is not clear whether the raw or the averaged weights are meant
    if require_header_keys(header, path, "kind")["kind"] != "best":
        raise CheckpointError(
            f"{path}: holds the whole state of a run, to resume from; "
            "use best.safetensors beside it"
        )
    return build_from_header(path, tensors, header), header


def build_from_header(
    path: Path | str, tensors: dict[str, Tensor], header: dict[str, Any]
) -> VisionTransformer:
    """Return the model that a header describes with these weights, as load() gives it.

    Raises CheckpointError, naming the path, where the header describes no model, or the weights
    belong to another one.
    """
    require_header_keys(header, path, "config", "classes", "preprocessing")
    # Another version may have written settings that this model does not take
    try:
        # What the weights were before training does not matter, and earlier versions wrote an
        # init_range beside every init
        settings = {
            key: value
            for key, value in header["config"]["model"].items()
            if key not in ("init", "init_range")
        }
        model = build_model(settings, len(header["classes"]))
        preprocessing = Preprocessing.from_dict(header["preprocessing"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its header describes no model of this version ({error})"
        ) from None
    load_weights(model, tensors, str(path))

    # A prediction needs these too, so they go with the model
    model.classes, model.preprocessing = header["classes"], preprocessing
    return model.eval()


def build_model(settings: dict[str, Any], num_classes: int) -> VisionTransformer:
    """Build the model of a configuration's group `model`, given as plain values.

    Raises ValueError as VisionTransformer does.
    """
    arguments = {key: value for key, value in settings.items() if key != "name"}
    # get(), since older checkpoints have no such key
    if arguments.get("pruned_heads") is not None:
        arguments["pruned_heads"] = parse_pruned_heads(arguments["pruned_heads"])
    return VisionTransformer(num_classes=num_classes, **arguments)


def build_on_meta(settings: dict[str, Any], num_classes: int = 2) -> VisionTransformer:
    """Build the model with shapes but no numbers, which takes neither memory nor time.

    Raises ConfigError where the settings contradict each other.
    """
    try:
        with torch.device("meta"):
            return build_model(settings, num_classes)
    except ValueError as error:
        raise ConfigError(f"model={settings['name']}: {error}") from None


def parse_pruned_heads(pruned_heads: Any) -> dict[int, list[int]]:
    """Return {layer: heads} as whole numbers. Raises ValueError for anything else."""
    # The keys of a JSON object are text
    try:
        return {
            int(layer): [int(head) for head in heads] for layer, heads in dict(pruned_heads).items()
        }
    except (TypeError, ValueError):
        raise ValueError(f"pruned_heads must be {{layer: [heads]}}, got {pruned_heads}") from None


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a model of the same shapes.

    source: the path, for messages. Raises CheckpointError with the first differences, and changes
    nothing, where they do not fit.
    """
    # All differences before any is copied: load_state_dict would leave a model half loaded
    targets = model.state_dict()
    differences = tensor_differences(
        targets, tensors, extra="belongs to no part of this model", expected="expected"
    )
    if differences:
        raise CheckpointError(
            f"{source}: weights of another model: {first_differences(differences, 3)}"
        )

    # Each process keeps its shard where the model is sharded
    placed = {name: shard_like(tensor, targets[name]) for name, tensor in tensors.items()}
    model.load_state_dict(placed)


def tensor_differences(
    targets: dict[str, Tensor], tensors: dict[str, Tensor], extra: str, expected: str
) -> list[str]:
    """List which tensors are missing, too many or of another shape.

    extra, expected: the words for the latter two, as "<name> <extra>" and
    "<name> is (2, 3), <expected> (2, 4)".
    """
    missing = [f"{name} is missing" for name in targets if name not in tensors]
    too_many = [f"{name} {extra}" for name in tensors if name not in targets]
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, {expected} {tuple(target.shape)}"
        for name, target in targets.items()
        if name in tensors and tensors[name].shape != target.shape
    ]
    return missing + too_many + shapes


def first_differences(differences: list[str], count: int) -> str:
    """Join the first of many differences, with how many more there are."""
    shown = differences[:count]
    if len(differences) > count:
        shown.append(f"and {len(differences) - count} more")
    return "; ".join(shown)


def evaluated_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that a run evaluates, of the tensors of its whole state.

    These are the averaged ones where there are any (there are none of frozen weights), and low-rank
    changes are merged.
    """
    weights = strip_prefix(tensors, "model/") | strip_prefix(tensors, "average/")
    return merge_low_rank(weights)


def strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
