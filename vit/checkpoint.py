"""Write and read one checkpoint: a safetensors file whose metadata holds a JSON header and a digest of everything.

No pickle anywhere: reading a checkpoint can't run code. A file is written beside its place, flushed to the disk and
renamed into it, so that at every moment the old or the new one is whole.
"""

import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vit.distributed import placed
from vit.errors import CheckpointError
from vit.model import VisionTransformer
from vit.transforms import Preprocessing

FORMAT = "vit-checkpoint-1"
LAST, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"


def digest(tensors: dict[str, Tensor], header: str) -> str:
    """SHA-256 over the header and every tensor's name, type, shape and bytes."""
    sha = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(path: Path, tensors: dict[str, Tensor], header: dict[str, Any], keep: Path | None = None) -> None:
    """Write atomically. `keep` is a second name under which the file that stood at path until now stays.

    header: anything JSON can hold. Raises OSError where the disk is full or the folder read-only; the old file stays.
    """
    text = json.dumps(header, sort_keys=True)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "header": text, "sha256": digest(held, text)}
    temporary = path.with_name(f".{path.name}.writing")
    try:
        try:
            save_file(held, temporary, metadata)
        except SafetensorError as error:  # its only cause here: the disk, whose errno stands in the words
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from None
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            link = keep.with_name(f".{keep.name}.writing")
            link.unlink(missing_ok=True)
            os.link(path, link)
            os.replace(link, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_checkpoint(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, header) of a checkpoint; raises CheckpointError where it is missing, damaged or none of ours."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file; runs keep theirs under RUN_FOLDER/checkpoints/")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); it is cut short, damaged or of another "
                              "kind") from None
    if metadata.get("format") != FORMAT or not {"header", "sha256"} <= metadata.keys():
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of this project (no header {FORMAT})")
    if digest(tensors, metadata["header"]) != metadata["sha256"]:
        raise CheckpointError(f"{path}: its checksum doesn't match, so some bytes have changed since it was written")
    return tensors, json.loads(metadata["header"])


def require(header: dict[str, Any], source: Path | str, *names: str) -> dict[str, Any]:
    """The header; raises CheckpointError, naming them, where it lacks some of what it should hold."""
    missing = [name for name in names if name not in header]
    if missing:
        raise CheckpointError(f"{source}: its header lacks {', '.join(missing)}; another version of this program wrote it")
    return header


def read_last(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """The last checkpoint of RUN/checkpoints, or the one before where it is damaged, and then a line that says so.

    Raises CheckpointError where neither can be read.
    """
    warning = None
    for name in (LAST, PREVIOUS):
        try:
            return *read_checkpoint(folder / name), warning
        except CheckpointError as error:
            if warning is not None:
                raise CheckpointError(f"nothing to resume from in {folder}: {warning}; {error}") from None
            warning = str(error)
    raise AssertionError("unreachable")


def check_classes(saved: list[str], found: list[str], source: Path | str) -> None:
    """Raise CheckpointError where a checkpoint's classes are not the data set's."""
    if saved != found:
        first = next((f"class {i} is '{a}' there and '{b}' here" for i, (a, b) in enumerate(zip(saved, found)) if a != b),  # noqa: B905
                     f"{len(saved)} there, {len(found)} here")
        raise CheckpointError(f"{source}: its classes are not those of the data set ({first}); a label would mean another "
                              "thing")


def select(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def build_model(config: dict[str, Any], num_classes: int) -> VisionTransformer:
    """The model of a configuration's `model` node, as plain values; raises ValueError as VisionTransformer does."""
    arguments = {key: value for key, value in config.items() if key != "name"}
    if arguments.get("pruned_heads") is not None:  # older checkpoints have no such key
        arguments["pruned_heads"] = head_numbers(arguments["pruned_heads"])
    return VisionTransformer(num_classes=num_classes, **arguments)


def head_numbers(pruned_heads: Any) -> dict[int, list[int]]:
    """{layer: heads} with the layers as numbers again, which are words after JSON; raises ValueError where it is no such."""
    try:
        return {int(layer): [int(head) for head in heads] for layer, heads in dict(pruned_heads).items()}
    except (TypeError, ValueError):
        raise ValueError(f"pruned_heads must be {{layer: [heads]}}, got {pruned_heads}") from None


def tensor_differences(expected: dict[str, Tensor], tensors: dict[str, Tensor], too_many: str, wanted: str) -> list[str]:
    """What is missing, what is too many and what is of another shape, in words, of which the last two are given."""
    return [*(f"{name} is missing" for name in expected if name not in tensors),
            *(f"{name} {too_many}" for name in tensors if name not in expected),
            *(f"{name} is {tuple(tensors[name].shape)}, {wanted} {tuple(expected[name].shape)}"
              for name in expected if name in tensors and tensors[name].shape != expected[name].shape)]


def first_of(differences: list[str], count: int) -> str:
    more = [f"and {len(differences) - count} more"] if len(differences) > count else []
    return "; ".join(differences[:count] + more)


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a model of the same shapes; raises CheckpointError with the first differences, changing nothing."""
    targets = model.state_dict()
    differences = tensor_differences(targets, tensors, "belongs to no part of this model", "expected")
    if differences:
        raise CheckpointError(f"{source}: weights of another model: {first_of(differences, 3)}")
    model.load_state_dict({name: placed(tensor, targets[name]) for name, tensor in tensors.items()})


def assemble(path: Path | str, tensors: dict[str, Tensor], header: dict[str, Any]) -> VisionTransformer:
    """The model that a header describes with these weights, as load() gives it. Raises CheckpointError, naming the path, where
    the header describes none, or the weights are of another."""
    require(header, path, "config", "classes", "preprocessing")
    try:
        model = build_model(header["config"]["model"], len(header["classes"]))
        preprocessing = Preprocessing.from_plain(header["preprocessing"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header describes no model of this version ({error})") from None
    load_weights(model, tensors, str(path))
    model.classes, model.preprocessing = header["classes"], preprocessing
    return model.eval()


def load_with_header(path: Path | str) -> tuple[VisionTransformer, dict[str, Any]]:
    """load() and the file's header, which is read but once."""
    tensors, header = read_checkpoint(path)
    if require(header, path, "kind")["kind"] != "best":
        raise CheckpointError(f"{path}: holds the whole state of a run, to resume from; use {BEST} beside it")
    return assemble(path, tensors, header), header


def load(path: Path | str) -> VisionTransformer:
    """The model of a best checkpoint, in evaluation mode on the CPU, with two attributes more:

    classes         the class names in the order of the logits
    preprocessing   a vit.transforms.Preprocessing: preprocessing(picture or path) → (C, height, width), ready for the model

    Raises CheckpointError where the file is missing, damaged or not a best checkpoint.
    """
    return load_with_header(path)[0]
