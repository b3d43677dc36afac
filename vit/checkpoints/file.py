"""One checkpoint file: safetensors whose metadata holds a JSON header and a digest of everything.

No pickle anywhere: reading a checkpoint can't run code. A file is written under a temporary name,
flushed to the disk and renamed, so that at every moment the old or the new one is whole.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vit.errors import CheckpointError
from vit.files import atomic_write

# Stands in every file's metadata; a change that older programs can't read needs a new number
FORMAT = "vit-checkpoint-1"
# The name of the file that evaluations and predictions read
BEST = "best.safetensors"


def write_checkpoint(
    path: Path, tensors: dict[str, Tensor], header: dict[str, Any], keep: Path | None = None
) -> None:
    """Write a checkpoint, whole or not at all.

    header: anything JSON can hold. keep: a second name for the file that was at `path` until now.
    Raises OSError where the disk is full or the folder read-only; the old file stays.
    """
    # Metadata of safetensors are strings; sorted, so that equal runs write equal bytes
    text = json.dumps(header, sort_keys=True)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "header": text, "sha256": digest(on_cpu, text)}
    with atomic_write(path, durable=True) as temporary:
        save_tensors(temporary, on_cpu, metadata)
        # Only now, when the new file is complete: a full disk must cost neither of the old ones
        if keep is not None and path.exists():
            link_as(path, keep)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file. Raises OSError where the disk refuses it."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        # The library gives an error of the disk only as text, "… (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from None


def link_as(path: Path, name: Path) -> None:
    """Give a file a second name, in place of the file that has that name now.

    A copy takes its place on file systems without hard links, such as exFAT and some of networks.
    Raises OSError where the disk has no room for it.
    """
    # os.link refuses a name that exists, and removing it first would leave a moment without it
    link = name.with_name(f".{name.name}.writing")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        # EPERM, ENOTSUP, ENOSYS, by file system; of a full disk the copy tells as well
        with atomic_write(name, durable=True) as temporary:
            shutil.copyfile(path, temporary)
        return
    os.replace(link, name)


def digest(tensors: dict[str, Tensor], header: str) -> str:
    """Return the SHA-256 of the header and of every tensor's name, type, shape and bytes."""
    sha = hashlib.sha256(header.encode())
    # By name: safetensors may store them in another order
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # As bytes, since NumPy has no bfloat16
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def best_in_folder(path: Path) -> Path:
    """Return the best checkpoint in the folder of a run, and any other path as it is."""
    files = (path / "checkpoints" / BEST, path / BEST)
    return next((file for file in files if file.is_file()), path)


def read_checkpoint(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors on the CPU, header) of a checkpoint, or of a run's best one.

    path: a file; or the folder of a run, or that of its checkpoints. Raises CheckpointError where
    it is missing, damaged or not a checkpoint of this project.
    """
    path = best_in_folder(Path(path))
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint file; runs keep theirs under RUN_FOLDER/checkpoints/"
        )

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); "
            "it is cut short, damaged or of another kind"
        ) from None

    if metadata.get("format") != FORMAT or not {"header", "sha256"} <= metadata.keys():
        raise CheckpointError(
            f"{path}: a safetensors file, but not a checkpoint of this project (no header {FORMAT})"
        )
    # A flipped bit leaves a file that loads, and a model that is silently worse
    if digest(tensors, metadata["header"]) != metadata["sha256"]:
        raise CheckpointError(
            f"{path}: its checksum does not match, so some bytes have changed since it was written"
        )
    return tensors, json.loads(metadata["header"])


def read_header(path: Path | str) -> dict[str, Any]:
    """Return the header of a checkpoint alone, at once, without a look at its checksum.

    Raises CheckpointError where there is none that could be read.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["header"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: no header of a checkpoint ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: no header of a checkpoint")
    return header


def require_header_keys(header: dict[str, Any], source: Path | str, *keys: str) -> dict[str, Any]:
    """Return the header. Raises CheckpointError, naming them, where it lacks some of the keys."""
    missing = [key for key in keys if key not in header]
    if missing:
        raise CheckpointError(
            f"{source}: its header lacks {', '.join(missing)}; "
            "another version of this program wrote it"
        )
    return header
