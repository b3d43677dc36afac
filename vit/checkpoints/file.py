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
from torch import Tensor

from vit.errors import CheckpointError

FORMAT = "vit-checkpoint-1"


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


def write_checkpoint(
    path: Path, tensors: dict[str, Tensor], header: dict[str, Any], keep: Path | None = None
) -> None:
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
        except (
            SafetensorError
        ) as error:  # its only cause here: the disk, whose errno stands in the words
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
        raise CheckpointError(
            f"{path}: no such checkpoint file; runs keep theirs under RUN_FOLDER/checkpoints/"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); it is cut short, damaged or of another "
            "kind"
        ) from None
    if metadata.get("format") != FORMAT or not {"header", "sha256"} <= metadata.keys():
        raise CheckpointError(
            f"{path}: a safetensors file, but not a checkpoint of this project (no header {FORMAT})"
        )
    if digest(tensors, metadata["header"]) != metadata["sha256"]:
        raise CheckpointError(
            f"{path}: its checksum doesn't match, so some bytes have changed since it was written"
        )
    return tensors, json.loads(metadata["header"])


def require_header_keys(header: dict[str, Any], source: Path | str, *names: str) -> dict[str, Any]:
    """The header; raises CheckpointError, naming them, where it lacks some of what it should hold."""
    missing = [name for name in names if name not in header]
    if missing:
        raise CheckpointError(
            f"{source}: its header lacks {', '.join(missing)}; another version of this program wrote it"
        )
    return header
