"""What the trainer must survive, tried for real: kills, damaged files, mistakes, hostile files, a full disk, a lost worker.

    make test-faults                            # everything; one to two hours on two cores
    python tests/fault_suite.py --quick         # the shortened version that `make test` runs too
    python tests/fault_suite.py --only kills --out benchmarks/results/faults.md

Every row of the table is one fault: how often it was tried and how often what should come, came. Exit code 1 where a row has
a case that did not survive; the cases are named below the table.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from helpers import ROOT, make_images

sys.path.insert(0, str(ROOT))

PICTURES = 60  # of each of two classes
KILLS = 100  # of each kind of signal
# Workers, augmentation, mixing, erasing, bfloat16, averaging, drop path and dropout, all at once; a step takes milliseconds
RUN = [
    "data=folder",
    "model=vit_nano4",
    "model.num_channels=3",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.drop_path=0.2",
    "model.dropout=0.1",
    "augment=deit",
    "train.precision=bf16",
    "train.batch_size=16",
    "train.micro_batch_size=8",
    "train.epochs=24",
    "train.ema_decay=0.99",
    "train.save_every=7",
    "train.log_every=3",
    "train.attention_every=8",
    "runtime.workers=1",
    "runtime.threads=1",
    "runtime.compile=false",
]


@dataclass
class Row:
    """One line of the table."""

    fault: str
    tried: int = 0
    survived: int = 0
    failures: list[str] = field(default_factory=list)

    def count(self, good: bool, what: str) -> None:
        self.tried += 1
        self.survived += good
        if not good:
            self.failures.append(what)


def start(
    folder: Path, *arguments: str, script: str = "train.py", **options: Any
) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(
    folder: Path, *arguments: str, script: str = "train.py", **options: Any
) -> tuple[int, str]:
    """(exit code, what stood on standard error) of a whole run."""
    process = start(folder, *arguments, script=script, **options)
    _, errors = process.communicate(timeout=600)
    return process.returncode, errors


def digests(run: Path) -> dict[str, str]:
    """What must be equal to the bit, by name: each part of the state, the best weights, the metrics and the result."""
    from vit.checkpoints.file import digest, read_checkpoint

    last, header = read_checkpoint(run / "checkpoints" / "last.safetensors")
    best, _ = read_checkpoint(run / "checkpoints" / "best.safetensors")
    found = {
        part: digest({name: tensor for name, tensor in last.items() if name.startswith(part)}, "")
        for part in ("model/", "average/", "optimizer/")
    }
    result = json.loads((run / "result.json").read_text())
    progress = {key: value for key, value in header["progress"].items() if key != "seconds"}
    return {
        **found,
        "best": digest(best, ""),
        "progress": json.dumps(progress, sort_keys=True),
        "metrics.jsonl": hashlib.sha256((run / "metrics.jsonl").read_bytes()).hexdigest(),
        "result": json.dumps(
            [result[key] for key in ("status", "val_top1", "test_top1", "test_loss", "best_step")]
        ),
    }


def differences(ours: dict[str, str], theirs: dict[str, str]) -> str:
    return ", ".join(name for name in theirs if ours.get(name) != theirs[name])


# --- kills -----------------------------------------------------------------------------------------------------------


def kills(work: Path, quick: bool) -> Iterator[Row]:
    """Real processes, killed at random moments from their first second to their last, gone on with by the same command."""
    make_images(work / "pictures", {"train": PICTURES, "test": 8})
    command = [*RUN, "data.root=pictures", "resume=auto"]
    began = time.monotonic()
    code, errors = finish(work, *command, "hydra.run.dir=whole")
    assert code == 0, errors
    length, expected = time.monotonic() - began, digests(work / "whole")
    dice = random.Random(0)
    for kind, wanted in (("SIGKILL", 2 if quick else KILLS), ("SIGTERM", 1 if quick else KILLS)):
        row, number = Row(f"{kind} at a random moment, resumed to the same bits"), 0
        while row.tried < wanted:
            number += 1
            name, sent = f"{kind}_{number}", 0
            workers = dice.choice((0, 1, 2))
            while True:
                process = start(
                    work, *command, f"hydra.run.dir={name}", f"runtime.workers={workers}"
                )
                strike = sent < 4 and row.tried + sent < wanted
                try:
                    _, errors = process.communicate(
                        timeout=dice.uniform(0.2, length) if strike else 600
                    )
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(getattr(signal, kind))
                    sent += 1
                    try:
                        _, errors = process.communicate(timeout=30)
                    except subprocess.TimeoutExpired:  # it must not take longer
                        process.kill()
                        process.communicate()
                        row.count(False, f"{name}: still alive 30 s after {kind}")
                    # 75: saved; -15: Python was not far enough for a handler; 0: it was done anyway
                    if kind == "SIGTERM" and process.returncode not in (75, -15, 0):
                        row.count(False, f"{name}: exit code {process.returncode}: {errors[-300:]}")
                    workers = dice.choice((0, 1, 2))
            told = f"exit code {process.returncode}: {errors[-300:]}"
            if process.returncode == 0:
                told = differences(digests(work / name), expected)
            for _ in range(sent):
                row.count(not told, f"{name}: {told}")
            shutil.rmtree(work / name)
        yield row

    row = Row("any number of loader workers, one result")
    for workers in () if quick else (0, 2, 4):
        code, errors = finish(
            work, *command, f"hydra.run.dir=workers_{workers}", f"runtime.workers={workers}"
        )
        row.count(
            code == 0 and not differences(digests(work / f"workers_{workers}"), expected),
            f"{workers}: {errors[-300:]}",
        )
    if not quick:
        yield row
    yield negative_controls(work, quick)


def negative_controls(work: Path, quick: bool) -> Row:
    """The comparison above would notice: with any one part of the saved state missing, resuming fails or ends elsewhere."""
    from vit.checkpoints.file import read_checkpoint, write_checkpoint
    from vit.checkpoints.run import LAST, PREVIOUS

    row = Row("negative controls: a state that lacks a part is refused or ends in other bits")
    short = [*RUN, "data.root=pictures", "train.epochs=6"]
    code, errors = finish(work, *short, "hydra.run.dir=controls")
    assert code == 0, errors
    expected = digests(work / "controls")
    process = start(work, *short, "hydra.run.dir=stopped")
    deadline = time.monotonic() + 120
    while not (work / "stopped" / "checkpoints" / PREVIOUS).exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    tensors, header = read_checkpoint(work / "stopped" / "checkpoints" / LAST)

    def without(part: str) -> tuple[dict, dict]:
        kept = {name: tensor.clone() for name, tensor in tensors.items() if part not in name}
        rest = {key: value for key, value in header.items() if key != part}
        if "progress" in rest:
            rest["progress"] = {
                key: value for key, value in header["progress"].items() if key != part
            }
        return kept, rest

    parts = [
        "model/head.weight",
        "/exp_avg",
        "optimizer/",
        "step",
        "/step",
        "average/",
        "model/",
        *header["progress"],
        "config",
        "classes",
        "precision",
        "progress",
    ]
    for part in parts[3:5] if quick else dict.fromkeys(parts):
        folder = work / "control"
        shutil.copytree(work / "stopped", folder)
        kept, changed = without(part)
        (folder / "checkpoints" / PREVIOUS).unlink(missing_ok=True)
        write_checkpoint(folder / "checkpoints" / LAST, kept, changed)
        code, errors = finish(work, "resume=control")
        noticed = code != 0 or bool(differences(digests(folder), expected))
        row.count(
            noticed and "Traceback" not in errors, f"{part}: exit code {code} {errors[-300:]}"
        )
        shutil.rmtree(folder)
    return row


# --- damaged files ---------------------------------------------------------------------------------------------------


def damage(work: Path, quick: bool) -> Iterator[Row]:
    """A real last checkpoint, cut at many lengths and with single bits flipped, beside the whole one before."""
    import torch

    from vit.checkpoints.file import read_checkpoint
    from vit.checkpoints.run import LAST, PREVIOUS, read_last
    from vit.errors import CheckpointError

    make_images(work / "pictures", {"train": 20, "test": 8})
    code, errors = finish(
        work,
        *RUN,
        "data.root=pictures",
        "train.steps=14",
        "train.batch_size=8",
        "hydra.run.dir=run",
    )
    assert code == 0, errors
    folder = work / "run" / "checkpoints"
    whole, read = (folder / LAST).read_bytes(), read_checkpoint(folder / LAST)
    original = (
        {name: tensor.clone() for name, tensor in read[0].items()},
        read[1],
    )  # those read lie in the file itself
    before = read_checkpoint(folder / PREVIOUS)[1]["progress"]["step"]
    dice = random.Random(1)
    header_end = 8 + int.from_bytes(whole[:8], "little")

    def same() -> bool:
        tensors, header = read_checkpoint(folder / LAST)
        return (
            header == original[1]
            and tensors.keys() == original[0].keys()
            and all(torch.equal(tensor, original[0][name]) for name, tensor in tensors.items())
        )

    def survives() -> bool:
        """Either nothing that is read has changed, or the damage is seen and the checkpoint before it is taken."""
        try:
            return same()
        except CheckpointError:
            _, header, warning = read_last(folder)
            return header["progress"]["step"] == before and LAST in str(warning)

    row = Row("last checkpoint cut short: seen, the one before is taken")
    lengths = {0, 1, 7, 8, 9, header_end - 1, header_end, header_end + 1, len(whole) - 1}
    while len(lengths) < (16 if quick else 96):
        lengths.add(dice.randrange(len(whole)))
    for length in sorted(lengths):
        (folder / LAST).write_bytes(whole[:length])
        row.count(survives(), f"cut to {length} of {len(whole)} bytes")
    yield row

    row = Row("a bit flipped in it: seen, or without effect")
    count = 60 if quick else 1200
    positions = [dice.randrange(header_end) for _ in range(count // 3)] + [
        dice.randrange(len(whole)) for _ in range(count - count // 3)
    ]
    for position in positions:
        changed = bytearray(whole)
        changed[position] ^= 1 << dice.randrange(8)
        (folder / LAST).write_bytes(changed)
        row.count(survives(), f"byte {position} of {len(whole)}")
    yield row

    row = Row("both damaged: exit 2, never a silent restart")
    (folder / LAST).write_bytes(whole[:1000])
    (folder / PREVIOUS).write_bytes(whole[:2000])
    code, errors = finish(work, "resume=run")
    row.count(
        code == 2 and "nothing to resume from" in errors and "Traceback" not in errors,
        errors[-300:],
    )
    yield row


# --- mistakes --------------------------------------------------------------------------------------------------------


def forked(work: Path, script: str, arguments: list[str]) -> tuple[int, str, float]:
    """(exit code, standard error, seconds) of a script run in a fork of this process, which has imported everything."""
    errors = work / "stderr.txt"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        with open(errors, "w") as file, open(os.devnull, "w") as nothing:
            os.dup2(file.fileno(), 2)
            os.dup2(nothing.fileno(), 1)
        sys.stdout, sys.stderr = (
            os.fdopen(1, "w", closefd=False),
            os.fdopen(2, "w", closefd=False),
        )  # pytest has its own
        signal.alarm(120)
        os.chdir(work)
        sys.argv = [str(ROOT / script), *arguments]
        code = 1
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), errors.read_text(), time.monotonic() - began


def configurations() -> Iterator[tuple[str, list[str], str]]:
    """(script, arguments, what the message must name), from rules over the schema."""
    from vit.config.command_line import known_keys
    from vit.config.config import CHECKS, Config

    candidates = [-1, 0, 2, -0.5, 1.5, 31, math.nan, math.inf, [], [0.5], [0.0, 2.0], [1, 2, 3, -4]]
    for key, (allowed, _) in CHECKS.items():
        for value in candidates:
            numbers = value if isinstance(value, list) else [value]
            try:
                fits = all(math.isfinite(number) for number in numbers) and allowed(value)
            except TypeError:  # a list for a number: refused by its type
                fits = False
            if not fits:
                yield "train.py", ["experiment=digits", f"{key}={str(value).replace(' ', '')}"], key
    for key in known_keys(Config):
        if "." in key:
            yield "train.py", [f"{key}x=1"], f"{key}x"
            yield (
                "train.py",
                [f"{key[:-2]}=1"] if len(key.split(".")[1]) > 2 else [f"{key}yy=1"],
                key.split(".")[0],
            )
    for group in (
        "model",
        "data",
        "augment",
        "optimizer",
        "schedule",
        "train",
        "runtime",
        "experiment",
    ):
        for name in ("nothing", "vit_b17", "digit", "_"):
            yield "train.py", [f"{group}={name}"], f"{group}={name}"
    for key in (
        "model.name",
        "optimizer.name",
        "train.precision",
        "runtime.device",
        "model.global_pool",
        "augment.policy",
        "train.loss",
        "data.interpolation",
        "model.init",
        "model.position",
    ):
        if key != "model.name":
            yield "train.py", ["experiment=digits", f"{key}=wrong"], key
    for key, value, named in (
        ("model.num_heads", 5, "num_heads"),
        ("model.num_heads", -2, "num_heads"),
        ("model.patch_size", 5, "patch_size"),
        ("model.patch_size", 0, "patch_size"),
        ("model.patch_size", "[4,3]", "patch_size"),
        ("model.image_size", 30, "image_size"),
        ("model.image_size", "[32]", "image_size"),
        ("model.hidden_size", 0, "hidden_size"),
        ("model.num_layers", 0, "num_layers"),
        ("model.grid_size", 8, "patch_size"),
        ("model.cls_token", "false", "cls_token"),
        ("model.init", "local", "init=local"),
        ("model.pruned_heads", "{0:[99]}", "head"),
        ("model.pruned_heads", "3", "pruned_heads"),
        ("model.resnet_stages", "[3,4]", "patch_size"),
    ):
        yield "train.py", [f"{key}={value}"], named
    for arguments, named in (
        (["optimizer.lr=("], "optimizer.lr"),
        (["optimizer.lr"], "optimizer.lr"),
        (["=3"], "=3"),
        (["experiment=digits", "train.batch_size=100000"], "train.batch_size"),
        (["data=folder"], "data.root"),
        (["data=imagenet"], "imagenet"),
        (["resume=nowhere"], "nowhere"),
        (["resume=/dev/null"], "/dev/null"),
        (["pretrained=nowhere.npz"], "nowhere.npz"),
        (["hydra.run.dir=/proc/x"], "/proc/x"),
        (["experiment=digits", "schedule.warmup=5epochs"], "warmup"),
        (["experiment=digits", "train.steps=5", "schedule.warmup=5"], "warmup"),
    ):
        yield "train.py", arguments, named
    for arguments, named in (
        ([], "checkpoint="),
        (["checkpoint=nowhere"], "nowhere"),
        (["split=tset"], "split"),
        (["checkpoint=/dev/null"], "/dev/null"),
        (["pretrained=nowhere", "data=digits"], "nowhere"),
        (["checkpont=x"], "checkpont"),
    ):
        yield "evaluate.py", arguments, named


def data_sets(work: Path) -> Iterator[tuple[str, list[str], str]]:
    """Folders and pictures that are not what they should be."""

    def spoilt(name: str, spoil: Callable[[Path], object]) -> list[str]:
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

    jpeg = (
        make_images(work / "source", {"train": 1}, size=(80, 80)) / "train" / "cat" / "0.jpg"
    ).read_bytes()
    layouts: dict[str, tuple[Callable[[Path], object], str]] = {
        "no_train": (lambda root: shutil.rmtree(root / "train"), "no_train/train"),
        "train_is_a_file": (
            lambda root: (shutil.rmtree(root / "train"), (root / "train").write_text("x")),
            "train_is_a_file/train",
        ),
        "empty_class": (
            lambda root: [file.unlink() for file in (root / "train" / "dog").iterdir()],
            "train/dog",
        ),
        "one_class": (lambda root: shutil.rmtree(root / "train" / "dog"), "one_class/train"),
        "other_classes": (
            lambda root: (root / "val" / "dog").rename(root / "val" / "wolf"),
            "wolf",
        ),
        "fewer_test_classes": (
            lambda root: shutil.rmtree(root / "test" / "dog"),
            "fewer_test_classes/test",
        ),
        "no_classes": (
            lambda root: [shutil.rmtree(folder) for folder in (root / "train").iterdir()],
            "no_classes/train",
        ),
        "other_files": (
            lambda root: [
                file.rename(file.with_suffix(".txt")) for file in (root / "train" / "dog").iterdir()
            ],
            "train/dog",
        ),
    }
    for name, (spoil, named) in layouts.items():
        yield "train.py", spoilt(name, spoil), named
    contents = {
        "zero": b"",
        "text": b"no picture",
        "magic": jpeg[:4],
        "html": b"<html></html>",
        "gif": b"GIF89a",
        "nul": bytes(500),
        **{f"cut{share}": jpeg[: len(jpeg) * share // 100] for share in range(3, 98, 5)},
        "bomb": bomb(),
        "random": random.Random(0).randbytes(3000),
    }
    for name, content in contents.items():

        def spoil(root: Path, content: bytes = content) -> None:
            for file in (root / "train" / "cat").iterdir():
                file.write_bytes(content)

        yield "train.py", spoilt(f"picture_{name}", spoil), "train/cat/"


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in a few bytes."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(100000)))
        + chunk(b"IEND", b"")
    )


def checkpoints(work: Path) -> Iterator[tuple[str, list[str], str]]:
    """Files offered as checkpoints and weights that are none, or others."""
    from safetensors.torch import save_file
    from torch import ones

    from vit.checkpoints.file import read_checkpoint, write_checkpoint
    from vit.checkpoints.run import BEST, LAST

    make_images(work / "pictures", {"train": 12, "test": 8})
    code, errors = finish(
        work,
        *RUN,
        "data.root=pictures",
        "train.steps=2",
        "train.batch_size=8",
        "hydra.run.dir=good",
    )
    assert code == 0, errors
    best = work / "good" / "checkpoints" / BEST
    tensors, header = read_checkpoint(best)
    offered: dict[str, Callable[[Path], object]] = {
        "missing": lambda path: None,
        "folder": lambda path: path.mkdir(),
        "empty": lambda path: path.write_bytes(b""),
        "last": lambda path: shutil.copy(best.with_name(LAST), path),
        "plain": lambda path: save_file({"x": ones(2)}, path),
        "fewer": lambda path: write_checkpoint(path, dict(list(tensors.items())[1:]), header),
        "more": lambda path: write_checkpoint(path, {**tensors, "extra": ones(1)}, header),
        "wider": lambda path: write_checkpoint(
            path, {**tensors, "head.weight": ones(2, 64)}, header
        ),
        "no_classes": lambda path: write_checkpoint(path, tensors, {**header, "classes": []}),
        **{
            f"without_{name}": (
                lambda path, name=name: write_checkpoint(
                    path, tensors, {key: value for key, value in header.items() if key != name}
                )
            )
            for name in ("kind", "config", "classes", "preprocessing")
        },
        **{
            f"cut_{share}": (
                lambda path, share=share: path.write_bytes(
                    best.read_bytes()[: best.stat().st_size * share // 100]
                )
            )
            for share in range(2, 100, 7)
        },
    }
    for name, write in offered.items():
        path = work / f"{name}.safetensors"
        write(path)
        yield "evaluate.py", [f"checkpoint={path}"], path.name
        if name not in ("last", "folder", "no_classes"):
            yield (
                "train.py",
                [
                    *RUN,
                    "data.root=pictures",
                    f"pretrained={path}",
                    "train.steps=1",
                    "train.batch_size=8",
                    f"hydra.run.dir={name}_run",
                ],
                path.name,
            )


def mistakes(work: Path, quick: bool) -> Iterator[Row]:
    """Each in a process of its own: exit code 2, one line that names the key or the path, no traceback."""
    import torch

    for name in (
        "train",
        "evaluate",
        "vit.attention",
        "vit.data",
        "vit.training",
        "vit.weights",
    ):  # for the forks
        importlib.import_module(name)
    torch.set_num_threads(1)  # threads begun here would be missing in a fork
    dice = random.Random(2)
    longest = 0.0
    for title, cases in (
        ("mistaken configurations", list(configurations())),
        ("data sets and pictures", list(data_sets(work))),
        ("checkpoints and weights", list(checkpoints(work))),
    ):
        row = Row(f"{title}: exit 2, named in one line, no traceback")
        for script, arguments, named in dice.sample(cases, 8) if quick else cases:
            code, errors, seconds = forked(work, script, arguments)
            longest = max(longest, seconds) if title.startswith("mistaken") else longest
            lines = [line for line in errors.splitlines() if line.strip() and "Warning" not in line]
            good = code == 2 and "Traceback" not in errors and len(lines) == 1 and named in errors
            row.count(
                good,
                f"{script} {' '.join(arguments[-3:])}: exit code {code}, {errors[-400:]!r} should name {named}",
            )
        yield row

    row = Row("a mistaken configuration is told within 3 s, Python's start and imports included")
    for arguments in (
        ["optimizer.lrr=1"],
        ["model=vit_b17"],
        ["optimizer.lr=-1"],
        ["train.epochs=0"],
    )[: 1 if quick else 4]:
        began = time.monotonic()
        code, errors = finish(work, *arguments)
        seconds = time.monotonic() - began
        row.count(code == 2 and seconds < 3, f"{arguments}: {seconds:.1f} s, exit code {code}")
    yield row

    row = Row("a planted bug shows its traceback, exit 1")
    (work / "sitecustomize.py").write_text(
        "import vit.evaluation.accuracy as accuracy\ndef broken(*arguments): raise KeyError('planted')\naccuracy.evaluate = broken\n"
    )
    code, errors = finish(
        work,
        "experiment=digits",
        "train.steps=1",
        "hydra.run.dir=bug",
        env={**os.environ, "PYTHONPATH": f"{work}:{ROOT}"},
    )
    row.count(
        code == 1 and "Traceback" in errors and "KeyError: 'planted'" in errors, errors[-300:]
    )
    yield row


# --- hostile files ---------------------------------------------------------------------------------------------------


class Hostile:
    """Unpickling it would write the canary."""

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


def hostile(work: Path, quick: bool) -> Iterator[Row]:
    """Files that would run code if they were unpickled or unpacked carelessly, offered wherever a file can be."""
    import torch

    from vit.checkpoints.model import load
    from vit.errors import UserError
    from vit.weights.loading import read

    row, canary = Row("hostile files: refused, nothing of theirs runs"), work / "canary"
    (work / "files").mkdir()
    files: list[Path] = []
    for way in range(5):
        bad = Hostile(canary, way)
        for protocol in (0, 2, 5):
            path = work / "files" / f"pickle_{way}_{protocol}.pt"
            path.write_bytes(pickle.dumps({"model": bad}, protocol=protocol))
            files.append(path)
        for name, content in (("zip", {"state_dict": bad}), ("list", [bad])):
            path = work / "files" / f"torch_{name}_{way}.pth"
            torch.save(content, path)
            files.append(path)
        path = work / "files" / f"legacy_{way}.bin"
        torch.save({"x": bad}, path, _use_new_zipfile_serialization=False)
        files.append(path)
        path = work / "files" / f"objects_{way}.npz"
        np.savez(path, x=np.array([bad], dtype=object), allow_pickle=True)
        files.append(path)
    escape = work / "files" / "escape_tar.tar"
    with tarfile.open(escape, "w") as archive:
        info = tarfile.TarInfo(f"../../{canary.name}")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"ran"))
    with zipfile.ZipFile(work / "files" / "escape.pth", "w") as archive:
        archive.writestr(f"../../{canary.name}", "ran")
    files += [escape, work / "files" / "escape.pth"]
    for path in files[::4] if quick else files:
        for offered in (path, Path(shutil.copy(path, path.with_suffix(".safetensors")))):
            for opening in (read, load):
                told = ""
                try:
                    opening(offered)
                except UserError as error:
                    told = str(error)
                except Exception as error:
                    told = f"BUG {type(error).__name__}: {error}"
                row.count(
                    not canary.exists() and offered.name in told and not told.startswith("BUG"),
                    f"{opening.__module__}.{opening.__name__}({offered.name}): {told[:200]}",
                )
                canary.unlink(missing_ok=True)
    yield row


# --- the machine -----------------------------------------------------------------------------------------------------


def machine(work: Path, quick: bool) -> Iterator[Row]:
    from vit.checkpoints.run import read_last

    make_images(work / "pictures", {"train": 30, "test": 8})
    command = [*RUN, "data.root=pictures", "train.epochs=40", "resume=auto"]

    row = Row("no room for a checkpoint: exit 3, told, the one before stays whole, resumable")
    short = [*RUN, "data.root=pictures", "train.epochs=4", "resume=auto", "hydra.run.dir=full"]
    limit = 320_000  # bytes a file: the first checkpoint fits, the next, with the optimizer's moments, does not
    code, errors = finish(
        work, *short, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    told = code == 3 and "Traceback" not in errors and "the disk can't be written to" in errors
    row.count(told, f"exit code {code}: {errors[-400:]}")
    kept = read_last(work / "full" / "checkpoints")
    row.count(
        kept[1]["progress"]["step"] == 0 and kept[2] is None,
        f"kept: {kept[1]['progress']}, {kept[2]}",
    )
    row.count(not list((work / "full" / "checkpoints").glob(".*")), "a temporary file was left")
    code, errors = finish(work, *short)
    row.count(code == 0, f"resumed: exit code {code}: {errors[-400:]}")
    yield row

    row = Row("a loader worker killed: told within 60 s, exit 3, resumable")
    for attempt in range(1 if quick else 5):
        process = start(
            work,
            *command,
            f"hydra.run.dir=worker_{attempt}",
            "runtime.workers=2",
            "train.epochs=400",
            "train.eval_every=1000",
            "train.attention_every=null",
        )
        victim, deadline, metrics = (
            None,
            time.monotonic() + 120,
            work / f"worker_{attempt}" / "metrics.jsonl",
        )
        while time.monotonic() < deadline and victim is None and process.poll() is None:
            time.sleep(0.2)
            if metrics.exists() and "train" in metrics.read_text():
                victim = next(iter(children(process.pid)), None)
        began = time.monotonic()
        if victim is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        try:
            _, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            _, errors = process.communicate()
        seconds = time.monotonic() - began
        good = (
            process.returncode == 3
            and "decodes pictures died" in errors
            and "Traceback" not in errors
            and seconds < 60
        )
        row.count(good, f"exit code {process.returncode} after {seconds:.0f} s: {errors[-400:]}")
    process = start(work, "resume=worker_0")
    time.sleep(12)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    row.count(process.returncode == 75, f"resumed: exit code {process.returncode} {errors[-300:]}")
    yield row

    row = Row("two runs, one folder: the second exits 2 and names the first")
    process = start(work, *command, "train.epochs=4000", "hydra.run.dir=shared")
    deadline = time.monotonic() + 120
    while not (work / "shared" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    code, errors = finish(work, *command, "train.epochs=4000", "hydra.run.dir=shared")
    row.count(code == 2 and f"process {process.pid}" in errors, errors[-300:])
    process.send_signal(signal.SIGINT)
    process.communicate()
    row.count(process.returncode == 75, f"SIGINT: exit code {process.returncode}")
    process = start(work, "resume=shared", stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not children(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()  # not for its workers: they must not hold its lock
    code, errors = finish(work, "resume=shared", "train.steps=1")
    row.count(
        code == 2 and "in use" not in errors, f"after a kill: exit code {code} {errors[-300:]}"
    )
    yield row

    row = Row("folders with spaces, unicode and Hydra's special characters")
    for name in ("bücher ü, it's (x)[1]{y} = 50% #1 ~ $HOME", "my pictures", "a=b,c", "it's")[
        : 1 if quick else 4
    ]:
        shutil.copytree(work / "pictures", work / name / "pictures")
        code, errors = finish(
            work,
            *RUN,
            f"data.root={name}/pictures",
            f"hydra.run.dir={name}/run",
            "train.steps=2",
            "train.batch_size=8",
        )
        row.count(
            code == 0 and (work / name / "run" / "result.json").exists(),
            f"{name}: exit code {code} {errors[-300:]}",
        )
    yield row


def sweeps(work: Path, quick: bool) -> Iterator[Row]:
    """Jobs that fail in every way they can: told apart, and the same command again runs them alone."""
    row = Row(
        "a sweep with planted failures: every job accounted for, then only the failed ones run again"
    )
    digits = [
        "experiment=digits",
        "model.num_layers=1",
        "model.hidden_size=32",
        "model.num_heads=2",
        "train.steps=3",
    ]
    every = ["SIGKILL", "none", "SIGSEGV", "SIGTERM", "exit code 7", "mistake"]
    kinds = every[:2] if quick else every * 3 + ["none"] * 2
    for seed, kind in enumerate(kinds):
        folder = work / "plants"
        folder.mkdir(exist_ok=True)
        (folder / f"{seed}").write_text(kind)
    (work / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "seed = next((word[5:] for word in sys.argv if word.startswith('seed=')), '')\n"
        "if os.environ.get('FAULTS') and seed.isdigit() and any('hydra.run.dir=' in word for word in sys.argv):\n"
        "    kind = open(os.path.join(os.environ['FAULTS'], seed)).read()\n"
        "    if kind.startswith('SIG'):\n"
        "        os.kill(os.getpid(), getattr(signal, kind))\n"
        "    elif kind.startswith('exit'):\n"
        "        os._exit(7)\n"
        "    elif kind == 'mistake':\n"
        "        sys.argv.append('train.batch_size=100000')\n"
    )
    seeds = ",".join(map(str, range(len(kinds))))
    command = ["-m", *digits, f"seed={seeds}", "hydra.sweep.dir=sweep"]
    env = {**os.environ, "PYTHONPATH": str(work), "OMP_NUM_THREADS": "1"}
    for faults in (True, False):
        before = (
            {
                path.parent.name: path.stat().st_mtime_ns
                for path in (work / "sweep").glob("*/result.json")
                if json.loads(path.read_text())["status"] == "finished"
            }
            if not faults
            else {}
        )
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *command],
            cwd=work,
            capture_output=True,
            text=True,
            env=env | ({"FAULTS": str(work / "plants")} if faults else {}),
            timeout=900,
        )
        row.count(done.returncode == 0, f"exit code {done.returncode} {done.stderr[-400:]}")
        with open(work / "sweep" / "summary.csv") as file:
            jobs = {job["job"]: job for job in csv.DictReader(file)}
        for seed, kind in enumerate(kinds):
            job = jobs.get(str(seed), {"status": "missing", "reason": ""})
            wanted = (
                {"none": "finished", "mistake": "failed"}.get(kind, "crashed")
                if faults
                else "finished"
            )
            named = {"none": "", "mistake": "train.batch_size"}.get(kind, kind) if faults else ""
            row.count(
                job["status"] == wanted and named in job["reason"], f"job {seed} ({kind}): {job}"
            )
        for name, time_written in before.items():
            untouched = (work / "sweep" / name / "result.json").stat().st_mtime_ns == time_written
            row.count(untouched, f"job {name} was finished and ran again")
    yield row


def processes(work: Path, quick: bool) -> Iterator[Row]:
    """Two processes of one run: one that is stopped without dying must not be waited for."""
    row = Row("one of two processes killed or stopped: all end within 60 s, told, resumable")
    run = [
        "experiment=digits",
        "model.num_layers=1",
        "train.steps=4000",
        "train.save_every=5",
        "train.log_every=1",
        "train.eval_every=1000",
        "runtime.processes=2",
    ]
    for number, kind in enumerate(("SIGSTOP",) if quick else ("SIGSTOP", "SIGKILL", "SIGSTOP")):
        for victim in (1,) if quick else (0, 1):
            folder = f"{kind}_{number}_{victim}"
            process = start(work, *run, f"hydra.run.dir={folder}")
            deadline = time.monotonic() + 120
            while (
                not (work / folder / "checkpoints" / "previous.safetensors").exists()
                and time.monotonic() < deadline
            ):
                time.sleep(0.05)
            ranks = [
                pid
                for pid in children(process.pid)
                if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()
            ]
            began = time.monotonic()
            os.kill(ranks[victim], getattr(signal, kind))
            _, errors = process.communicate(timeout=150)
            seconds = time.monotonic() - began
            row.count(
                process.returncode != 0 and seconds < 60 and f"rank {victim}" in errors,
                f"{folder}: exit code {process.returncode} after {seconds:.0f} s: {errors[-500:]}",
            )
            code, errors = finish(
                work,
                f"resume={folder}",
                "runtime.processes=1",
                "train.steps=1",
                "resume_changed=allow",
            )
            row.count(
                code == 2 and "steps are done already" in errors,
                f"{folder} resumed: {code} {errors[-300:]}",
            )
    yield row


def children(parent: int) -> list[int]:
    """The processes begun by a process that decode pictures (not helpers such as its resource tracker)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rsplit(")", 1)[1].split()
            command = (path.parent / "cmdline").read_text()
            if int(fields[1]) == parent and "resource_tracker" not in command:
                found.append(int(path.parent.name))
    return sorted(found)


