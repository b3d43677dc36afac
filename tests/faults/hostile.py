"""Files that would run code if they were unpickled or unpacked carelessly."""

import io
import os
import pickle
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from faults.trials import Effort, Row

from vit.checkpoints.model import load
from vit.errors import UserError
from vit.weights.loading import read

WAYS = 5  # of running code from a pickle


class Hostile:
    """Unpickling it would write a file, the canary."""

    def __init__(self, canary: Path, way: int):
        self.canary, self.way = str(canary), way

    def __reduce__(self) -> tuple:
        command = f"open({self.canary!r}, 'w').write('ran')"
        return [
            (exec, (command,)),
            (eval, (command,)),
            (os.system, (f"touch {self.canary}",)),
            (subprocess.check_call, (["touch", self.canary],)),
            (Path(self.canary).write_text, ("ran",)),
        ][self.way]


def write_files(folder: Path, canary: Path) -> list[Path]:
    """Hostile files of every format that is read, and archives that write outside their folder."""
    folder.mkdir()
    files: list[Path] = []
    for way in range(WAYS):
        files += write_pickles(folder, Hostile(canary, way), way)
    outside = f"../../{canary.name}"
    with tarfile.open(folder / "escape_tar.tar", "w") as archive:
        member = tarfile.TarInfo(outside)
        member.size = 3
        archive.addfile(member, io.BytesIO(b"ran"))
    with zipfile.ZipFile(folder / "escape.pth", "w") as archive:
        archive.writestr(outside, "ran")
    return [*files, folder / "escape_tar.tar", folder / "escape.pth"]


def write_pickles(folder: Path, bad: Hostile, way: int) -> list[Path]:
    files = []
    for protocol in (0, 2, 5):
        files.append(folder / f"pickle_{way}_{protocol}.pt")
        files[-1].write_bytes(pickle.dumps({"model": bad}, protocol=protocol))
    for name, content in (("zip", {"state_dict": bad}), ("list", [bad])):
        files.append(folder / f"torch_{name}_{way}.pth")
        torch.save(content, files[-1])
    files.append(folder / f"legacy_{way}.bin")
    torch.save({"x": bad}, files[-1], _use_new_zipfile_serialization=False)
    files.append(folder / f"objects_{way}.npz")
    np.savez(files[-1], x=np.array([bad], dtype=object), allow_pickle=True)
    return files


def refusal(opening: Callable[[Path], object], file: Path) -> str:
    """How a file is refused: the message to the user, empty where it is not."""
    try:
        opening(file)
    except UserError as error:
        return str(error)
    except Exception as error:
        return f"BUG {type(error).__name__}: {error}"
    return ""


def hostile(work: Path, effort: Effort) -> Iterator[Row]:
    row, canary = Row("hostile files: refused, nothing of theirs runs"), work / "canary"
    files = write_files(work / "files", canary)
    for path in files[::4] if effort.quick else files:
        renamed = Path(shutil.copy(path, path.with_suffix(".safetensors")))
        for file in (path, renamed):
            for opening in (read, load):
                message = refusal(opening, file)
                refused = file.name in message and not message.startswith("BUG")
                name = f"{opening.__module__}.{opening.__name__}({file.name})"
                row.count(refused and not canary.exists(), f"{name}: {message[:200]}")
                canary.unlink(missing_ok=True)
    yield row
