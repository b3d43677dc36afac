"""Models at several moments of one training run, to be shown one after the other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vit.checkpoints.file import read_checkpoint, require_header_keys
from vit.checkpoints.model import build_from_header, evaluated_tensors
from vit.checkpoints.run import check_classes
from vit.errors import CheckpointError
from vit.model.head_pruning import attention_modules, num_original_heads
from vit.model.vision_transformer import VisionTransformer


@dataclass(frozen=True)
class Snapshot:
    """A model at one step of its training; step is None where the checkpoint doesn't record it."""

    path: Path
    model: VisionTransformer
    step: int | None

    def equals(self, other: "Snapshot") -> bool:
        """Whether both are of the same step and have the same weights, whatever their files."""
        weights = self.model.state_dict()
        other_weights = other.model.state_dict()
        return self.step == other.step and all(
            name in other_weights and torch.equal(tensor, other_weights[name])
            for name, tensor in weights.items()
        )


def load_snapshot(path: Path) -> Snapshot:
    """Load the model of a best checkpoint, or of one that holds the whole state of a run.

    Of a whole state (last, previous) these are the weights that the run evaluates: the averaged
    ones where there are any. The model is on the CPU and in evaluation mode. Raises
    CheckpointError as `vit.checkpoints.model.load` does.
    """
    tensors, header = read_checkpoint(path)
    require_header_keys(header, path, "kind")
    if header["kind"] == "last":
        tensors = evaluated_tensors(tensors)
    model = build_from_header(path, tensors, header)
    progress = header.get("progress") or {}
    return Snapshot(path, model, progress.get("step"))


def check_same_architecture(snapshot: Snapshot, reference: Snapshot) -> None:
    """Raise CheckpointError unless two models differ only in their weights and in pruned heads."""
    check_classes(snapshot.model.classes, reference.model.classes, snapshot.path)
    expected = describe_architecture(reference.model)
    for name, value in describe_architecture(snapshot.model).items():
        if value != expected[name]:
            raise CheckpointError(
                f"{snapshot.path}: of another model than {reference.path} "
                f"({name}: {value} there, {expected[name]} here); "
                "take checkpoints of the same run"
            )


def describe_architecture(model: VisionTransformer) -> dict[str, Any]:
    """What two models must have in common for their attention maps to be compared."""
    embeddings = model.embeddings
    attentions = attention_modules(model)
    return {
        "preprocessing": model.preprocessing,
        "patch grid": embeddings.patch_embedding.grid_size,
        "layers": len(attentions),
        "heads": num_original_heads(attentions[0]),
        "pooling": model.global_pool,
        "tokens before the patches": embeddings.num_prefix,
    }
