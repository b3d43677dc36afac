"""Two processes that share a model's state (FSDP) compute, and save, what a whole model would."""

import json
from pathlib import Path

import pytest
from several_processes import finish_ranks, start_ranks

from vit.checkpoints.file import read_checkpoint
from vit.checkpoints.run import BEST, LAST

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The folders of sharded_state.py by its kind of sharding."""
    folders = {}
    for sharding in ("ddp", "fsdp"):
        folder = folders[sharding] = tmp_path_factory.mktemp(sharding)
        script = "tests/runtime/sharded_state.py"
        texts = finish_ranks(start_ranks(2, script, str(folder), sharding, cwd=folder))
        assert not any("Warning" in text for text in texts), texts
    return folders


def notes(folder: Path, rank: int) -> dict:
    return json.loads((folder / f"{rank}.json").read_text())


def test_the_state_is_put_together_tensor_by_tensor_in_the_first_process(runs):
    first, second = (notes(runs["fsdp"], rank) for rank in (0, 1))
    largest, whole = max(first["sizes"].values()), sum(first["sizes"].values())
    assert whole > 40 * largest
    # The collectives' worker may still hold the tensors before
    for rank in (first, second):
        assert largest <= rank["gathered"] <= 3 * largest
    assert second["sizes"] == {}
    assert first["differs"] == []


def test_the_files_hold_what_a_whole_model_s_do(runs):
    for name in (LAST, BEST):
        sharded, whole = (read_checkpoint(runs[kind] / name)[0] for kind in ("fsdp", "ddp"))
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in sharded.items()} == {
            name: (tensor.shape, tensor.dtype) for name, tensor in whole.items()
        }


def test_the_residual_stream_has_the_types_of_a_whole_model(runs):
    sharded, whole = (notes(runs[kind], 0) for kind in ("fsdp", "ddp"))
    assert sharded["types"] == whole["types"]
    assert sharded["types"]["rotation"] == ["torch.float32"]
    assert sharded["types"]["block output"] == ["torch.float32"]
    assert sharded["types"]["product output"] == ["torch.bfloat16"]
    # Rounding its norms or LayerScale to bf16 would differ in the fourth digit
    for ours, theirs in zip(sharded["losses"], whole["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_every_evaluation_is_of_the_average_as_it_is_then(runs):
    """Not of what the evaluation before has gathered of it."""
    sharded, whole = (notes(runs[kind], 0)["losses of averages"] for kind in ("fsdp", "ddp"))
    assert sharded == pytest.approx(whole, rel=1e-5)
    assert abs(whole[1] / whole[0] - 1) > 1e-3
