"""Files of tensors: find them, tell their kind by their content, read them without running code."""

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vit.checkpoints.file import FORMAT
from vit.errors import CheckpointError

# At the end of the name of a file that lists the files of a model that is in several
INDEX = ".index.json"

# What holds the weights in a repository of the Hugging Face hub, the best first: pickles last
HUB_FILES = (
    "model.safetensors",
    "model.safetensors" + INDEX,
    "pytorch_model.bin",
    "pytorch_model.bin" + INDEX,
)
# … and in a folder: of the hub, a run, or a run's checkpoints
FILES = (
    *HUB_FILES,
    "checkpoints/best.safetensors",
    "best.safetensors",
)

# Keys under which training scripts put a state_dict
WRAPPERS = ("state_dict", "model", "model_state_dict")

LOOKED_FOR = (
    "looked for Google's .npz, safetensors, and PyTorch's .bin or .pth, and in them for the names "
    "of Hugging Face, timm, torchvision, ViT-pytorch and this project"
)


def find_file(path: Path) -> Path:
    """The file of weights in a folder, or the file itself; raises CheckpointError without one."""
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: a folder without weights; looked for {', '.join(FILES)}")


def is_index(path: Path) -> bool:
    return path.name.endswith(INDEX)


def shards_in(index: Path) -> dict[str, set[str]]:
    """The files that an index lists, and the names of the tensors in each.

    Raises CheckpointError where it is no index.
    """
    shards: dict[str, set[str]] = {}
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for tensor, name in table.items():
            shards.setdefault(name, set()).add(tensor)
        # Never a path that leads out of the folder
        is_whole = bool(shards) and all(name == Path(name).name for name in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise CheckpointError(f"{index}: no index of a model in several files")
    return shards


def file_kind(path: Path) -> str:
    """`npz`, `safetensors` or `pickle`, by the file's content, whatever its name.

    Raises CheckpointError for other files, and those that can't be read.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: no readable file of weights ({error.strerror})") from None
    # safetensors first: its eight bytes of length may happen to be the letters PK.
    if start[8:9] == b"{":
        return "safetensors"
    if start[:2] == b"PK":  # a zip archive: numpy's, or PyTorch's with a pickle in it
        return "npz" if holds_arrays_only(path) else "pickle"
    if start[:1] == b"\x80":
        return "pickle"
    raise CheckpointError(f"{path}: no known format of weights; {LOOKED_FOR}")


def holds_arrays_only(path: Path) -> bool:
    """Whether a zip archive is an .npz; raises CheckpointError where it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path}: an .npz, .bin or .pth that is cut short or damaged; download it again"
        ) from None


def read_safetensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a safetensors file, or None where it is a checkpoint of this project.

    Those have a checksum and a reader of their own. Raises CheckpointError for a damaged file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # The reader of checkpoints would only read all tensors again.
            if metadata.get("format") == FORMAT:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); download it again"
        ) from None


# What torch.load raises for damaged files, of which it makes no kind of its own
DAMAGED = (
    EOFError,
    RuntimeError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file of torch.save, also where it lies under a key such as "model".

    Code in the pickle is refused, never run. Raises CheckpointError where there is any, where the
    file is damaged, or holds something else.
    """
    damaged = f"{path}: a PyTorch file that is cut short or damaged; download it again"
    try:
        with open(path, "rb") as file:  # given a path, torch would go by its name
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)|Unsupported (operand|class)", str(error))
        if refused is None:
            raise CheckpointError(damaged) from None
        raise CheckpointError(
            f"{path}: refused, for it holds more than tensors ({refused[1] or 'Python objects'}) "
            "and opening it could run code; where you trust it, save its state_dict as safetensors"
        ) from None
    except DAMAGED:
        raise CheckpointError(damaged) from None
    tensors = unwrap(content)
    if not is_state_dict(tensors):
        raise CheckpointError(
            f"{path}: a PyTorch file, but not of a state_dict; save model.state_dict()"
        )
    return dict(tensors)


def unwrap(content: Any) -> Any:
    """What lies under the keys that training scripts put a state_dict under, however deep."""
    while isinstance(content, Mapping):
        keys = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not keys:
            break
        content = content[keys[0]]
    return content


def is_state_dict(content: Any) -> bool:
    """Whether it is a mapping that holds tensors alone, and one at least."""
    if not isinstance(content, Mapping) or not content:
        return False
    return all(isinstance(value, Tensor) for value in content.values())
