"""What the faults have in common: a run that uses everything, a row of the table, comparisons."""

import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from helpers import read_result, run

from vit.checkpoints.file import digest, read_checkpoint
from vit.checkpoints.run import BEST, LAST
from vit.runtime.precision import cpu_multiplies_bf16

# Workers, augmentation, mixing, erasing, half precision, averaging, stochastic depth and dropout,
# all at once; a step takes milliseconds. Without hardware for it, bf16 would take seconds.
RUN = [
    "data=folder",
    "data.root=images",
    "model=vit_nano4",
    "model.num_channels=3",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.drop_path=0.2",
    "model.dropout=0.1",
    "augment=deit",
    f"train.precision={'bf16' if cpu_multiplies_bf16() else 'fp32'}",
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


@dataclass(frozen=True)
class Effort:
    """How much is tried. quick: little, as a part of `make test`; kills: of each kind of signal."""

    quick: bool
    kills: int


@dataclass
class Row:
    """One line of the table: a fault, how often it was tried, and how often all went well."""

    fault: str
    tried: int = 0
    survived: int = 0
    failures: list[str] = field(default_factory=list)

    def count(self, good: bool, description: str) -> None:
        self.tried += 1
        self.survived += good
        if not good:
            self.failures.append(description)


def finish(folder: Path, *arguments: str, program: str = "train.py", **options) -> tuple[int, str]:
    """The exit code of a whole command and what it wrote to standard error."""
    done = run(program, *arguments, cwd=folder, timeout=600, **options)
    return done.returncode, done.stderr


def must_finish(folder: Path, *arguments: str) -> None:
    """A run that the trials build upon; a suite in which it fails is of no use."""
    code, errors = finish(folder, *arguments)
    assert code == 0, errors


def digests(run_folder: Path) -> dict[str, str]:
    """What must be equal to the bit, by name: the state's parts, the best weights, the results."""
    last, header = read_checkpoint(run_folder / "checkpoints" / LAST)
    best, _ = read_checkpoint(run_folder / "checkpoints" / BEST)
    values = {"best": digest(best, "")}
    for part in ("model/", "average/", "optimizer/"):
        tensors = {name: tensor for name, tensor in last.items() if name.startswith(part)}
        values[part] = digest(tensors, "")
    progress = {key: value for key, value in header["progress"].items() if key != "seconds"}
    values["progress"] = json.dumps(progress, sort_keys=True)
    metrics = (run_folder / "metrics.jsonl").read_bytes()
    values["metrics.jsonl"] = hashlib.sha256(metrics).hexdigest()
    result = read_result(run_folder)
    keys = ("status", "val_top1", "test_top1", "test_loss", "best_step")
    values["result"] = json.dumps([result[key] for key in keys])
    return values


def differences(ours: dict[str, str], theirs: dict[str, str]) -> str:
    """The names of what differs, empty where nothing does."""
    return ", ".join(name for name in theirs if ours.get(name) != theirs[name])


def children(parent: int) -> list[int]:
    """The processes that a process has started, without its resource tracker."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            command = (stat.parent / "cmdline").read_text()
            if int(fields[1]) == parent and "resource_tracker" not in command:
                pids.append(int(stat.parent.name))
    return sorted(pids)
