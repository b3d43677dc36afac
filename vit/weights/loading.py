"""Weights in and out: find out what a file holds, bring it under this project's names, put it into a model.

weights = read(path)                    whatever the format; what the model must be is in weights.model
report = load_into(model, weights)      resizes positions and channels; print(report) tells what was done
model = build(path)                     both, with a model made to fit
"""

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vit.checkpoints.file import FORMAT
from vit.checkpoints.model import first_differences, tensor_differences
from vit.errors import CheckpointError
from vit.model.positions import resize_positions
from vit.model.activations import ACTIVATIONS
from vit.model.vision_transformer import VisionTransformer
from vit.weights import huggingface, jeonsworld, npz, own, timm, torchvision
from vit.weights.description import Weights
from vit.weights.names import CLS, PATCHES, POSITIONS, ROOT, list_some

__all__ = ["Report", "Weights", "build", "load_into", "read"]


FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "checkpoints/best.safetensors",
    "best.safetensors",
)


LOOKED_FOR = (
    "looked for Google's .npz, safetensors, PyTorch's .bin or .pth, and in them for the names of Hugging Face, timm, "
    "torchvision, ViT-pytorch and this project"
)


WRAPPERS = ("state_dict", "model", "model_state_dict")


def read(path: Path | str) -> Weights:
    """The weights in a file or folder, whatever its name.

    Raises CheckpointError where it is missing, cut short, of no known format or architecture, or would run code.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise CheckpointError(
                f"{path}: a folder without weights; looked for {', '.join(FILES)}"
            )
        path = found[0]
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: no readable file of weights ({error.strerror})") from None
    if start[:2] == b"PK" and is_npz(path):
        arrays = npz.read_arrays(path)
        if any(name.endswith(npz.MARK) for name in arrays):
            return npz.read(path, arrays)
        raise unknown(path, list(arrays))
    if start[8:9] == b"{":
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") == FORMAT:
            return own.read_own(path)
    elif start[:2] == b"PK" or start[:1] == b"\x80":
        tensors = read_pickle(path)
    else:
        raise CheckpointError(f"{path}: no known format of weights; {LOOKED_FOR}")
    tensors = {
        name.removeprefix("module."): tensor for name, tensor in tensors.items()
    }  # of DistributedDataParallel
    for reader in (own, jeonsworld, timm, torchvision, huggingface):
        if reader.MARK in tensors or (reader is huggingface and f"vit.{reader.MARK}" in tensors):
            return reader.read(path, tensors)
    raise unknown(path, list(tensors))


def unknown(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path}: tensors of no known kind ({list_some(names) or 'none'}); {LOOKED_FOR}"
    )


def is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path}: an .npz, .bin or .pth that is cut short or damaged; download it again"
        ) from None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = [] if metadata.get("format") == FORMAT else file.keys()
            return {name: file.get_tensor(name) for name in names}, metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); download it again"
        ) from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A state_dict, also where it lies under a key such as "model". Code in the pickle is refused, never run."""
    try:
        with open(
            path, "rb"
        ) as file:  # by its content: torch goes by the name where it is given one
            held = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL (\S+)|Unsupported (operand|class)", str(error)):
            raise CheckpointError(
                f"{path}: refused, for it holds more than tensors ({wanted[1] or 'Python objects'}) and "
                "opening it could run code; where you trust it, save its state_dict as safetensors"
            ) from None
        raise CheckpointError(
            f"{path}: a PyTorch file that is cut short or damaged; download it again"
        ) from None
    except (
        EOFError,
        RuntimeError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
    ):
        raise CheckpointError(
            f"{path}: a PyTorch file that is cut short or damaged; download it again"
        ) from None
    while isinstance(held, Mapping) and (
        key := next((key for key in WRAPPERS if isinstance(held.get(key), Mapping)), None)
    ):
        held = held[key]
    if (
        not isinstance(held, Mapping)
        or not held
        or not all(isinstance(value, Tensor) for value in held.values())
    ):
        raise CheckpointError(
            f"{path}: a PyTorch file, but not of a state_dict; save model.state_dict()"
        )
    return dict(held)


@dataclass(frozen=True)
class Report:
    """What became of the weights: lists of tensors, resized and notes in words. str() is for people."""

    weights: Weights
    used: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.weights.path} ({self.weights.format}): {len(self.used)} tensors used"]
        lines += [
            f"  {title}: {'; '.join(names) if title == 'resized' else list_some(names)}"
            for title, names in (
                ("resized", self.resized),
                ("freshly initialised", self.fresh),
                ("left over", self.left_over),
            )
            if names
        ]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def load_into(
    model: VisionTransformer,
    weights: Weights,
    classes: Sequence[str] | None = None,
    position_resize: str = "bicubic",
) -> Report:
    """Copy weights into a model, in place: positions fitted to its grid (see resize_positions), the first convolution to its
    channels.

    The head is left out, and zero in the model, where it has another number of classes, or other `classes` than the file
    names; then a pooler may be left out too. Raises CheckpointError, naming the first differences and leaving the model as
    it was, where anything else is missing, too much or of another shape.
    """
    expected, tensors = model.state_dict(), dict(weights.tensors)
    differences, notes = compare_settings(model, weights)
    resized = adapt_embeddings(model, weights, tensors, position_resize)
    fresh_head = tensors.get("head.weight", torch.empty(0)).shape[:1] != expected[
        "head.weight"
    ].shape[:1] or (
        None not in (classes, weights.classes) and list(classes or []) != weights.classes
    )
    left_over = list(weights.left_over)
    if fresh_head:
        pooler = [name for name in {**expected, **tensors} if name.startswith("pooler.")]
        same = all(
            name in expected and name in tensors and tensors[name].shape == expected[name].shape
            for name in pooler
        )
        dropped = ["head.weight", "head.bias"] + ([] if same else pooler)
        left_over += [name for name in dropped if tensors.pop(name, None) is not None]
    else:
        dropped = []
    fresh = [name for name in dropped if name in expected]
    filled = {name: tensor for name, tensor in expected.items() if name not in fresh}
    differences += tensor_differences(filled, tensors, "has no place in the model", "the model's")
    if differences:
        raise CheckpointError(
            f"{weights.path}: weights of another model than this: {first_differences(differences, 4)}"
        )
    zeros = {
        name: torch.zeros_like(expected[name])
        for name in ("head.weight", "head.bias")
        if fresh_head
    }
    model.load_state_dict(
        tensors | zeros, strict=False
    )  # a fresh pooler stays as it is; all else is in the two
    return Report(weights, list(tensors), resized, fresh, left_over, notes)


