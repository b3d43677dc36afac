"""This project's own weights: checkpoints, and bare safetensors of a model's state_dict()."""

from pathlib import Path
from typing import Any

from torch import Tensor

from vit.checkpoints.file import read_checkpoint, require_header_keys, write_checkpoint
from vit.checkpoints.model import evaluated_tensors, parse_pruned_heads
from vit.data.preprocessing import Preprocessing
from vit.weights.description import Weights, describe, input_preprocessing, require_head

MARKS = ("embeddings.patch_embedding.projection.weight",)


def read(path: Path, tensors: dict[str, Tensor]) -> Weights:
    """Bare tensors under this project's names.

    Raises CheckpointError where they are no whole model, or of one whose positions are not learned:
    only a checkpoint states which it has.
    """
    model, assumed = describe(tensors, path, known={})
    name = "bare safetensors of this project"
    return Weights(path, name, tensors, model, assumed, "conf/model/vit_*.yaml")


def read_own(path: Path) -> Weights:
    """The weights of a run's best or last checkpoint; of the last, the average where there is one.

    Raises CheckpointError as vit.checkpoints.file.read_checkpoint does.
    """
    tensors, header = read_checkpoint(path)
    require_header_keys(header, path, "kind", "config", "classes", "preprocessing")
    # The last checkpoint holds the whole state of training; evaluation uses the average.
    if header["kind"] != "best":
        tensors = evaluated_tensors(tensors)
    # describe() finds the sizes that are left out here in the tensors, and what the weights were
    # before training is of no interest.
    known = {
        key: value
        for key, value in header["config"]["model"].items()
        if value is not None and key not in ("name", "mlp_ratio", "grid_size", "init", "init_range")
    }
    if known.get("pruned_heads"):
        known["pruned_heads"] = parse_pruned_heads(known["pruned_heads"])
    model, _ = describe(tensors, path, known)
    return Weights(
        path,
        "a checkpoint of this project",
        tensors,
        model,
        preprocessing=Preprocessing.from_dict(header["preprocessing"]),
        classes=header["classes"],
        header=header,
    )


def write(weights: Weights, out: Path) -> list[str]:
    """Write a best checkpoint, which vit.load, evaluate.py and safetensors open.

    Returns notes for the user: none. Raises CheckpointError where the weights have no head.
    """
    require_head(weights)
    header = new_header(weights, out.stem) if weights.header is None else weights.header
    # safetensors refuses tensors that share memory.
    tensors = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    write_checkpoint(out, tensors, header | {"kind": "best"})
    return []


def new_header(weights: Weights, name: str) -> dict[str, Any]:
    """A header for weights that come from elsewhere; classes without names are numbered."""
    arguments = {key: value for key, value in weights.model.items() if key != "num_classes"}
    numbers = [str(number) for number in range(weights.model["num_classes"])]
    preprocessing = input_preprocessing(weights)
    return {
        "config": {"model": {"name": name} | arguments},
        "classes": weights.classes or numbers,
        "preprocessing": preprocessing.to_dict(),
        "precision": "fp32",
    }
