"""Files of tensors: told apart by their content, refused where they are damaged or hostile."""

import os
import pickle
import random

import numpy as np
import pytest
import torch
from foreign_models import jax_arrays, own_checkpoint, own_model
from safetensors.torch import save_file

from vit.errors import CheckpointError
from vit.weights.files import file_kind
from vit.weights.loading import read


def refused(path, message: str) -> None:
    """Reading is refused in one line that begins with the path."""
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_files_of_no_known_format(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(random.Random(0).randbytes(1000))
    refused(
        path, "no known format of weights; looked for Google's .npz, safetensors, and PyTorch's"
    )
    path.write_bytes(b"")
    refused(path, "no known format")
    refused(tmp_path / "missing", "no readable file")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "a folder without weights; looked for model.safetensors")


def test_files_without_weights(tmp_path):
    path = tmp_path / "x"
    save_file({"a": torch.zeros(1)}, path)
    refused(path, r"tensors of no known library \(a\); looked for")
    np.savez(tmp_path / "x.npz", a=np.zeros(1))
    refused(tmp_path / "x.npz", r"tensors of no known library \(a\); looked for")
    for content in ([1, 2], {}, {"model": {"a": 1}}):
        torch.save(content, path)
        refused(path, "not of a state_dict")


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", None])
def test_a_state_dict_is_found_where_training_scripts_put_it(tmp_path, wrapper):
    state = own_model().state_dict()
    content = {"model": {"state_dict": state}} if wrapper is None else {wrapper: state, "epoch": 3}
    torch.save(content, tmp_path / "x")
    assert read(tmp_path / "x").tensors.keys() == state.keys()


def test_safetensors_whose_length_spells_pk_is_no_zip(tmp_path):
    """The file begins with the length of its header: 0x4B50 are the letters PK, as in a zip."""
    path, state = tmp_path / "x", own_model().state_dict()
    save_file(state, path, {"padding": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    for surplus in range(8):  # the header is padded to a multiple of eight
        save_file(state, path, {"padding": "x" * (0x4B50 - length + surplus)})
        if path.read_bytes()[:2] == b"PK":
            break
    assert path.read_bytes()[:2] == b"PK"
    assert file_kind(path) == "safetensors"
    assert read(path).tensors.keys() == state.keys()


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["npz", "safetensors", "zip", "legacy", "own"])
def test_truncated_files(tmp_path, kind, fraction):
    model, path = own_model(), tmp_path / "x"
    if kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, **jax_arrays(model))
    elif kind == "safetensors":
        save_file(model.state_dict(), path)
    elif kind == "own":
        own_checkpoint(path, model)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    os.truncate(path, int(path.stat().st_size * fraction))
    refused(path, "cut short or damaged|not a whole")


class Canary:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "npz"])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, kind):
    path, canary = tmp_path / "x.bin", tmp_path / "canary"
    content = {"head.weight": torch.zeros(1), "x": Canary(canary)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif kind == "npz":
        array = np.array([Canary(canary)], dtype=object)
        with open(path, "wb") as file:
            np.savez(file, **{"embedding/kernel": array})
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    by_torch = kind in ("zip", "legacy")
    refused(path, "refused, for it holds more than tensors" if by_torch else "x.bin: ")
    assert not canary.exists()
    if kind == "pickle":  # the canary does sing where it is let
        pickle.loads(path.read_bytes())
        assert canary.exists()