def compare_settings(model: VisionTransformer, weights: Weights) -> tuple[list[str], list[str]]:
    """(differences that make loading wrong, those worth a note): of what the model is, and the weights want it to be."""
    block, patches, norm = (
        model.encoder.blocks[0],
        model.embeddings.patch_embedding,
        model.encoder.norm,
    )
    assert hasattr(block, "attention")
    here: dict[str, Any] = {
        "num_layers": len(model.encoder.blocks),
        "hidden_size": norm.normalized_shape[0],
        "num_heads": norm.normalized_shape[0] // block.attention.head_size,
    }  # pyright: ignore
    there = weights.model
    differences = [
        f"{key} {there[key]} there, {value} in the model"
        for key, value in here.items()
        if value != there[key] and key not in weights.assumed
    ]
    notes = [f"{key}={there[key]} is assumed, the file doesn't tell" for key in weights.assumed]
    activation = str(block.mlp.activation)  # pyright: ignore[reportAttributeAccessIssue]
    if activation != str(ACTIVATIONS[there["activation"]]()):
        notes.append(
            f"trained with activation={there['activation']}, the model computes {activation}"
        )
    if norm.eps != there["layer_norm_eps"]:
        notes.append(
            f"trained with layer_norm_eps={there['layer_norm_eps']:g}, the model's is {norm.eps:g}"
        )
    if patches.stem is not None and patches.stem.conv.style != there["resnet_style"]:
        notes.append(f"trained with resnet_style={there['resnet_style']}, the model has the other")
    if model.global_pool != there["global_pool"]:
        notes.append(
            f"trained with global_pool={there['global_pool']}, the model has {model.global_pool}"
        )
    return differences, notes


def adapt_embeddings(
    model: VisionTransformer, weights: Weights, tensors: dict[str, Tensor], position_resize: str
) -> list[str]:
    """Fit positions and the first convolution to the model, in `tensors`; returns what was changed, in words."""
    changed, embeddings = [], model.embeddings
    if POSITIONS in tensors and isinstance(embeddings.position_embedding, torch.nn.Parameter):
        there, here = bool(weights.model["cls_position"]), embeddings.cls_position
        if there and not here and embeddings.cls_token is not None:
            tensors[CLS] = tensors[CLS] + tensors[POSITIONS][:, :1]
            tensors[POSITIONS] = tensors[POSITIONS][:, 1:]
            changed.append("the class token's position added to the token")
        elif here and not there and CLS in tensors:
            tensors[POSITIONS] = torch.cat(
                [torch.zeros_like(tensors[POSITIONS][:, :1]), tensors[POSITIONS]], dim=1
            )
            changed.append("a zero position for the class token")
        old, new = weights.grid(), embeddings.patch_embedding.grid_size
        if old != new:
            tensors[POSITIONS] = resize_positions(
                tensors[POSITIONS], old, (new[0], new[1]), position_resize
            )
            changed.append(f"{POSITIONS} from {old[0]}x{old[1]} to {new[0]}x{new[1]}")
    name = ROOT if ROOT in tensors else PATCHES + "projection.weight"
    old, new = tensors[name].shape[1], embeddings.patch_embedding.num_channels
    if old != new:
        kernel = tensors[name]
        tensors[name] = (
            kernel.sum(dim=1, keepdim=True)
            if new == 1  # grey is R = G = B
            else kernel.repeat(1, -(-new // old), 1, 1)[:, :new] * (old / new)
        )
        changed.append(f"{name} from {old} to {new} channels")
    return changed


def build(path: Path | str, num_classes: int | None = None) -> VisionTransformer:
    """A model made to fit the weights in a file or folder, in evaluation mode on the CPU; `classes` and `preprocessing` are
    set where the file tells them. num_classes: for a fresh head, needed where the weights have none.

    Raises CheckpointError as read and load_into do.
    """
    weights = read(path)
    arguments = dict(weights.model)
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if "num_classes" not in arguments:
        raise CheckpointError(f"{weights.path}: holds no head; give num_classes for a fresh one")
    try:
        model = VisionTransformer(**arguments)
    except ValueError as error:
        raise CheckpointError(f"{weights.path}: no model fits these weights ({error})") from None
    load_into(model, weights)
    if weights.classes is not None and len(weights.classes) == arguments["num_classes"]:
        model.classes = weights.classes
    if weights.preprocessing is not None:
        model.preprocessing = weights.preprocessing
    return model.eval()
