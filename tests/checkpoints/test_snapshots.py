"""Models at several steps of one run: their weights, and what they must have in common."""

from pathlib import Path

import pytest
import torch
from helpers import SMALL_BLOCKS

from vit.checkpoints.file import write_checkpoint
from vit.checkpoints.model import build_model
from vit.checkpoints.snapshots import Snapshot, check_same_architecture, load_snapshot
from vit.data.preprocessing import Preprocessing
from vit.errors import CheckpointError
from vit.model.vision_transformer import VisionTransformer

SMALL = {"image_size": 16, **SMALL_BLOCKS}


def build(classes=("cat", "dog"), **changes) -> VisionTransformer:
    torch.manual_seed(0)
    model = build_model({**SMALL, **changes}, len(classes)).eval()
    model.classes = list(classes)
    model.preprocessing = Preprocessing((16, 16), 3, (0.5,), (0.5,), None, "bilinear")
    return model


def write(path: Path, kind: str, tensors: dict[str, torch.Tensor], **header) -> Path:
    model = build()
    header = {
        "kind": kind,
        "config": {"model": SMALL},
        "classes": model.classes,
        "preprocessing": model.preprocessing.to_dict(),
        **header,
    }
    write_checkpoint(path, tensors, header)
    return path


def with_prefix(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def test_weights_of_every_kind_of_checkpoint(tmp_path):
    weights = build().state_dict()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    averaged = {**with_prefix("average/", weights), **with_prefix("model/", zeros)}
    files = [
        write(tmp_path / "best.safetensors", "best", weights, progress={"step": 7}),
        write(tmp_path / "last.safetensors", "last", averaged, progress={"step": 7}),
        write(
            tmp_path / "plain.safetensors",
            "last",
            with_prefix("model/", weights),
            progress={"step": 7},
        ),
    ]
    snapshots = [load_snapshot(file) for file in files]
    for snapshot in snapshots:
        assert snapshot.step == 7
        assert not snapshot.model.training
        assert snapshot.equals(snapshots[0])
        loaded = snapshot.model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert load_snapshot(write(tmp_path / "x.safetensors", "best", weights)).step is None


def test_equal_snapshots_have_the_same_step_and_weights():
    first = Snapshot(Path("a"), build(), 1)
    other_weights = build()
    with torch.no_grad():
        other_weights.head.weight.add_(1)
    assert first.equals(Snapshot(Path("b"), build(), 1))
    assert not first.equals(Snapshot(Path("b"), build(), 2))
    assert not first.equals(Snapshot(Path("b"), other_weights, 1))
    assert not first.equals(Snapshot(Path("b"), build(pruned_heads={0: [1]}), 1))


def test_pruned_heads_are_no_difference_in_architecture():
    reference = Snapshot(Path("best.safetensors"), build(), 1)
    check_same_architecture(Snapshot(Path("b"), build(pruned_heads={0: [1]}), 1), reference)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"num_layers": 3}, "layers: 3"),
        ({"num_heads": 2}, "heads: 2"),
        ({"patch_size": 4}, "patch grid: "),
        ({"global_pool": "mean"}, "pooling: mean"),
        ({"num_registers": 1}, "tokens before the patches: 2"),
        ({"classes": ("cat", "bird")}, "'bird'"),
    ],
    ids=str,
)
def test_another_architecture_is_refused(changes, difference):
    reference = Snapshot(Path("best.safetensors"), build(), 1)
    other = Snapshot(Path("other.safetensors"), build(**changes), 1)
    with pytest.raises(CheckpointError, match=r"other\.safetensors: ") as raised:
        check_same_architecture(other, reference)
    assert difference in str(raised.value)
