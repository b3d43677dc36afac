"""This project's own weights: checkpoints, and bare safetensors files of VisionTransformer.state_dict()."""

from pathlib import Path

from torch import Tensor

from vit.checkpoints.file import read_checkpoint, require_header_keys, write_checkpoint
from vit.checkpoints.model import parse_pruned_heads, strip_prefix
from vit.data.preprocessing import Preprocessing
from vit.weights.description import Weights, describe, squash

MARK = "embeddings.patch_embedding.projection.weight"


def read(path: Path, tensors: dict[str, Tensor]) -> Weights:
    model, assumed = describe(tensors, path)
    return Weights(path, "bare safetensors of this project", tensors, model, assumed)


def read_own(path: Path) -> Weights:
    """Of a run's best or last checkpoint; of the latter the averaged weights where there are any.

    Raises CheckpointError as vit.checkpoints.file.read_checkpoint does.
    """
    tensors, header = read_checkpoint(path)
    require_header_keys(header, path, "kind", "config", "classes", "preprocessing")
    if header["kind"] != "best":
        tensors = strip_prefix(tensors, "average/") or strip_prefix(tensors, "model/")
    told = {
        key: value
        for key, value in header["config"]["model"].items()
        if value is not None and key not in ("name", "mlp_ratio", "grid_size")
    }
    if told.get("pruned_heads"):
        told["pruned_heads"] = parse_pruned_heads(told["pruned_heads"])
    model, _ = describe(tensors, path, **told)
    return Weights(
        path,
        "a checkpoint of this project",
        tensors,
        model,
        (),
        Preprocessing.from_dict(header["preprocessing"]),
        header["classes"],
        header=header,
    )


def write(weights: Weights, out: Path) -> list[str]:
    """A best checkpoint: vit.load and evaluate.py open it, and so does safetensors."""
    header = weights.header
    if header is None:
        preprocessing = weights.preprocessing or squash(weights.model)
        classes = weights.classes or [str(number) for number in range(weights.model["num_classes"])]
        model = {"name": out.stem} | {
            key: value for key, value in weights.model.items() if key != "num_classes"
        }
        header = {
            "config": {"model": model},
            "classes": classes,
            "preprocessing": preprocessing.to_dict(),
            "precision": "fp32",
        }
    write_checkpoint(
        out,
        {name: tensor.clone() for name, tensor in weights.tensors.items()},
        header | {"kind": "best"},
    )
    return []