FAULTS: dict[str, Callable[[Path, bool], Iterator[Row]]] = {
    "kills": kills,
    "damage": damage,
    "mistakes": mistakes,
    "hostile": hostile,
    "machine": machine,
    "sweeps": sweeps,
    "processes": processes,
}


def machine_name() -> str:
    import torch

    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        return f"{len(names)} cores of {names[0]}, torch {torch.__version__}"
    return f"torch {torch.__version__}"


def run_fault(name: str, quick: bool) -> list[Row]:
    """All rows of one kind of fault, in a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="faults ") as work:
        rows = []
        for row in FAULTS[name](Path(work), quick):
            print(f"{row.survived:5} of {row.tried:5}  {row.fault}", flush=True)
            for failure in row.failures[:20]:
                print(f"        {failure}", flush=True)
            rows.append(row)
        return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=list(FAULTS), action="append")
    parser.add_argument("--out", type=Path, help="write the table here, as Markdown")
    parser.add_argument("--kills", type=int, default=KILLS, help="of each kind of signal")
    arguments = parser.parse_args()
    globals()["KILLS"] = arguments.kills
    began, rows = time.monotonic(), []
    for name in arguments.only or FAULTS:
        rows += run_fault(name, arguments.quick)
        lines = [f"| {row.fault} | {row.tried} | {row.survived} |" for row in rows]
        minutes = (time.monotonic() - began) / 60
        text = "\n".join(
            [
                "| fault | tried | survived |",
                "|---|---|---|",
                *lines,
                "",
                f"{minutes:.0f} minutes, {time.strftime('%Y-%m-%d')}, {machine_name()}",
            ]
        )
        if arguments.out:  # after each kind, so that none is lost
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(text + "\n")
    print("\n" + text)
    return 1 if any(row.failures for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
