"""Weights of any known format: find out what a file holds, and build a model for it.

weights = read(source)                a path or a name; what model it fits is in weights.model
report = load_into(model, weights)    resizes positions and channels; print(report) says what it did
model = build(source)                 both, with a model made to fit
load_block(block, path, n)            one block alone
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vit.checkpoints.model import load_weights, strip_prefix
from vit.errors import CheckpointError
from vit.model.head_pruning import num_original_heads
from vit.model.vision_transformer import Block, VisionTransformer
from vit.weights import huggingface, jeonsworld, npz, own, timm, torchvision, towers
from vit.weights.config_file import model_name, read_config
from vit.weights.description import Weights
from vit.weights.files import (
    LOOKED_FOR,
    file_kind,
    is_index,
    read_pickle,
    read_safetensors,
    shards_in,
)
from vit.weights.fitting import Report, block_notes, check_complete, load_into
from vit.weights.names import list_some, without_prefix
from vit.weights.sources import find

__all__ = ["Report", "Weights", "build", "build_from", "load_block", "load_into", "read"]


def read(source: Path | str) -> Weights:
    """Read the weights in a file or folder, whatever its name, or under a name of sources.py.

    Raises CheckpointError where it is missing, can't be downloaded, is cut short, of no known
    format or architecture, has tensors too few or too many, or would run code.
    """
    weights = read_format(find(source).path)
    check_complete(weights)
    return weights


def read_format(path: Path) -> Weights:
    """Read a file of any format, as that format describes it."""
    if is_index(path):
        return read_state_dict(path, read_shards(path))
    kind = file_kind(path)
    if kind == "npz":
        return read_npz(path)
    if kind == "safetensors":
        tensors = read_safetensors(path)
        if tensors is None:
            return own.read_own(path)
    else:
        tensors = read_pickle(path)
    return read_state_dict(path, tensors)


def read_shards(index: Path) -> dict[str, Tensor]:
    """Read the files that an index lists, the shards of one model, as one.

    Raises CheckpointError where one is missing or damaged, or holds other tensors than it should.
    """
    tensors: dict[str, Tensor] = {}
    for name, expected in shards_in(index).items():
        path = index.with_name(name)
        kind = file_kind(path)
        shard = read_safetensors(path) if kind == "safetensors" else read_pickle(path)
        differing = sorted(expected ^ set(shard or {}))
        if differing:
            raise CheckpointError(
                f"{path}: not the file that {index.name} lists; they differ in "
                f"{list_some(differing)}"
            )
        tensors |= shard or {}
    return tensors


def read_npz(path: Path) -> Weights:
    """Read an .npz; raises CheckpointError where it is damaged or not Google's."""
    arrays = npz.read_arrays(path)
    if any(name.endswith(npz.MARK) for name in arrays):
        return npz.read(path, arrays)
    raise unknown_names(path, list(arrays))


def read_state_dict(path: Path, tensors: dict[str, Tensor]) -> Weights:
    """Read tensors under the names of one of the libraries; raises CheckpointError for others."""
    # DistributedDataParallel puts module. before every name.
    tensors = without_prefix(tensors, ("module.",), path)
    family = towers.family_of(path, tensors)
    if family is not None:
        return towers.read(path, tensors, family)
    for library in (own, jeonsworld, timm, torchvision, huggingface):
        if any(mark in tensors for mark in library.MARKS):
            return library.read(path, tensors)
    raise unknown_names(path, list(tensors))


def unknown_names(path: Path, names: list[str]) -> CheckpointError:
    """The error for names that no known library uses, with what a config.json says they are."""
    model = model_name(read_config(path.parent / "config.json"))
    kind = f"{model} (by its config.json) can't be loaded: " if model else ""
    return CheckpointError(
        f"{path}: {kind}tensors of no known library ({list_some(names) or 'none'}); {LOOKED_FOR}"
    )


def load_block(block: Block, weights: Path | str | Mapping[str, Any], n: int) -> None:
    """Copy block n of a whole model into a block, in place.

    weights: a file or folder of any format, tensors under this project's names, or Google's arrays:
    a mapping of them, or an open np.load(file). Warns where the weights were trained with another
    activation or epsilon than the block has. Raises CheckpointError, and changes nothing, where the
    weights are of another block or there is no block n.
    """
    if isinstance(weights, Path | str):
        whole = read(weights)
    elif any(npz.BLOCKS in name for name in weights):
        whole = npz.read_block(weights, n, Path("Google's arrays"))
    else:
        whole = Weights(Path("the tensors"), "this project's names", dict(weights), {})
    tensors = strip_prefix(whole.tensors, f"encoder.blocks.{n}.")
    source = f"{whole.path}: block {n}"
    if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{source}: must be of tensors, or Google's arrays by their names")
    heads, stated = num_original_heads(block.attention), whole.model.get("num_heads")
    if stated not in (None, heads) and "num_heads" not in whole.assumed:
        raise CheckpointError(f"{source}: num_heads is {stated} there, {heads} in the block")
    load_weights(block, tensors, source)
    for note in block_notes(block, whole.model) if whole.model else []:
        warnings.warn(f"{source}: {note}", stacklevel=3)


def build(source: Path | str, num_classes: int | None = None) -> VisionTransformer:
    """Build a model that fits the weights of a path or a name, in evaluation mode on the CPU.

    Its attributes `classes` and `preprocessing` are set where the file states them. num_classes:
    for a new head, needed where the weights have none. Raises CheckpointError as read and load_into
    do.
    """
    return build_from(read(source), num_classes)


def build_from(weights: Weights, num_classes: int | None = None) -> VisionTransformer:
    """Build a model from weights that have been read, as build() describes it."""
    model = build_for(weights, num_classes)
    load_into(model, weights)
    return model.eval()


def build_for(weights: Weights, num_classes: int | None = None) -> VisionTransformer:
    """Build a model that fits weights which have been read, and does not hold them yet.

    It has the attributes that build() describes. Raises CheckpointError where the weights have no
    head, or no model can be built.
    """
    arguments = dict(weights.model)
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if "num_classes" not in arguments:
        raise CheckpointError(f"{weights.path}: holds no head; give num_classes for a new one")
    try:
        model = VisionTransformer(**arguments)
    except ValueError as error:
        raise CheckpointError(f"{weights.path}: no model fits these weights ({error})") from None
    # With another number of classes the file's names are those of the old head.
    if weights.classes is not None and len(weights.classes) == arguments["num_classes"]:
        model.classes = weights.classes
    if weights.preprocessing is not None:
        # It may be of smaller images than the positions, as of DINOv2
        image_size = model.embeddings.patch_embedding.image_size
        model.preprocessing = replace(weights.preprocessing, image_size=image_size)
    return model
