"""What tensors say about the convolutions before the patch embedding."""

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vit.errors import CheckpointError
from vit.weights.names import PATCHES, ROOT

# The kernels of a ConvStem, by their number
CONV_KERNEL = re.compile(re.escape(PATCHES) + r"stem\.layers\.(\d+)\.conv\.weight")


def first_kernel(tensors: Mapping[str, Tensor]) -> str:
    """The name of the convolution that sees pixels."""
    for name in (ROOT, PATCHES + "stem.layers.0.conv.weight"):
        if name in tensors:
            return name
    return PATCHES + "projection.weight"


def describe_stem(
    tensors: Mapping[str, Tensor], known: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """The arguments of VisionTransformer that are about the stem.

    Strides, which no tensor shows, are there only with the convolutions that they belong to: as
    `known` states them, or 2 for each. Raises CheckpointError for a ResNet without any unit, and
    for strides that are not one for each convolution.
    """
    stem: dict[str, Any] = {"resnet_stages": count_stages(tensors, path), "resnet_style": "jax"}
    # In the order of their numbers
    kernels = {
        int(match[1]): tensor
        for name, tensor in tensors.items()
        if (match := CONV_KERNEL.fullmatch(name))
    }
    channels = [kernels[number].shape[0] for number in sorted(kernels)]
    stem["conv_stem"] = channels or None
    if channels:
        strides = known.get("conv_stem_strides") or [2] * len(channels)
        is_list = isinstance(strides, list) and all(stride in (1, 2) for stride in strides)
        if not is_list or len(strides) != len(channels):
            raise CheckpointError(
                f"{path}: conv_stem_strides is stated as {strides}; by its tensors there are "
                f"{len(channels)} convolutions, with a stride of 1 or 2 each"
            )
        stem["conv_stem_strides"] = strides
    return stem


def stride_of(stem: Mapping[str, Any]) -> int:
    """How many pixels a side a feature stands for: the stride of what describe_stem describes."""
    if stem["conv_stem"]:
        return math.prod(stem["conv_stem_strides"])
    stages = stem["resnet_stages"]
    return 2 ** (len(stages) + 1) if stages else 1


def unseen_settings(stem: Mapping[str, Any]) -> list[str]:
    """The names of a stem's settings that change what it computes and that no shape shows."""
    shown_by = {"resnet_style": "resnet_stages", "conv_stem_strides": "conv_stem"}
    return [key for key, owner in shown_by.items() if stem[owner]]


def count_stages(tensors: Mapping[str, Tensor], path: Path) -> list[int] | None:
    """The number of units in each stage of a hybrid's ResNet, or None for a model without one.

    Raises CheckpointError for a ResNet without any unit.
    """
    stem = PATCHES + "stem.blocks."
    units, first_of_stage = set(), []
    for name in tensors:
        if name.startswith(stem):
            unit = name.removeprefix(stem).split(".")[0]
            units.add(unit)
            # A stage's first unit alone changes the width, so it alone has a downsampling shortcut.
            if name.endswith("downsample.0.weight") and unit.isdecimal():
                first_of_stage.append(int(unit))
    bounds = [*sorted(first_of_stage), len(units)]
    stages = [end - start for start, end in itertools.pairwise(bounds)]
    if ROOT in tensors and not stages:
        raise CheckpointError(
            f"{path}: a hybrid with a ResNet's root alone (R+Ti/16); only hybrids with stages can "
            "be loaded"
        )
    return stages or None
