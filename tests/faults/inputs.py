"""Folders, images and checkpoints that are not what they should be."""

import random
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.configurations import Case
from faults.trials import RUN, must_finish
from helpers import make_images
from safetensors.torch import save_file
from torch import ones

from vit.checkpoints.file import read_checkpoint, write_checkpoint
from vit.checkpoints.run import BEST, LAST

Spoil = Callable[[Path], object]


def data_sets(work: Path) -> Iterator[Case]:
    for name, spoil, named in LAYOUTS:
        yield Case("train.py", training_on(work, name, spoil), named)
    source = make_images(work / "source", {"train": 1}, size=(80, 80))
    jpeg = (source / "train" / "cat" / "0.jpg").read_bytes()
    for name, content in broken_images(jpeg).items():
        arguments = training_on(work, f"image_{name}", replace_images(content))
        yield Case("train.py", arguments, "train/cat/")


def training_on(work: Path, name: str, spoil: Spoil) -> list[str]:
    """Make a folder of images, spoil it, and return the arguments of a short run on it."""
    root = make_images(work / name, {"train": 12, "val": 8, "test": 8})
    spoil(root)
    return [
        *RUN,
        "train.steps=3",
        "train.batch_size=12",
        "train.micro_batch_size=null",
        "runtime.workers=0",
        f"data.root={root}",
        f"hydra.run.dir={name}_run",
    ]


def put_a_file_for_train(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").write_text("x")


def empty_dog(root: Path) -> None:
    for file in (root / "train" / "dog").iterdir():
        file.unlink()


def remove_classes(root: Path) -> None:
    for folder in (root / "train").iterdir():
        shutil.rmtree(folder)


def rename_dogs(root: Path) -> None:
    for file in (root / "train" / "dog").iterdir():
        file.rename(file.with_suffix(".txt"))


def remove(*parts: str) -> Spoil:
    return lambda root: shutil.rmtree(root.joinpath(*parts))


# Name, what is done to the folder, what the message must name
LAYOUTS: list[tuple[str, Spoil, str]] = [
    ("no_train", remove("train"), "no_train/train"),
    ("train_is_a_file", put_a_file_for_train, "train_is_a_file/train"),
    ("empty_class", empty_dog, "train/dog"),
    ("one_class", remove("train", "dog"), "one_class/train"),
    ("other_classes", lambda root: (root / "val/dog").rename(root / "val/wolf"), "wolf"),
    ("fewer_test_classes", remove("test", "dog"), "fewer_test_classes/test"),
    ("no_classes", remove_classes, "no_classes/train"),
    ("other_files", rename_dogs, "train/dog"),
]


def replace_images(content: bytes) -> Spoil:
    def spoil(root: Path) -> None:
        for file in (root / "train" / "cat").iterdir():
            file.write_bytes(content)

    return spoil


def broken_images(jpeg: bytes) -> dict[str, bytes]:
    """What a file may hold that is named .jpg, by name."""
    contents = {
        "zero": b"",
        "text": b"no image",
        "magic": jpeg[:4],
        "html": b"<html></html>",
        "gif": b"GIF89a",
        "nul": bytes(500),
        "bomb": decompression_bomb(),
        "random": random.Random(0).randbytes(3000),
    }
    for percent in range(3, 98, 5):
        contents[f"cut_{percent}"] = jpeg[: len(jpeg) * percent // 100]
    return contents


def decompression_bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100000))
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def checkpoints(work: Path) -> Iterator[Case]:
    """Files offered as checkpoints to evaluate, and as weights to start or to learn from."""
    make_images(work / "images", {"train": 12, "test": 8})
    short = [*RUN, "train.batch_size=8"]
    must_finish(work, *short, "train.steps=2", "hydra.run.dir=good")
    for name, write in offered_files(work / "good" / "checkpoints").items():
        path = work / f"{name}.safetensors"
        write(path)
        yield Case("evaluate.py", [f"checkpoint={path}"], path.name)
        if name not in ("last", "folder", "no_classes"):  # fine as weights, or tried above
            folder = f"hydra.run.dir={name}_run"
            for key in ("pretrained", "train.teacher"):
                arguments = [*short, f"{key}={path}", "train.steps=1", folder]
                yield Case("train.py", arguments, path.name)


def offered_files(folder: Path) -> dict[str, Spoil]:
    """How to write each file, by name."""
    best = folder / BEST
    tensors, header = read_checkpoint(best)
    fewer = dict(list(tensors.items())[1:])
    more = {**tensors, "extra": ones(1)}
    wider = {**tensors, "head.weight": ones(2, 64)}
    files: dict[str, Spoil] = {
        "missing": lambda path: None,
        "folder": lambda path: path.mkdir(),
        "empty": lambda path: path.write_bytes(b""),
        "last": lambda path: shutil.copy(folder / LAST, path),
        "plain": lambda path: save_file({"x": ones(2)}, path),
        "fewer": lambda path: write_checkpoint(path, fewer, header),
        "more": lambda path: write_checkpoint(path, more, header),
        "wider": lambda path: write_checkpoint(path, wider, header),
        "no_classes": lambda path: write_checkpoint(path, tensors, {**header, "classes": []}),
    }
    for key in ("kind", "config", "classes", "preprocessing"):
        rest = {name: value for name, value in header.items() if name != key}
        files[f"without_{key}"] = lambda path, rest=rest: write_checkpoint(path, tensors, rest)
    whole = best.read_bytes()
    for percent in range(2, 100, 7):
        cut = whole[: len(whole) * percent // 100]
        files[f"cut_{percent}"] = lambda path, cut=cut: path.write_bytes(cut)
    return files
